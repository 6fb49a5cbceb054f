"""Write docs/performance.md and its plot from the newest recorded benchmarks: ``python docs/make_performance.py``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RUNS = Path(__file__).parents[1] / "experiments" / "results" / "benchmarks"
MODELS = {"reader": "reader", "smollm2": "SmolLM2-135M"}
# What is measured: against what, the target (a limit, and whether a ratio should be below or above it).
METRICS: dict[str, tuple[str, str]] = {
    "step_vs_frozen": ("frozen forward and backward over the same tokens, one visible cartridge of 256", "<= 1.10"),
    "step_vs_peft": ("PEFT's CARTRIDGE in a plain loop, the same", "<= 1.00"),
    "mixed_vs_frozen": ("the frozen pass; a quarter of the conversations among up to 10 distractors", "<= 1.40"),
    "rotation_overhead": ("no rotation; half of 20 are exchanged every 10 steps", "<= 1.02"),
    "residents32_vs_8": ("a pool of 8; up to 5 distractors", ""),
    "residents128_vs_8": ("a pool of 8; up to 5 distractors", ""),
    "largest_pool": ("the largest pool that fits the GPU; the planner's", "<= 1.00"),
    "store_write_vs_copy": ("raw files of the same bytes, synced one by one (speed)", ">= 0.70"),
    "store_read_vs_copy": ("raw files of the same bytes (speed)", ">= 0.70"),
    "first_token_vs_full_cold": ("prefill of the four documents", "< 1.00"),
    "first_token_vs_full_warm": ("prefill of the four documents", "< 1.00"),
    "first_token_vs_rag_cold": ("prefill of a RAG prompt of three times the cartridges' tokens", "< 1.00"),
    "first_token_vs_rag_warm": ("prefill of a RAG prompt of three times the cartridges' tokens", "< 1.00"),
    "decode_many": ("tokens a second with full context in the same memory", ""),
    "synthesis_vs_sequential": ("one conversation at a time (conversations a second)", ">= 4.00"),
    "documents1024_vs_256": ("seconds a step with 256 documents", "<= 1.10"),
    "documents4096_vs_256": ("seconds a step with 256 documents", "<= 1.10"),
}


def newest(kind: str = "cpu") -> Path:
    """The newest recorded run of a kind of machine."""
    return max(RUNS.glob(f"{kind}-*/results.json"))


def text() -> str:
    """The page."""
    file = newest()
    found = json.loads(file.read_text(encoding="utf-8"))
    hardware, figures = found["hardware"], found["measurements"]
    ten = {name: 10 * figures[f"step_vs_frozen_{name}.seconds"]["mean"] for name in ("reader", "smollm2")}  # steps
    return f"""# Performance

Made by `python docs/make_performance.py` from a [recorded
run](../{file.parent.relative_to(RUNS.parents[2]).as_posix()}/results.json) (`{found["command"]}`, {found["date"][:10]},
{hardware["cpu"]}, {hardware["cores"]} cores, no accelerator). Each figure is a ratio to a baseline that ran in the same
process, alternating with it: mean and 95% interval over repetitions. With a target of `<=` or `<`, lower is better;
with `>=`, higher is better. Missed targets are **bold**.

![ratios and targets](performance.svg)

| measured | against | target | {" | ".join(MODELS.values())} |
|---|---|---|{"---|" * len(MODELS)}
{chr(10).join(_row(name, found["metrics"]) for name in _measured(found["metrics"]))}

`decode_many` and `first_token` use [fictional documents](worlds.md). Cartridges have a sixteenth of a document's tokens
in `decode_many` and 32 positions in `first_token`, which is a twentieth of the mean document in the reader's tokens and
a twenty-sixth in SmolLM2's. `first_token` names the four documents: retrieval is timed on neither side, and the RAG
prompt is the beginning of their text.

## Where a training step's time goes

Seconds of one step over the same conversations: matrix products with the model's weights, those of attention, and the
rest (copies, exponentials, the optimizer, Python).

{_profile(figures)}

Training a cartridge has a minimum cost: per token and layer, six matrix products with its keys and values, which the
frozen pass does not have. With 256 positions these add 0.41 of the multiplications of the reader's layers forward and
backward, and an eighth of SmolLM2's. `step_vs_frozen` cannot fall below 1 plus that share.

