"""Write docs/results.md from recorded runs: ``python docs/make_results.py``."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from cas.evaluation.recording import read_run
from experiments.claims.lab import NAMES, load, report

PAGE = Path(__file__).with_name("results.md")
RESULTS = Path(__file__).parents[1] / "experiments" / "results"
RUNS = RESULTS / "claims"
OWN, FOUR = "the right document's cartridge (oracle)", "4 retrieved cartridges"
NONE, FULL, RAG = "no document", "the right document in the prompt", "RAG, as many tokens as 4 cartridges"


def recorded(name: str) -> Path | None:
    """The newest recorded run of a claim."""
    return max((RUNS / name).glob("*/results.json"), default=None)


def text() -> str:
    """The page."""
    parts = [
        f"""# Results

Made by `python docs/make_results.py`. Every figure comes from a recorded run under `experiments/results/`; `python -m
cas.evaluation.check` recomputes the metrics of a run from its predictions. Brackets are 95% intervals from a bootstrap
over documents. *Exact* counts answers that match exactly, *contains* those that contain a right answer, both in
percent; *F1* is the overlap of words. What was tried and did not work is in the [log](../experiments/LOG.md).

## Fictional documents: `make demo`

30 [fictional documents](worlds.md) of 627 tokens on average, cartridges of 32 to 40 positions (a sixteenth), the
embedded reader; 480 questions whose wording occurs in no training conversation. RAG uses vectors and BM25 with its
default chunks.

{_table("demo/2026-11-26-cpu", ("exact_match",), DEMO)}

The same questions about 16 of these documents, always with nine other cartridges loaded. The last two rows train each
cartridge alone, on the same conversations:

{_table("demo/2026-11-26-cpu", ("exact_match",), SAMPLE)}

Joint training gains 3.4 [0.8, 6.5] points over isolated training from the same initialization. Isolated training as in
the paper, from a document's first tokens and at `offset` positions, collapses when others are loaded.

## A real model: `make demo-real`

Eight documents about a harbor town, 263 tokens on average, 64 positions each (a quarter), SmolLM2-135M-Instruct; 57
questions. This takes about half an hour on two cores (the recorded run used one and took 57 minutes).

{_table("demo_real/2026-11-26-cpu", ("contains", "f1"), REAL)}

Loaded together, cartridges of this small model confuse documents, and documents this short answer better as text. With
first-token initialization in place of attention matching, the same training gave:

{_table("demo_real/2026-11-25-cpu", ("contains", "f1"), REAL)}

## Joint against isolated training on Wikipedia text

The first 250 words of 24 articles from SQuAD's development set, a position per 8 tokens, SmolLM2-135M-Instruct, 200
questions, one seed. Joint and isolated training use the same conversations and 855,544 tokens each. The articles are
not part of this repository: the run read them from `squad_dev_v1/documents.jsonl.gz` and `questions.jsonl.gz` under
`$CAS_DATA`.

{_table("joint_vs_isolated/2026-11-25-cpu-squad24", ("contains", "f1"), SQUAD)}

- Retrieved text beats retrieved cartridges by far on these short texts.
- With all 24 loaded, joint training is ahead by 7.0 [3.8, 10.6] points of contains and 5.2 [3.7, 7.1] of F1. Both are
  far below one cartridge alone, and isolated cartridges fall below no document at all.
- With four retrieved, joint training does not help: contains and F1 do not differ, and the right answer is less likely
  than after isolated training (log-perplexity +0.43 [0.29, 0.56]). The same holds with the right cartridge alone (+0.17
  [0.01, 0.29]).
- On eight excerpts of 500 words the advantage with all loaded did not show ([log](../experiments/LOG.md)).

## The papers' claims

Each claim has the paper's figure, ours, and a verdict on the whole 95% interval: *confirmed* if all of it is on the
right side of the limit, *contradicted* if all of it is on the wrong side, else *undecided*. Intervals resample
documents, with all their questions and seeds. Figures are percent of test questions answered exactly unless a claim
says otherwise. The runs use fictional documents, the embedded reader and a CPU. The papers' models are a thousand times
larger, so compare the size of effects, not absolute accuracy. `make claims` runs all claims in hours; each command runs
one in minutes; both resume.
"""
    ]
    for name in NAMES:
        claim, file = load(name), recorded(name)
        if file is None:
            reason = claim.not_run or "no run is recorded yet"
            parts.append(f"## {NAMES.index(name) + 1}. {claim.title}\n\n*Paper:* {claim.paper}\n\nNot run: {reason}.\n")
            continue
        run, _ = read_run(file.parent)
        parts.append(
            report(claim, run)
            + f"\n[Recorded run]({_link(file)}): `{run['command']}`, {run['date'][:10]}, {run['hardware']['cpu']}, seeds "
            f"{', '.join(map(str, run['seeds']))}.\n"
        )
    return "\n".join(parts)


DEMO = {
    "no_context": NONE,
    "full_document": FULL,
    "rag_hybrid": RAG,
    "joint_oracle": OWN,
    "joint_loaded10": "that cartridge and 9 others",
    "joint_retrieved4_hybrid": FOUR,
}
SAMPLE = {
    "sample_joint_loaded10": "joint training",
    "isolated_loaded10": "isolated, same initialization",
    "isolated_paper_loaded10": "isolated as in the paper",
}
REAL = {
    "no_context": NONE,
    "full_document": FULL,
    "oracle": OWN,
    "loaded": "all 8 cartridges loaded",
    "retrieved4": FOUR,
}
SQUAD = {
    "no_context": NONE,
    "full_document": FULL,
    "rag": RAG,
    **{
        f"{how}_{arm}": f"{title}, {how}"
        for arm, title in (("oracle", OWN), ("loaded", "all 24 cartridges loaded"), ("retrieved4", FOUR))
        for how in ("joint", "isolated")
    },
}


def _table(folder: str, metrics: Sequence[str], arms: Mapping[str, str]) -> str:
    """Figures of a recorded run, a row per arm, with a link to the run."""
    run, _ = read_run(RESULTS / folder)
    titles = {"exact_match": "exact", "contains": "contains", "f1": "F1"}
    rows = [f"| | {' | '.join(titles[m] for m in metrics)} |", "|---" * (1 + len(metrics)) + "|"]
    for arm, title in arms.items():
        rows.append(f"| {title} | {' | '.join(_cell(run['metrics'][f'{arm}.{m}']) for m in metrics)} |")
    file = RESULTS / folder / "results.json"
    return "\n".join(rows) + f"\n\n[Recorded run]({_link(file)}): `{run['command']}`, {run['date'][:10]}."


def _cell(figure: Mapping[str, Any]) -> str:
    return f"{figure['mean']:.1f} [{figure['low']:.1f}, {figure['high']:.1f}]"


def _link(file: Path) -> str:
    return (Path("..") / file.relative_to(RESULTS.parents[1])).as_posix()


if __name__ == "__main__":
    PAGE.write_text(text(), encoding="utf-8")
