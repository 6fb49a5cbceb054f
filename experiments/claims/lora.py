"""Claim 13: a prefix against LoRA of the same memory, and what each does to unrelated text."""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from cas.data.worlds import world
from cas.evaluation.recording import Prediction
from cas.model.decoding import Prompt
from cas.model.frozen import FrozenModel
from cas.selfstudy.conversations import Conversation, Conversations
from cas.training.loss import distillation_loss
from cas.training.optim import learning_rate
from experiments.claims.lab import BATCH, FIRST_TOKENS, SMALL, Claim, ClaimContext, Criterion, main_of
from retrieval import with_title

DOCUMENTS = 4
RATES = {"prefix": (0.02, 0.05, 0.1), "lora": (0.001, 0.003, 0.01)}


def run(lab: ClaimContext) -> list[Prediction]:
    """Train both on the conversations about four documents, each at its best rate by held-out loss; ask about these
    documents and, with its text in context, about another one."""
    from peft import LoraConfig, inject_adapter_in_model

    chosen = lab.collection.select(DOCUMENTS)
    items = [replace(c, document="collection") for d in chosen.documents for c in lab.conversations.by_document[d.id]]
    trained, held_out = [c for i, c in enumerate(items) if i % 10], items[::10]
    questions = [q for q in lab.questions if {*q.document_ids} <= {d.id for d in chosen.documents}]
    positions = len(lab.model.encode(chosen.merged().documents[0].text)) // int(lab.config.ratio) // 4 * 4
    steps = round(FIRST_TOKENS["epochs"] * len(trained) / BATCH)
    predictions: list[Prediction] = []

    best = {}
    for lr in RATES["prefix"]:
        with prefix(lab, trained, positions, steps, lr) as store:
            kv = {"collection": store.cartridge("collection").to(lab.model.device, lab.model.dtype)}
            best[lr] = prefix_loss(lab, held_out, kv, store.layout)
    lr = min(best, key=lambda x: best[x])
    with prefix(lab, trained, positions, steps, lr) as store:
        predictions += lab.ask(store, "prefix_", ["loaded"], questions)
        kv = {"collection": store.cartridge("collection")}
        layout = store.layout

    elements = lab.model.geometry.elements(positions)
    trials = []
    for rate in RATES["lora"]:
        hf = copy.deepcopy(lab.model.hf)
        rank = max(1, round(elements / lora_elements(hf)))
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(TARGETS)), hf)
        tune(lab, hf, trained, steps, rate)
        trials.append((lora_loss(lab, hf, held_out), hf, rank))
    _, hf, rank = min(trials, key=lambda t: t[0])
    adapted = FrozenModel(hf, lab.model.tokenizer, lab.model.source, lab.model.system)
    lab.measure("prefix.elements", [elements])
    lab.measure("lora.elements", [rank * lora_elements(lab.model.hf)])
    empty: dict[str, Any] = {}
    prompts = [Prompt(lab.question_tokens(q)) for q in questions]
    predictions += lab.answer("lora", questions, prompts, empty, layout, adapted)

    other = world(700 + lab.seed, DOCUMENTS, shape=SMALL)
    for name, model, loaded in (("plain", lab.model, empty), ("prefix", lab.model, kv), ("lora", adapted, empty)):
        loaded = {k: v.to(model.device, model.dtype) for k, v in loaded.items()}
        prompts = []
        for q in other.questions:
            text = "\n\n".join(with_title(other[i].title, other[i].text) for i in q.document_ids)
            prompts.append(Prompt((*model.encode(text), *lab.question_tokens(q)), tuple(loaded)))
        predictions += lab.answer(f"{name}_unrelated", other.questions, prompts, loaded, layout, model)
    return predictions


def prefix(lab: ClaimContext, conversations: Sequence[Conversation], positions: int, steps: int, lr: float) -> Any:
    """A training of one cartridge for all four documents."""
    collection = lab.collection.select(DOCUMENTS).merged()
    alone: dict[str, Any] = {"pool": 1, "targets": 1, "per_target": BATCH, "isolation": 1.0, "steps": steps, "lr": lr}
    options = {"tokens": positions, "initialisation": "first"}
    return lab.trained(f"prefix4-lr{lr:g}", collection, Conversations(conversations, {}), options=options, **alone)


@torch.no_grad()
def prefix_loss(lab: ClaimContext, held_out: Sequence[Conversation], kv: dict[str, torch.Tensor], layout: Any) -> float:
    """Mean distillation loss of conversations that were not trained, nats a token."""
    from cas.model.attention import Batch, packed_positions
    from cas.model.attention_cpu import CpuAttention

    model, total, count = lab.model, 0.0, 0
    for start in range(0, len(held_out), BATCH):
        batch_conversations = held_out[start : start + BATCH]
        tokens = [c.tokens(model) for c in batch_conversations]
        batch = Batch(tuple(map(len, tokens)), (tuple(kv),) * len(tokens))
        context = CpuAttention(batch, model.header_kv, kv, layout, model.rope, model.dtype)
        places = packed_positions(batch, {n: x.shape[3] for n, x in kv.items()}, layout)
        rows = torch.cat(
            [
                torch.arange(s + n - len(c.answer), s + n)
                for s, n, c in zip(batch.starts(), batch.lengths, batch_conversations, strict=True)
            ]
        )
        logits = model.forward(torch.tensor([[t for one in tokens for t in one]]), places, context, rows=rows)[0]
        total, count = total + float(_losses(batch_conversations, logits).sum()), count + len(rows)
    return total / count


