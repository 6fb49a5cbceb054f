"""Many clients at once against ``cas serve``: is each answer the one that is given alone, and how much faster is it?

python -m experiments.benchmarks.serving_load --clients 16 --seconds 60 --output DIR

Questions about fictional documents are first answered one at a time in this process (``alone``), each with 1, 2, 4 or 8
retrieved cartridges. Then a server in a process of its own answers the same mixture over HTTP, for one client
(``one_client``) and for many (``many_clients``), half of them streamed. ``same``: whether the answer and its number of
tokens are those given alone. Figures: answers a second, ratios to ``alone``, seconds of an answer, and by how much the
server's memory grew after a fifth of the time.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from cas import console
from cas.errors import ConfigError
from cas.options import parse

if TYPE_CHECKING:
    from cas.evaluation.recording import Prediction

KS = (1, 2, 4, 8)
MAX_TOKENS = 32


@dataclass(frozen=True)
class Config:
    """Ask a server from many clients."""

    output: str | None = None
    """Folder of the run's two files; default none are written."""
    store: str | None = None
    """A store that the demo trained; default a new one with initial cartridges."""
    documents: int = 30
    """Documents of the new store."""
    questions: int = 64
    """Different questions."""
    clients: int = 16
    """Clients at a time."""
    seconds: float = 60.0
    """How long they ask."""


@dataclass(frozen=True)
class Asked:
    """One request: which question with how many cartridges, the seconds it took, and whether the answer was right."""

    number: int
    k: int
    seconds: float
    same: bool


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure. Returns the exit status: 1 where an answer differed."""
    return console.run(lambda: run(parse(Config, "python -m experiments.benchmarks.serving_load", arguments)))


def run(config: Config) -> int:
    """Answer alone, serve, compare, print."""
    with store_of(config) as folder:
        questions, truth, alone = answer_alone(folder, config.questions)
        print(f"alone: {1 / alone:.1f} answers a second", file=sys.stderr, flush=True)
        figures, asked = {"alone.answers_per_second": 1 / alone}, dict[str, list[Asked]]()
        with server(folder) as (process, port):
            for arm, clients in (("one_client", 1), ("many_clients", config.clients)):
                seconds, memory = config.seconds / (4 if clients == 1 else 1), list[int]()
                asked[arm] = load(port, questions, truth, clients, seconds, process.pid, memory)
                rate = len(asked[arm]) / seconds
                times = sorted(one.seconds for one in asked[arm])
                figures |= {
                    f"{arm}.answers_per_second": rate,
                    f"{arm}.ratio_to_alone": rate * alone,
                    f"{arm}.median_seconds": times[len(times) // 2],
                    f"{arm}.p95_seconds": times[int(0.95 * len(times))],
                    f"{arm}.memory_growth_mib": (memory[-1] - memory[0]) / 2**20,
                }
        for name, value in figures.items():
            print(f"{name:<36}{value:10.3f}")
        wrong = sum(not one.same for found in asked.values() for one in found)
        print(f"{sum(map(len, asked.values()))} answers, {wrong} of them differ from those given alone")
        if config.output is not None:
            record(config, figures, asked)
    return 1 if wrong else 0


@contextmanager
def store_of(config: Config) -> Iterator[str]:
    """A folder with a store of fictional documents."""
    from experiments.benchmarks.work import Work

    if config.store is not None:
        yield config.store
        return
    from cas.data.worlds import world
    from cas.store.store import Store
    from cas.training.initialization import initialize_cartridges

    model = Work.load("reader", 16).model
    with tempfile.TemporaryDirectory() as folder:
        with Store.create(Path(folder) / "store", model, ratio=16) as store:
            store.add_documents(world(0, config.documents), model.count_tokens)
            initialize_cartridges(model, store)
        yield str(Path(folder) / "store")


def answer_alone(folder: str, count: int) -> tuple[list[str], dict[tuple[int, int], tuple[str, int]], float]:
    """Questions, {(question, k): (answer, tokens)} of them, and the mean seconds of an answer, one at a time."""
    from cas.answering.answerer import Answerer
    from cas.data.worlds import world
    from cas.model.frozen import FrozenModel
    from cas.store.index import load_embedder
    from cas.store.store import Store

    with Store.open(folder) as store:
        titles = {row.title for row in store.rows().values()}
        documents = world(0, len(titles))
        if {document.title for document in documents.documents} != titles:
            raise ConfigError(f"{folder} is no store of the fictional documents that the demo trains on")
        questions = [question.question for question in documents.questions]
        questions = Random(0).sample(questions, min(count, len(questions)))
        answerer = Answerer(FrozenModel.from_store(store), store, load_embedder(), keep=len(titles))
        answerer.ask(questions[0], max_new_tokens=MAX_TOKENS)
        truth, started = dict[tuple[int, int], tuple[str, int]](), time.perf_counter()
        for number, question in enumerate(questions):
            for k in KS:
                answer = answerer.ask(question, k, max_new_tokens=MAX_TOKENS)
                truth[number, k] = answer.text, answer.tokens["answer"]
        return questions, truth, (time.perf_counter() - started) / len(truth)


@contextmanager
def server(folder: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A server over a store, and its port."""
    words = [sys.executable, "-m", "cas", "serve", "--store", folder, "--port", "0", "--queue", "1000"]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        lines = ""
        while (found := re.search(r" on http://127\.0\.0\.1:(\d+)$", lines.strip())) is None:
            line = process.stderr.readline()
            if not line:
                raise ConfigError(f"the server did not start: {lines.strip()}")
            lines += line
        yield process, int(found[1])
    finally:
        process.terminate()
        process.wait()


