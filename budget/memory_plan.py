"""Bytes that a training will take, and the largest pool that fits. Plain arithmetic on sizes; no tensors."""

from __future__ import annotations

from dataclasses import dataclass

from budget.manager import guest_bytes, trainee_bytes

RUNTIME_BYTES = 700 * 2**20  # interpreter, libraries, allocator: see docs/architecture.md


class DoesNotFit(ValueError):
    """The budget is too small for what was asked; the message has the figures."""


@dataclass(frozen=True)
class Sizes:
    """What the plan is computed from, all in numbers of elements, tokens or bytes.

    Attributes:
        weights: bytes of the frozen model. element: bytes of one number in its compute dtype.
        largest: elements of the largest cartridge. total: elements of all cartridges together.
        documents: how many. tokens: of all documents.
        step_tokens: own tokens of one step; logit_rows: of these, rows whose logits are held at a time.
        prefix: sum of the prefix positions (header included) that the step's conversations see.
        layers, hidden, intermediate, vocabulary, query_heads, kv_heads, head_dim: the model's shape.
        longest: own tokens of the longest conversation. rows: conversations of a step.
        decoded: positions that one batch of self-study may hold.
        matched: tokens of the longest document that gets attention-matching initialization (0: none does); matched_on:
            tokens of the conversations it is computed from.
    """

    weights: int
    element: int
    largest: int
    total: int
    documents: int
    tokens: int
    step_tokens: int
    logit_rows: int
    prefix: int
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    query_heads: int
    kv_heads: int
    head_dim: int
    longest: int
    rows: int
    decoded: int = 0
    matched: int = 0
    matched_on: int = 0


@dataclass(frozen=True)
class Plan:
    """Memory in bytes. ``device``: runtime (on a CPU), weights, activations, pool and guests (frozen distractors)."""

    documents: int
    tokens: int
    pool: int
    guests: int
    recompute: bool
    weights: int
    activations: int
    trainees: int
    guest_copies: int
    runtime: int
    device: int
    host: int
    disk: int
    largest: int

    def lines(self) -> list[str]:
        """The plan as text, a line for each kind of memory."""
        return [
            f"documents   {self.documents:,} ({self.tokens:,} tokens)",
            f"cartridge   at most {size(self.largest * 4)} of values, {size(self.largest * 12)} with optimizer state",
            f"device      {size(self.device)}: runtime {size(self.runtime)}, weights {size(self.weights)}, "
            f"activations up to {size(self.activations)}{' (layers computed twice)' if self.recompute else ''}, "
            f"pool of {self.pool} {size(self.trainees)}, {self.guests} frozen distractors {size(self.guest_copies)}",
            f"host        up to {size(self.host)} for evicted cartridges and those in transit",
            f"disk        {size(self.disk)} for cartridges and state",
        ]


def activation_bytes(s: Sizes, recompute: bool = False, merged: bool = True) -> int:
    """An upper bound of what forward and backward over a packed step keep. ``recompute``: layers keep only their input
    and are computed again one at a time. ``merged``: attention of a CPU, which keeps its weights; without it resident
    cartridges are counted by :func:`make_plan`.

    Per layer and token: about 14 hidden-sized, 6 query-sized, 6 key-sized and 5 MLP-sized tensors; per layer: the
    attention weights of every head, and the visible prefix in the compute dtype; once, the weights' gradients and
    masks; for the rows held at a time, three float32 copies of the logits and one in the compute dtype.
    """
    kv_width, q_width = s.kv_heads * s.head_dim, s.query_heads * s.head_dim
    per_token = 14 * s.hidden + 6 * q_width + 6 * kv_width + 5 * s.intermediate
    padded = s.rows * s.longest  # own keys and queries, padded to the longest conversation inside attention
    seen = 2 * kv_width * s.prefix if merged else 0
    own = (2 * kv_width + 2 * q_width) * padded
    weights = s.query_heads * s.longest * (s.prefix + padded) if merged else 0
    logits = s.logit_rows * s.vocabulary * (s.element + 3 * 4)
    layer = s.step_tokens * per_token + weights
    kept = s.layers * seen + (layer + s.layers * s.step_tokens * s.hidden if recompute else s.layers * layer)
    return (kept + 2 * own + 2 * weights) * s.element + logits


