"""The rows that decode together: they join at any step, and leave when they end. Used by one thread."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from cas.answering.answerer import Answerer
from cas.answering.cartridge_cache import Loading
from cas.model.decoding import Generation, held_positions, most_positions
from cas.model.decoding_attention import Prompt
from cas.model.decoding_cache import Decoding
from cas.model.text import TextStream
from cas.serving.requests import Finished, RequestError, Ticket
from cas.serving.visible_text import VisibleText

ROOM = 64  # tokens for which the cache of own tokens has room before it grows
GREEDY_BELOW = 1e-3  # temperature


@dataclass
class Row:
    """A request with its cartridges. ``scores``: of retrieval, by document; ``loaded``: by document; ``most``: tokens
    of the longest answer; ``timings``: seconds so far."""

    ticket: Ticket
    scores: Mapping[str, float | None]
    loaded: Mapping[str, Loading]
    most: int
    stream: TextStream
    timings: dict[str, float]
    ids: list[int] = field(default_factory=list)
    begun: float = 0.0

    def __post_init__(self) -> None:
        request, order = self.ticket.request, sorted(self.loaded)
        self.prompt = Prompt(request.tokens, tuple(self.loaded[name].key for name in order))
        self.documents = {self.loaded[name].key: name for name in order}
        self.visible = VisibleText(request.stop)
        self.generator = torch.Generator().manual_seed(request.seed % 2**63)

    @property
    def positions(self) -> int:
        """Of its cartridges."""
        return sum(loading.kv.shape[3] for loading in self.loaded.values())

    def choose(self, logits: Tensor, likeliest: int) -> int:
        """The next token; ``logits``: float32 [vocabulary]."""
        request = self.ticket.request
        if request.temperature < GREEDY_BELOW:
            return likeliest
        probabilities = (logits / request.temperature).softmax(-1).cpu()
        if request.top_p < 1:
            values, order = probabilities.sort(descending=True, stable=True)
            values[values.cumsum(-1) - values >= request.top_p] = 0  # keeps the first
            probabilities = torch.zeros_like(probabilities).scatter(0, order, values)
        return int(torch.multinomial(probabilities, 1, generator=self.generator))


class RunningBatch:
    """Rows under way."""

    def __init__(self, answerer: Answerer, rows: int, positions: int | None = None) -> None:
        """``rows``, ``positions``: the most that decode together, prefixes and longest answers included; the default of
        the latter depends on the device."""
        self.model, self.answerer = answerer.model, answerer
        self.most_rows, self.most_positions = rows, positions or most_positions(answerer.model)
        self.rows: dict[int, Row] = {}
        self._cartridges: dict[str, Tensor] = {}  # by key, of the rows under way
        self._state: Decoding | None = None
        self._tokens: list[int] = []  # the last one of each of its rows
        self._number = 0
        self.decoded = 0  # tokens of answers since the start

    def __len__(self) -> int:
        return len(self.rows)

    def admit(self, waiting: Sequence[Row]) -> int:
        """How many of the first of ``waiting`` fit beside the rows under way; at least one where there are none."""
        rows = list(self.rows.values())
        for count, row in enumerate(waiting):
            rows.append(row)
            width = self.model.layout_header + max(r.positions for r in rows)
            own = max(len(r.prompt.tokens) + r.most for r in rows) + ROOM
            held = held_positions([r.prompt.cartridges for r in rows], width, own)
            if len(rows) > self.most_rows or (len(rows) > 1 and held > self.most_positions):
                return count
        return len(waiting)

    def step(self, arrivals: Sequence[Row]) -> None:
        """Read the prompts of ``arrivals``, then one token more of every row. Rows that end tell their tickets."""
        self._drop_unwanted()
        if arrivals:
            self._join(arrivals)
        if self._state is not None:
            logits = self._state.step(torch.tensor(self._tokens))
            self._tokens = self._choose(self._state, logits)
            self._state = self._state if self._state.rows else None
        self._forget_cartridges()

    def fail(self, error: RequestError) -> None:
        """End every row with an error."""
        for row in self.rows.values():
            row.ticket.emit(error)
        self.rows, self._state, self._tokens = {}, None, []
        self._forget_cartridges()

    def _join(self, arrivals: Sequence[Row]) -> None:
        numbers = range(self._number, self._number + len(arrivals))
        self._number += len(arrivals)
        for row in arrivals:
            row.begun = time.perf_counter()
            for loading in row.loaded.values():
                self._cartridges.setdefault(loading.key, loading.kv)
        prompts = {number: row.prompt for number, row in zip(numbers, arrivals, strict=True)}
        self.rows |= dict(zip(numbers, arrivals, strict=True))
        new = Decoding(self.model, prompts, self._cartridges, self.answerer.store.layout, ROOM, watch=True)
        tokens = self._choose(new, new.prefill())
        if not new.rows:
            return
        if self._state is None:
            self._state, self._tokens = new, tokens
        else:
            self._state.join(new)
            self._tokens += tokens

    def _choose(self, state: Decoding, logits: Tensor) -> list[int]:
        """Choose the next token of every row; rows that have ended leave. Returns the tokens of the others."""
        logits = logits.float()
        chosen, going = [], []
        for number, scores, likeliest in zip(state.rows, logits, logits.argmax(-1).tolist(), strict=True):
            token = self.rows[number].choose(scores, likeliest)
            if self._take(state, number, token):
                chosen.append(token)
                going.append(number)
        if len(going) < len(state.rows):
            state.keep(going)
        return chosen

    def _take(self, state: Decoding, number: int, token: int) -> bool:
        """Add a token to a row's answer. Returns: whether the row goes on."""
        row = self.rows[number]
        row.timings.setdefault("prefill_s", time.perf_counter() - row.begun)
        last = token in self.model.template.stop_ids
        if last:
            text = ""
        else:
            row.ids.append(token)
            self.decoded += 1
            text = row.visible.push(row.stream.push(token))
        going = not (last or row.visible.stopped or len(row.ids) == row.most)
        if not going and not row.visible.stopped:
            text += row.visible.push(row.stream.finish()) + row.visible.finish()
        if text:
            row.ticket.emit(text)
        if not going:
            self._finish(state, number, last)
        return going

    def _finish(self, state: Decoding, number: int, last: bool) -> None:
        """A row has its answer. ``last``: whether the model ended its turn."""
        row = self.rows.pop(number)
        shares = state.attention_shares(number, len(row.ids) + last - 1)
        row.timings["decode_s"] = time.perf_counter() - row.begun - row.timings["prefill_s"]
        result = Generation(row.ids, last, {row.documents[key]: share for key, share in shares.items()})
        question = row.ticket.request.question
        answer = self.answerer.make_answer(question, row.prompt, result, row.scores, row.loaded, row.timings)
        ended = last or row.visible.stopped
        row.ticket.emit(Finished(replace(answer, answer=row.visible.text), "stop" if ended else "length"))

    def _drop_unwanted(self) -> None:
        """Rows that nobody waits for any more, or whose time is over, leave."""
        gone = {number for number, row in self.rows.items() if row.ticket.cancelled or row.ticket.expired}
        if not gone:
            return
        for number in gone:
            self.rows.pop(number).ticket.emit(RequestError(503, "timeout", "the answer took too long; ask again later"))
        if self._state is not None:
            going = [(n, token) for n, token in zip(self._state.rows, self._tokens, strict=True) if n not in gone]
            self._state.keep([number for number, _ in going])
            self._tokens = [token for _, token in going]
            self._state = self._state if going else None

    def _forget_cartridges(self) -> None:
        used = {key for row in self.rows.values() for key in row.prompt.cartridges}
        for key in self._cartridges.keys() - used:
            del self._cartridges[key]
