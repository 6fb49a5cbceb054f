"""What several experiments use: progress, training to the end, answers and summaries to print."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cas import console
from cas.errors import RunError

if TYPE_CHECKING:
    from cas.answering.answerer import Answerer
    from cas.data.collection import Question
    from cas.evaluation.recording import Prediction
    from cas.model.frozen import FrozenModel
    from cas.store.store import Store
    from cas.training.trainer import Trainer


def log_arm(arm: str) -> None:
    """Print that an arm is measured."""
    print(f"measured    {arm}", flush=True)


def counter(title: str) -> Callable[[int, int], None]:
    """A progress callback that counts on one line of stderr."""
    return lambda done, total: print(f"\r{title}  {done}/{total} ", end="", file=sys.stderr, flush=True)


def open_store(folder: Path, model: FrozenModel, **options: Any) -> Store:
    """The store in a folder, open for writing; created with ``options`` (see :meth:`Store.create`) if there is none."""
    from cas.store.store import Store

    return Store.open(folder, write=True) if Store.exists(folder) else Store.create(folder, model, **options)


def train(trainer: Trainer, title: str) -> dict[str, Any]:
    """Train to the end, with a line every 20 steps on stderr. Returns what the training cost.

    Raises RunError when interrupted, after saving.
    """

    def show(report: object) -> None:
        step, loss, rate = (getattr(report, name) for name in ("step", "loss", "tokens_per_s"))
        if step % 20 == 0:
            line = f"{title}: step {step}/{trainer.steps} loss {loss:.3f} {rate:.0f} tokens/s"
            print(line, file=sys.stderr, flush=True)

    trainer.on_step = show
    with console.Interrupt().listening() as interrupt:
        if not trainer.run(stop=interrupt):
            raise RunError("interrupted, saved; the same command goes on")
    rows = trainer.store.rows().values()
    return {
        "steps": trainer.steps,
        "trained_tokens": sum(r.trained_tokens for r in rows),
        "adam_steps_each": sum(r.steps for r in rows) / len(rows),
        "conversations_shown_each": sum(r.drawn for r in rows) / len(rows),
        "positions_each": sum(r.p for r in rows) / len(rows),
    }


def with_seed(prediction: Prediction, seed: int) -> Prediction:
    """A prediction with exact match alone, and the seed in its ids: every seed has documents of its own."""
    return {
        **prediction,
        "question_id": f"{seed}/{prediction['question_id']}",
        "document_id": f"{seed}/{prediction['document_id']}",
        "scores": {"exact_match": prediction["scores"]["exact_match"]},
    }


def single_measurement(value: float) -> dict[str, float]:
    """A figure that was measured one time, as results record it."""
    return {"mean": round(value, 1), "low": round(value, 1), "high": round(value, 1), "n": 1}


def show_answers(answerer: Answerer, questions: Sequence[Question]) -> None:
    """Print three questions, what is right, the answer from four retrieved cartridges, and their shares of the
    attention."""
    from cas.answering.prompts import brief

    for question in questions[:: max(1, len(questions) // 3)][:3]:
        answer = answerer.ask(question.question + brief(answerer.model), k=4, max_new_tokens=48)
        shares = ", ".join(f"{c.id} ({c.attention:.1%})" for c in answer.cartridges)
        print(f"{question.question}  (right: {' or '.join(question.answers)})\n  {answer.text}\n  from {shares}\n")


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    """Write ``summary.json`` and print where it is, how long everything took and how much memory."""
    from cas.evaluation.resume import write

    write(folder / "summary.json", summary)
    seconds, peak = summary["wall_s"], summary["peak_anonymous_bytes"] / 2**30
    print(f"{seconds:.0f} s, at most {peak:.1f} GiB; written: {folder}/summary.json, {folder}/results")
