"""Write docs/scaling.md from the code's formulas and recorded rates: ``python docs/make_scaling.py``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from budget.manager import guest_bytes, trainee_bytes
from budget.memory_plan import size
from cas.model.positions import cartridge_size
from cas.options import EFFORTS, Training
from cas.training.ranks.deals import deals_every, steps_of_a_rank

RESULTS = Path(__file__).parents[1] / "experiments" / "results"
BENCHMARKS = RESULTS / "benchmarks" / "cpu-2026-11-25-v2" / "results.json"
SCHEDULE = RESULTS / "ranks_schedule" / "2026-12-01-cpu" / "results.json"
TOKENS, RATIO, POOL = 1024, 16.0, 20
# Assumptions, none of them measured: see the page.
SPEED = 0.3 * 989e12  # FLOP/s of a GPU
DECODED = 2000.0  # tokens/s that a GPU decodes in self-study
KEPT = 0.5  # of the questions
PASSAGES = 1 / 3  # reconstruction, beside the written conversations


@dataclass(frozen=True)
class Model:
    """A frozen model: parameters, layers, KV heads, their dimension, bytes of its weights."""

    name: str
    parameters: float
    layers: int
    kv_heads: int
    head_dim: int

    @property
    def elements(self) -> int:
        """Numbers in a cartridge of a document of ``TOKENS``."""
        return 2 * self.layers * self.kv_heads * self.head_dim * cartridge_size(TOKENS, None, RATIO, None)


MODELS = (Model("SmolLM2-135M", 0.1345e9, 30, 3, 64), Model("Qwen3-8B", 8.19e9, 36, 8, 128))


@dataclass(frozen=True)
class Case:
    """A collection on a number of GPUs."""

    title: str
    documents: int
    gpus: int


CASES = (Case("10,000 documents on 8 GPUs", 10_000, 8), Case("a billion tokens on 512 GPUs", 976_562, 512))


def measured(name: str) -> float:
    """A figure of the recorded benchmarks."""
    return float(json.loads(BENCHMARKS.read_text())["measurements"][name]["mean"])


def plan(case: Case, model: Model) -> dict[str, Any]:
    """The figures of one case: bytes, FLOP and seconds."""
    training, effort = Training(pool=POOL), EFFORTS["standard"]
    written = max(effort.least, round(effort.per_token * TOKENS))
    conversations = round(written * (1 + PASSAGES))
    own = measured("step_vs_frozen_smollm2.tokens") / (training.targets * training.per_target)
    each, documents, gpus = model.elements, case.documents, case.gpus
    steps = steps_of_a_rank(training, conversations * documents, documents, gpus)
    every = deals_every(None, documents, steps, gpus)
    here, deals = documents / gpus, steps // every
    step_s = training.targets * training.per_target * own * 4 * model.parameters / SPEED
    copy_s = here * 12 * each / (1e6 * measured("store_write_vs_copy_reader.megabytes_per_second"))
    decoded = documents * written / KEPT * own
    studied = (
        conversations * documents * own / 2 * 20 * 8
    )  # half of the tokens are answers; 20 tokens and probabilities
    prefill = 2 * model.parameters * TOKENS
    cost = documents * conversations * own * training.epochs * 4 * model.parameters
    study_s = decoded / (DECODED * gpus)
    return {
        "written": written,
        "conversations": conversations,
        "own": own,
        "steps": steps,
        "every": every,
        "deals": deals,
        "cartridge": 4 * each,
        "pool": POOL * trainee_bytes(each),
        "guest": guest_bytes(each),
        "weights": 2 * model.parameters,
        "values": 4 * each * documents,
        "state": 12 * each * documents,
        "disk": 2 * 12 * each * documents * 17 // 16 + 12 * each * documents,
        "studied": studied,
        "rotations": steps * 2 * 12 * each,
        "dealing": deals * 2 * 12 * each * here,
        "training_h": steps * step_s / 3600,
        "deals_h": deals * copy_s / 3600,
        "study_h": study_s / 3600,
        "merge_h": documents * 4 * each / (1e6 * measured("store_write_vs_copy_reader.megabytes_per_second")) / 3600,
        "prefills": (cost / documents) / prefill,
        "even_full": (cost + study_s * gpus * SPEED) / (4 * prefill) / documents,
        "even_rag": (cost + study_s * gpus * SPEED) / (3 * 4 * TOKENS / RATIO * 2 * model.parameters) / documents,
    }


def text() -> str:
    """The page."""
    rates = {"write": "store_write_vs_copy_reader", "read": "store_read_vs_copy_reader"}
    megabytes = {key: measured(f"{name}.megabytes_per_second") for key, name in rates.items()}
    tokens, seconds = (measured(f"step_vs_frozen_smollm2.{name}") for name in ("tokens", "seconds"))
    flops = measured("step_vs_frozen_smollm2.tflops") * 1e12 * seconds / tokens / MODELS[0].parameters
    model, columns = MODELS[1], [plan(case, MODELS[1]) for case in CASES]
    simulation = json.loads(SCHEDULE.read_text())

    def row(label: str, show: Any) -> str:
        return f"| {label} | " + " | ".join(show(c, case) for c, case in zip(columns, CASES, strict=True)) + " |"

    table = "\n".join(
        [
            row("documents of a rank", lambda c, case: f"{case.documents / case.gpus:,.0f}"),
            row("steps of a rank, 4 targets of 8 conversations", lambda c, _: f"{c['steps']:,}"),
            row("deals, one every so many steps", lambda c, _: f"{c['deals']}, {c['every']:,}"),
            row("GPU: weights, bfloat16", lambda c, _: size(c["weights"])),
            row(f"GPU: pool of {POOL}, 16 bytes a number", lambda c, _: size(c["pool"])),
            row("store when finished, 4 bytes a number", lambda c, _: size(c["values"])),
            row("shards, 12 bytes a number", lambda c, _: size(c["state"])),
            row("disk while a deal is made (at most)", lambda c, _: size(c["disk"])),
            row("conversations on disk, about", lambda c, _: size(c["studied"])),
            row("read and written by rotations, each rank", lambda c, _: size(c["rotations"])),
            row("read and written by deals, each rank", lambda c, _: size(c["dealing"])),
            row("self-study, hours (assumed rate)", lambda c, _: f"{c['study_h']:.1f}"),
            row("training, hours (assumed rate)", lambda c, _: f"{c['training_h']:.1f}"),
            row("deals, hours (recorded write rate, each rank its own)", lambda c, _: f"{c['deals_h']:.2f}"),
            row("merging on the first rank, hours (recorded write rate)", lambda c, _: f"{c['merge_h']:.2f}"),
            row("GPU hours", lambda c, case: f"{case.gpus * (c['study_h'] + c['training_h'] + c['deals_h']):,.0f}"),
            row("training, in prefills of every document", lambda c, _: f"{c['prefills']:,.0f}"),
            row("questions a document until paid, against four documents", lambda c, _: f"{c['even_full']:,.0f}"),
            row("the same against RAG of three times the tokens", lambda c, _: f"{c['even_rag']:,.0f}"),
        ]
    )
    small, large = (4 * m.elements for m in MODELS)
    one = columns[0]
    figures = simulation["figures"]

    def spread(name: str) -> str:
        found = figures[name]
        return (
            f"| {name.replace('_', ' ')} | "
            + " | ".join(f"{found[k]:.4g}" for k in ("mean", "least", "p1", "p99", "most"))
            + " |"
        )

    counts = "\n".join(
        map(spread, ("conversations", "conversations_at_half_time", "seen_as_distractor", "ranks_visited"))
    )
    settings = simulation["settings"]
    return f"""# Many GPUs

