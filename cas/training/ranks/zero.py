"""The frozen model in parts: its decoder layers are split over the ranks by DeepSpeed's ZeRO-3, and every layer is put
together for the moment in which it computes.

All ranks must then run the model in lockstep, but they have different work: self-study decodes until its answers end, and
steps have different micro-batches. So before every forward pass the ranks agree on its kind. One that has no work of that
kind joins in with a single token, forward and, where the others need gradients, backward. Nothing is added up over ranks:
every rank's gradients are those of its own conversations.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from cas.model.attention import Batch, packed_positions
from cas.model.attention_cpu import CpuAttention
from cas.model.frozen import FrozenModel
from cas.model.positions import Layout

_READ, _TRAIN, _RECOMPUTE, _IDLE = range(4)  # kinds of forward passes, in the order in which they take turns


def partition(model: FrozenModel, device: torch.device) -> FrozenModel:
    """The model with its decoder layers in parts, one on every rank; embedding and output layer stay whole.

    Args: model: on the CPU; device: this rank's.
    """
    deepspeed = _deepspeed()
    identity, decoder = model.identity, model.hf.base_model  # the identity reads all weights
    whole, embedding = model.weight_bytes, decoder.get_input_embeddings()
    decoder.set_input_embeddings(torch.nn.Identity())  # it may be the output layer, too, whose weights we use directly
    layers = sum(p.numel() * p.element_size() for p in decoder.parameters())
    # A layer at a time, not a matrix: the order of backward inside a layer may differ from rank to rank.
    kinds = {type(m) for m in decoder.modules() if isinstance(m, GradientCheckpointingLayer)}
    deepspeed.utils.set_z3_leaf_modules(decoder, list(kinds))
    stage = {"stage": 3, "stage3_param_persistence_threshold": 0}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": stage}
    engine, *_ = deepspeed.initialize(model=decoder, config=config)
    decoder.set_input_embeddings(embedding)
    model.hf.to(device)
    parts = FrozenModel(model.hf, model.tokenizer, model.source, model.system, identity)
    size, live = torch.distributed.get_world_size(), engine.zero_max_live_parameters() * model.dtype.itemsize
    parts.weight_bytes = whole - layers + layers // size + min(layers, live)
    parts.hf.zero_engine = [engine]  # kept alive; in a list, since it is a module
    return parts


def _deepspeed() -> Any:
    """DeepSpeed, with the process group that this process has."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import deepspeed
    import deepspeed.ops

    if not torch.cuda.is_available():
        # Else init_distributed compiles an operator for shared memory, for which it needs g++ and a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo")
    return deepspeed


class Lockstep:
    """Keeps the ranks' forward passes together. Every rank makes one, of its part of the model."""

    def __init__(self, model: FrozenModel) -> None:
        self.model, self.joining = model, False
        model.header_kv  # noqa: B018  # read now, while all ranks do
        model.hf.base_model.register_forward_pre_hook(self._before_forward, prepend=True)

    def join_in(self) -> None:
        """Join in with the other ranks until none of them has work."""
        while (kind := _agree(_IDLE)) != _IDLE:
            self._run(kind)

    def _before_forward(self, *_: Any) -> None:
        if self.joining:
            return
        own = _READ
        if torch.is_grad_enabled():
            own = _RECOMPUTE if any(vars(m).get("gradient_checkpointing") for m in self.model.hf.modules()) else _TRAIN
        while (kind := _agree(own)) != own:
            self._run(kind)

    def _run(self, kind: int) -> None:
        """One token after a cartridge, forward, and backward where that kind of pass has one."""
        model, g = self.model, self.model.geometry
        batch, layout = Batch((1,), (("none",),)), Layout("fixed", model.layout_header, 4)
        with self._joining(), torch.set_grad_enabled(kind != _READ), model.recomputing(kind == _RECOMPUTE):
            kv = torch.zeros(g.layers, 2, g.kv_heads, 4, g.head_dim, device=model.device, requires_grad=kind != _READ)
            context = CpuAttention(batch, model.header_kv, {"none": kv}, layout, model.rope, model.dtype)
            states = model.hidden(
                torch.zeros(1, 1, dtype=torch.long), packed_positions(batch, {"none": 4}, layout), context
            )
            if kind != _READ:
                states.float().sum().backward()

    @contextlib.contextmanager
    def _joining(self) -> Iterator[None]:
        self.joining = True
        try:
            yield
        finally:
            self.joining = False


def _agree(kind: int) -> int:
    """The first in turn of the kinds that ranks ask for."""
    asked = torch.tensor(kind)
    torch.distributed.all_reduce(asked, op=torch.distributed.ReduceOp.MIN)
    return int(asked)
