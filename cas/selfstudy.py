"""Self-study: the frozen model questions itself about each document, answers with the text before it, and keeps the
probabilities it answered with (2506.06266, section 3; seed prompts and filters are our own).

One *call* shows the model a chunk and one of five kinds of seed prompt, and asks for several questions at once: rows that
share the chunk's KV, each pointed at one sentence and opened with one of the kind's openings. Small models need the hand
on the sentence, large ones do not mind it, and it covers the whole document. Answers are decoded greedily with the chunk
in context, so the probabilities met on the way are the teacher's: no second pass.

A *unit* of work is a fixed number of calls and one Parquet file, renamed when whole. Everything in it is keyed by
(seed, call), so an interrupted synthesis goes on to the same conversations.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

from cas.cartridge import Layout
from cas.collection import Collection, Document
from cas.decoding import Generation, Prompt, generate
from cas.errors import ConfigError, RunError
from cas.model import FrozenModel
from cas.store import Store
from retrieval.chunk import split_sentences, with_title

BRIEF = " Answer in a few words."


@dataclass(frozen=True)
class Seed:
    """One of the five kinds: how it is asked for, an example of ours, the openings that start each question, and what is
    added to a question when it is answered."""

    kind: str
    request: str
    examples: tuple[str, ...]
    openings: tuple[str, ...]
    style: str = ""


_EXAMPLE_SENTENCE = "Marrow Bridge, which Ines Calloway designed, was opened in 1902 and has seven arches."
SEEDS = (
    Seed(
        "question", "Write questions about the sentence.",
        ("Who designed Marrow Bridge?", "When was Marrow Bridge opened?", "How many arches does Marrow Bridge have?"),
        ("Who", "When", "How many", "What", "Where", "Why", "Which", "How", "What is the name of", "What kind of"), BRIEF,
    ),
    Seed(
        "structuring", "Write requests that ask for one detail of the sentence in a fixed form.",
        ("Give the year in which Marrow Bridge was opened.", "Name the designer of Marrow Bridge.", "State the number of arches of Marrow Bridge."),
        ("Give the", "Name the", "State the", "List the"), BRIEF,
    ),
    Seed(
        "summarisation", "Write requests to sum up what the sentence says.",
        ("Say in one sentence what is known about Marrow Bridge.", "Describe Marrow Bridge in one sentence.", "Tell me briefly about the opening of Marrow Bridge."),
        ("Say in one sentence", "Describe", "Tell me briefly", "Sum up"),
    ),
    Seed(
        "use case", "Write questions of people who need what the sentence says for something they do.",
        ("For my report, who designed Marrow Bridge?", "Before I go there, I need to know when Marrow Bridge was opened.", "I want to draw it: how many arches does Marrow Bridge have?"),
        ("For my report, who", "For my report, when", "For my report, how many", "For my report, what", "Before I go there, I need to know", "I want to know"), BRIEF,
    ),
    Seed(
        "creative", "Write playful questions about the sentence.",
        ("Quiz time: who designed Marrow Bridge?", "Guess when Marrow Bridge was opened.", "Riddle: what has seven arches and is called Marrow Bridge?"),
        ("Quiz time: who", "Quiz time: when", "Quiz time: how many", "Quiz time: what", "Quiz time: where", "Guess", "Riddle: what"), BRIEF,
    ),
)


@dataclass(frozen=True)
class SelfStudy:
    """Settings of the synthesis.

    Attributes:
        conversations: how many to keep in all; None: a quarter of the documents' tokens, at least 64 a document.
        chunk_tokens: the teacher reads windows of at most this many tokens of whole sentences.
        questions_per_call: rows that share one chunk and seed prompt. calls_per_unit: calls in one Parquet file.
        question_tokens, answer_tokens: longer ones are dropped and counted, never cut.
        kinds: the kinds of seed prompt to use. top_k: probabilities kept of the teacher.
    """

    conversations: int | None = None
    chunk_tokens: int = 512
    questions_per_call: int = 32
    calls_per_unit: int = 2
    question_tokens: int = 40
    answer_tokens: int = 48
    kinds: tuple[str, ...] = tuple(s.kind for s in SEEDS)
    top_k: int = 20
    seed: int = 0


@dataclass(frozen=True)
class Conversation:
    """One question and answer. ``answer`` ends with the end-of-turn token; ``top_ids``, ``top_logprobs``: [answer, K]."""

    document: str
    kind: str
    question: str
    prompt: np.ndarray  # int32, the user's message
    answer: np.ndarray  # int32
    top_ids: np.ndarray  # int32
    top_logprobs: np.ndarray  # float32

    def tokens(self, model: FrozenModel) -> list[int]:
        """Own tokens of the student: footer, question, suffix, answer without its last token. The last ``len(answer)``
        rows predict the answer."""
        template = model.template
        return [*template.footer_ids, *self.prompt.tolist(), *template.suffix_ids, *self.answer[:-1].tolist()]


class Conversations:
    """All training conversations of a store, by document, in memory."""

    def __init__(self, items: Sequence[Conversation], dropped: dict[str, int]) -> None:
        self.dropped = dropped
        self.by_document: dict[str, list[Conversation]] = {}
        for item in items:
            self.by_document.setdefault(item.document, []).append(item)

    def __len__(self) -> int:
        return sum(map(len, self.by_document.values()))

    @classmethod
    def load(cls, folder: Path) -> Conversations:
        """Read every whole unit of a store's ``conversations`` folder."""
        items: list[Conversation] = []
        dropped: Counter[str] = Counter()
        for file in sorted(folder.glob("unit-*.parquet")):
            found, counts, _ = _read(file)
            items += found
            dropped.update(counts)
        return cls(items, dict(dropped))