Made by `python docs/make_scaling.py` from the code's formulas and recorded rates. No run on more than one GPU is recorded.

```
torchrun --nproc-per-node 8 -m cas.train --collection manuals/      # or: deepspeed --num_gpus 8 --module cas.train …
torchrun --nproc-per-node 8 -m cas.train --collection manuals/ --zero 3    # needs: pip install -e '.[deepspeed]'
python -m cas merge runs/both runs/manuals runs/wiki                # stores that were trained apart
```

- The documents are split over the processes (*ranks*). Self-study, first values and embedding go by parts of at most 256
  documents. Training goes by *shards*: every rank has its own documents, pool and budget, and distractors from its own.
- Documents are dealt out anew every so many steps (`--exchange-every`), at random by the seed, so that they meet others.
  No gradient travels between ranks.
- Ranks share one file system. A deal copies cartridges and their Adam state into new shards before the old ones go. A
  lost rank ends the command; the same command, on any number of ranks, goes on from the last checkpoints. On as many
  ranks, the result is the same bit for bit as without the loss.
- At the end the first rank copies the cartridges, without Adam state, into the store: an ordinary one, as after training
  by one process. `--steps` counts the steps of all ranks together.
- In a trial on eight fictional documents, 1, 2 and 4 ranks answered 80.5, 82.0 and 78.9 percent of 128 questions
  ([log](../experiments/LOG.md), 2026-12-01).
