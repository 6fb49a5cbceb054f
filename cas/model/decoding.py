"""The one engine that decodes every arm: text prompts and cartridge prompts differ only in their prefix."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cas.model.decoding_attention import Prompt, group_rows
from cas.model.decoding_cache import Decoding
from cas.model.frozen import FrozenModel
from cas.model.positions import Layout

BATCH_POSITIONS = 16384  # prefix, prompt and answer positions that one batch of the engine may hold on a CPU, at least
BATCH_BYTES = 2 << 30  # KV cache that it may hold on a GPU, where many rows cost as much as few


def most_positions(model: FrozenModel) -> int:
    """Prefix, prompt and answer positions that one batch holds by default."""
    each = model.geometry.elements(1) * model.dtype.itemsize
    return max(BATCH_POSITIONS, BATCH_BYTES // each) if model.device.type == "cuda" else BATCH_POSITIONS


@dataclass
class Generation:
    """One decoded answer. ``finished``: the model ended its turn by itself. ``attention``: mean share of the attention
    that answer tokens paid to each cartridge, over layers and heads. ``top_ids``, ``top_logprobs``: for every token,
    the one that ended the turn included, the model's most likely ones, [K] each. Both only when asked for."""

    ids: list[int] = field(default_factory=list)
    finished: bool = False
    attention: dict[str, float] = field(default_factory=dict)
    top_ids: list[Tensor] = field(default_factory=list)
    top_logprobs: list[Tensor] = field(default_factory=list)
    stop: int | None = None  # the token that ended it


