"""Who writes lists of questions: the frozen model itself, or an endpoint (:mod:`cas.selfstudy.endpoint`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Protocol

from torch import Tensor

from cas.model.decoding import Prompt, generate
from cas.model.frozen import FrozenModel
from cas.model.positions import Layout
from cas.selfstudy.list_style import instruction
from cas.selfstudy.planners import Call

LIST_START = "1."
Reply = tuple[str, bool]  # text, and whether the writer ended it by itself


class ListWriter(Protocol):
    """Writes one list for each call."""

    def write(self, calls: Sequence[Call], chunks: Mapping[str, Tensor]) -> list[Reply]:
        """The replies to the calls of a unit. ``chunks``: KV by the chunk's text.

        Raises: RunError when the writer cannot be reached any more.
        """
        ...


@dataclass(frozen=True)
class ModelWriter:
    """The frozen model, with the chunk in its cache. The lists of a unit are sampled side by side, by the seed and the
    number of the unit's first call."""

    model: FrozenModel
    question_tokens: int
    seed: int = 0

    def write(self, calls: Sequence[Call], chunks: Mapping[str, Tensor]) -> list[Reply]:
        """See :class:`ListWriter`. Every reply has begun with "1.", so that it is a list."""
        model, layout = self.model, Layout("offset", self.model.layout_header, 0)
        asked = [instruction(call.seed_prompt, call.document.title, call.listed) for call in calls]
        start = model.encode(LIST_START)
        prompts = [
            Prompt((*model.question_tokens(text), *start), (call.chunk,))
            for text, call in zip(asked, calls, strict=True)
        ]
        used = max(layout.token_start([chunks[c.chunk].shape[3]]) + len(p.tokens) for c, p in zip(calls, prompts))
        most = max(call.listed for call in calls) * self.question_tokens
        replies = generate(
            model,
            prompts,
            chunks,
            layout,
            max_new_tokens=max(1, min(most, model.geometry.max_positions - used)),
            temperature=calls[0].temperatures[0],
            seed=Random(f"{self.seed}/write/{calls[0].number}").getrandbits(32),
        )
        return [
            (LIST_START + model.tokenizer.decode(reply.ids, skip_special_tokens=True), reply.finished)
            for reply in replies
        ]
