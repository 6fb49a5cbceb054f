"""Self-study: the frozen model questions itself about each document, answers with the text before it, and keeps the
probabilities it answered with (2506.06266, section 4).

One *call* shows the model a chunk and one of five kinds of seed prompt, and asks for several questions at once: rows that
share the chunk's KV, each pointed at one sentence and opened with one of the kind's openings. Small models need the hand
on the sentence, large ones do not mind it, and it covers the whole document. The embedded reader, which has one way to ask a
kind of question about a sentence, is by default asked about every sentence in every kind, once greedily and then by sampling: facts about
which its likeliest question goes astray get others. Answers are decoded greedily with the chunk in context, so the probabilities
met on the way are the teacher's: no second pass.

A *unit* of work is a fixed number of calls and one Parquet file, renamed when whole. Everything in it is keyed by
(seed, call), so an interrupted synthesis goes on to the same conversations.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

from budget.manager import trim_host_memory
from cas.config import SelfStudy
from cas.data.collection import Collection, Document
from cas.errors import ConfigError, RunError
from cas.model.decoding import Prompt, generate
from cas.model.frozen import FrozenModel
from cas.model.positions import Layout
from cas.selfstudy.conversations import Conversation, Conversations, read_unit, write_unit
from cas.selfstudy.seed_prompts import READER_SEED_PROMPTS, SEEDS, SeedPrompt, bad_answer, bad_question, loops, normal
from cas.store.store import Store
from retrieval.chunk import split_sentences, with_title

MAX_RETRIES_PER_DOCUMENT = 5
ROWS = 128  # questions or answers about a chunk that are decoded side by side
GOLDEN_RATIO = 0.6180339887498949


def synthesize(
    model: FrozenModel,
    documents: Collection,
    store: Store,
    settings: SelfStudy | None = None,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Conversations:
    """Write the training conversations of a collection beside its store; goes on where an earlier call stopped.

    Also records new documents in the store (:meth:`Store.add_documents`). A document about which nothing worth
    keeping is written, in calls of its own too, is missing from the result.

    Args: settings, or its fields as ``options``; progress: called with (kept, wanted) after every unit, or with (asked, to be
    asked) where everything is asked once.
    Raises: ConfigError when finished units were made with other settings; RunError when too little survives the filters.
    """
    store.check_model(model)
    settings = settings or SelfStudy(**options)
    folder = store.conversations
    about = {k: v for k, v in vars(settings).items() if k != "conversations"}
    # The collection's own hash leaves ids out, but conversations are filed by id.
    texts = hashlib.sha256("\n".join(f"{d.id}\t{d.hash}" for d in documents.documents).encode()).hexdigest()
    once = model.reader and settings.conversations is None
    made_with = json.dumps(
        {"model": model.fingerprint, "system": model.system, "documents": texts, "once": once, **about}, sort_keys=True
    )

    def read(file: Path) -> tuple[list[Conversation], Counter[str]]:
        found, counts, before = read_unit(file)
        if before != made_with:
            raise ConfigError(
                f"{folder} was made with other settings, documents or model; use the same ones or give another --store"
            )
        return found, counts

    if (first := folder / "unit-000000.parquet").exists():
        read(first)  # before anything is written
    elif store.run_state() is not None:
        raise ConfigError(
            f"{store.folder} was trained on conversations that are no longer in {folder}; give another --store"
        )
    store.add_documents(documents, model.count_tokens)
    folder.mkdir(exist_ok=True)
    teacher = _Teacher(model, documents, settings)
    have, dropped = 0, Counter[str]()
    # When enough is kept, documents about which nothing is yet get calls of their own, but not for ever.
    patience = {} if once else dict.fromkeys(teacher.ids, MAX_RETRIES_PER_DOCUMENT)
    unit = 0
    with store.training():  # one writer of units at a time
        while teacher.calls(unit) if once else have < teacher.wanted or any(patience.values()):
            # Half of what is asked of a weak model may be dropped; one that writes next to nothing usable must be said.
            if (
                not once
                and have < teacher.wanted
                and unit * settings.calls_per_unit * settings.questions_per_call > (12 * teacher.wanted + 1000)
            ):
                kept = f"{have} of {teacher.wanted} conversations; dropped: {dict(dropped)}"
                raise RunError(
                    f"self-study kept {kept}; {'give another --model' if model.reader else 'use a larger model'}"
                )
            teacher.only = [i for i, calls in patience.items() if calls] if have >= teacher.wanted else []
            file = folder / f"unit-{unit:06d}.parquet"
            if file.exists():
                found, counts = read(file)
                teacher.replay(unit, found)
            elif store.run_state() is not None:
                raise ConfigError(
                    f"{store.folder} is trained on {have} conversations; ask for no more, or give another --store"
                )
            else:
                started = time.monotonic()
                found, counts = teacher.unit(unit)
                trim_host_memory()
                write_unit(file, found, counts, made_with)
                store.log_duration("self-study", time.monotonic() - started)
            for number in teacher.calls(unit) if teacher.only else ():
                one = teacher.only[number % len(teacher.only)]
                patience[one] = max(0, patience[one] - 1)
            patience.update({item.document: 0 for item in found})
            have += len(found)
            dropped.update(counts)
            unit += 1
            if progress is not None:
                done = sum(len(call.rows) for call in teacher.plan[: teacher.calls(unit - 1).stop]) if once else have
                progress(min(done, teacher.wanted), teacher.wanted)
        return Conversations.load(folder, unit)


@dataclass(frozen=True)
class _Call:
    """What one call asks: a window of a document, a kind, and which sentence each row is about, with its opening."""

    document: Document
    chunk: str
    seed: SeedPrompt
    pairs: tuple[tuple[str, str], ...]
    temperatures: tuple[float, ...]  # every row is written once at each


@dataclass(frozen=True)
class _Window:
    """Sentences of a document that are read together, and those of them that a call of one kind asks about."""

    document: str
    kind: str
    read: range
    rows: range


class _Teacher:
    """The frozen model with a chunk before it."""

    def __init__(self, model: FrozenModel, documents: Collection, settings: SelfStudy) -> None:
        self.model, self.settings = model, settings
        self.documents = {d.id: d for d in documents.documents}
        self.sentences = {d.id: _sentences(model, d) for d in documents.documents}
        self.ids = sorted(self.sentences)
        self.lengths = [sum(n for _, n in self.sentences[i]) for i in self.ids]
        self.total = sum(self.lengths)
        # Every sentence in every kind, or else calls without end.
        self.plan = self._everything() if model.reader and settings.conversations is None else []
        everything = sum(len(call.rows) for call in self.plan)
        self.wanted = settings.conversations or everything or sum(max(64, n // 4) for n in self.lengths)
        # Of finished units only what was kept is known, in this process as in one that goes on where it stopped.
        self.wordings: dict[str, set[str]] = {i: set() for i in self.ids}
        self.used: dict[tuple[str, str], set[tuple[int, str]]] = {}  # (document, kind): sentences and openings tried
        self.newline = frozenset(i for i in range(model.geometry.vocabulary) if "\n" in model.tokenizer.decode([i]))
        self.layout = Layout("offset", model.layout_header, 0)
        self.only: list[str] = []

    def replay(self, unit: int, items: Sequence[Conversation]) -> None:
        """Remember what a finished unit tried and kept."""
        for number in self.calls(unit):
            self._call(number)
        self._remember(items)

    def _remember(self, items: Sequence[Conversation]) -> None:
        for item in items:
            self.wordings[item.document].add(normal(item.question))

    def unit(self, unit: int) -> tuple[list[Conversation], Counter[str]]:
        """The conversations of one unit and what was dropped, by reason."""
        s, template, dropped = self.settings, self.model.template, Counter[str]()
        asked: list[tuple[_Call, str]] = []
        kv: dict[str, torch.Tensor] = {}  # of every chunk, read once for its questions and their answers
        for number in self.calls(unit):
            call = self._call(number)
            seen = {normal(question) for before, question in asked if before.document == call.document}
            asked += [(call, question) for question in self._questions(number, call, seen, dropped, kv)]
        users = [self.model.encode(question + call.seed.style) for call, question in asked]
        prompts = [
            Prompt((*template.footer_ids, *user, *template.suffix_ids), (call.chunk,))
            for (call, _), user in zip(asked, users, strict=True)
        ]
        top_k = min(s.top_k, self.model.geometry.vocabulary)
        answers = generate(
            self.model, prompts, kv, self.layout, max_new_tokens=s.answer_tokens, keep_top=top_k, batch_rows=ROWS
        )
        kept: list[Conversation] = []
        for (call, question), user, answer in zip(asked, users, answers, strict=True):
            reason = "answer too long" if not answer.finished else "loop" if loops(answer.ids) else None
            reason = reason or bad_answer(self.model.decode(answer.ids), question, call.chunk)
            if reason:
                dropped[reason] += 1
                continue
            end = next((t for t in answer.top_ids[-1].tolist() if t in template.stop_ids), min(template.stop_ids))
            kept.append(
                Conversation(
                    call.document.id,
                    call.seed.kind,
                    question,
                    np.array(user, np.int32),
                    np.array([*answer.ids, end], np.int32),
                    torch.stack(answer.top_ids).numpy(),
                    torch.stack(answer.top_logprobs).numpy(),
                )
            )
        self._remember(kept)
        return kept, dropped

    def calls(self, unit: int) -> range:
        """The numbers of a unit's calls; none behind the last."""
        first, last = (n * self.settings.calls_per_unit for n in (unit, unit + 1))
        return range(min(first, len(self.plan)), min(last, len(self.plan))) if self.plan else range(first, last)

    def _call(self, number: int) -> _Call:
        """What call ``number`` asks; notes it as tried. Pairs of sentence and opening that were tried come again only when
        none is left, and are then sampled instead of greedy."""
        s, random = self.settings, Random(f"{self.settings.seed}/call/{number}")
        seeds = READER_SEED_PROMPTS if self.model.reader else SEEDS
        if self.plan:
            planned = self.plan[number]
            document, texts = self.documents[planned.document], [text for text, _ in self.sentences[planned.document]]
            seed = next(x for x in seeds if x.kind == planned.kind)
            chunk = with_title(document.title, " ".join(texts[i] for i in planned.read))
            pairs = tuple((texts[i], "") for i in planned.rows)
            return _Call(document, chunk, seed, pairs, (0.0, *[1.0] * (s.wordings - 1)))
        document, first, sentences = self._window(number)
        seed = next(x for x in seeds if x.kind == s.kinds[(number + number // len(s.kinds)) % len(s.kinds)])
        used = self.used.setdefault((document.id, seed.kind), set())
        every = [
            (first + i, o) for i, sentence in enumerate(sentences) for o in seed.openings_for(sentence, document.title)
        ]
        fresh = [pair for pair in every if pair not in used]
        chosen = fresh or every
        random.shuffle(chosen)
        chosen = chosen[: s.questions_per_call]
        used.update(chosen)
        pairs = tuple((sentences[i - first], opening) for i, opening in chosen)
        return _Call(document, with_title(document.title, " ".join(sentences)), seed, pairs, (0.0 if fresh else 0.7,))

    def _questions(
        self, number: int, call: _Call, seen: set[str], dropped: Counter[str], kv: dict[str, torch.Tensor]
    ) -> list[str]:
        """Let the model write a call's questions; the ones worth answering. ``seen``: wordings asked in this unit before;
        ``kv``: the chunk's is added."""
        title, seen = call.document.title, seen | self.wordings[call.document.id]
        prefix, prompts = self._requests(call)
        kv[call.chunk] = prefix[:, :, :, : len(self.model.encode(call.chunk))]
        written = [
            row
            for temperature, times in Counter(call.temperatures).items()
            for row in generate(
                self.model,
                prompts * times,
                {"call": prefix},
                self.layout,
                batch_rows=ROWS,
                max_new_tokens=self.settings.question_tokens,
                also_stop=self.newline,
                temperature=temperature,
                seed=Random(f"{self.settings.seed}/write/{number}").getrandbits(32),
            )
        ]
        questions = []
        for (_, opening), row in zip(call.pairs * len(call.temperatures), written, strict=True):
            question = (opening + self.model.tokenizer.decode(row.ids, skip_special_tokens=True)).strip()
            reason = (
                bad_question(question, title, call.chunk, not self.model.reader)
                if row.finished
                else "unfinished question"
            )
            if reason is None and normal(question) in seen:
                reason = "duplicate"
            if reason:
                dropped[reason] += 1
                continue
            seen.add(normal(question))
            questions.append(question)
        return questions

    def _requests(self, call: _Call) -> tuple[torch.Tensor, list[Prompt]]:
        """The prompts that the questions of a call are written behind, and the KV that they share."""
        model = self.model
        if model.reader:
            asked = [model.question_tokens(f"{call.seed.kind}: {sentence}") for sentence, _ in call.pairs]
            return self._kv(call.chunk, ()), [Prompt(tokens, ("call",)) for tokens in asked]
        instruction = [*model.template.footer_ids, *model.encode(call.seed.instruction())]
        prompts = [
            Prompt(tuple(model.encode(f"\n\nSentence: {s}\nAbout {call.document.title}:\n- {opening}")), ("call",))
            for s, opening in call.pairs
        ]
        return self._kv(call.chunk, instruction), prompts

    def _everything(self) -> list[_Window]:
        """Calls that ask about every sentence in every kind, in a random order of the seed's own."""
        s, found = self.settings, []
        for name in self.ids:
            for read, asked in _windows([n for _, n in self.sentences[name]], s.chunk_tokens):
                for first in range(asked.start, asked.stop, s.questions_per_call):
                    rows = range(first, min(first + s.questions_per_call, asked.stop))
                    found += [_Window(name, kind, read, rows) for kind in s.kinds]
        Random(f"{s.seed}/everything").shuffle(found)
        return found

    def _window(self, call: int) -> tuple[Document, int, list[str]]:
        """A document, and whole sentences of it from the given one on, at most ``chunk_tokens``, around a point that walks
        evenly (by the golden ratio) over all the collection's tokens: documents get calls in proportion to their length.
        While ``only`` names some, over these in turn."""
        start = Random(f"{self.settings.seed}/walk").random()
        along = (start + call * GOLDEN_RATIO) % 1.0
        if self.only:
            which = self.ids.index(self.only[call % len(self.only)])
            point = int(along * self.lengths[which])
        else:
            which, point = 0, int(along * self.total)
        while point >= self.lengths[which]:
            point -= self.lengths[which]
            which += 1
        sentences = self.sentences[self.ids[which]]
        at = 0
        while point >= sentences[at][1]:
            point -= sentences[at][1]
            at += 1
        low, high, used = at, at + 1, sentences[at][1]
        random = Random(f"{self.settings.seed}/window/{call}")
        while True:
            left = low > 0 and used + sentences[low - 1][1] <= self.settings.chunk_tokens
            right = high < len(sentences) and used + sentences[high][1] <= self.settings.chunk_tokens
            if not (left or right):
                break
            if left and (not right or random.random() < 0.5):
                low -= 1
                used += sentences[low][1]
            else:
                used += sentences[high][1]
                high += 1
        return self.documents[self.ids[which]], low, [text for text, _ in sentences[low:high]]

    def _kv(self, chunk: str, more: Sequence[int]) -> torch.Tensor:
        """The exact KV of chunk (and more) behind the header, to be shared by rows as if it were a cartridge."""
        header = self.model.template.header_ids
        return self.model.prefill([*header, *self.model.encode(chunk), *more])[:, :, :, len(header) :]


def _windows(lengths: Sequence[int], most: int) -> list[tuple[range, range]]:
    """Sentences of these lengths in windows of at most ``most`` tokens (or one sentence), and which of them each is for: all
    in all every sentence once. Later windows begin before what they are for, so that a pronoun finds its name."""
    found, start = [], 0
    while start < len(lengths):
        end, used = start + 1, lengths[start]
        while end < len(lengths) and used + lengths[end] <= (most * 3 // 4 if start else most):
            used += lengths[end]
            end += 1
        low = start
        while low > 0 and used + lengths[low - 1] <= most:
            low -= 1
            used += lengths[low]
        found.append((range(low, end), range(start, end)))
        start = end
    return found


def _sentences(model: FrozenModel, document: Document) -> list[tuple[str, int]]:
    spans = [document.text[a:b].strip() for a, b in split_sentences(document.text)]
    return [(text, max(1, len(model.encode(text)))) for text in spans if re.search(r"\w", text)]
