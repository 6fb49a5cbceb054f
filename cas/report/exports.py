"""The report's rankings and answers in the formats of other tools."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from cas.data.collection import Question
from cas.evaluation.arms import Arm
from cas.evaluation.recording import Prediction
from cas.report.arms import Comparison
from cas.store.files import write_atomically


def write_trec(
    folder: Path, questions: Sequence[Question], rankings: Mapping[str, Mapping[str, Sequence[tuple[str, float]]]]
) -> None:
    """Write ``trec/qrels.txt`` and ``trec/run.<ranking>.txt``, which trec_eval, ranx and ir_measures read.

    ``rankings``: by ranking and question id, (document id, score), best first. White space in ids is percent-encoded:
    the formats have none.
    """
    lines = [f"{_word(q.id)} 0 {_word(d)} 1" for q in questions for d in q.document_ids]
    _write(folder / "trec" / "qrels.txt", lines)
    for name, by_question in rankings.items():
        lines = [
            f"{_word(question)} Q0 {_word(document)} {rank} {score:.6f} {name}"
            for question, ranked in by_question.items()
            for rank, (document, score) in enumerate(ranked, 1)
        ]
        _write(folder / "trec" / f"run.{name}.txt", lines)


def write_ragas(
    folder: Path, comparison: Comparison, questions: Sequence[Question], predictions: Sequence[Prediction]
) -> None:
    """Write ``ragas/<arm>.jsonl``, a line per question as ragas' EvaluationDataset reads it. The retrieved contexts of
    cartridges are the documents that they were trained on."""
    answers = {(p["arm"], p["question_id"]): p.get("answer", "") for p in predictions}
    remove_ragas(folder)  # of arms that the report no longer has
    for name in dict.fromkeys(p["arm"] for p in predictions):
        lines = [
            json.dumps(
                {
                    "user_input": q.question,
                    "retrieved_contexts": list(contexts),
                    "response": answers[name, q.id],
                    "reference": q.answers[0],
                },
                ensure_ascii=False,
            )
            for q, contexts in zip(questions, comparison.contexts(Arm.parse(name), questions), strict=True)
        ]
        _write(folder / "ragas" / f"{name}.jsonl", lines)


def remove_ragas(folder: Path) -> None:
    """Remove what :func:`write_ragas` wrote: it has texts."""
    for file in (folder / "ragas").glob("*.jsonl"):
        file.unlink()


def _word(name: str) -> str:
    return re.sub(r"\s", lambda space: quote(space[0]), name)


def _write(file: Path, lines: Sequence[str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, "".join(f"{line}\n" for line in lines).encode())
