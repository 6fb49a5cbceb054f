"""Bytes that a training will take, and the largest pool that fits. Plain arithmetic on sizes; no tensors."""

from __future__ import annotations

from dataclasses import dataclass

from budget.manager import guest_bytes, trainee_bytes

RUNTIME_BYTES = 700 * 2**20  # interpreter, libraries, allocator: see docs/architecture.md
PREFILL_BYTES = 64 * 2**20  # scores of one forward pass over prompts, at most 2**22, in a few copies
ALLOCATOR_SHARE = 2  # gaps take at most such a part of what forward keeps, over many steps, as measured on CPUs


class DoesNotFit(ValueError):
    """The budget is too small for what was asked; the message has the figures."""


@dataclass(frozen=True)
class Sizes:
    """What the plan is computed from, all in numbers of elements, tokens or bytes.

    Attributes:
        weights: bytes of the frozen model. element: bytes of one number in its compute dtype.
        largest: elements of the largest cartridge. total: elements of all cartridges together.
        documents: how many. tokens: of all documents.
        kept: the most bytes that a micro-batch of a step keeps for backward; per_token: of these, bytes of one token
            without its attention weights; seen: cartridges that a micro-batch may see. logit_rows: rows whose logits are
            held at a time.
        layers, hidden, intermediate, vocabulary, query_heads, kv_heads, head_dim: the model's shape.
        longest: own tokens of the longest conversation.
        decoded: own positions that a batch of self-study holds, twice where others can join it; decoded_rows: its rows;
            chunks: positions of text and requests that the rows of a unit share.
        matched: tokens of the longest document that gets attention-matching initialization (0: none does); matched_on:
            tokens of the conversations it is computed from, padding included; scores_at_once: of one key head.
        whole_logits: the logits are not the plain output of the last layer, and keep their own graph.
        conversations: the most bytes that the files of self-study have.
    """

    weights: int
    element: int
    largest: int
    total: int
    documents: int
    tokens: int
    kept: int
    per_token: int
    seen: int
    logit_rows: int
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    query_heads: int
    kv_heads: int
    head_dim: int
    longest: int
    decoded: int = 0
    decoded_rows: int = 0
    chunks: int = 0
    matched: int = 0
    matched_on: int = 0
    scores_at_once: int = 0
    whole_logits: bool = False
    conversations: int = 0


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
    conversations: int = 0

    def lines(self) -> list[str]:
        """The plan as text, a line for each kind of memory."""
        return [
            f"documents   {self.documents:,} ({self.tokens:,} tokens)",
            f"cartridge   at most {size(self.largest * 4)} of values, {size(self.largest * 12)} with optimizer state",
            f"device      {size(self.device)}: runtime {size(self.runtime)}, weights {size(self.weights)}, "
            f"activations up to {size(self.activations)}{' (layers computed twice)' if self.recompute else ''}, "
            f"pool of {self.pool} {size(self.trainees)}, {self.guests} frozen distractors {size(self.guest_copies)}",
            f"host        up to {size(self.host)} for evicted cartridges and those in transit",
            f"disk        {size(self.disk)} for cartridges and state, up to {size(self.conversations)} for conversations",
        ]


def activation_bytes(s: Sizes, recompute: bool = False) -> int:
    """An upper bound of what forward and backward over a micro-batch take. ``recompute``: layers keep only their input
    and are computed again one at a time.

    What is kept, and half of it for the gaps between tensors of many sizes. During backward, one layer's gradients:
    about 12 hidden-sized and 6 MLP-sized tensors a token, and its attention weights twice. The rows of logits held at a
    time: in float32, and three times in a smaller compute dtype; where they keep a graph of their own, four more times.
    """
    tokens, layer = s.kept // s.per_token, s.kept // s.layers
    kept = layer + tokens * s.layers * s.hidden * s.element if recompute else s.kept
    backward = tokens * (12 * s.hidden + 6 * s.intermediate) * s.element + 2 * layer
    each = 4 + (0 if s.element == 4 else 2 * s.element) + (16 if s.whole_logits else 0)
    return kept + kept // ALLOCATOR_SHARE + max(backward, s.logit_rows * s.vocabulary * each)


def decoding_bytes(s: Sizes) -> int:
    """An upper bound of what a batch of self-study takes: the KV cache of its rows; that of the chunks and requests they
    share, as read, stacked, gathered and kept; the logits of one new token for every row, twice in float32; and one
    forward pass over the chunks or the prompts."""
    per_position = 2 * s.layers * s.kv_heads * s.head_dim * s.element
    cache = (s.decoded + 4 * s.chunks) * per_position + 2 * s.decoded_rows * s.vocabulary * 4
    return cache + max(512, s.chunks) * (6 * s.hidden + 6 * s.intermediate) * s.element + PREFILL_BYTES


