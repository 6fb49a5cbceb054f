"""Joint training of many cartridges over one frozen model: the method of 2606.04557, as we reconstruct it, top to bottom.

A small pool of cartridges is on the device. A step takes a few of them as targets, draws conversations about each, and
decides for every conversation whether it sees its own cartridge alone or among distractors. The frozen model answers
with what it sees, the loss compares it with what it answered when it had the text, and only cartridges learn. Every so
many steps the most trained leave the pool, with their Adam state, and the least trained enter.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from budget.manager import Manager
from cas.config import Training
from cas.errors import ConfigError
from cas.model.attention import AttentionContext, Batch, packed_positions
from cas.model.attention_cpu import CpuAttention
from cas.model.attention_gpu import GpuAttention
from cas.model.frozen import FrozenModel
from cas.selfstudy.conversations import Conversation, Conversations
from cas.store.store import Store
from cas.training.initialization import initialize_cartridges
from cas.training.loss import distillation_loss, distillation_mean
from cas.training.loss_guard import LossGuard
from cas.training.metrics_log import Report, StepLog
from cas.training.optim import adam_step, learning_rate
from cas.training.rounds import guests_among, members, refuse_changes
from cas.training.schedule import Schedule, Step


class Trainer:
    """Trains a store's cartridges on its conversations; resumes where the store's last checkpoint is.

    ``host_bytes`` is memory for cartridges outside the pool, ``recompute`` keeps fewer activations and computes layers twice;
    neither changes a result. ``options`` are fields of :class:`Training`.
    """

    def __init__(
        self,
        model: FrozenModel,
        store: Store,
        conversations: Conversations,
        training: Training | None = None,
        *,
        host_bytes: int | None = 0,
        device_bytes: int | None = None,
        recompute: bool = False,
        on_step: Callable[[Report], None] | None = None,
        **options: Any,
    ) -> None:
        store.check_model(model)
        self.model, self.store, self.conversations = model, store, conversations
        self.training = t = training or Training(**options)
        self.on_step = on_step
        self.layout = store.layout
        learning, frozen = members(store)
        counts = {i: len(conversations.by_document[i]) for i in learning if i in conversations.by_document}
        if not counts:
            raise ConfigError("no conversations about the documents of this store; run its synthesis again")
        if without := [i for i in learning if i not in counts]:
            warnings.warn(f"nothing to train on about {', '.join(without)}: left as initialised", stacklevel=2)
        pool = min(20 if t.pool is None else t.pool, len(counts))
        self.schedule = Schedule(  # who trains and who sees whom: cas/schedule.py
            counts,
            seed=t.seed,
            pool=pool,
            targets=min(t.targets, pool),
            per_target=t.per_target,
            isolation=t.isolation,
            max_distractors=t.max_distractors,
            guests=guests_among(t, len(frozen)),
            frozen=frozen,
            rotate_every=t.rotate_every,
            rotate_fraction=t.rotate_fraction,
        )
        per_step = self.schedule.targets * t.per_target
        self.steps = t.steps if t.steps is not None else max(1, round(t.epochs * sum(counts.values()) / per_step))
        self._limits, self.recompute, self.rescue = (device_bytes, host_bytes), recompute, LossGuard()
        self.ahead = model.device.type == "cuda"  # a CPU has no time to spare beside the steps

    def run(self, stop: Callable[[], bool] = lambda: False, until: int | None = None) -> bool:
        """Train to the end, or until ``stop()`` or step ``until``; always leaves a checkpoint.

        Returns: whether the last step was reached. Raises: RunError when no step can be taken any more (:mod:`cas.training.loss_guard`).
        """
        if not initialize_cartridges(self.model, self.store, self.conversations, stop):
            return False
        with self.store.training():
            step, pool, guests = self._resume()
            end = self.steps if until is None else min(until, self.steps)
            with closing(self.manager), closing(StepLog(self.store.metrics, step)) as log:
                while step < end and not stop():
                    started = time.perf_counter()
                    if self.schedule.rotates(step):
                        pool, guests = self.schedule.rotate(step, pool, self._drawn)
                        self.manager.rotate(pool, guests)
                        if self.manager.ahead and step + self.training.rotate_every < end:
                            self.manager.prefetch(*self.schedule.next_rotation(step, pool, self._drawn))
                    work = self.schedule.step(step, pool, guests, self._drawn)
                    loss, tokens, lr = self.train_step(step, work)
                    seconds = time.perf_counter() - started
                    turned = step // self.training.rotate_every
                    skipped = self.rescue.skipped
                    report = Report(step, self.steps, loss, lr, tokens, tokens / seconds, pool, turned, skipped)
                    log.write(report, work.targets)
                    step += 1
                    if step % self.training.checkpoint_every == 0:
                        self._checkpoint(step, pool, guests, log)
                    if self.on_step is not None:
                        self.on_step(report)
                self._checkpoint(step, pool, guests, log)
        return step >= self.steps

    def train_step(self, step: int, work: Step) -> tuple[float, int, float]:
        """One step on the resident pool: forward, loss, backward, Adam on the targets. Returns loss, tokens, lr."""
        t = self.training
        seen = {name for example in work.examples for name in example.visible}
        learners = set(self.manager.trainees) & seen if t.distractor_gradients else set(work.targets)
        leaves = {
            name: slot.kv.detach().requires_grad_(name in learners) for name, slot in self.manager.trainees.items()
        }
        examples = [self.conversations.by_document[e.document][e.index] for e in work.examples]
        loss, tokens = self.loss(examples, [e.visible for e in work.examples], {**leaves, **self.manager.guests})
        loss.backward()
        value, lr = float(loss.detach()), 0.0
        gradients = {name: g for name in learners if (g := leaves[name].grad) is not None}
        assert len(gradients) == len(learners)
        spoilers = self.rescue.spoils(value, gradients, self.model.geometry.vocabulary)
        if spoilers:
            for name in self.rescue.count(step, value, spoilers):
                self._back(name)
            gradients = {}
        else:
            self.rescue.taken(learners)
        for name, grad in sorted(gradients.items()):
            slot = self.manager.trainees[name]
            if slot.pending is not None:
                grad = grad + slot.pending
            if name not in work.targets:
                # Adam would blow a distractor's faint gradient up to a full step: it waits for its own turn.
                slot.pending = grad
            else:
                row = self._rows[name]
                lr = learning_rate(t.lr, row.steps + 1, t.warmup, step, self.steps, t.final_lr)
                adam_step(slot.kv, grad, slot.exp_avg, slot.exp_avg_sq, row.steps + 1, lr)
                slot.pending = None
            self.manager.touch(name)
        for name in work.targets:
            mine = [c for c in examples if c.document == name]
            row = self._rows[name]
            trained = sum(len(c.tokens(self.model)) for c in mine) if name in gradients else 0
            self._rows[name] = replace(
                row,
                drawn=row.drawn + len(mine),
                steps=row.steps + (name in gradients),
                trained_tokens=row.trained_tokens + trained,
            )
            self._drawn[name] = row.drawn + len(mine)
            self.manager.touch(name)  # what was drawn counts, of a skipped step too
        return value, tokens, lr

    def _back(self, name: str) -> None:
        """Give a cartridge and its moments what they were at the last checkpoint; its conversations stay drawn."""
        self.store.forget(name)
        self.manager.reload(name)
        self._rows[name] = replace(self.store.row(name), drawn=self._rows[name].drawn)

    def loss(
        self, conversations: list[Conversation], visible: list[tuple[str, ...]], cartridges: Mapping[str, Tensor]
    ) -> tuple[Tensor, int]:
        """Mean loss per supervised token of conversations under what each of them sees, and the number of own tokens.

        Only tokens of answers count (2506.06266); the conversations are packed without padding.
        """
        tokens = [c.tokens(self.model) for c in conversations]
        batch = Batch(tuple(map(len, tokens)), tuple(visible))
        context = self._attention(batch, cartridges)
        positions = packed_positions(batch, {n: kv.shape[3] for n, kv in cartridges.items()}, self.layout)
        rows = [
            torch.arange(start + length - len(c.answer), start + length)
            for start, length, c in zip(batch.starts(), batch.lengths, conversations, strict=True)
        ]
        ids = torch.tensor([[token for row in tokens for token in row]])
        device, supervised = self.model.device, torch.cat(rows)
        if self.training.objective == "next-token":  # the model's own words as if it had had no doubt
            answers = np.concatenate([c.answer for c in conversations])[:, None]
            top_ids, top = torch.from_numpy(answers).long().to(device), torch.zeros(answers.shape, device=device)
        else:
            top_ids = torch.from_numpy(np.concatenate([c.top_ids for c in conversations])).long().to(device)
            top = torch.from_numpy(np.concatenate([c.top_logprobs for c in conversations])).to(device)
        with self.model.recomputing(self.recompute):
            if self.model.head is None:
                logits = self.model.forward(ids, positions, context, rows=supervised)[0]
                return distillation_loss(logits, top_ids, top).mean(), ids.numel()
            states = self.model.hidden(ids, positions, context, rows=supervised)[0]
        return distillation_mean(states, self.model.head, top_ids, top), ids.numel()

    def _attention(self, batch: Batch, cartridges: Mapping[str, Tensor]) -> AttentionContext:
        header, dtype = self.model.header_kv, self.model.dtype
        if self.model.device.type == "cuda" and self.layout.policy != "sequential":
            return GpuAttention(batch, header, cartridges, self.layout, dtype)
        return CpuAttention(batch, header, cartridges, self.layout, self.model.rope, dtype)

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def _resume(self) -> tuple[int, tuple[str, ...], tuple[str, ...]]:
        """Step, pool and guests of the last checkpoint, with the residents loaded; the settings must be the same."""
        self._rows = self.store.rows()
        self._drawn = {i: row.drawn for i, row in self._rows.items()}
        state = self.store.run_state()
        self._settings = {**asdict(self.training), "total_steps": self.steps}
        self._settings.pop("checkpoint_every")
        refuse_changes(self.store, self._settings)
        state = state or {"step": 0, "pool": (), "guests": ()}
        self.rescue = LossGuard(**state.get("rescue", {}))
        step, pool, guests = int(state["step"]), tuple(state["pool"]), tuple(state["guests"])
        # A new one every time: the old one may hold what a failed run did after the checkpoint.
        self.manager = Manager(self.store, self.model.device, *self._limits, ahead=self.ahead)
        self.manager.rotate(pool, guests)
        return step, pool, guests

    def _checkpoint(self, step: int, pool: tuple[str, ...], guests: tuple[str, ...], log: StepLog) -> None:
        """Everything trained so far, and where the run is, in one transaction; the log is on disk before it."""
        log.sync()
        self.manager.flush()
        state = {
            "step": step,
            "pool": pool,
            "guests": guests,
            "settings": self._settings,
            "rescue": asdict(self.rescue),
        }
        self.store.commit(self._rows, state)
