"""The one engine that decodes every arm: text prompts and cartridge prompts differ only in their prefix.

Prompts are padded on the left, so that all rows write their next key into the same column; positions are explicit, so
padding moves nobody. Rows that have ended leave the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from cas.model.attention import _Pool, _visible_columns, causal_mask
from cas.model.frozen import FrozenModel
from cas.model.positions import Layout

BATCH_POSITIONS = 16384  # prefix, prompt and answer positions that one batch of the engine may hold on a CPU, at least
BATCH_BYTES = 2 << 30  # KV cache that it may hold on a GPU, where many rows cost as much as few


def most_positions(model: FrozenModel) -> int:
    """Prefix, prompt and answer positions that one batch holds unless it is told."""
    each = model.geometry.elements(1) * model.dtype.itemsize
    return max(BATCH_POSITIONS, BATCH_BYTES // each) if model.device.type == "cuda" else BATCH_POSITIONS


@dataclass(frozen=True)
class Prompt:
    """What one question puts behind the shared header: cartridges (ids in loading order), then tokens.

    Without cartridges the tokens stand directly behind the header, as in any ordinary prompt.
    """

    tokens: tuple[int, ...]
    cartridges: tuple[str, ...] = ()


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


class Decoding:
    """Attention context of a batch of prompts with a growing cache of their own tokens."""

    def __init__(
        self,
        model: FrozenModel,
        prompts: Sequence[Prompt],
        cartridges: Mapping[str, Tensor],
        layout: Layout,
        room: int,
        watch: bool,
    ) -> None:
        """``room``: how many tokens will be decoded behind the prompts; ``watch``: add up the attention shares."""
        names = list(dict.fromkeys(name for prompt in prompts for name in prompt.cartridges))
        pool = _Pool(model.header_kv, {name: cartridges[name] for name in names}, model.dtype)
        self.rope, self.watch, self.names = model.rope, watch, names
        columns, placed, turn, starts = [], [], [], []
        for prompt in prompts:
            seen = prompt.cartridges
            its_columns, its_places, its_turn = _visible_columns(pool, seen, layout)
            columns.append(its_columns)
            placed.append(its_places)
            turn.append(its_turn)
            starts.append(layout.token_start([len(pool.places[n]) for n in seen]))
        # One prefix for everybody is read in place; different ones are gathered once, not in every step.
        width = max(map(len, columns))
        self.same = all(c == columns[0] and t == turn[0] for c, t in zip(columns, turn, strict=True))
        rows = 1 if self.same else len(prompts)
        pad = [[0] * (width - len(c)) for c in columns[:rows]]
        device = model.device
        cols = torch.tensor([c + p for c, p in zip(columns, pad)], device=device)
        self.placed = torch.tensor([c + p for c, p in zip(placed, pad)], device=device)
        self.valid = torch.tensor([[True] * len(c) + [False] * len(p) for c, p in zip(columns, pad)], device=device)
        turned = torch.tensor([t + p for t, p in zip(turn, pad)], device=device)
        self.prefix = []
        for layer, kv in enumerate(pool.layers):
            k, v = kv[0][:, cols].transpose(0, 1), kv[1][:, cols].transpose(0, 1)  # [B or 1, H, S, D]
            if bool(turned.any()):
                k = self.rope.shift(k, turned[:, None], layer)
            self.prefix.append((k, v))
        # For the shares: which cartridge each prefix column belongs to (0 is header or padding).
        owner_of = torch.zeros(pool.size, dtype=torch.long)
        for i, name in enumerate(names):
            owner_of[list(pool.places[name])] = i + 1
        self.owner = owner_of.to(device)[cols] * self.valid
        t = max(len(prompt.tokens) for prompt in prompts)
        self.tokens = torch.zeros(len(prompts), t, dtype=torch.long, device=device)
        self.real = torch.zeros(len(prompts), t + room, dtype=torch.bool, device=device)
        self.positions = torch.zeros(len(prompts), t + room, dtype=torch.long, device=device)
        for b, (prompt, start) in enumerate(zip(prompts, starts, strict=True)):
            n = len(prompt.tokens)
            self.tokens[b, t - n :] = torch.tensor(prompt.tokens)
            self.real[b, t - n :] = True
            self.positions[b, t - n :] = torch.arange(start, start + n + room)
        self.used, self.new = 0, t
        self.own: dict[int, tuple[Tensor, Tensor]] = {}
        self.shares = torch.zeros(len(prompts), len(names) + 1, device=device)
        self.watched = 0

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        b, heads, t, d = key.shape
        end = self.used + t
        if layer not in self.own:
            total = self.real.shape[1]
            self.own[layer] = (key.new_zeros(b, heads, total, d), value.new_zeros(b, heads, total, d))
        own_k, own_v = self.own[layer]
        own_k[:, :, self.used : end], own_v[:, :, self.used : end] = key, value
        prefix_k, prefix_v = self.prefix[layer]
        own_positions = self.positions[:, self.used : end]
        key_positions = torch.cat([self.placed.expand(b, -1), self.positions[:, :end]], dim=1)
        seen = torch.cat([self.valid.expand(b, -1), self.real[:, :end]], dim=1)
        mask = causal_mask(own_positions, key_positions, window) & seen[:, None]
        # Padding has position 0 and may come before everything: it would see nothing, so it sees the first column.
        mask[:, :, 0] |= ~self.real[:, self.used : end]
        if t == 1:
            return self._one(query, prefix_k, prefix_v, own_k[:, :, :end], own_v[:, :, :end], mask, scale)
        k = torch.cat([prefix_k.expand(b, -1, -1, -1), own_k[:, :, :end]], dim=2)
        v = torch.cat([prefix_v.expand(b, -1, -1, -1), own_v[:, :, :end]], dim=2)
        return scaled_dot_product_attention(
            query, k, v, attn_mask=mask[:, None], scale=scale, enable_gqa=True
        ).transpose(1, 2)

    def _one(
        self,
        query: Tensor,
        prefix_k: Tensor,
        prefix_v: Tensor,
        own_k: Tensor,
        own_v: Tensor,
        mask: Tensor,
        scale: float,
    ) -> Tensor:
        """One new token a row. Prefix and own tokens are scored apart, so that a long prefix is never copied."""
        b, heads = own_k.shape[:2]
        repeat, d = query.shape[1] // heads, query.shape[3]
        q = query.view(b, heads, repeat, d)
        if self.same:  # one prefix for all rows: one matrix product a head
            shared = q.transpose(0, 1).reshape(heads, b * repeat, d) @ prefix_k[0].transpose(1, 2)
            on_prefix = shared.view(heads, b, repeat, -1).transpose(0, 1)
        else:
            on_prefix = q @ prefix_k.transpose(2, 3)
        scores = torch.cat([on_prefix, q @ own_k.transpose(2, 3)], dim=3).float() * scale
        weights = scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1)  # [B, H, repeat, S + own]
        width = prefix_k.shape[2]
        if self.watch:
            self.shares.scatter_add_(1, self.owner.expand(b, -1), weights[..., :width].mean((1, 2)))
            self.watched += 1
        weights = weights.to(own_v.dtype)
        if self.same:
            from_prefix = weights[..., :width].transpose(0, 1).reshape(heads, b * repeat, width) @ prefix_v[0]
            out = from_prefix.view(heads, b, repeat, d).transpose(0, 1)
        else:
            out = weights[..., :width] @ prefix_v
        return (out + weights[..., width:] @ own_v).reshape(b, 1, heads * repeat, d)

    def advance(self) -> None:
        """The columns of the last forward are now history."""
        self.used, self.new = self.used + self.new, 1

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone."""
        for name in ("real", "positions", "shares"):
            setattr(self, name, getattr(self, name)[rows])
        if not self.same:
            self.placed, self.valid, self.owner = self.placed[rows], self.valid[rows], self.owner[rows]
            self.prefix = [(k[rows], v[rows]) for k, v in self.prefix]
        self.own = {layer: (k[rows], v[rows]) for layer, (k, v) in self.own.items()}


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
    on_gpu = model.device.type == "cuda"
    batches = _batches(
        prompts,
        sizes,
        max_new_tokens,
        batch_positions or most_positions(model),
        batch_rows or (512 if on_gpu else 64),
        mixed=on_gpu,
    )
    for number, members in enumerate(batches):
        generator = torch.Generator(device="cpu").manual_seed((seed * 1_000_003 + number) % 2**63)
        state = Decoding(model, [prompts[i] for i in members], cartridges, layout, max_new_tokens, watch)
        assert int(state.positions.max()) < longest + max_new_tokens, "a prompt is longer than the model's positions"
        tokens, rows = state.tokens, list(members)
        for _ in range(max_new_tokens):
            columns = slice(state.used, state.used + state.new)
            logits = model.forward(tokens, state.positions[:, columns], state, rows=1)[:, -1].float()
            state.advance()
            if temperature > 0:
                chosen = torch.multinomial((logits / temperature).softmax(-1).cpu(), 1, generator=generator)[:, 0]
            else:
                chosen = logits.argmax(-1).cpu()
            if keep_top:
                top = logits.topk(keep_top, dim=-1)
                top_ids = top.indices.to("cpu", torch.int32)
                top_logprobs = (top.values - logits.logsumexp(-1, keepdim=True)).cpu()
                for b, i in enumerate(rows):
                    results[i].top_ids.append(top_ids[b])
                    results[i].top_logprobs.append(top_logprobs[b])
            going = []
            for b, (i, token) in enumerate(zip(rows, chosen.tolist(), strict=True)):
                if token in stop:
                    results[i].finished = True
                    _take_shares(results[i], state, b)
                    continue
                results[i].ids.append(token)
                if on_token is not None:
                    on_token(i, token)
                going.append(b)
            if not going:
                break
            kept = torch.tensor(going)
            if len(going) < len(rows):
                state.keep(kept.to(model.device))
                rows = [rows[b] for b in going]
            tokens = chosen[kept][:, None]
        else:
            for b, i in enumerate(rows):
                _take_shares(results[i], state, b)
    return results


