"""The memory plan against what a training really takes: ``python -m experiments.benchmarks.memory`` (some 20 minutes).

Every case is a training in a process of its own. Its resident set's high-water mark is read, and reset, around self-study,
initialization and training; ratios are of the whole plan, so phases that take less have larger ones.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from budget.memory_plan import size
from cas.data.named import million_tokens
from cas.options import DEFAULT_MODEL, READER
from experiments.benchmarks.child import run_child

PHASES = ("self_study", "initialize", "train")
CASES = {  # name: documents, characters of each
    "two sentences": (2, 100),
    "six pages": (6, 5000),
    "twenty documents": (20, 2250),
}
SHORT = ("--conversations", "16", "--steps", "3")  # of a model that is slow on a CPU
Figures = dict[str, int]


def measure(folder: Path, case: str, model: str, *options: str) -> Figures:
    """Bytes planned for the device, and of every phase at its peak, in a training of a case."""
    collection = folder / "documents"
    write_documents(collection, *CASES[case])
    words = ["--collection", str(collection), "--model", model, "--store", str(folder / "store"), *options]
    figures: Figures = json.loads(run_child("memory", *words).splitlines()[-1])
    return figures


def write_documents(folder: Path, count: int, characters: int) -> None:
    """Text files of whole sentences, about so many characters each, from the fictional world."""
    folder.mkdir()
    texts = iter(document.text for document in million_tokens("", 0).documents)
    for number in range(count):
        text = next(texts)
        while len(text) < characters:
            text += "\n\n" + next(texts)
        end = text.rfind(". ", 0, characters)
        (folder / f"{number:02d}.txt").write_text(text[: end + 1] if end > 0 else text[: text.index(". ") + 1])


def peak() -> int:
    """The resident set's high-water mark in bytes, since the last call."""
    status = Path("/proc/self/status").read_text()
    Path("/proc/self/clear_refs").write_text("5")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def child(words: list[str]) -> int:
    """Train with these options, and print the figures as JSON in the last line."""
    from cas import train
    from cas.training import pipeline

    figures: Figures = {}

    def watched(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            peak()
            result = call(*arguments)
            figures[name] = peak()
            return result

        return run

    def planned(*arguments: Any) -> Any:
        plan = plan_memory(*arguments)
        figures["plan"] = plan.device
        return plan

    plan_memory = pipeline.plan_memory
    vars(pipeline).update({name: watched(name, getattr(pipeline, name)) for name in PHASES}, plan_memory=planned)
    status = train.main(words)
    print(json.dumps(figures))
    return status


def main() -> int:
    """Print a table of all cases with both models."""
    print(f"{'case':<18}{'model':<10}{'plan':>10}{'peak':>10}  plan/peak of " + ", ".join(PHASES))
    for case in CASES:
        for model in (READER, DEFAULT_MODEL):
            with tempfile.TemporaryDirectory() as folder:
                options = ("--steps", "30", "--keep-going") if model == READER else SHORT
                figures = measure(Path(folder), case, model, *options)
            highest = max(figures[phase] for phase in PHASES)
            ratios = "  ".join(f"{figures['plan'] / figures[phase]:.2f}" for phase in PHASES)
            name = model.rpartition("/")[2][:8]
            print(f"{case:<18}{name:<10}{size(figures['plan']):>10}{size(highest):>10}  {ratios}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(child(sys.argv[1:]) if sys.argv[1:] else main())