def synthesize(
    model: FrozenModel, documents: Collection, store: Store, settings: SelfStudy | None = None,
    progress: Callable[[int, int], None] | None = None, **options: Any,
) -> Conversations:
    """Write the training conversations of a collection beside its store; goes on where an earlier call stopped.

    Also gives new documents their initial cartridges (:meth:`Store.add_documents`).

    Args: settings, or its fields as ``options``; progress: called with (kept, wanted) after every unit.
    Raises: ConfigError when finished units were made with other settings; RunError when too little survives the filters.
    """
    settings = settings or SelfStudy(**options)
    unknown = set(settings.kinds) - {s.kind for s in SEEDS}
    if unknown or not settings.kinds:
        raise ConfigError(f"unknown kinds of seed prompt: {', '.join(sorted(unknown))}; choose from {', '.join(s.kind for s in SEEDS)}")
    store.add_documents(documents)
    folder = store.folder / "conversations"
    folder.mkdir(exist_ok=True)
    teacher = _Teacher(model, documents, settings)
    made_with = _made_with(model, documents, settings)
    items: list[Conversation] = []
    dropped: Counter[str] = Counter()
    wanted, unit = teacher.wanted, 0
    while len(items) < wanted:
        # Half of what is asked of a weak model may be dropped; a model that writes next to nothing usable must be said.
        if unit * settings.calls_per_unit * settings.questions_per_call > 12 * wanted + 1000:
            raise RunError(f"self-study kept {len(items)} of {wanted} conversations ({dict(dropped)}); use a larger model or --conversations {len(items)}")
        file = folder / f"unit-{unit:06d}.parquet"
        if file.exists():
            found, counts, about = _read(file)
            if about != made_with:
                raise ConfigError(f"{folder} was made with other settings, documents or model; give another --store or delete that folder")
        else:
            found, counts = teacher.unit(unit)
            _write(file, found, counts, made_with)
        teacher.remember(found)
        items += found
        dropped.update(counts)
        unit += 1
        if progress is not None:
            progress(min(len(items), wanted), wanted)
    missing = sorted({d.id for d in documents.documents} - {i.document for i in items})
    if missing:
        raise RunError(f"no usable conversation about {', '.join(missing[:3])}{' …' if len(missing) > 3 else ''}; raise --conversations")
    return Conversations(items, dict(dropped))