# -- LoRA --------------------------------------------------------------------------------------------------------------

TARGETS = ("q_proj", "v_proj")


def lora_elements(hf: Any) -> int:
    """Parameters per rank, over all layers."""
    return sum(
        m.in_features + m.out_features
        for name, m in hf.named_modules()
        if name.endswith(TARGETS) and hasattr(m, "in_features")
    )


def tune(lab: ClaimContext, hf: Any, conversations: Sequence[Conversation], steps: int, lr: float) -> None:
    """Train the adapters alone with Adam, on as many conversations as the prefix, with the same schedule."""
    weights = [p for name, p in hf.named_parameters() if "lora_" in name]
    for p in weights:
        p.data = p.data.float()
        p.requires_grad_(True)
    adam = torch.optim.Adam(weights)
    order: list[int] = []
    for step in range(steps):
        if len(order) < BATCH:
            order += Random(f"{lab.seed}/{step}").sample(range(len(conversations)), len(conversations))
        batch, order = [conversations[i] for i in order[:BATCH]], order[BATCH:]
        for group in adam.param_groups:
            group["lr"] = learning_rate(lr, step + 1, 20, step, steps, 0.02)
        adam.zero_grad()
        _losses(batch, _logits(lab, hf, batch)).mean().backward()
        adam.step()


@torch.no_grad()
def lora_loss(lab: ClaimContext, hf: Any, held_out: Sequence[Conversation]) -> float:
    """As :func:`prefix_loss`."""
    batches = [held_out[i : i + BATCH] for i in range(0, len(held_out), BATCH)]
    losses = torch.cat([_losses(batch, _logits(lab, hf, batch)) for batch in batches])
    return float(losses.mean())


def _logits(lab: ClaimContext, hf: Any, conversations: Sequence[Conversation]) -> torch.Tensor:
    """Logits at the places of answers, [N, V], of conversations behind the header alone."""
    header = list(lab.model.template.header_ids)
    tokens = [torch.tensor(header + c.tokens(lab.model)) for c in conversations]
    ids = pad_sequence(tokens, batch_first=True)
    mask = pad_sequence([torch.ones(len(t), dtype=torch.long) for t in tokens], batch_first=True)
    logits = hf(input_ids=ids.to(hf.device), attention_mask=mask.to(hf.device), use_cache=False).logits
    return torch.cat(
        [row[len(t) - len(c.answer) : len(t)] for row, t, c in zip(logits, tokens, conversations, strict=True)]
    )


def _losses(conversations: Sequence[Conversation], logits: torch.Tensor) -> torch.Tensor:
    ids = torch.cat([torch.tensor(c.top_ids) for c in conversations]).long().to(logits.device)
    top = torch.cat([torch.tensor(c.top_logprobs) for c in conversations]).to(logits.device)
    return distillation_loss(logits, ids, top)


CLAIM = Claim(
    name="lora",
    title="Prefix against LoRA of equal memory",
    paper=(
        "A prefix beats memory-matched LoRA and keeps MMLU, where LoRA falls to 45.3, 9 points below the prefix "
        "(2506.06266)."
    ),
    ours=(
        "One cartridge or one LoRA (queries and values) of as many numbers for the same four documents, the same "
        "conversations, loss and steps, each at its best of three rates. Unrelated: questions about another world's "
        "document, whose text is in context."
    ),
    run=run,
    table=[
        ("prefix, own questions", "prefix_loaded"),
        ("LoRA, own questions", "lora"),
        ("unrelated text, neither", "plain_unrelated"),
        ("unrelated text, prefix loaded", "prefix_unrelated"),
        ("unrelated text, LoRA", "lora_unrelated"),
        ("numbers, prefix", "prefix.elements"),
        ("numbers, LoRA", "lora.elements"),
    ],
    compare=[
        ("prefix_loaded", "lora"),
        ("plain_unrelated", "prefix_unrelated"),
        ("plain_unrelated", "lora_unrelated"),
        ("prefix_unrelated", "lora_unrelated"),
    ],
    criteria=[
        Criterion("the prefix answers more of its own questions", "prefix_loaded_minus_lora", "least", 0),
        Criterion("the prefix harms unrelated text less", "prefix_unrelated_minus_lora_unrelated", "least", 0),
    ],
)

if __name__ == "__main__":
    sys.exit(main_of(CLAIM))