def decoding_bytes(s: Sizes) -> int:
    """An upper bound of what a batch of self-study keeps: its whole KV cache twice (gathered, and while gathering), and
    the logits of one new token for as many rows as would fit at 64 positions each."""
    per_position = 2 * s.layers * s.kv_heads * s.head_dim * s.element
    return 2 * s.decoded * per_position + s.decoded // 64 * s.vocabulary * 4


def matching_bytes(s: Sizes) -> int:
    """An upper bound of what attention-matching initialization keeps: the document's KV twice; of one key head four
    float32 copies of all scores, conversations padded to twice their tokens; and a layer's activations."""
    if not s.matched:
        return 0
    kv = 2 * s.layers * s.kv_heads * s.head_dim * s.matched
    rows = 2 * s.matched_on
    scores = 4 * (s.query_heads // s.kv_heads) * rows * (s.matched + s.longest) * 4
    return 2 * kv * s.element + scores + max(rows, s.matched) * (6 * s.hidden + 5 * s.intermediate) * s.element


def make_plan(
    s: Sizes,
    *,
    pool: int | None,
    guests: int,
    budget: int | None,
    host_budget: int | None,
    on_cpu: bool,
    merged: bool | None = None,
    frozen: int = 0,
) -> Plan:
    """What training will take. Layers are computed twice where it does not fit otherwise.

    Args:
        pool: cartridges in training at a time; by default as many as fit ``budget``, at most 20 (as in 2606.04557).
        guests: frozen distractors; with the pool never more than documents and ``frozen`` cartridges of earlier rounds.
        merged: attention is that of a CPU; by default ``on_cpu``.

    Raises: DoesNotFit with the figures if the budget cannot hold it.
    """
    runtime = RUNTIME_BYTES if on_cpu else 0
    merged = on_cpu if merged is None else merged
    # A GPU step concatenates residents in the compute dtype: cast, concatenated, and the gradient of that.
    beside = 0 if on_cpu else 3 * s.element * s.largest
    each, guest = trainee_bytes(s.largest), guest_bytes(s.largest)

    def copies(pool: int) -> int:
        return min(guests, s.documents + frozen - pool)

    def needed(pool: int) -> int:
        return runtime + s.weights + activations + pool * (each + beside) + copies(pool) * (guest + beside)

    most = min(20 if pool is None else pool, s.documents)
    least = 1 if pool is None else most
    fitting: list[int] = []
    for recompute in (False, True):
        activations = max(activation_bytes(s, recompute, merged), decoding_bytes(s), matching_bytes(s))
        fitting = [n for n in range(most, least - 1, -1) if budget is None or needed(n) <= budget]
        if fitting:
            break
    else:
        raise DoesNotFit(
            f"--budget {size(budget or 0)} cannot hold this: weights {size(s.weights)}, "
            f"activations up to {size(activations)}, runtime {size(runtime)}, {copies(least)} frozen distractors "
            f"{size(copies(least) * guest)}, pool of {least} {size(least * each)} need {size(needed(least))}; "
            "raise --budget or lower --pool, --frozen-distractors, --targets or --per-target"
        )
    pool = fitting[0]
    guests = copies(pool)
    everything = 12 * s.total
    host = everything if host_budget is None else min(host_budget, everything)
    if not on_cpu:  # in transit: a thread reads and writes during the steps
        host += (2 * 12 * pool + 4 * guests) * s.largest
    return Plan(
        documents=s.documents,
        tokens=s.tokens,
        pool=pool,
        guests=guests,
        recompute=recompute,
        weights=s.weights,
        activations=activations + (pool + guests) * beside,
        trainees=pool * each,
        guest_copies=guests * guest,
        runtime=runtime,
        device=needed(pool),
        host=host,
        # Old versions stay until the commit that replaces them, and LMDB never shrinks.
        disk=2 * everything + everything // 8,
        largest=s.largest,
    )


def size(count: float) -> str:
    """Bytes as text: 3.4 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