@torch.no_grad()
def generate(
    model: FrozenModel,
    prompts: Sequence[Prompt],
    cartridges: Mapping[str, Tensor],
    layout: Layout,
    *,
    max_new_tokens: int,
    temperature: float | Sequence[float] = 0.0,
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
        temperature: 0 is greedy; else sampled, by ``seed`` alone. One for all prompts or one for each.
        watch: measure each cartridge's share of the attention. keep_top: keep this many most likely tokens of every
            step.
        also_stop: further tokens that end an answer.
        on_token: called with (prompt index, token id) as soon as a token is known.
        batch_positions, batch_rows: prefix, prompt and answer positions, and rows, that one batch may hold; the
            default depends on the device.
    Returns: one Generation per prompt, in the order of the prompts; stop tokens are left out.
    """
    results = [Generation() for _ in prompts]
    temperatures = [temperature] * len(prompts) if isinstance(temperature, int | float) else list(temperature)
    longest, stop = model.geometry.max_positions, model.template.stop_ids | also_stop
    waiting = Waiting(
        prompts,
        {name: kv.shape[3] for name, kv in cartridges.items()},
        max_new_tokens,
        batch_positions or most_positions(model),
        batch_rows or (512 if model.device.type == "cuda" else 64),
    )
    generator = torch.Generator(device="cpu")

    def choose(state: Decoding, logits: Tensor) -> Tensor:
        """Choose the next token of every row; rows that have ended leave. Returns the tokens of the others."""
        logits = logits.float()
        chosen = logits.argmax(-1).cpu()
        if sampled := [b for b, row in enumerate(state.rows) if temperatures[row] > 0]:
            scale = torch.tensor([temperatures[state.rows[b]] for b in sampled], device=logits.device)
            probabilities = (logits[sampled] / scale[:, None]).softmax(-1).cpu()
            chosen[sampled] = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
        if keep_top:
            top = logits.topk(keep_top, dim=-1)
            top_ids = top.indices.to("cpu", torch.int32)
            top_logprobs = (top.values - logits.logsumexp(-1, keepdim=True)).cpu()
            for row, ids, logprobs in zip(state.rows, top_ids, top_logprobs, strict=True):
                results[row].top_ids.append(ids)
                results[row].top_logprobs.append(logprobs)
        going = []
        for b, (row, token) in enumerate(zip(state.rows, chosen.tolist(), strict=True)):
            result = results[row]
            if token in stop:
                result.finished, result.stop = True, token
            else:
                result.ids.append(token)
                if on_token is not None:
                    on_token(row, token)
            if result.finished or len(result.ids) == max_new_tokens:
                result.attention = state.attention_shares(row, len(result.ids) + result.finished - 1)
            else:
                going.append(b)
        if len(going) < len(state.rows):
            state.keep([state.rows[b] for b in going])
        return chosen[going]

    state: Decoding | None = None
    number = most = 0
    tokens = torch.empty(0, dtype=torch.long)
    while state or waiting:
        # Random numbers are keyed by the batch, so only greedy rows join others, as soon as half of these have left.
        refill = not state or (2 * len(state.rows) <= most and max(temperatures) == 0)
        members = waiting.take(state) if refill and waiting else []
        if members:
            new = Decoding(model, {i: prompts[i] for i in members}, cartridges, layout, max_new_tokens, watch)
            assert new.last_position < longest + max_new_tokens, "a prompt is longer than the model's positions"
            generator.manual_seed((seed * 1_000_003 + number) % 2**63)
            number += 1
            new_tokens = choose(new, new.prefill())
            if state and new:
                state.join(new)
                tokens = torch.cat([tokens, new_tokens])
            elif new:
                state, tokens = new, new_tokens
            most = max(most, len(state.rows)) if state else 0
        elif state:
            tokens = choose(state, state.step(tokens))
            state = state if state.rows else None
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
    waiting = Waiting(joined, sizes, 0, batch_positions or most_positions(model), rows)
    while waiting:
        state = Decoding(model, {i: joined[i] for i in waiting.take()}, cartridges, layout, 0)
        for i, logits in state.read_prompts({i: len(answers[i]) for i in state.rows}):
            wanted = torch.tensor(answers[i], device=model.device)
            results[i] = float(logits.float().log_softmax(-1).gather(1, wanted[:, None]).mean())
    return results


def held_positions(prefixes: Sequence[Hashable], width: int, own: int) -> int:
    """Positions that a batch holds, padding included, of rows with these prefixes of up to ``width`` positions and up to
    ``own`` tokens. A prefix counts once for every group that reads it."""
    groups = group_rows(prefixes, width)
    return len(groups) * (width + own * max(map(len, groups)))


class Waiting:
    """Prompts that wait for a batch, in the order of their cartridges and lengths."""

    def __init__(
        self, prompts: Sequence[Prompt], sizes: Mapping[str, int], room: int, positions: int, rows: int
    ) -> None:
        """``positions``, ``rows``: the most that a batch holds, ``room`` positions behind every prompt included."""
        self.prompts, self.sizes, self.room, self.positions, self.rows = prompts, sizes, room, positions, rows
        self.order = deque(
            sorted(
                range(len(prompts)),
                key=lambda i: (len(prompts[i].cartridges), prompts[i].cartridges, len(prompts[i].tokens), i),
            )
        )

    def __len__(self) -> int:
        return len(self.order)

    def take(self, state: Decoding | None = None) -> list[int]:
        """Numbers of the next prompts that fit into a batch beside the rows of ``state``; without these at least
        one."""
        seen = [self.prompts[row].cartridges for row in state.rows] if state else []
        prefix = max((sum(map(self.sizes.__getitem__, names)) for names in seen), default=0)
        own, batch = (state.used if state else 0), list[int]()
        while self.order and len(seen) < self.rows:
            prompt = self.prompts[self.order[0]]
            prefix = max(prefix, sum(self.sizes[name] for name in prompt.cartridges))
            own = max(own, len(prompt.tokens))
            held = held_positions([*seen, prompt.cartridges], prefix, own + self.room)
            if seen and held > self.positions:
                break
            seen.append(prompt.cartridges)
            batch.append(self.order.popleft())
        return batch