def matching_bytes(s: Sizes) -> int:
    """An upper bound of what attention-matching initialization takes: the document's KV three times; of one key head
    four float32 copies of the scores held at a time, and the queries, four times; and a layer's activations."""
    if not s.matched:
        return 0
    kv = 2 * s.layers * s.kv_heads * s.head_dim * s.matched
    group = s.query_heads // s.kv_heads
    scores = max(s.scores_at_once, group * s.longest * (s.matched + s.longest))
    width = 4 * s.hidden + 4 * s.intermediate
    own = max(s.matched_on, s.matched) * width * s.element + 4 * s.matched_on * group * s.head_dim * 4
    return 3 * kv * s.element + 4 * scores * 4 + own


def make_plan(
    s: Sizes,
    *,
    pool: int | None,
    guests: int,
    budget: int | None,
    host_budget: int | None,
    on_cpu: bool,
    frozen: int = 0,
    device_free: int | None = None,
    host_free: int | None = None,
) -> Plan:
    """What training will take. Layers are computed twice where it does not fit otherwise.

    Args:
        pool: cartridges in training at a time; by default as many as fit ``budget``, at most 20 (as in 2606.04557).
        guests: frozen distractors; with the pool never more than documents and ``frozen`` cartridges of earlier rounds.
        device_free, host_free: what the machine can give, which no budget exceeds. The pool does not depend on it, so
            that results do not.

    Raises: DoesNotFit with the figures if the budget, or the machine, cannot hold it.
    """
    runtime = RUNTIME_BYTES if on_cpu else 0
    each, guest = trainee_bytes(s.largest), guest_bytes(s.largest)
    if on_cpu:  # those that a step sees, cast, with a spare column or two for each head; and the gradient of that
        beside = s.element * (s.largest + 2 * s.largest // s.head_dim)
        beside += s.element * s.largest
    else:  # a step concatenates residents in the compute dtype: cast, concatenated, and the gradient of that
        beside = 3 * s.element * s.largest

    def copies(pool: int) -> int:
        return min(guests, s.documents + frozen - pool)

    def visible(pool: int) -> int:
        return min(s.seen, pool + copies(pool)) if on_cpu else pool + copies(pool)

    def needed(pool: int) -> int:
        resident = pool * each + copies(pool) * guest + visible(pool) * beside
        return runtime + s.weights + activations + resident

    most = min(20 if pool is None else pool, s.documents)
    least = 1 if pool is None else most
    chosen: int | None = None
    for recompute in (False, True):
        activations = max(activation_bytes(s, recompute), decoding_bytes(s), matching_bytes(s))
        if chosen is None:
            fitting = (n for n in range(most, least - 1, -1) if budget is None or needed(n) <= budget)
            chosen = next(fitting, None)
        if chosen is not None and (device_free is None or needed(chosen) <= device_free):
            break
    else:
        pool = least if chosen is None else chosen
        figures = (
            f"cannot hold this: weights {size(s.weights)}, activations up to {size(activations)}, "
            f"runtime {size(runtime)}, {copies(pool)} frozen distractors {size(copies(pool) * guest)}, "
            f"pool of {pool} {size(pool * each)} need {size(needed(pool))}"
        )
        lower = "lower --pool, --frozen-distractors, --tokens or --chunk-tokens"
        if chosen is None:
            raise DoesNotFit(f"--budget {size(budget or 0)} {figures}; raise --budget or {lower}")
        raise DoesNotFit(f"the {size(device_free or 0)} that this machine has free {figures}; {lower}")
    pool = chosen
    guests = copies(pool)
    everything = 12 * s.total
    host = everything if host_budget is None else min(host_budget, everything)
    if not on_cpu:  # in transit: a thread reads and writes during the steps
        host += (2 * 12 * pool + 4 * guests) * s.largest
    if host_free is not None and (needs := host + (needed(pool) if on_cpu else RUNTIME_BYTES)) > host_free:
        raise DoesNotFit(
            f"the {size(host_free)} of host memory that this machine has free cannot hold {size(needs)}, of which "
            f"{size(host)} for cartridges outside the pool; lower --host-memory or --pool"
        )
    return Plan(
        documents=s.documents,
        tokens=s.tokens,
        pool=pool,
        guests=guests,
        recompute=recompute,
        weights=s.weights,
        activations=activations + visible(pool) * beside,
        trainees=pool * each,
        guest_copies=guests * guest,
        runtime=runtime,
        device=needed(pool),
        host=host,
        # Old versions stay until the commit that replaces them, and LMDB never shrinks.
        disk=2 * everything + everything // 8,
        largest=s.largest,
        conversations=s.conversations,
    )


def size(count: float) -> str:
    """Bytes as text: 3.4 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
