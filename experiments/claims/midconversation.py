"""Claim 19: a cartridge loaded in mid-conversation, with nothing computed again."""

from __future__ import annotations

import sys
import time

import torch
from torch import Tensor

from cas.data.collection import Question
from cas.evaluation.recording import Prediction
from cas.model.attention import Batch, packed_positions
from cas.model.attention_cpu import CpuAttention
from cas.model.decoding import Prompt
from cas.model.positions import Layout
from experiments.claims.lab import Claim, ClaimContext, Criterion, main_of


class KVRecorder:
    """An attention context that records the keys and values of the conversation's own tokens."""

    def __init__(self, inner: CpuAttention) -> None:
        self.inner, self.kv = inner, list[Tensor]()

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        self.kv.append(torch.stack([key[0], value[0]]))
        return self.inner.attend(layer, query, key, value, scale, window)


@torch.no_grad()
def turn_kv(lab: ClaimContext, layout: Layout, tokens: list[int], kv: Tensor) -> Tensor:
    """KV [L, 2, H, T, D] of a first turn that sees one cartridge."""
    model, batch = lab.model, Batch((len(tokens),), (("own",),))
    context = KVRecorder(CpuAttention(batch, model.header_kv, {"own": kv}, layout, model.rope, model.dtype))
    model.hidden(torch.tensor([tokens]), packed_positions(batch, {"own": kv.shape[3]}, layout), context, rows=slice(0))
    return torch.stack(context.kv)


def run(lab: ClaimContext) -> list[Prediction]:
    """A question about one document and its answer, then one about another whose cartridge is loaded only now."""
    predictions: list[Prediction] = []
    model, end = lab.model, list(lab.model.template.end_ids)
    one = [q for q in lab.questions if len(q.document_ids) == 1]
    before: dict[str, Question] = dict(
        zip((q.id for q in one), one[len(one) // 2 :] + one[: len(one) // 2], strict=True)
    )
    seconds: dict[str, list[float]] = {"kept": [], "recomputed": []}
    with lab.trained("joint") as store:
        kv = {i: store.cartridge(i).to(model.device, model.dtype) for i in store.rows()}
        header, span = store.layout.header, store.layout.span
        for q in one:
            first = before[q.id]
            first_turn = [*lab.question_tokens(first), *model.encode(first.answers[0]), *end]
            question = lab.question_tokens(q)
            both = tuple(sorted({first.document_ids[0], q.document_ids[0]}))
            turn = turn_kv(lab, store.layout, first_turn, kv[first.document_ids[0]])
            after_turn = Layout("fixed", header, span + len(first_turn))
            for arm, prompt, layout in (
                ("kept", Prompt(question, (*both, "turn")), after_turn),
                ("recomputed", Prompt((*first_turn, *question), both), store.layout),
                ("without_first_turn", Prompt(question, both), store.layout),
                ("first_cartridge_alone", Prompt(question, (first.document_ids[0], "turn")), after_turn),
            ):
                started = time.perf_counter()
                predictions += lab.answer(arm, [q], [prompt], {**kv, "turn": turn}, layout)
                if arm in seconds:
                    seconds[arm].append(time.perf_counter() - started)
    lab.measure("kept.seconds_ratio", [b / a for a, b in zip(seconds["kept"], seconds["recomputed"], strict=True)])
    return predictions


CLAIM = Claim(
    name="midconversation",
    title="A cartridge loaded in mid-conversation",
    paper=(
        "Loading a cartridge in mid-conversation invalidates the conversation's KV cache: a stated limit (2606.04557)."
    ),
    ours=(
        "Under `fixed` no token moves: the first turn's KV stays, and the second turn sees a cartridge that the first "
        "did not. Against computing the whole conversation again with both loaded."
    ),
    run=run,
    table=[
        ("first turn kept, cartridge added", "kept"),
        ("all computed again", "recomputed"),
        ("second turn without the first", "without_first_turn"),
        ("first turn kept, nothing added", "first_cartridge_alone"),
        ("time computing again over keeping, answer included", "kept.seconds_ratio"),
    ],
    compare=[("recomputed", "kept"), ("kept", "first_cartridge_alone"), ("without_first_turn", "recomputed")],
    criteria=[
        Criterion("keeping loses at most 2 points", "recomputed_minus_kept", "most", 2),
        Criterion("the added cartridge is what answers", "kept_minus_first_cartridge_alone", "least", 20),
    ],
)

if __name__ == "__main__":
    sys.exit(main_of(CLAIM))