def _take_shares(result: Generation, state: Decoding, row: int) -> None:
    if state.watched:
        share = state.shares[row] / state.watched
        result.attention = {name: float(share[i + 1]) for i, name in enumerate(state.names)}


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
    on_gpu = model.device.type == "cuda"
    rows = batch_rows or (128 if on_gpu else 32)  # their logits are held at once
    for members in _batches(joined, sizes, 0, batch_positions or most_positions(model), rows, mixed=on_gpu):
        state = Decoding(model, [joined[i] for i in members], cartridges, layout, 0, watch=False)
        longest = max(len(answers[i]) for i in members)
        logits = model.forward(state.tokens, state.positions, state, rows=longest)
        for b, i in enumerate(members):
            wanted = torch.tensor(answers[i], device=model.device)
            scores = logits[b, -len(wanted) :].float().log_softmax(-1).gather(1, wanted[:, None])
            results[i] = float(scores.mean())
    return results


def _batches(
    prompts: Sequence[Prompt], sizes: Mapping[str, int], room: int, positions: int, rows: int, mixed: bool = False
) -> Iterator[list[int]]:
    """Indices of prompts of similar length, neighbours with the same cartridges side by side; at least one a batch. One prefix
    for the whole batch counts once, as it is held once: unless ``mixed``, a fair number of rows with the same one, which read
    it in place, go by themselves."""
    order = sorted(
        range(len(prompts)),
        key=lambda i: (len(prompts[i].cartridges), prompts[i].cartridges, len(prompts[i].tokens), i),
    )
    batch: list[int] = []
    same, prefix, own = True, 0, 0  # of the batch: whether it has one prefix; the most positions of a row
    for i in order:
        mine = sum(sizes[n] for n in prompts[i].cartridges), len(prompts[i].tokens) + room
        alike = not batch or prompts[i].cartridges == prompts[batch[0]].cartridges
        other = not mixed and len(batch) >= 16 and not alike
        longest = max(prefix, mine[0]), max(own, mine[1])
        held = longest[0] + longest[1] * (len(batch) + 1) if same and alike else sum(longest) * (len(batch) + 1)
        if batch and (other or len(batch) == rows or held > positions):
            yield batch
            batch, alike, same, longest = [], True, True, mine
        batch.append(i)
        same, (prefix, own) = same and alike, longest
    if batch:
        yield batch
