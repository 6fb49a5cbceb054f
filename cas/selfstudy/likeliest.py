"""Several questions about one sentence without sampling: the likeliest one, and the likeliest of those that differ.

Samples of a small model mostly repeat its greedy question, or begin with a word that it hardly believes in. Where the
model was unsure of a token of its greedy question, another token leads to another question; so no question comes twice
for a sentence, and a sentence about which the model is sure is asked about once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from typing import Any

from torch import Tensor

from cas.model.decoding import Generation, Prompt, generate
from cas.model.frozen import FrozenModel
from cas.model.positions import Layout
from cas.selfstudy.planners import Call

LEAST_PROBABILITY = 0.05  # of the tokens up to and with the one that differs


def likeliest(
    model: FrozenModel,
    prompts: Sequence[Prompt],
    cartridges: Mapping[str, Tensor],
    layout: Layout,
    most: int,
    *,
    also_stop: frozenset[int],
    max_new_tokens: int,
    batch_rows: int,
) -> list[tuple[int, Generation]]:
    """Greedy replies to all prompts, in order, then up to ``most`` - 1 others to each, which differ from its greedy reply in
    a token of at least :data:`LEAST_PROBABILITY` and are greedy from there on. Each with the number of its prompt.

    ``cartridges`` and what follows, but for ``most``: as of :func:`cas.model.decoding.generate`.
    """
    decode: dict[str, Any] = {"also_stop": also_stop, "max_new_tokens": max_new_tokens, "batch_rows": batch_rows}
    greedy = generate(model, prompts, cartridges, layout, keep_top=most, **decode)
    stop = model.template.stop_ids | also_stop
    starts = [(i, ids) for i, reply in enumerate(greedy) for ids in _other_starts(reply, most - 1, stop)]
    longer = [Prompt((*prompts[i].tokens, *ids), prompts[i].cartridges) for i, ids in starts]
    others = generate(model, longer, cartridges, layout, **decode)
    whole = [
        replace(reply, ids=[*ids, *reply.ids], finished=reply.finished and len(ids) + len(reply.ids) <= max_new_tokens)
        for (_, ids), reply in zip(starts, others, strict=True)
    ]
    return [*enumerate(greedy), *((i, reply) for (i, _), reply in zip(starts, whole, strict=True))]


def _other_starts(reply: Generation, most: int, stop: AbstractSet[int]) -> list[list[int]]:
    """The likeliest beginnings that differ from a greedy reply in their last token, the likeliest first."""
    found, before = list[tuple[float, int, int]](), 0.0
    for place, (ids, logprobs) in enumerate(zip(reply.top_ids, reply.top_logprobs, strict=True)):
        chosen = reply.ids[place] if place < len(reply.ids) else reply.stop
        own = float(logprobs[0])
        for token, logprob in zip(ids.tolist(), logprobs.tolist(), strict=True):
            if token == chosen:
                own = logprob
            elif token not in stop and before + logprob >= math.log(LEAST_PROBABILITY):
                found.append((-before - logprob, place, token))
        before += own
    return [[*reply.ids[:place], token] for _, place, token in sorted(found)[:most]]


class Silent:
    """Sentences that tell nothing: about which the model had no question, in one kind, and is not asked in the next."""

    def __init__(self) -> None:
        self._sentences = set[tuple[str, int]]()

    def without(self, call: Call) -> Call:
        """The call without pairs about such sentences."""
        if not call.likeliest:
            return call
        return replace(call, pairs=tuple(p for p in call.pairs if (call.document.id, p[0]) not in self._sentences))

    def add(self, call: Call, written: Sequence[tuple[str, bool]]) -> None:
        """Count what a call wrote: first the greedy question of every pair."""
        if call.likeliest:
            for (sentence, _), (question, _) in zip(call.pairs, written[: len(call.pairs)], strict=True):
                if not question.endswith("?") and len(question.split()) < 3:
                    self._sentences.add((call.document.id, sentence))
