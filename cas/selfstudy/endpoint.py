"""Lists written by the model behind an OpenAI-compatible endpoint: ``POST {url}/chat/completions``.

The key comes from the environment and goes into one request header: never into a file, a message or the settings.
"""

from __future__ import annotations

import email.utils
import http.client
import json
import os
import queue
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from cas.errors import ConfigError, RunError
from cas.model.frozen import FrozenModel
from cas.options import SelfStudy
from cas.selfstudy.list_style import instruction
from cas.selfstudy.list_writers import ListWriter, ModelWriter, Reply
from cas.selfstudy.planners import Call
from cas.selfstudy.prompt_styles import PromptStyle, token_limits

KEYS = ("CAS_WRITER_KEY", "OPENAI_API_KEY")
TIMEOUT = 300.0  # seconds until the reply begins; a large model may take minutes
ATTEMPTS = 6
THREAD = "cas-writer"
LONGEST_WAIT = 300.0  # seconds that a Retry-After may ask for
MOST_BYTES = 16 << 20  # of a reply
_RETRIED = (408, 409, 425, 429)  # and all from 500


class _Failed(Exception):
    """A request that may succeed when repeated. ``wait``: seconds that the server asks for."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class _Refused(Exception):
    """A request that will not succeed when repeated."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect could take the key to another host."""

    def redirect_request(self, *_: Any) -> None:
        return None


@dataclass
class Endpoint:
    """One model of an endpoint. ``key``: None for an endpoint that needs none."""

    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    timeout: float = TIMEOUT
    first_wait: float = 1.0  # seconds before the second attempt; doubles from there

    def __post_init__(self) -> None:
        """Raises: ConfigError for a key that no request can carry."""
        self.url = self.url.rstrip("/").removesuffix("/chat/completions")
        if self.key is not None and not (self.key.isascii() and self.key.isprintable() and " " not in self.key):
            raise ConfigError(f"the key in ${KEYS[0]} or ${KEYS[1]} has characters that no key has; set it again")
        self._opener = urllib.request.build_opener(_NoRedirect())
        self._unknown = set[str]()  # optional fields that this endpoint refuses
        self._works = False

    def only_model(self) -> str:
        """The name of the only model that the endpoint serves. Raises: ConfigError when that is not clear."""
        try:
            listed = [str(entry["id"]) for entry in self._send("/models", None)["data"]]
        except _Failed as error:
            raise ConfigError(f"--writer-url {self.url}: {error}; is the server running?") from None
        except _Refused as error:
            if error.status in (401, 403):
                raise self._refusal(error) from None
            listed = []
        except (KeyError, TypeError):
            listed = []
        if len(listed) != 1:
            names = f"one of {', '.join(listed[:8])}" if listed else "the endpoint does not list its models"
            raise ConfigError(f"--writer-url {self.url}: give --writer-model ({names})")
        return listed[0]

    def check(self) -> None:
        """One short request. Raises: ConfigError for a refused one; RunError when the endpoint does not answer."""
        self.complete("Reply with OK.", 64, 0.7, threading.Event(), attempts=3)

    def complete(
        self, prompt: str, max_tokens: int, temperature: float, stopped: threading.Event, attempts: int = ATTEMPTS
    ) -> Reply:
        """The reply to a user's message, and whether the model ended it by itself; empty when the endpoint refuses this
        message alone.

        Repeats requests that may succeed later, until ``stopped``. Raises: ConfigError for a refused request; RunError
        when all attempts fail.
        """
        fields: dict[str, Any] = {"model": self.model, "messages": [{"role": "user", "content": prompt}]}
        fields |= {"max_tokens": max_tokens, "temperature": temperature}
        failure = "stopped"
        for attempt in range(attempts):
            body = {name: value for name, value in fields.items() if name not in self._unknown}
            try:
                reply = self._reply(self._send("/chat/completions", body))
                self._works = True
                return reply
            except _Refused as error:
                failure = str(error)
                unknown = {name for name in ("max_tokens", "temperature") if name in body and name in failure}
                self._unknown |= unknown
                if error.status not in (400, 422) or not (unknown or self._works):
                    raise self._refusal(error) from None
                if not unknown:  # other texts were welcome: a filter of the endpoint, or its window
                    return "", True
            except _Failed as error:
                failure = str(error)
                wait = self.first_wait * 2**attempt * random.uniform(0.8, 1.2) if error.wait is None else error.wait
                if attempt + 1 < attempts and stopped.wait(min(wait, LONGEST_WAIT)):
                    break
        raise RunError(
            f"--writer-url {self.url}: {attempts} attempts failed, the last one with: {failure}; "
            "run the same command again to go on from here"
        )

    def _reply(self, answer: Any) -> Reply:
        try:
            choice = answer["choices"][0]
            text = choice["message"]["content"] or ""
            if not isinstance(text, str):
                raise TypeError
            text = text.encode(errors="replace").decode()  # half a surrogate pair is no text to a tokenizer
            return text, choice.get("finish_reason") not in ("length", "content_filter")
        except (KeyError, IndexError, TypeError, AttributeError):
            raise _Failed("the reply is no chat completion") from None

    def _send(self, path: str, body: dict[str, Any] | None) -> Any:
        """The JSON that the endpoint answers with. Raises: _Failed, _Refused."""
        headers = {"Accept": "application/json", "Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with self._opener.open(request, timeout=self.timeout) as response:
                return json.loads(_whole(response, time.monotonic() + self.timeout, MOST_BYTES))
        except urllib.error.HTTPError as error:
            raise self._http_error(error) from None
        except urllib.error.URLError as error:
            raise _Failed(self._clean(getattr(error.reason, "strerror", None) or str(error.reason))) from None
        except TimeoutError:  # until it begins, between two parts of it, or from its beginning to its end
            raise _Failed(f"no whole reply in {self.timeout:.0f} seconds") from None
        except (ValueError, RecursionError):  # no JSON, not in UTF-8, or nested without end
            raise _Failed("the reply is no JSON") from None
        except (OSError, http.client.HTTPException) as error:
            raise _Failed(type(error).__name__) from None

    def _http_error(self, error: urllib.error.HTTPError) -> Exception:
        try:
            text = _whole(error, time.monotonic() + self.timeout, 4096).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException):
            text = ""
        try:
            detail = json.loads(text)
            detail = detail.get("error", detail)
            text = str((detail["message"] if isinstance(detail, dict) else detail) or "")
        except (ValueError, KeyError, AttributeError, RecursionError):
            pass  # it is no JSON, or of another form
        reason = f"HTTP {error.code}, {self._clean(text or str(error.reason))}"
        if error.code in _RETRIED or error.code >= 500:
            return _Failed(reason, _seconds(error.headers.get("Retry-After")))
        return _Refused(error.code, reason)

    def _refusal(self, error: _Refused) -> ConfigError:
        """One line that says what to change."""
        where = f"--writer-url {self.url}"
        if error.status in (401, 403):  # the server's own words may repeat the key
            given = "the key was refused" if self.key else "a key is needed"
            return ConfigError(f"{where}: HTTP {error.status}, {given}; set ${KEYS[0]}")
        if error.status == 404:
            return ConfigError(
                f"{where}: HTTP 404, no such address or no model {self.model!r}; the address mostly ends in /v1"
            )
        return ConfigError(f"{where}: {error}")

    def _clean(self, text: str) -> str:
        """The first 200 characters on one line, without the key."""
        text = " ".join(text.split())
        return (text.replace(self.key, "***") if self.key else text)[:200]