def load(
    port: int,
    questions: Sequence[str],
    truth: dict[tuple[int, int], tuple[str, int]],
    clients: int,
    seconds: float,
    pid: int,
    memory: list[int],
) -> list[Asked]:
    """What so many clients asked, each one question after the other; ``memory`` gets the resident bytes over time."""
    asked, started = list[Asked](), time.perf_counter()
    errors = list[BaseException]()

    def client(number: int) -> None:
        random, connection = Random(number), http.client.HTTPConnection("127.0.0.1", port, timeout=300)
        try:
            while time.perf_counter() < started + seconds and not errors:
                question, k = random.randrange(len(questions)), random.choice(KS)
                began = time.perf_counter()
                found = ask(connection, questions[question], k, stream=random.random() < 0.5)
                asked.append(Asked(question, k, time.perf_counter() - began, found == truth[question, k]))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        time.sleep(0.1)
        if time.perf_counter() > started + 0.2 * seconds:
            memory.append(resident(pid))
    if errors:
        raise errors[0]
    return asked


def ask(connection: http.client.HTTPConnection, question: str, k: int, stream: bool) -> tuple[str, int]:
    """Answer and number of tokens."""
    body: dict[str, Any] = {"messages": [{"role": "user", "content": question}], "retrieve_k": k}
    body |= {"max_tokens": MAX_TOKENS, "stream": stream, "stream_options": {"include_usage": True}}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    text = response.read().decode()
    if response.status != 200:
        raise RuntimeError(text)
    if not stream:
        found = json.loads(text)
        return found["choices"][0]["message"]["content"], found["usage"]["completion_tokens"]
    events = [json.loads(line.removeprefix("data: ")) for line in text.strip().split("\n\n")[:-1]]
    pieces = [choice["delta"].get("content", "") for event in events for choice in event["choices"]]
    return "".join(pieces), events[-1]["usage"]["completion_tokens"]


def resident(pid: int) -> int:
    """Bytes of memory that a process has."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def record(config: Config, figures: dict[str, float], asked: dict[str, list[Asked]]) -> None:
    """Write the run's two files: every answer's score, and the figures."""
    from cas.evaluation.recording import flags, write_run

    predictions: list[Prediction] = [
        {
            "arm": arm,
            "seed": 0,
            "question_id": f"{n:06d}",
            "document_id": f"{one.number:04d}-{one.k}",
            "scores": {"same": float(one.same), "seconds": one.seconds},
        }
        for arm, found in asked.items()
        for n, one in enumerate(found)
    ]
    write_run(
        str(config.output),
        name="serving_load",
        command="python -m experiments.benchmarks.serving_load " + flags(config),
        seeds=[0],
        model="reader",
        collection={"name": "million_tokens", "sha256": sha256(b"world 0").hexdigest()},
        settings={k: v for k, v in asdict(config).items() if k not in ("output", "store")},
        predictions=predictions,
        compare=[],
        metric_names=["same", "seconds"],
        extra_metrics={name: {"mean": v, "low": v, "high": v, "n": 1} for name, v in figures.items()},
        keep_answers=False,
    )


if __name__ == "__main__":
    sys.exit(main())