A rotation in `rotation_overhead` writes ten cartridges of 256 positions with their Adam state and reads ten others: 120
MiB each way for every ten steps. Ten steps take the reader {ten["reader"]:.1f} s and SmolLM2 {ten["smollm2"]:.0f} s. On
a CPU no core is free to move data meanwhile; on a GPU a thread reads ahead. `store_read_vs_copy` is below 1 because of
what opening and checking a record costs in Python.

## On a GPU

No run is recorded yet. `python -m experiments.benchmarks --models smollm2 qwen3-8b` takes the same timings there
(qwen3-8b has the model's shape and random weights) and prints the TFLOP/s of a step next to those of a plain matrix
product. `largest_pool` fills the device and compares the pool with the planner's. `residents32_vs_8` and
`residents128_vs_8` show only there whether FlexAttention skips what is invisible.

## Measured values

{_figures(figures)}
"""


def _measured(metrics: dict[str, Any]) -> list[str]:
    return [name for name in METRICS if any(f"{name}_{model}.ratio" in metrics for model in MODELS)]


def _row(name: str, metrics: dict[str, Any]) -> str:
    against, target = METRICS[name]
    cells = []
    for model in MODELS:
        m = metrics.get(f"{name}_{model}.ratio")
        cell = "" if m is None else f"{m['mean']:.2f} [{m['low']:.2f}, {m['high']:.2f}]"
        cells.append(f"**{cell}**" if m is not None and not met(m["mean"], target) else cell)
    return f"| {name} | {against} | {target} | {' | '.join(cells)} |"


def met(value: float, target: str) -> bool:
    """Whether a mean is on the right side of its target (none: always)."""
    if not target:
        return True
    side, limit = target.split()
    return value <= float(limit) if side.startswith("<") else value >= float(limit)


def _profile(figures: dict[str, Any]) -> str:
    rows = ["| | weights | attention | rest |", "|---|---|---|---|"]
    for model, title in MODELS.items():
        for who, label in (("frozen", "frozen pass"), ("step", "step")):
            keys = [f"step_vs_frozen_{model}.profile_{who}_{what}" for what in ("weights", "attention", "rest")]
            if all(key in figures for key in keys):
                rows.append(f"| {title}, {label} | " + " | ".join(f"{figures[key]['mean']:.3f}" for key in keys) + " |")
    return "\n".join(rows)


def _figures(figures: dict[str, Any]) -> str:
    rows = ["| figure | mean |", "|---|---|"]
    for key in sorted(figures):
        if ".profile_" not in key:
            rows.append(f"| {key} | {figures[key]['mean']:,.3g} |")
    return "\n".join(rows)


def plot(to: Path) -> None:
    """Every ratio with its interval, and its target, as an SVG file."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    metrics = json.loads(newest().read_text(encoding="utf-8"))["metrics"]
    names = _measured(metrics)
    matplotlib.rcParams["svg.hashsalt"] = "cas"
    figure, axes = pyplot.subplots(figsize=(8, 0.34 * len(names) + 1.2), layout="constrained")
    for offset, (model, title) in zip((-0.15, 0.15), MODELS.items()):
        at = [(i, metrics[f"{n}_{model}.ratio"]) for i, n in enumerate(names) if f"{n}_{model}.ratio" in metrics]
        means = [m["mean"] for _, m in at]
        spread = [[m["mean"] - m["low"] for _, m in at], [m["high"] - m["mean"] for _, m in at]]
        axes.errorbar(means, [i + offset for i, _ in at], xerr=spread, fmt="o", ms=4, capsize=2, label=title)
    for i, name in enumerate(names):
        if target := METRICS[name][1]:
            side, limit = target.split()
            axes.plot([float(limit)], [i], "k<" if side.startswith("<") else "k>", ms=6)
    axes.axvline(1, color="0.8", lw=1, zorder=0)
    axes.set_xscale("log")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("ratio (black arrows: target, pointing to the good side)")
    axes.legend()
    figure.savefig(to, metadata={"Date": None})


if __name__ == "__main__":
    here = Path(__file__).parent
    here.joinpath("performance.md").write_text(text(), encoding="utf-8")
    plot(here / "performance.svg")
