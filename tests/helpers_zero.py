"""One rank of a model in parts: the gradients of its own conversations, next to those that one process computes."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from conftest import tiny_cartridges, tiny_hf, tiny_tokenizer
from helpers_store import converse, make_store, many_documents
from torch import Tensor

from cas.model.frozen import FrozenModel, Source
from cas.options import Training
from cas.training.ranks.world import join
from cas.training.ranks.zero import Lockstep, partition
from cas.training.trainer import Trainer

SIZES = {"doc-00": 16, "doc-01": 16, "doc-02": 8}


def tiny(kind: str) -> FrozenModel:
    """A fresh one: the shared one must not be taken apart. Of vectors that are large enough to be split."""
    return FrozenModel(tiny_hf(kind), tiny_tokenizer(), Source("folder", f"tiny-{kind}"))


def gradients(trainer: Trainer, batches: list[list[int]], recompute: bool) -> list[dict[str, Tensor]]:
    """Of a step for each batch: indices of conversations of doc-00, every second one with all cartridges in sight."""
    kv, found = tiny_cartridges(reference, SIZES), []
    trainer.recompute = recompute
    for batch in batches:
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in kv.items()}
        visible = [tuple(SIZES) if i % 2 else ("doc-00",) for i in batch]
        trainer.backward([trainer.conversations.by_document["doc-00"][i] for i in batch], visible, leaves)
        found.append({name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None})
    return found


def compare(rank: int, model: FrozenModel, folder: Path) -> float:
    """The largest difference of a gradient, relative to the largest gradient. Ranks have 1 and 3 steps, of other conversations."""
    documents = many_documents(3)
    conversations = converse(reference, documents)
    batches = [[0, 1, 2]] if rank == 0 else [[3, 4], [5], [0, 3, 5]]
    worst = 0.0
    for recompute in (False, True):
        results = []
        for n, used in enumerate((reference, model)):
            with make_store(folder / f"{rank}-{recompute}-{n}", used, documents) as store:
                results.append(gradients(Trainer(used, store, conversations, Training()), batches, recompute))
        for one, parts in zip(*results, strict=True):
            assert one.keys() == parts.keys() and one
            largest = max(float(g.abs().max()) for g in one.values())
            worst = max(worst, *(float((one[name] - parts[name]).abs().max()) / largest for name in one))
    return worst


if __name__ == "__main__":
    kind, folder = sys.argv[1], Path(sys.argv[2])
    reference = tiny(kind)
    with join(zero=True) as world:
        model = partition(tiny(kind), world.device)
        whole = sum(p.numel() for p in reference.hf.base_model.layers.parameters())
        here = sum(p.numel() for p in model.hf.base_model.layers.parameters())
        world.before_waiting = Lockstep(model).join_in
        # Ranks read different numbers of texts, too.
        for n in range(1 + 2 * world.rank):
            ids = list(range(5, 15 + n))
            assert torch.allclose(model.prefill(ids), reference.prefill(ids), atol=1e-5)
        held = sum(p.ds_tensor.numel() for p in model.hf.base_model.layers.parameters())
        worst = compare(world.rank, model, folder)
        left = sum(p.numel() for p in model.hf.base_model.layers.parameters())  # put together when training has ended
        figures = world.exchange([worst, here / whole, held / whole, left / whole])
        if world.first:
            print(figures)
        for difference, before, share, after in figures:
            assert difference <= 1e-5 and before == 0 and 0.49 < share < 0.52 and after <= 0.34, figures
