"""Lists of questions without a model that can write: in place of ``generate``, and as an endpoint on 127.0.0.1."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from helpers_writer import Writer

from cas.model.decoding import Generation, Prompt

LISTS: dict[str, Any] = {
    "conversations": 60, "chunk_tokens": 120, "questions_per_call": 8, "calls_per_unit": 3, "top_k": 5, "question_tokens": 60,
    "writer": "list", "reconstruction": "off",
}  # fmt: skip


def a_list(chunk: str, number: int, start: int) -> str:
    """A numbered list about a chunk, with a heading, which is malformed."""
    sentences = [sentence.strip() for sentence in re.findall(r"[^.\n]+(?=\.)", chunk)]
    lines = [f"{i + 1}. Is it so that {sentences[(start + i) % len(sentences)]}, {start + i}?" for i in range(number)]
    return "Here is the list:\n" + "\n".join(lines)


class ListWriterDouble(Writer):
    """Writes lists, and answers as its base does."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.prompts: list[str] = []
        self.cut = False

    def __call__(
        self, model: Any, prompts: Sequence[Prompt], cartridges: Any, layout: Any, **options: Any
    ) -> list[Generation]:
        if options.get("keep_top"):
            return super().__call__(model, prompts, cartridges, layout, **options)
        self.calls += 1
        assert options["temperature"] == 0.7 and layout.policy == "offset"
        replies = []
        for row, prompt in enumerate(prompts):
            text = model.tokenizer.decode(list(prompt.tokens))
            self.prompts.append(text)
            number = int(re.search(r"Write (\d+)", text)[1])  # type: ignore[index]
            written = a_list(prompt.cartridges[0], number, (options["seed"] + row) % 89)
            replies.append(Generation(model.encode(written.partition("1.")[2]), finished=not self.cut))
        return replies


Answer = tuple[int, dict[str, str], bytes]


def completion(text: str | None, finish: str = "stop") -> Answer:
    """A good reply."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return 200, {}, json.dumps({"object": "chat.completion", "choices": [choice]}).encode()


def failure(status: int, message: str = "no", **headers: str) -> Answer:
    """An error, as such endpoints report it."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return status, named, json.dumps({"error": {"message": message}}).encode()


class Served:
    """What an endpoint got and how it answers. ``script``: answers to give first, then lists; ``key``: that it wants."""

    def __init__(self) -> None:
        self.url = ""
        self.models = ["writer-70b"]
        self.script: list[Answer] = []
        self.key: str | None = None
        self.seconds = 0.0
        self.requests: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.at_once = self.most_at_once = 0
        self.on_request: Callable[[], None] = lambda: None
        self._lock = threading.Lock()

    def get(self, path: str, key: str | None) -> Answer:
        if self.key is not None and key != f"Bearer {self.key}":
            return failure(401, f"Incorrect API key provided: {key}")
        if path != "/v1/models":
            return failure(404)
        return 200, {}, json.dumps({"data": [{"id": name} for name in self.models]}).encode()

    def post(self, path: str, key: str | None, body: dict[str, Any]) -> Answer:
        with self._lock:
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
            self.requests.append(body)
            self.times.append(time.monotonic())
            scripted = self.script.pop(0) if self.script else None
            number = len(self.requests)
        self.on_request()
        time.sleep(self.seconds)
        with self._lock:
            self.at_once -= 1
        if self.key is not None and key != f"Bearer {self.key}":
            return failure(401, f"Incorrect API key provided: {key}")
        if path != "/v1/chat/completions" or body["model"] not in self.models:
            return failure(404, "no such model")
        if scripted is not None:
            return scripted
        content = body["messages"][0]["content"]
        wanted = re.search(r"Write (\d+)", content)
        return completion(a_list(content.partition("\n\n---\n\n")[0], int(wanted[1]), number) if wanted else "OK")


@contextmanager
def serving() -> Iterator[Served]:
    """An endpoint on a free port of 127.0.0.1."""
    served = Served()

    class Handler(BaseHTTPRequestHandler):
        def answer(self, answer: Answer) -> None:
            status, headers, content = answer
            try:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
            except OSError:
                pass  # the client gave up

        def do_GET(self) -> None:
            self.answer(served.get(self.path, self.headers["Authorization"]))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.answer(served.post(self.path, self.headers["Authorization"], body))

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.block_on_close = False
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    served.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
