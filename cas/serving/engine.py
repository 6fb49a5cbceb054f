"""Many requests with different cartridges, decoded together by one thread.

A request waits in a queue; a thread retrieves and loads its cartridges; it then joins the rows under way at their next
step and leaves when its answer ends. Greedy answers are those of :class:`cas.Answerer`, whoever else decodes.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from cas.answering.answerer import Answer, Answerer
from cas.answering.cartridge_cache import Loading
from cas.answering.prompts import room_for_answer
from cas.errors import CollectionError, UserError
from cas.model.decoding_attention import Prompt
from cas.serving.batch import Row, RunningBatch
from cas.serving.requests import Event, Request, RequestError, Ticket

log = logging.getLogger("cas.serving")
PREPARED = 16  # requests that wait with their cartridges loaded, and that are retrieved for together
CLOSING = RequestError(503, "shutting_down", "the server is shutting down; ask again later")


@dataclass(frozen=True)
class Limits:
    """rows: requests that decode together. queue: requests that wait for that. seconds: until a request is given up.
    cartridges: the most for one request. tokens: the longest answer. positions: prefix, prompt and answer positions of
    all that decode together; the default depends on the device."""

    rows: int = 32
    queue: int = 128
    seconds: float = 120.0
    cartridges: int = 32
    tokens: int = 1024
    positions: int | None = None


class Engine:
    """Answers requests from any number of threads. The model's forward passes are those of one thread of its own.

    Attributes: answerer: what retrieves and loads cartridges; limits.
    """

    def __init__(self, answerer: Answerer, limits: Limits | None = None) -> None:
        self.answerer, self.limits = answerer, limits or Limits()
        self._batch = RunningBatch(answerer, self.limits.rows, self.limits.positions)
        self._waiting: deque[Ticket] = deque()
        self._preparing = 0
        self._ready: deque[Row] = deque()
        self._changed = threading.Condition()
        self._draining = False
        self._threads = [
            threading.Thread(target=run, name=f"cas-{run.__name__.strip('_')}", daemon=True)
            for run in (self._prepare, self._decode)
        ]
        with torch.no_grad():
            _ = answerer.model.header_kv  # before threads compete for it
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- for callers, from any thread -------------------------------------------------------------------------------

    def submit(self, request: Request, listener: Callable[[Event], None] | None = None) -> Ticket:
        """Put a request into the queue.

        Args: listener: as of :class:`Ticket`.
        Raises: RequestError for a request that makes no sense or is beyond the limits, a full queue, or after
            :meth:`drain`.
        """
        self._check(request)
        ticket = Ticket(request, self.limits.seconds, listener)
        with self._changed:
            if self._draining:
                raise CLOSING
            if self._queued() >= self.limits.queue:
                raise RequestError(429, "queue_full", f"{self._queued()} requests are waiting already; ask again later")
            self._waiting.append(ticket)
            self._changed.notify_all()
        return ticket

    def ask(self, question: str, **options: Any) -> Answer:
        """Answer one question; ``options`` are those of :class:`Request`. Raises: RequestError."""
        tokens = self.answerer.model.question_tokens(question)
        return self.submit(Request(question, tokens, **options)).result().answer

    @property
    def queued(self) -> int:
        """Requests that wait."""
        with self._changed:
            return self._queued()

    @property
    def decoding(self) -> int:
        """Requests that decode."""
        return len(self._batch)

    @property
    def alive(self) -> bool:
        """Whether it takes requests."""
        return not self._draining and all(thread.is_alive() for thread in self._threads)

    @property
    def decoded(self) -> int:
        """Tokens of answers since the start."""
        return self._batch.decoded

    def drain(self) -> None:
        """Take no more requests, refuse those that wait, and let those that decode end."""
        with self._changed:
            self._draining = True
            waiting = [*self._waiting, *(row.ticket for row in self._ready)]
            self._waiting.clear()
            self._ready.clear()
            self._changed.notify_all()
        for ticket in waiting:
            ticket.emit(CLOSING)

    def close(self) -> None:
        """:meth:`drain`, and wait for the last answer."""
        self.drain()
        for thread in self._threads:
            thread.join()

    def _queued(self) -> int:
        return len(self._waiting) + self._preparing + len(self._ready)

    def _check(self, request: Request) -> None:
        limits = self.limits
        if not request.question.strip():
            raise RequestError(400, "empty_question", "the question is empty")
        if not 1 <= request.k <= limits.cartridges:
            raise RequestError(400, "invalid_value", f"retrieve_k: from 1 to {limits.cartridges}", "retrieve_k")
        if request.cartridges is not None and len(request.cartridges) > limits.cartridges:
            raise RequestError(400, "invalid_value", f"cartridges: at most {limits.cartridges}", "cartridges")
        if not 1 <= request.max_tokens <= limits.tokens:
            raise RequestError(400, "invalid_value", f"max_tokens: from 1 to {limits.tokens}", "max_tokens")
        room = self.answerer.model.geometry.max_positions - self.answerer.model.layout_header
        if len(request.tokens) >= room:
            raise _too_long(len(request.tokens), room)

    # -- the thread that retrieves and loads ------------------------------------------------------------------------

    def _prepare(self) -> None:
        while tickets := self._next_waiting():
            for k, some in groupby(sorted(tickets, key=_retrieved), key=_retrieved):
                members = list(some)
                rows = self._load(members, k)
                with self._changed:
                    closing = self._draining
                    self._preparing -= len(members)
                    self._ready += [] if closing else rows
                    self._changed.notify_all()
                for row in rows if closing else ():
                    row.ticket.emit(CLOSING)

    def _next_waiting(self) -> list[Ticket]:
        """Wait for requests; none of them when the engine ends."""
        with self._changed:
            while not self._draining and not (self._waiting and len(self._ready) < PREPARED):
                self._changed.wait()
            count = 0 if self._draining else min(len(self._waiting), PREPARED)
            self._preparing = count
            return [self._waiting.popleft() for _ in range(count)]

    def _load(self, tickets: Sequence[Ticket], k: int) -> list[Row]:
        """Rows of those requests that can be answered; ``k``: cartridges to retrieve, 0 where they are named."""
        wanted = [ticket for ticket in tickets if not (ticket.cancelled or ticket.expired)]
        for ticket in tickets:
            if ticket not in wanted:
                ticket.emit(RequestError(503, "timeout", "the request waited too long; ask again later"))
        if not wanted:
            return []
        started = time.perf_counter()
        try:
            if k:
                scores, loaded, seconds = self.answerer.retrieve_and_load([t.request.question for t in wanted], k)
            else:
                scores = [dict.fromkeys(ticket.request.cartridges or ()) for ticket in wanted]
                loaded, seconds = self.answerer.load_all(name for found in scores for name in found), 0.0
            timings = {"retrieve_s": seconds, "load_s": time.perf_counter() - started - seconds}
            rows = [self._row(t, s, {name: loaded[name] for name in s}, timings) for t, s in zip(wanted, scores)]
            return [row for row in rows if row is not None]
        except Exception as error:
            if len(wanted) > 1:  # one of them must not spoil the others
                return [row for ticket in wanted for row in self._load([ticket], k)]
            if isinstance(error, CollectionError) and not k:
                wanted[0].emit(
                    RequestError(404, "no_such_cartridge", "no cartridge has one of these ids", "cartridges")
                )
            else:
                log.exception("a request could not be prepared")
                wanted[0].emit(RequestError(500, "internal_error", "the cartridges could not be loaded"))
            return []

    def _row(
        self, ticket: Ticket, scores: dict[str, float | None], loaded: dict[str, Loading], timings: dict[str, float]
    ) -> Row | None:
        model, layout = self.answerer.model, self.answerer.store.layout
        sizes = [loaded[name].kv.shape[3] for name in sorted(loaded)]
        prompt = Prompt(ticket.request.tokens, tuple(sorted(loaded)))
        try:
            room = room_for_answer(model, prompt, sizes, layout)
        except UserError:
            room = max(0, model.geometry.max_positions - layout.token_start(sizes))
            ticket.emit(_too_long(len(prompt.tokens), room))
            return None
        return Row(ticket, scores, loaded, min(ticket.request.max_tokens, room), model.stream(), dict(timings))

    # -- the thread that decodes ------------------------------------------------------------------------------------

    @torch.no_grad()
    def _decode(self) -> None:
        while True:
            with self._changed:
                while not (self._ready or self._batch.rows or self._draining):
                    self._changed.wait()
                if not (self._ready or self._batch.rows):
                    return
                arrivals = [self._ready.popleft() for _ in range(self._batch.admit(list(self._ready)))]
                self._changed.notify_all()
            try:
                self._batch.step(arrivals)
            except Exception:
                log.exception("a step failed")
                self._batch.fail(
                    RequestError(500, "internal_error", "the model failed on this request or one beside it")
                )


def _retrieved(ticket: Ticket) -> int:
    """Cartridges to retrieve, 0 where they are named."""
    return ticket.request.k if ticket.request.cartridges is None else 0


def _too_long(tokens: int, room: int) -> RequestError:
    message = (
        f"the question takes {tokens} tokens, and there is room for {room}; ask a shorter one, or load fewer cartridges"
    )
    return RequestError(400, "context_length_exceeded", message, "messages")