@dataclass(frozen=True)
class EndpointWriter:
    """Asks an endpoint for the lists of a unit, several at a time."""

    endpoint: Endpoint
    question_tokens: int
    concurrency: int = 8

    def write(self, calls: Sequence[Call], chunks: Mapping[str, Tensor]) -> list[Reply]:
        """See :class:`cas.selfstudy.list_writers.ListWriter`. Raises: ConfigError, RunError as the endpoint does."""
        waiting, done = queue.SimpleQueue[int](), queue.SimpleQueue[tuple[int, Reply] | BaseException]()
        prompts = [
            f"Text:\n\n{call.chunk}\n\n---\n\n{instruction(call.seed_prompt, call.document.title, call.listed)}"
            for call in calls
        ]
        for index in range(len(calls)):
            waiting.put(index)
        stopped = threading.Event()

        def work() -> None:
            try:
                while not stopped.is_set():
                    index = waiting.get_nowait()
                    call = calls[index]
                    most = 4 * call.listed * self.question_tokens  # a reasoning model thinks first
                    reply = self.endpoint.complete(prompts[index], most, call.temperatures[0], stopped)
                    done.put((index, reply))
            except queue.Empty:
                return
            except BaseException as error:
                done.put(error)

        for _ in range(min(self.concurrency, len(calls))):
            threading.Thread(target=work, name=THREAD, daemon=True).start()  # Ctrl-C does not wait for replies
        replies = dict[int, Reply]()
        try:
            while len(replies) < len(calls):
                result = done.get()
                if isinstance(result, BaseException):
                    raise result
                replies[result[0]] = result[1]
        finally:
            stopped.set()
        return [replies[index] for index in range(len(calls))]


def list_writer(
    model: FrozenModel, style: PromptStyle, settings: SelfStudy, model_before: str | None
) -> ListWriter | None:
    """Who writes lists, if the style asks for them. ``model_before``: the endpoint's model that wrote earlier units."""
    if not style.lists:
        return None
    question_tokens = token_limits(model, settings)[0]
    if settings.writer_url is None:
        return ModelWriter(model, question_tokens, settings.seed)
    return EndpointWriter(open_endpoint(settings, model_before), question_tokens, settings.writer_concurrency)


def _whole(response: Any, deadline: float, most: int) -> bytes:
    """The first bytes of a reply's body, as many as ``most``. Raises: TimeoutError where they are not there in time."""
    body = bytearray()
    while len(body) < most and (part := response.read1(min(most - len(body), 1 << 16))):
        body += part
        if time.monotonic() > deadline:
            raise TimeoutError
    return bytes(body)


def open_endpoint(settings: SelfStudy, model_before: str | None = None) -> Endpoint:
    """The endpoint of the settings, with the key of the environment. ``model_before``: that wrote earlier units.

    Raises: ConfigError when it is not clear which model is meant.
    """
    assert settings.writer_url is not None
    key = next((key for name in KEYS if (key := os.environ.get(name, "").strip())), None)
    endpoint = Endpoint(settings.writer_url, settings.writer_model or model_before or "", key)
    endpoint.model = endpoint.model or endpoint.only_model()
    return endpoint


def _seconds(text: str | None) -> float | None:
    """Seconds of a Retry-After header: a number or a date."""
    if not text:
        return None
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return None
