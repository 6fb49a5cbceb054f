"""The one engine that decodes every arm: text prompts and cartridge prompts differ only in their prefix."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cas.model.decoding_cache import Decoding, Prompt, group_rows
from cas.model.frozen import FrozenModel
from cas.model.positions import Layout

BATCH_POSITIONS = 16384  # prefix, prompt and answer positions that one batch of the engine may hold on a CPU, at least
BATCH_BYTES = 2 << 30  # KV cache that it may hold on a GPU, where many rows cost as much as few


def most_positions(model: FrozenModel) -> int:
    """Prefix, prompt and answer positions that one batch holds unless it is told."""
    each = model.geometry.elements(1) * model.dtype.itemsize
    return max(BATCH_POSITIONS, BATCH_BYTES // each) if model.device.type == "cuda" else BATCH_POSITIONS


@dataclass
class Generation:
    """One decoded answer. ``finished``: the model ended its turn by itself. ``attention``: mean share of the attention
    that answer tokens paid to each cartridge, over layers and heads. ``top_ids``, ``top_logprobs``: for every token, the one
    that ended the turn included, the model's most likely ones, [K] each. Both only when asked for."""

    ids: list[int] = field(default_factory=list)
    finished: bool = False
    attention: dict[str, float] = field(default_factory=dict)
    top_ids: list[Tensor] = field(default_factory=list)
    top_logprobs: list[Tensor] = field(default_factory=list)


@torch.no_grad()
def generate(
    model: FrozenModel,
    prompts: Sequence[Prompt],
    cartridges: Mapping[str, Tensor],
    layout: Layout,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    watch: bool = False,
    keep_top: int = 0,
    also_stop: frozenset[int] = frozenset(),
    on_token: Callable[[int, int], None] | None = None,
    batch_positions: int | None = None,
    batch_rows: int | None = None,
) -> list[Generation]:
    """Decode answers to prompts of any mixture of prefixes.

    Args:
        cartridges: id -> [L, 2, H, P, D] of every cartridge named in the prompts, any float dtype.
        temperature: 0 is greedy; else sampled, by ``seed`` alone.
        watch: measure each cartridge's share of the attention. keep_top: keep this many most likely tokens of every step.
        also_stop: further tokens that end an answer.
        on_token: called with (prompt index, token id) as soon as a token is known.
        batch_positions, batch_rows: prefix, prompt and answer positions, and rows, that one batch may hold; by default as
            suits the device.
    Returns: one Generation per prompt, in the order of the prompts; stop tokens are left out.
    """
    results = [Generation() for _ in prompts]
    sizes = {name: kv.shape[3] for name, kv in cartridges.items()}
    longest, stop = model.geometry.max_positions, model.template.stop_ids | also_stop
    rows = batch_rows or (512 if model.device.type == "cuda" else 64)
    batches = _batches(prompts, sizes, max_new_tokens, batch_positions or most_positions(model), rows)
    for number, members in enumerate(batches):
        generator = torch.Generator(device="cpu").manual_seed((seed * 1_000_003 + number) % 2**63)
        state = Decoding(model, [prompts[i] for i in members], cartridges, layout, max_new_tokens, watch)
        assert state.last_position < longest + max_new_tokens, "a prompt is longer than the model's positions"
        tokens: Tensor | None = None
        for _ in range(max_new_tokens):
            logits = (state.prefill() if tokens is None else state.step(tokens)).float()
            if temperature > 0:
                chosen = torch.multinomial((logits / temperature).softmax(-1).cpu(), 1, generator=generator)[:, 0]
            else:
                chosen = logits.argmax(-1).cpu()
            if keep_top:
                top = logits.topk(keep_top, dim=-1)
                top_ids = top.indices.to("cpu", torch.int32)
                top_logprobs = (top.values - logits.logsumexp(-1, keepdim=True)).cpu()
                for row, ids, logprobs in zip(state.rows, top_ids, top_logprobs, strict=True):
                    results[members[row]].top_ids.append(ids)
                    results[members[row]].top_logprobs.append(logprobs)
            going = []
            for b, (row, token) in enumerate(zip(state.rows, chosen.tolist(), strict=True)):
                result = results[members[row]]
                if token in stop:
                    result.finished = True
                    result.attention = state.attention_shares(row)
                    continue
                result.ids.append(token)
                if on_token is not None:
                    on_token(members[row], token)
                going.append(b)
            if not going:
                break
            if len(going) < len(state.rows):
                state.keep([state.rows[b] for b in going])
            tokens = chosen[going]
        else:
            for row in state.rows:
                results[members[row]].attention = state.attention_shares(row)
    return results


@torch.no_grad()
def log_likelihood(
    model: FrozenModel,
    prompts: Sequence[Prompt],
    answers: Sequence[Sequence[int]],
    cartridges: Mapping[str, Tensor],
    layout: Layout,
    *,
    batch_positions: int | None = None,
    batch_rows: int | None = None,
) -> list[float]:
    """Mean log-probability (nats per token) of given answers behind their prompts, teacher-forced.

    Args: answers: token ids, the end-of-turn token included by the caller if it should count.
    """
    assert all(answers), "an empty answer has no likelihood"
    joined = [Prompt((*p.tokens, *a[:-1]), p.cartridges) for p, a in zip(prompts, answers, strict=True)]
    results = [0.0] * len(prompts)
    sizes = {name: kv.shape[3] for name, kv in cartridges.items()}
    rows = batch_rows or (128 if model.device.type == "cuda" else 32)
    for members in _batches(joined, sizes, 0, batch_positions or most_positions(model), rows):
        state = Decoding(model, [joined[i] for i in members], cartridges, layout, 0)
        for row, logits in state.read_prompts([len(answers[i]) for i in members]):
            wanted = torch.tensor(answers[members[row]], device=model.device)
            results[members[row]] = float(logits.float().log_softmax(-1).gather(1, wanted[:, None]).mean())
    return results


def _batches(
    prompts: Sequence[Prompt], sizes: Mapping[str, int], room: int, positions: int, rows: int
) -> Iterator[list[int]]:
    """Indices of prompts of similar length, neighbors with the same cartridges side by side; at least one a batch. A prefix
    counts once for every group that reads it, as it is held once."""
    order = sorted(
        range(len(prompts)),
        key=lambda i: (len(prompts[i].cartridges), prompts[i].cartridges, len(prompts[i].tokens), i),
    )
    batch: list[int] = []
    prefix, own = 0, 0  # the most positions of a row
    for i in order:
        width, length = sum(sizes[n] for n in prompts[i].cartridges), len(prompts[i].tokens) + room
        widest, longest = max(prefix, width), max(own, length)
        groups = group_rows([prompts[j].cartridges for j in (*batch, i)], widest)
        held = len(groups) * (widest + longest * max(map(len, groups)))
        if batch and (len(batch) == rows or held > positions):
            yield batch
            batch, widest, longest = [], width, length
        batch.append(i)
        prefix, own = widest, longest
    if batch:
        yield batch