- `--zero 3` is for a model that one GPU cannot hold: every rank keeps a part of each decoder layer, and layers are put
  together for the moment in which they compute. Otherwise every rank has the whole model, which is faster.
- While ranks train, documents can be added to the collection for the next round, but not changed or dropped.

## A plan

{model.name} in bfloat16; documents of {TOKENS:,} tokens, `--ratio 16`: cartridges of {cartridge_size(TOKENS, None, RATIO, None)} positions.

| | {" | ".join(case.title for case in CASES)} |
|---|{"---|" * len(CASES)}
{table}

How the rows come about:

- **A cartridge** has 2 · layers · KV heads · head dimension · positions numbers: {model.elements:,} here, {size(large)} of values. For
  SmolLM2-135M it is {size(small)}, as the [README](../README.md) says of the recorded demo. A trained one takes 16 bytes a number on the
  GPU (`budget.manager.trainee_bytes`), 12 on disk. The plan of the command line counts 25.5 for replaced versions; a deal
  has the old shards beside the new ones. Activations are measured on the model: `--dry-run` prints them.
- **Conversations**: standard effort writes {one["written"]} about {TOKENS:,} tokens, reconstruction adds up to a third: {one["conversations"]}. Each has
  {one["own"]:.0f} own tokens, as in the [recorded benchmark](performance.md) (`step_vs_frozen_smollm2.tokens`: {tokens:,.0f} in a step of 32).
- **Steps**: four epochs over all conversations, divided by ranks (`ranks.deals.steps_of_a_rank`). A step costs four times
  the parameters in FLOP for each token, forward and backward without gradients of weights; the recorded step of
  SmolLM2-135M took {flops:.1f} times. **Assumed, not measured**: a GPU does {SPEED / 1e12:.0f} TFLOP/s, 30% of the peak of an H100 or H200.
- **Self-study**: twice as many questions as are kept, {one["own"]:.0f} tokens each. **Assumed, not measured**: a GPU decodes
  {DECODED:,.0f} tokens/s of them. On the recorded two-core CPU, SmolLM2-135M keeps {measured("synthesis_vs_sequential_smollm2.conversations_per_second"):.2f} conversations a second.
- **Disk and network**: the store writes {megabytes["write"]:,.0f} MB/s and reads {megabytes["read"]:,.0f} (page cache), recorded as `store_write_vs_copy_reader` and
  `store_read_vs_copy_reader`. Every step of a pool of 20 moves one cartridge in and one out, so a rank on the right
  writes {size(columns[1]["rotations"] / 2 / (columns[1]["training_h"] * 3600))} a second, for which nodes need disks of their own or `--host-memory`. By default deals add half of that,
  over the network. All ranks of a cluster together need a file system of {size(CASES[1].gpus * columns[1]["rotations"] / 2 / (columns[1]["training_h"] * 3600))} a second; what
  is slower than that sets the pace instead of the GPUs.
- **Merging** is the first rank's alone, as a store has one writer: for the cluster it takes longer than training. There,
  train collections of a few thousand documents apart and keep several stores.
- **ZeRO-3** sends all layers twice for each forward and backward pass: {size(2 * 2 * model.parameters)} for this model, about {2 * 2 * model.parameters / 450e9 * 1000:.0f} ms of an
  NVLink of 450 GB/s, next to {32 * one["own"] * 4 * model.parameters / SPEED * 1000:.0f} ms of computing.
- **Worth it?** A question over four documents prefills {4 * TOKENS:,} tokens or loads four cartridges; RAG of three times their
  tokens prefills {int(3 * 4 * TOKENS / RATIO):,}. Multiply GPU hours by your price; the report tells after how many questions a trained store
  has paid, from measured seconds.

## Even coverage

`{simulation["command"].removesuffix(" --output DIR")}` goes through the real deals and schedules of
{settings["documents"]:,} documents on {settings["ranks"]} ranks: {settings["conversations"]} conversations each, {settings["epochs"]:g} pass, {simulation["deals"]} deals, no model
([record](../{SCHEDULE.parent.relative_to(RESULTS.parents[1])}/results.json)).

| for each document | mean | least | 1% | 99% | most |
|---|---|---|---|---|---|
{counts}

A turn as target is eight conversations, so the least and the most are a few turns apart; what a document lacks it gets
first after the next deal. Of random pairs of documents, {figures["pairs_that_met"]["mean"]:.1%} were on one rank together, where {simulation["deals"]} independent deals
make it {1 - (1 - 1 / settings["ranks"]) ** simulation["deals"]:.1%}.
"""  # noqa: E501


if __name__ == "__main__":
    Path(__file__).with_name("scaling.md").write_text(text(), encoding="utf-8")
