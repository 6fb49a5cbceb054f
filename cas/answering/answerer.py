"""Questions in, answers out: retrieve k cartridges, compose them, prefill only the question, decode."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from torch import Tensor

from cas.answering.cartridge_cache import CartridgeCache, Loading
from cas.answering.prompts import cartridges as cartridge_prompt
from cas.answering.prompts import room_for_answer
from cas.errors import CollectionError, UserError
from cas.model.decoding import Generation, Prompt, generate
from cas.model.frozen import FrozenModel
from cas.store.index import open_index
from cas.store.store import Store
from retrieval import ChunkIndex, Ranked, WordIndex, rank_documents

if TYPE_CHECKING:
    from retrieval import Embedder


_ATTEMPTS = 3  # to load what was retrieved, while documents are being dropped


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
    """Answers questions from a store, as it is when each is asked: documents may be added, changed or dropped meanwhile, by
    this process or another. Keeps the cartridges it loaded last in memory. Threads can share it."""

    def __init__(
        self,
        model: FrozenModel,
        store: Store,
        embedder: Embedder | None = None,
        keep: int = 16,
        cache_bytes: int | None = None,
    ) -> None:
        """``keep``: cartridges to keep in memory, and questions that are answered together; ``cache_bytes``: keep so many
        bytes of cartridges instead. Raises: StoreMismatch for another model than the store's."""
        store.check_model(model)
        self.model, self.store, self._embedder = model, store, embedder
        self._index: ChunkIndex | None = None
        self._words: WordIndex | None = None
        self._stamp = -1  # of the store when it was last looked at
        self._indexed: dict[str, str] = {}  # {id: hash} of what the index is of
        self._keep = keep
        self._retrieving = threading.RLock()  # neither the index nor an embedder takes two threads at once
        self.cartridges = CartridgeCache(model, store, keep, cache_bytes)

    @property
    def index(self) -> ChunkIndex:
        """The retrieval index, opened at first need, of the documents that answer now."""
        with self._retrieving:
            stamp = self.store.stamp
            if self._index is None or stamp != self._stamp:
                self.store.reload()
                now = {name: row.hash for name, row in self.store.answering().items()}
                self.cartridges.keep_only(now)
                if self._index is None or now != self._indexed:
                    texts = cache(self.store.texts)  # read where an index is not of them yet, and then once for both
                    self._index = open_index(self.store, self._embedder, texts=texts)
                    self._words = WordIndex.open(self._index, texts, self.store.folder / "index")
                self._stamp, self._indexed = stamp, now
            return self._index

    def retrieve(self, questions: Sequence[str], k: int) -> list[list[Ranked]]:
        """The k best documents for each question, by vectors and words: names unknown to the embedder are found by
        their spelling."""
        with self._retrieving:
            return rank_documents(self.index, questions, k, self._words)

    def load(self, document: str) -> Tensor:
        """A cartridge in the model's dtype on its device."""
        return self.cartridges.load(document).kv

    def retrieve_and_load(
        self, questions: Sequence[str], k: int
    ) -> tuple[list[dict[str, float | None]], dict[str, Loading], float]:
        """Scores by document for each question, the documents' cartridges and titles, and the seconds that ranking took.
        Where one was dropped between the two, once more."""
        for attempt in range(_ATTEMPTS):
            clock = _Clock()
            scores: list[dict[str, float | None]] = [
                {r.document_id: r.score for r in found} for found in self.retrieve(questions, k)
            ]
            seconds = clock.lap()
            try:
                return scores, self.load_all(name for found in scores for name in found), seconds
            except CollectionError:
                if attempt == _ATTEMPTS - 1:
                    raise
        raise AssertionError("returned or raised")

    def load_all(self, documents: Iterable[str]) -> dict[str, Loading]:
        """Cartridges by document. Raises: as :meth:`CartridgeCache.load`."""
        return {name: self.cartridges.load(name) for name in dict.fromkeys(documents)}

    def _room(self, prompt: Prompt, loaded: Mapping[str, Loading]) -> int:
        sizes = [loaded[name].kv.shape[3] for name in prompt.cartridges]
        return room_for_answer(self.model, prompt, sizes, self.store.layout)

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
        Raises: CollectionError for an unknown document, UserError for an empty question, k < 1, or a question that does not
            fit into the model's positions behind the cartridges; an answer ends where they end.
        """
        _refuse(question, k)
        scores: dict[str, float | None] = {}
        clock, retrieve_s = _Clock(), 0.0
        if documents is not None:
            scores = dict.fromkeys(documents)
            loaded = self.load_all(scores)
        else:
            (scores,), loaded, retrieve_s = self.retrieve_and_load([question], k)
        prompt: Prompt = cartridge_prompt(self.model, question, list(loaded))
        most = min(max_new_tokens, self._room(prompt, loaded))
        load_s = clock.lap() - retrieve_s
        if on_loaded is not None:
            on_loaded([(name, loaded[name].title, score) for name, score in scores.items()])
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
            {name: found.kv for name, found in loaded.items()},
            self.store.layout,
            max_new_tokens=most,
            watch=True,
            on_token=on_token,
        )[0]
        total = time.perf_counter() - started
        if on_text is not None and (rest := stream.finish()):
            on_text(rest)
        prefill_s = (first - started) if first else total
        timings = {"retrieve_s": retrieve_s, "load_s": load_s, "prefill_s": prefill_s, "decode_s": total - prefill_s}
        return self.make_answer(question, prompt, result, scores, loaded, timings)

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
            scores, loaded, retrieve_s = self.retrieve_and_load(some, k)
            timings = {"retrieve_s": retrieve_s, "load_s": clock.lap() - retrieve_s}
            prompts = [cartridge_prompt(self.model, question, list(found)) for question, found in zip(some, scores)]
            most = min(max_new_tokens, *(self._room(prompt, loaded) for prompt in prompts))
            layout = self.store.layout
            kv = {name: found.kv for name, found in loaded.items()}
            results = generate(self.model, prompts, kv, layout, max_new_tokens=most, watch=True)
            timings |= {"prefill_s": 0.0, "decode_s": clock.lap()}
            for question, prompt, result, found in zip(some, prompts, results, scores):
                answers.append(self.make_answer(question, prompt, result, found, loaded, timings))
        return answers

    def make_answer(
        self,
        question: str,
        prompt: Prompt,
        result: Generation,
        scores: Mapping[str, float | None],
        loaded: Mapping[str, Loading],
        timings: dict[str, float],
    ) -> Answer:
        """What is returned of one prompt's decoding over the cartridges that ``scores`` names."""
        positions = sum(loaded[name].kv.shape[3] for name in scores)
        held = self.store.layout.header + positions + len(prompt.tokens) + len(result.ids)
        return Answer(
            question=question,
            answer=self.model.answer_text(result.ids),
            cartridges=tuple(Loaded(n, loaded[n].title, s, result.attention.get(n, 0.0)) for n, s in scores.items()),
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