class _Teacher:
    """The frozen model with a chunk before it."""

    def __init__(self, model: FrozenModel, documents: Collection, settings: SelfStudy) -> None:
        self.model, self.settings = model, settings
        self.documents = {d.id: d for d in documents.documents}
        self.sentences = {d.id: _sentences(model, d) for d in documents.documents}
        self.ids = sorted(self.sentences)
        self.lengths = [sum(n for _, n in self.sentences[i]) for i in self.ids]
        total = sum(self.lengths)
        self.wanted = settings.conversations or sum(max(64, n // 4) for n in self.lengths)
        self.total = total
        self.seen: dict[str, set[str]] = {i: set() for i in self.ids}
        self.newline = frozenset(i for i in range(model.geometry.vocabulary) if "\n" in model.tokenizer.decode([i]))
        self.layout = Layout("offset", model.layout_header, 0)

    def remember(self, items: Sequence[Conversation]) -> None:
        for item in items:
            self.seen[item.document].add(normal(item.question))

    def unit(self, unit: int) -> tuple[list[Conversation], Counter[str]]:
        """The conversations of one unit and what was dropped, by reason."""
        s, dropped = self.settings, Counter[str]()
        rows: list[tuple[str, str, str, Seed]] = []  # document, chunk, question, seed
        # Of earlier units only what was kept is known, as it is to a synthesis that goes on.
        asked = {document: set(questions) for document, questions in self.seen.items()}
        for call in range(unit * s.calls_per_unit, (unit + 1) * s.calls_per_unit):
            rows += self._questions(call, asked, dropped)
        prefixes = {chunk: f"chunk{i}" for i, chunk in enumerate(dict.fromkeys(chunk for _, chunk, _, _ in rows))}
        kv = {name: self._kv(chunk, ()) for chunk, name in prefixes.items()}
        suffix = self.model.template.suffix_ids
        users = [self.model.encode(question + seed.style) for _, _, question, seed in rows]
        prompts = [
            Prompt((*self.model.template.footer_ids, *user, *suffix), (prefixes[chunk],))
            for (_, chunk, _, _), user in zip(rows, users, strict=True)
        ]
        answers = generate(self.model, prompts, kv, self.layout, max_new_tokens=s.answer_tokens, keep_top=min(s.top_k, self.model.geometry.vocabulary))
        kept = []
        for (document, _, question, seed), user, answer in zip(rows, users, answers, strict=True):
            reason = _bad_answer(answer, self.model)
            if reason:
                dropped[reason] += 1
                continue
            end = int(answer.top_ids[-1][0]) if int(answer.top_ids[-1][0]) in self.model.template.stop_ids else self.model.template.end_ids[0]
            kept.append(Conversation(
                document, seed.kind, question, np.array(user, np.int32), np.array([*answer.ids, end], np.int32),
                torch.stack(answer.top_ids).numpy(), torch.stack(answer.top_logprobs).numpy(),
            ))
        return kept, dropped

    def _questions(
        self, call: int, asked: dict[str, set[str]], dropped: Counter[str]
    ) -> list[tuple[str, str, str, Seed]]:
        s, random = self.settings, Random(f"{self.settings.seed}/call/{call}")
        document, sentences = self._window(call)
        seed = next(x for x in SEEDS if x.kind == s.kinds[(call + call // len(s.kinds)) % len(s.kinds)])
        chunk = with_title(document.title, " ".join(sentences))
        shown = f"{seed.request}\n\nSentence: {_EXAMPLE_SENTENCE}\nAbout Marrow Bridge:\n" + "\n".join(f"- {e}" for e in seed.examples)
        kv = {"call": self._kv(chunk, [*self.model.template.footer_ids, *self.model.encode(shown)])}
        pairs = [(sentence, opening) for sentence in sentences for opening in seed.openings]
        random.shuffle(pairs)
        pairs = pairs[: s.questions_per_call]
        prompts = [
            Prompt(tuple(self.model.encode(f"\n\nSentence: {sentence}\nAbout {document.title}:\n- {opening}")), ("call",))
            for sentence, opening in pairs
        ]
        written = generate(self.model, prompts, kv, self.layout, max_new_tokens=s.question_tokens, also_stop=self.newline)
        text = " ".join([document.title, *sentences])
        questions = []
        for (_, opening), row in zip(pairs, written, strict=True):
            question = (opening + self.model.tokenizer.decode(row.ids, skip_special_tokens=True)).strip()
            reason = "unfinished question" if not row.finished else _bad_question(question, document.title, text)
            if reason is None and normal(question) in asked[document.id]:
                reason = "duplicate"
            if reason:
                dropped[reason] += 1
                continue
            asked[document.id].add(normal(question))
            questions.append((document.id, chunk, question, seed))
        return questions

    def _window(self, call: int) -> tuple[Document, list[str]]:
        """A document and whole sentences of it, at most ``chunk_tokens``, around a point that walks evenly (by the golden
        ratio) over all the collection's tokens: documents get calls in proportion to their length."""
        start = Random(f"{self.settings.seed}/walk").random()
        point = int((start + call * 0.6180339887498949) % 1.0 * self.total)
        which = 0
        while point >= self.lengths[which]:
            point -= self.lengths[which]
            which += 1
        sentences = self.sentences[self.ids[which]]
        at, before = 0, 0
        while before + sentences[at][1] <= point:
            before += sentences[at][1]
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
        return self.documents[self.ids[which]], [text for text, _ in sentences[low:high]]

    def _kv(self, chunk: str, more: Sequence[int]) -> torch.Tensor:
        """The exact KV of chunk (and more) behind the header, to be shared by rows as if it were a cartridge."""
        header = self.model.template.header_ids
        return self.model.prefill([*header, *self.model.encode(chunk), *more])[:, :, :, len(header) :]


def _sentences(model: FrozenModel, document: Document) -> list[tuple[str, int]]:
    spans = [document.text[a:b].strip() for a, b in split_sentences(document.text)]
    return [(text, max(1, len(model.encode(text)))) for text in spans if re.search(r"\w", text)]


_SMALL = frozenset(
    "a about again all also an and before any are as at be been but by can could describe did do does each false fill find for from gap give go guess had "
    "has have he her him his how i if in into is it its know like list made many me more most much my name named need no not of on one only or "
    "other our out over please quiz report riddle say sentence should show so some state sum tell than that the their them then there these they thing "
    "this those time to true up us want was we were what when where which who whom whose why will with would write year years you your briefly".split()
)


def normal(text: str) -> str:
    """Words in lower case: two questions with the same are one wording."""
    return " ".join(re.findall(r"\w+", text.lower()))


def _bad_question(question: str, title: str, text: str) -> str | None:
    """Why a question is not worth answering, or None."""
    words = re.findall(r"\w+", question)
    if len(words) < 3 or question[-1] not in "?.":
        return "malformed question"
    if _loops(words):
        return "loop"
    lower = text.lower()
    content = [w for w in words[1:] if w.lower() not in _SMALL and len(w) > 2]
    # A small model wanders off: most of what it asks about must occur in the text.
    if content and sum(w.lower()[:5] in lower for w in content) < 0.6 * len(content):
        return "off topic"
    # Once several cartridges are loaded, a question has to say whom it means: a name, or a word of the title.
    names = {w for w in re.findall(r"\w{2,}", text) if w[0].isupper() and w.lower() not in _SMALL}
    title_words = {w.lower() for w in re.findall(r"\w+", title) if len(w) > 3}
    if not any(w in names or w.lower() in title_words for w in words[1:]):
        return "no named subject"
    return None


def _bad_answer(answer: Generation, model: FrozenModel) -> str | None:
    if not answer.finished:
        return "answer too long"
    if not answer.ids or not model.decode(answer.ids):
        return "empty answer"
    return "loop" if _loops(answer.ids) else None


def _loops(items: Sequence[Any]) -> bool:
    """Whether some three items in a row come three times."""
    counts = Counter(tuple(items[i : i + 3]) for i in range(len(items) - 2))
    return bool(counts) and max(counts.values()) >= 3


def _made_with(model: FrozenModel, documents: Collection, settings: SelfStudy) -> str:
    about = {k: v for k, v in vars(settings).items() if k != "conversations"}
    # The collection's own hash leaves ids out, but conversations are filed by id.
    texts = hashlib.sha256("\n".join(f"{d.id}\t{d.hash}" for d in documents.documents).encode()).hexdigest()
    return json.dumps({"model": model.fingerprint, "system": model.system, "documents": texts, **about}, sort_keys=True)


def _write(file: Path, items: Sequence[Conversation], dropped: Counter[str], made_with: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, list[Any]] = {
        "document": [i.document for i in items], "kind": [i.kind for i in items], "question": [i.question for i in items],
        "prompt": [i.prompt for i in items], "answer": [i.answer for i in items],
        "top_ids": [i.top_ids.reshape(-1) for i in items], "top_logprobs": [i.top_logprobs.reshape(-1) for i in items],
    }
    types = [pa.string()] * 3 + [pa.list_(pa.int32())] * 3 + [pa.list_(pa.float32())]
    schema = pa.schema(
        [pa.field(n, t) for n, t in zip(columns, types, strict=True)],
        metadata={"made_with": made_with, "dropped": json.dumps(dropped, sort_keys=True)},
    )
    partial = file.with_suffix(".partial")
    pq.write_table(pa.table(columns, schema=schema), partial, write_page_checksum=True)
    with open(partial, "rb+") as handle:
        os.fsync(handle.fileno())
    partial.replace(file)


def _read(file: Path) -> tuple[list[Conversation], Counter[str], str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(file, page_checksum_verification=True)
        items = []
        for document, kind, question, prompt, answer, top_ids, top in zip(*table.to_pydict().values(), strict=True):
            shape = (len(answer), -1)
            items.append(Conversation(
                document, kind, question, np.array(prompt, np.int32), np.array(answer, np.int32),
                np.array(top_ids, np.int32).reshape(shape), np.array(top, np.float32).reshape(shape),
            ))
        about = table.schema.metadata
        return items, Counter(json.loads(about[b"dropped"])), about[b"made_with"].decode()
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError) as error:
        raise RunError(f"{file} is damaged; delete it and run the same command again") from error
