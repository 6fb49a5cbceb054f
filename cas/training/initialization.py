"""The first values of cartridges, before training.

``first``: KV of the document's first p tokens behind the header (2506.06266, section 3.2).
``sampled``: KV of p/64 random contiguous 64-token chunks, joined in document order and read behind the header
(Sampled Chunk Initialization, 2508.17032). ``random``: normal noise with the header's spread in every layer and head.

``matched``: keys picked from the document, values fitted so that attention gives what the document gave. The frozen
model runs over self-study conversations with the whole document before them. In every layer and key head, p of the
document's tokens are picked: those to which some token of a conversation paid most attention. Their keys are moved to
stand as far from the question as they did, and their values are solved for by ridge regression: with them, attention
over [header ; cartridge ; own tokens] approximates what it returned over [header ; document ; own tokens]. No gradient,
one forward pass.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from random import Random
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cas.model.attention import causal_mask
from cas.model.frozen import FrozenModel
from cas.model.positions import Layout
from cas.options import Initialization
from cas.selfstudy.conversations import Conversation, Conversations

if TYPE_CHECKING:
    from cas.store.records import Row
    from cas.store.store import Store

TOKENS = 4096  # of conversations that a document is matched on
PADDED_TOKENS = 2 * TOKENS  # of these, padded to the longest: bounds the memory of long conversations among short ones
LONGEST = 4096  # tokens of a document that is read in one forward pass; longer ones start as ``first``
SCORES_AT_ONCE = 1 << 22  # of one key head, in float32: 16 MiB
RIDGE = 1.0  # of the mean squared weight: regularizes values that few questions attend to toward their original ones
SAMPLED_CHUNK = 64  # tokens of one chunk in Sampled Chunk Initialization (2508.17032)


def initialize(model: FrozenModel, document_ids: Sequence[int], p: int, how: Initialization, seed: int) -> Tensor:
    """First values of a cartridge that need no conversations: float32 [L, 2, H, p, D] on the model's device.

    ``matched`` gives the values of ``first``. A document shorter than p is repeated until it is long enough.
    """
    generator = torch.Generator().manual_seed(seed)
    header = model.header_kv
    if how == "random":
        spread = header.float().std(dim=3, keepdim=True)
        noise = torch.randn(*header.shape[:3], p, header.shape[4], generator=generator)
        return (noise * spread.cpu()).to(model.device)
    ids = list(document_ids)
    assert ids, "an empty document cannot initialize a cartridge"
    while len(ids) < p:
        ids += ids
    if how == "sampled" and len(ids) > p:
        size = min(SAMPLED_CHUNK, p)
        count = math.ceil(p / size)
        starts = torch.randint(0, len(ids) - size + 1, (count,), generator=generator).sort().values.tolist()
        ids = [token for start in starts for token in ids[start : start + size]]
    return model.prefill([*model.template.header_ids, *ids[:p]])[:, :, :, model.layout_header :].float()


def initialize_cartridges(
    model: FrozenModel,
    store: Store,
    conversations: Conversations | None = None,
    stop: Callable[[], bool] = lambda: False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> bool:
    """Give every cartridge of a store that has no values its first ones, by the store's initialization. Resumable.

    In a ``matched`` store, documents with conversations are matched, even those that have values of ``first`` already;
    other documents, and those of more than ``LONGEST`` tokens, get ``first``. Trained cartridges stay as they are.

    Args: stop: asked before each cartridge; progress: called with (done, total) before each and at the end.
    Returns: whether all are done; False after ``stop()``.
    Raises: StoreMismatch for another model than the store's; StoreLocked if a trainer holds the store.
    """
    store.check_model(model)
    how, rows = store.meta["initialisation"], store.rows()
    by_document = conversations.by_document if how == "matched" and conversations is not None else {}
    room = model.geometry.max_positions - model.layout_header - 512  # conversations stand behind the document

    def matchable(row: Row) -> bool:
        return row.version < 1 and row.id in by_document and row.p < row.tokens <= min(LONGEST, room)

    todo = [row for row in rows.values() if not row.initialized or matchable(row)]
    if not todo:
        return True
    started, done = time.monotonic(), 0
    with store.training():
        for row in todo:
            if stop():
                break
            progress(done, len(todo))
            ids, seed = model.encode(store.text(row.id)), int(row.hash[:15], 16) ^ store.meta["seed"]
            if matchable(row):
                kv = matched(model, store.layout, ids, row.p, by_document[row.id], seed)
                store.write_tensors(row.id, {"kv": kv.cpu()})
            else:
                kv = initialize(model, ids, row.p, how, seed)
                store.write_tensors(row.id, {"kv": kv.cpu()}, version=0)
            done += 1
            if done % 64 == 0:
                store.commit(rows, None)
        store.commit(rows, None)
        progress(done, len(todo))
    if by_document:
        store.log_duration("starts", time.monotonic() - started)
    return done == len(todo)


@torch.no_grad()
def matched(
    model: FrozenModel, layout: Layout, ids: Sequence[int], p: int, conversations: Sequence[Conversation], seed: int
) -> Tensor:
    """Matched values of a cartridge of p positions for a document of more tokens than that.

    Args: ids: of the document; conversations: about it; at most ``TOKENS`` of their tokens are used, drawn by ``seed``.
    Returns: float32 [L, 2, H, p, D], keys after RoPE.
    """
    drawn, room, longest = list[list[int]](), TOKENS, 0
    for n in Random(seed).sample(range(len(conversations)), len(conversations)):
        tokens = conversations[n].tokens(model)
        room, longest = room - len(tokens), max(longest, len(tokens))
        if drawn and (room < 0 or longest * (len(drawn) + 1) > PADDED_TOKENS):
            break
        drawn.append(tokens)
    lengths = torch.tensor([len(tokens) for tokens in drawn], device=model.device)
    padded = torch.zeros(len(drawn), int(lengths.max()), dtype=torch.long)
    for row, tokens in zip(padded, drawn, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    prefix = model.prefill([*model.template.header_ids, *ids])
    places = torch.arange(padded.shape[1], device=model.device)[None].expand(len(drawn), -1)
    context = _Matching(model, prefix, p, places < lengths[:, None], layout.token_start([p]))
    model.hidden(padded, places + prefix.shape[3], context, rows=slice(0))
    return torch.stack(context.kv)


class _Matching:
    """Attention context of that forward pass: attends to the whole document, and computes every layer's cartridge."""

    def __init__(self, model: FrozenModel, prefix: Tensor, p: int, real: Tensor, start: int) -> None:
        """``prefix``: KV of header and document; ``real`` bool [C, T]: tokens of the C conversations that are not
        padding; ``start``: position of their first token behind the cartridge."""
        self.model, self.prefix, self.p, self.real = model, prefix, p, real
        self.nearer = start - prefix.shape[3]  # shift of the question and of the end of the document
        self.kv: list[Tensor] = []  # of every layer, [2, H, p, D]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        heads, out, groups = [], torch.empty_like(query), query.shape[1] // key.shape[1]
        for h in range(key.shape[1]):
            queries = slice(h * groups, (h + 1) * groups)
            kv, out[:, queries] = self._head(layer, h, query[:, queries], key[:, h], value[:, h], scale, window)
            heads.append(kv)
        self.kv.append(torch.stack(heads, dim=1))
        return out.transpose(1, 2)

    def _head(
        self, layer: int, h: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None
    ) -> tuple[Tensor, Tensor]:
        """One key head: query and output [C, Q, T, D] of its query heads, key and value [C, T, D], KV [2, p, D]."""
        header, turn = self.model.layout_header, self.model.rope.shift
        query, key, value = query.float() * scale, key.float(), value.float()
        keys, values = self.prefix[layer, :, h].float()
        seen = _seen(query.shape[2], 0, query.shape[2], window).to(query.device)
        size = max(1, SCORES_AT_ONCE // (query.shape[1] * query.shape[2] * (len(keys) + query.shape[2])))
        parts = [slice(start, start + size) for start in range(0, len(query), size)]  # of the conversations

        def own(part: slice) -> Tensor:  # the same wherever the conversation stands
            return (query[part] @ key[part, None].mT).masked_fill(~seen, -torch.inf)

        out, paid = torch.empty_like(query), keys.new_zeros(len(keys) - header)
        for part in parts:
            weights = _weights(query[part], keys, own(part), window, len(keys))
            out[part] = _output(weights, values, value[part])
            # Attention paid by padding does not count.
            real = weights[..., header : len(keys)] * self.real[part, None, :, None]
            paid = torch.maximum(paid, real.amax((0, 1, 2)))
        chosen = paid.topk(self.p).indices.sort().values + header
        by = torch.full((self.p,), self.nearer)
        first = len(keys) + self.nearer
        keys = torch.cat([keys[:header], turn(keys[chosen], by, layer)])
        values = torch.cat([values[:header], values[chosen]])
        square, wanted = keys.new_zeros(self.p, self.p), values.new_zeros(self.p, values.shape[1])
        for part in parts:
            moved = turn(query[part], torch.full(query.shape[2:3], self.nearer), layer)
            weights = _weights(moved, keys, own(part), window, first)
            rows = self.real[part, None].expand(weights.shape[:3])
            missing = (out[part] - _output(weights, values, value[part]))[rows]
            x = weights[..., header : len(keys)][rows]  # [rows, p]
            square += x.T @ x
            wanted += x.T @ missing
        square.diagonal().add_(RIDGE * square.diagonal().mean() + 1e-8)
        values[header:] += torch.linalg.solve(square, wanted)
        return torch.stack([keys[header:], values[header:]]), out.to(value.dtype)


def _seen(tokens: int, first: int, columns: int, window: int | None) -> Tensor:
    """Visibility, bool [tokens, columns], of keys at 0.. to tokens at ``first``.."""
    return causal_mask(torch.arange(tokens) + first, torch.arange(columns), window)


def _weights(query: Tensor, keys: Tensor, own: Tensor, window: int | None, first: int) -> Tensor:
    """Softmax [C, Q, T, S + T] over prefix keys [S, D] and own scores [C, Q, T, T] of tokens at ``first``.."""
    scores = query @ keys.T
    if window is not None:
        scores = scores.masked_fill(~_seen(query.shape[2], first, len(keys), window).to(scores.device), -torch.inf)
    return torch.cat([scores, own], dim=-1).softmax(-1)


def _output(weights: Tensor, values: Tensor, own: Tensor) -> Tensor:
    """[C, Q, T, D] of weights over prefix values [S, D] and own ones [C, T, D]."""
    return weights[..., : len(values)] @ values + weights[..., len(values) :] @ own[:, None]
