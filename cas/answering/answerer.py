"""Questions in, answers out: retrieve k cartridges, compose them, prefill only the question, decode."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from cas.answering.prompts import cartridges as cartridge_prompt
from cas.errors import UserError
from cas.model.decoding import Generation, Prompt, generate
from cas.model.frozen import FrozenModel
from cas.store.index import open_index
from cas.store.store import Store
from retrieval import ChunkIndex, Ranked, WordIndex, rank_documents

if TYPE_CHECKING:
    from retrieval import Embedder


@dataclass(frozen=True)
class Loaded:
    """A cartridge behind an answer: retrieval score (None if named by the user), mean share of attention."""

    id: str
    title: str
    score: float | None
    attention: float


@dataclass(frozen=True)
class Answer:
    """An answer and what it cost. ``tokens``: positions of cartridges, tokens of prompt and answer. ``bytes``: KV
    memory of header, cartridges, prompt and answer. ``timings``: seconds."""

    question: str
    answer: str
    cartridges: tuple[Loaded, ...]
    tokens: dict[str, int]
    bytes: int
    timings: dict[str, float]

    @property
    def text(self) -> str:
        """The answer itself."""
        return self.answer

    def to_dict(self) -> dict[str, Any]:
        """As ``--json`` prints it."""
        return asdict(self)


class Answerer:
    """Answers questions from a store. Keeps the last few cartridges it loaded in memory."""

    def __init__(self, model: FrozenModel, store: Store, embedder: Embedder | None = None, keep: int = 16) -> None:
        store.check_model(model)
        self.model, self.store, self._embedder = model, store, embedder
        self._index: ChunkIndex | None = None
        self._words: WordIndex | None = None
        self._keep = keep
        self._hot: OrderedDict[tuple[str, int], Tensor] = OrderedDict()

    @property
    def index(self) -> ChunkIndex:
        """The retrieval index, opened at first need."""
        if self._index is None:
            self._index = open_index(self.store, self._embedder)
        return self._index

    def retrieve(self, questions: Sequence[str], k: int) -> list[list[Ranked]]:
        """The k best documents for each question, by vectors and words: names unknown to the embedder are found by
        their spelling."""
        if self._words is None:
            self._words = WordIndex.open(self.index, self.store.texts, self.store.folder / "index")
        return rank_documents(self.index, questions, k, self._words)

    def load(self, document: str) -> Tensor:
        """A cartridge in the model's dtype on its device."""
        key = (document, self.store.row(document).version)
        if key not in self._hot:
            self._hot[key] = self.store.cartridge(document).to(self.model.device, self.model.dtype)
            if len(self._hot) > self._keep:
                self._hot.popitem(last=False)
        self._hot.move_to_end(key)
        return self._hot[key]

    def ask(
        self,
        question: str,
        k: int = 4,
        documents: Sequence[str] | None = None,
        max_new_tokens: int = 128,
        on_loaded: Callable[[Sequence[tuple[str, str, float | None]]], None] | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> Answer:
        """Answer one question from k retrieved cartridges, or from those of ``documents``.

        Args: on_loaded: called with (id, title, score) of the cartridges before decoding; on_text: with each new piece.
        Raises: CollectionError for an unknown document, UserError for an empty question or k < 1.
        """
        _refuse(question, k)
        scores: dict[str, float | None] = {}
        clock = _Clock()
        if documents is not None:
            scores = dict.fromkeys(documents)
        else:
            scores = {r.document_id: r.score for r in self.retrieve([question], k)[0]}
        retrieve_s = clock.lap()
        loaded = {name: self.load(name) for name in scores}
        prompt: Prompt = cartridge_prompt(self.model, question, list(loaded))
        load_s = clock.lap()
        if on_loaded is not None:
            on_loaded([(name, self.store.row(name).title, score) for name, score in scores.items()])
        stream, first = self.model.stream(), 0.0

        def on_token(_: int, token: int) -> None:
            nonlocal first
            first = first or time.perf_counter()
            if on_text is not None and (piece := stream.push(token)):
                on_text(piece)

        started = time.perf_counter()
        result = generate(
            self.model,
            [prompt],
            loaded,
            self.store.layout,
            max_new_tokens=max_new_tokens,
            watch=True,
            on_token=on_token,
        )[0]
        total = time.perf_counter() - started
        if on_text is not None and (rest := stream.finish()):
            on_text(rest)
        prefill_s = (first - started) if first else total
        timings = {"retrieve_s": retrieve_s, "load_s": load_s, "prefill_s": prefill_s, "decode_s": total - prefill_s}
        return self._answer(question, prompt, result, scores, loaded, timings)

    def ask_many(self, questions: Sequence[str], k: int = 4, max_new_tokens: int = 128) -> list[Answer]:
        """Answer questions, each from its own k retrieved cartridges, up to 16 of them in one forward pass a token.

        ``timings`` of an answer are those of all that were answered with it; ``prefill_s`` is part of ``decode_s``.
        Raises: UserError for an empty question or k < 1.
        """
        for question in questions:
            _refuse(question, k)
        answers: list[Answer] = []
        for start in range(0, len(questions), self._keep):
            some, clock = questions[start : start + self._keep], _Clock()
            ranked = self.retrieve(some, k)
            scores: list[dict[str, float | None]] = [{r.document_id: r.score for r in found} for found in ranked]
            timings = {"retrieve_s": clock.lap()}
            loaded = {name: self.load(name) for found in scores for name in found}
            timings["load_s"] = clock.lap()
            prompts = [cartridge_prompt(self.model, question, list(found)) for question, found in zip(some, scores)]
            layout = self.store.layout
            results = generate(self.model, prompts, loaded, layout, max_new_tokens=max_new_tokens, watch=True)
            timings |= {"prefill_s": 0.0, "decode_s": clock.lap()}
            for question, prompt, result, found in zip(some, prompts, results, scores):
                answers.append(self._answer(question, prompt, result, found, loaded, timings))
        return answers

    def _answer(
        self,
        question: str,
        prompt: Prompt,
        result: Generation,
        scores: Mapping[str, float | None],
        loaded: Mapping[str, Tensor],
        timings: dict[str, float],
    ) -> Answer:
        positions = sum(loaded[name].shape[3] for name in scores)
        held = self.store.layout.header + positions + len(prompt.tokens) + len(result.ids)
        return Answer(
            question=question,
            answer=self.model.answer_text(result.ids),
            cartridges=tuple(
                Loaded(n, self.store.row(n).title, s, result.attention.get(n, 0.0)) for n, s in scores.items()
            ),
            tokens={"cartridge": positions, "prompt": len(prompt.tokens), "answer": len(result.ids)},
            bytes=self.model.geometry.elements(held) * self.model.dtype.itemsize,
            timings=timings,
        )


def _refuse(question: str, k: int) -> None:
    if not question.strip():
        raise UserError("the question is empty")
    if k < 1:
        raise UserError(f"--retrieve-k {k}: retrieve at least one cartridge")


class _Clock:
    def __init__(self) -> None:
        self.last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap."""
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        return seconds
