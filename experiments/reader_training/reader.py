"""Accuracy of the embedded reader: exact match of whole answers on worlds that it was not trained on.

    python -m experiments.reader --output DIR

Lookups in a chunk of 512 tokens, in a whole document, in retrieved chunks with the right one among others; and with 2,
4 and 10 documents loaded as separately prefilled KV (``fixed``, ``offset``) or as one text. The other kinds of question
are measured in the whole document, or with both documents.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Literal, get_args

from cas import console
from cas.errors import ConfigError
from cas.options import READER, parse
from experiments import common

if TYPE_CHECKING:
    from torch import Tensor

    from cas.data.collection import Collection, Document, Question
    from cas.evaluation.recording import Prediction
    from cas.model.decoding import Prompt
    from cas.model.frozen import FrozenModel

LOADED = (2, 4, 10)
Way = Literal["fixed", "offset", "text"]


@dataclass(frozen=True)
class Context:
    """What the model reads before a question. ``str(context)`` is its name in results (``documents4_offset``)."""

    kind: Literal["no_context", "chunk512", "whole_document", "rag_shaped", "documents"]
    count: int | None = None
    """Number of documents (``documents``)."""
    way: Way = "fixed"
    """Their positions as separately prefilled KV, or one text."""

    def __str__(self) -> str:
        return f"{self.kind}{self.count or ''}" + ("" if self.way == "fixed" else f"_{self.way}")


DOCUMENTS = [Context("documents", n, way) for n in LOADED for way in get_args(Way)]


@dataclass(frozen=True)
class Config:
    """Measure a reader."""

    model: str = READER
    """The reader in the package, or the folder of another."""
    output: str = "runs/reader/results"
    """Folder of the results."""
    documents: int = 64
    """Documents of the world that is read."""
    collection_seed: int = 1000
    """Its seed; reader training uses others."""
    questions: int = 512
    """Lookups to ask in every arm, and questions of all other kinds together."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute type."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure. Returns the exit status."""
    return console.run(lambda: experiment(parse(Config, "python -m experiments.reader", arguments)))


def experiment(config: Config) -> int:
    """Ask under every arm, write the results, print the table."""
    from cas.data.worlds import LOOKUP, world
    from cas.evaluation.metrics import exact_match
    from cas.evaluation.recording import flags, table, write_run
    from cas.model.frozen import FrozenModel

    if config.documents < max(LOADED) or config.questions < 1:
        raise ConfigError(f"give --documents {max(LOADED)} or more, and --questions 1 or more")
    model = FrozenModel.from_pretrained(config.model, dtype=config.dtype)
    collection = world(config.collection_seed, config.documents)
    shuffled = Random(config.collection_seed).sample(collection.questions, len(collection.questions))
    lookups = [q for q in shuffled if q.kind == LOOKUP][: config.questions]
    others = [q for q in shuffled if q.kind != LOOKUP][: config.questions]
    predictions: list[Prediction] = []
    for context, questions in contexts(lookups, others):
        for question, answer in read(model, collection, context, questions):
            score = {"exact_match": exact_match(answer, question.answers)}
            kind = "" if question.kind == LOOKUP else f"_{question.kind.replace(' ', '_')}"
            predictions.append(
                {
                    "arm": f"{context}{kind}", "seed": config.collection_seed, "question_id": question.id,
                    "document_id": question.document_ids[0], "scores": score, "answer": answer,
                }
            )  # fmt: skip
        common.log_arm(str(context))
    names = list(dict.fromkeys(p["arm"] for p in predictions))
    counts = Counter(p["arm"] for p in predictions)
    complete = [name for name in map(str, DOCUMENTS) if counts[name] == len(lookups)]
    run = write_run(
        Path(config.output),
        name="reader",
        command="python -m experiments.reader " + "--model DIR " * (config.model != READER) + flags(config, "model"),
        seeds=[config.collection_seed],
        model="embedded reader" if config.model == READER else {"reader": model.fingerprint},
        collection={"name": collection.name, "sha256": collection.hash},
        settings={k: v for k, v in asdict(config).items() if k not in ("model", "output")},
        predictions=predictions,
        metric_names=["exact_match"],
        keep_answers=True,
        compare=[("whole_document", arm) for arm in complete],  # a question whose ten texts do not fit has no pair
    )
    print(table(run, names, ["exact_match"]))
    return 0


def contexts(lookups: Sequence[Question], others: Sequence[Question]) -> Iterator[tuple[Context, Sequence[Question]]]:
    """Every context with its questions."""
    yield Context("no_context"), lookups
    yield Context("chunk512"), lookups
    yield Context("whole_document"), [*lookups, *others]
    yield Context("rag_shaped"), lookups
    for context in DOCUMENTS:
        yield context, lookups


def read(
    model: FrozenModel, collection: Collection, context: Context, questions: Sequence[Question]
) -> Iterator[tuple[Question, str]]:
    """Questions with the model's answers, in the order of their documents, so that prefilled texts are reused."""
    from cas.model.decoding import Prompt, generate
    from cas.model.positions import Layout

    room = model.geometry.max_positions - 256

    @lru_cache(80)
    def prefilled(text: str) -> Tensor:
        return model.prefill([*model.template.header_ids, *model.encode(text)])[:, :, :, model.layout_header :]

    for question in sorted(questions, key=lambda q: q.document_ids):
        texts, policy = context_texts(model, collection, context, question)
        kv = {f"{i}": prefilled(text) for i, text in enumerate(texts)}
        sizes = [t.shape[3] for t in kv.values()]
        if sum(sizes) > room:
            continue
        layout = Layout(policy, model.layout_header, max(sizes, default=0))
        prompt: Prompt = Prompt(model.question_tokens(question.question), tuple(kv))
        yield question, model.answer_text(generate(model, [prompt], kv, layout, max_new_tokens=24)[0].ids)


