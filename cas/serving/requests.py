"""What the engine is asked, what it answers, and why it refuses."""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from cas.answering.answerer import Answer
from cas.errors import CasError


@dataclass(frozen=True)
class Request:
    """One question to the engine.

    Attributes:
        question: what retrieval searches with. tokens: what stands behind the cartridges, the question as a prompt.
        k: how many cartridges to retrieve. cartridges: the documents whose cartridges to load instead.
        max_tokens: the longest answer; it also ends where the model's positions do.
        temperature: 0 is greedy, else sampled by ``seed`` alone from the most likely tokens that together have
            probability ``top_p``. stop: strings that end the answer, which does not contain them.
    """

    question: str
    tokens: tuple[int, ...]
    k: int = 4
    cartridges: tuple[str, ...] | None = None
    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()


class RequestError(CasError):
    """Why a request was refused or not answered. The message has nothing but what the client itself sent.

    Attributes: status: of HTTP. code, parameter: as in OpenAI's errors.
    """

    def __init__(self, status: int, code: str, message: str, parameter: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.parameter = status, code, parameter


@dataclass(frozen=True)
class Finished:
    """A complete answer. ``reason``: "stop" where the model or a stop string ended it, "length" where a limit did."""

    answer: Answer
    reason: Literal["stop", "length"]


Event = str | Finished | RequestError  # pieces of text, then one of the others


class Ticket:
    """A submitted request. Iterating over it gives the pieces of text as they are decoded."""

    def __init__(self, request: Request, seconds: float, listener: Callable[[Event], None] | None = None) -> None:
        """``seconds``: until the engine gives up; ``listener``: called, by the engine's threads, with every event; must
        not block. Without one, iterate or call :meth:`result`."""
        self.request = request
        self.created = time.perf_counter()
        self._deadline = self.created + seconds
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._listener = listener or self._events.put
        self.cancelled = self.finished = False

    def cancel(self) -> None:
        """Nobody waits for the answer any more: it leaves at the next step."""
        self.cancelled = True

    @property
    def expired(self) -> bool:
        """Whether its time is over."""
        return time.perf_counter() > self._deadline

    def emit(self, event: Event) -> None:
        """Of the engine: tell the listener, until the request is finished."""
        if not self.finished:
            self.finished = not isinstance(event, str)
            try:
                self._listener(event)
            except Exception:  # it must not end the thread that all others are answered by
                logging.getLogger("cas.serving").exception("a listener failed")
                self.cancel()

    def __iter__(self) -> Iterator[str]:
        """Pieces of text. Raises: RequestError where the request is refused or fails."""
        while True:
            event = self._events.get()
            if isinstance(event, RequestError):
                raise event
            if isinstance(event, Finished):
                self._result = event
                return
            yield event

    def result(self) -> Finished:
        """Wait for the whole answer. Raises: RequestError."""
        for _ in self:
            pass
        return self._result