def context_texts(
    model: FrozenModel, collection: Collection, context: Context, question: Question
) -> tuple[list[str], Literal["fixed", "offset"]]:
    """The texts of a context, each prefilled by itself, and their positions."""
    from retrieval.chunk import with_title

    # Documents are loaded beside the same others for all questions about them.
    random = Random(f"{context}/{question.id if context.kind == 'rag_shaped' else question.document_ids[0]}")
    gold = [collection[i] for i in question.document_ids]
    others = [d for d in collection.documents if d not in gold]
    whole = [with_title(d.title, d.text) for d in gold]
    if context.kind == "no_context":
        return [], "offset"
    if context.kind == "whole_document":
        return whole, "offset"
    if context.kind == "chunk512":
        return [with_title(gold[0].title, _chunk(model, gold[0], question, 480))], "offset"
    if context.kind == "rag_shaped":
        chunks = [with_title(gold[0].title, _chunk(model, gold[0], question, 100))]
        for document in random.sample(others, 5):
            sentences = document.text.split(". ")
            at = random.randrange(max(1, len(sentences) - 8))
            chunks.append(with_title(document.title, ". ".join(sentences[at : at + 8]).rstrip(".") + "."))
        random.shuffle(chunks)
        return ["\n\n".join(chunks)], "offset"
    assert context.kind == "documents" and context.count is not None, context
    texts = [*whole, *(with_title(d.title, d.text) for d in random.sample(others, context.count - len(whole)))]
    random.shuffle(texts)
    return (["\n\n".join(texts)], "offset") if context.way == "text" else (texts, context.way)


def _chunk(model: FrozenModel, document: Document, question: Question, tokens: int) -> str:
    """Whole paragraphs around the one with the answer, at most ``tokens`` tokens."""
    paragraphs = document.text.split("\n\n")
    names = [p for p in paragraphs if question.answers[0] in p]
    # The paragraph of the subject: the one that has most of the question's capitalized words.
    words = [w for w in question.question.replace("?", "").split()[1:] if w[0].isupper()]
    at = paragraphs.index(max(names, key=lambda p: sum(w in p for w in words)))
    low, high = at, at + 1
    while True:
        grown = [(low - 1, high)] * (low > 0) + [(low, high + 1)] * (high < len(paragraphs))
        fitting = [g for g in grown if len(model.encode("\n\n".join(paragraphs[g[0] : g[1]]))) <= tokens]
        if not fitting:
            return "\n\n".join(paragraphs[low:high])
        low, high = fitting[0]


if __name__ == "__main__":
    sys.exit(main())
