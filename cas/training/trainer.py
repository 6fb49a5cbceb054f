"""Joint training of many cartridges over one frozen model: the method of 2606.04557, as we reconstruct it.

A small pool of cartridges is on the device. A step takes a few of them as targets, draws conversations about each, and
decides for every conversation whether it sees its own cartridge alone or among distractors. The frozen model answers
with what it sees, the loss compares the answer with the one it gave when it had the text, and only cartridges learn. At
every rotation the most trained leave the pool, with their Adam state, and the least trained enter.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from budget.manager import Manager
from cas.errors import ConfigError
from cas.model.attention import AttentionContext, Batch, packed_positions
from cas.model.attention_cpu import CpuAttention
from cas.model.attention_gpu import GpuAttention
from cas.model.frozen import FrozenModel
from cas.options import Training
from cas.selfstudy.conversations import Conversation, Conversations
from cas.store.store import Store
from cas.training.initialization import initialize_cartridges
from cas.training.loss import distillation_loss, distillation_mean
from cas.training.metrics_log import Report, StepLog
from cas.training.micro_batches import micro_batches
from cas.training.optim import adam_step, learning_rate
from cas.training.rounds import current_round
from cas.training.schedule import Schedule, Step
from cas.training.state import TrainerState


class StepResult(NamedTuple):
    """Of one step: mean loss in nats per supervised token, own tokens of its conversations, learning rate of the last
    target (0 if the step was skipped)."""

    loss: float
    tokens: int
    lr: float


class Trainer:
    """Trains a store's cartridges on its conversations; resumes where the store's last checkpoint is.

    ``host_bytes`` is memory for cartridges outside the pool, ``recompute`` keeps fewer activations and computes layers
    twice; neither changes a result. ``options`` are fields of :class:`Training`.
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
        self.training = training or Training(**options)
        self.layout, self.recompute, self.on_step = store.layout, recompute, on_step
        members = current_round(store)
        counts = {i: len(conversations.by_document[i]) for i in members.learners if i in conversations.by_document}
        if not counts:
            raise ConfigError("no conversations about the documents of this store; run its synthesis again")
        if without := [i for i in members.learners if i not in counts]:
            warnings.warn(f"nothing to train on about {', '.join(without)}: left as initialized", stacklevel=2)
        self.schedule = Schedule(counts, self.training, members.frozen)
        self.steps = self.schedule.steps
        self.state = TrainerState()
        self.ahead = model.device.type == "cuda"  # read and write in a thread during the steps; a CPU is busy with them
        self._limits = device_bytes, host_bytes
        self.manager = Manager(store, model.device, *self._limits)  # every run makes a new one

    def run(self, stop: Callable[[], bool] = lambda: False, until: int | None = None) -> bool:
        """Train to the end, or until ``stop()`` or step ``until``; always ends with a checkpoint.

        Returns: whether the last step was reached.
        Raises: RunError when every step is skipped (:mod:`cas.training.loss_guard`).
        """
        if not initialize_cartridges(self.model, self.store, self.conversations, stop):
            return False
        with self.store.training():
            self._resume()
            state, schedule = self.state, self.schedule
            end = self.steps if until is None else min(until, self.steps)
            with closing(self.manager), closing(StepLog(self.store.metrics, state.step)) as log:
                while state.step < end and not stop():
                    started = time.perf_counter()
                    if schedule.rotates(state.step):
                        state.pool, state.guests = schedule.rotate(state.step, state.pool, state.drawn)
                        self.manager.rotate(state.pool, state.guests)
                        if self.manager.ahead and state.step + self.training.rotate_every < end:
                            self.manager.prefetch(*schedule.next_rotation(state.step, state.pool, state.drawn))
                    work = schedule.step(state.step, state.pool, state.guests, state.drawn)
                    result = self.train_step(state.step, work)
                    report = self._report(result, time.perf_counter() - started)
                    log.write(report, work.targets)
                    state.step += 1
                    if state.step % self.training.checkpoint_every == 0:
                        self._checkpoint(log)
                    if self.on_step is not None:
                        self.on_step(report)
                self._checkpoint(log)
        return state.step >= self.steps

    def train_step(self, step: int, work: Step) -> StepResult:
        """One step on the resident pool: forward, loss, backward, Adam on the targets."""
        trainees, guard = self.manager.trainees, self.state.loss_guard
        seen = {name for example in work.examples for name in example.visible}
        learners = set(trainees) & seen if self.training.distractor_gradients else set(work.targets)
        leaves = {name: slot.kv.detach().requires_grad_(name in learners) for name, slot in trainees.items()}
        examples = [self.conversations.by_document[e.document][e.index] for e in work.examples]
        loss, tokens = self.backward(examples, [e.visible for e in work.examples], {**leaves, **self.manager.guests})
        gradients = {name: g for name in sorted(learners) if (g := leaves[name].grad) is not None}
        assert len(gradients) == len(learners)
        if causes := guard.causes(loss, gradients, self.model.geometry.vocabulary):
            gradients = {}
            for name in guard.count_skipped(step, loss, causes):
                self._restore(name)
        else:
            guard.count_taken(learners)
        lr = self._apply(step, gradients, work.targets)
        self._count(examples, gradients, work.targets)
        return StepResult(loss, tokens, lr)

    def _apply(self, step: int, gradients: Mapping[str, Tensor], targets: Iterable[str]) -> float:
        """Adam on the targets. Returns: the last one's learning rate, 0 if nothing is to be applied."""
        t, lr = self.training, 0.0
        for name, grad in gradients.items():
            slot = self.manager.trainees[name]
            if slot.pending is not None:
                grad = grad + slot.pending
            if name not in targets:
                # Adam would scale a distractor's small gradient up to a full step: it waits for its own turn.
                slot.pending = grad
            else:
                own_step = self.state.rows[name].steps + 1
                lr = learning_rate(t.lr, own_step, self.schedule.warmup, step, self.steps, t.final_lr)
                adam_step(slot.kv, grad, slot.exp_avg, slot.exp_avg_sq, own_step, lr)
                slot.pending = None
            self.manager.touch(name)
        return lr

    def _count(self, examples: Sequence[Conversation], gradients: Mapping[str, Tensor], targets: Iterable[str]) -> None:
        """Add a step to the figures of its targets; conversations of a skipped step count as drawn, not as trained."""
        for name in targets:
            row, own, taken = self.state.rows[name], [c for c in examples if c.document == name], name in gradients
            self.state.rows[name] = replace(
                row,
                drawn=row.drawn + len(own),
                steps=row.steps + taken,
                trained_tokens=row.trained_tokens + taken * sum(len(c.tokens(self.model)) for c in own),
            )
            self.state.drawn[name] = row.drawn + len(own)
            self.manager.touch(name)

    def _restore(self, name: str) -> None:
        """Give a cartridge, its moments and its figures back from the last checkpoint; its conversations stay drawn."""
        self.store.forget(name)
        self.manager.reload(name)
        self.state.rows[name] = replace(self.store.row(name), drawn=self.state.drawn[name])

    def backward(
        self, conversations: list[Conversation], visible: list[tuple[str, ...]], cartridges: Mapping[str, Tensor]
    ) -> tuple[float, int]:
        """Add the gradient of :meth:`loss` to the cartridges, in micro-batches, which bounds memory. Returns as it does."""
        lengths, answers = [len(c.tokens(self.model)) for c in conversations], [len(c.answer) for c in conversations]
        prefixes = [self.model.layout_header + sum(cartridges[n].shape[3] for n in names) for names in visible]
        loss = 0.0
        for part in micro_batches(self.model, lengths, prefixes):
            mean = self.loss(conversations[part], visible[part], cartridges)[0]
            mean = mean * (sum(answers[part]) / sum(answers))  # together, the mean over all answer tokens of the step
            mean.backward()
            loss += float(mean.detach())
        return loss, sum(lengths)

    def loss(
        self, conversations: list[Conversation], visible: list[tuple[str, ...]], cartridges: Mapping[str, Tensor]
    ) -> tuple[Tensor, int]:
        """Mean loss per supervised token of conversations under what each of them sees, and the number of own tokens.

        Only tokens of answers count (2506.06266); the conversations are packed without padding. A cartridge gets a
        gradient from its own conversations; from all that see it with ``distractor_gradients``.
        """
        tokens = [c.tokens(self.model) for c in conversations]
        learner = None if self.training.distractor_gradients else tuple(c.document for c in conversations)
        batch = Batch(tuple(map(len, tokens)), tuple(visible), learner)
        context = self._attention(batch, cartridges)
        positions = packed_positions(batch, {n: kv.shape[3] for n, kv in cartridges.items()}, self.layout)
        rows = [
            torch.arange(start + length - len(c.answer), start + length)
            for start, length, c in zip(batch.starts(), batch.lengths, conversations, strict=True)
        ]
        ids = torch.tensor([[token for row in tokens for token in row]])
        device, supervised = self.model.device, torch.cat(rows)
        if self.training.objective == "next-token":  # one-hot targets: the tokens that the teacher chose
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

    def _resume(self) -> None:
        """Go to the last checkpoint and load its residents. Raises: ConfigError for other settings than the run's."""
        settings = {**asdict(self.training), "total_steps": self.steps}
        del settings["checkpoint_every"]
        self.state = TrainerState.load(self.store, settings)
        # A new one: the old one may hold changes of a failed run after the checkpoint.
        self.manager = Manager(self.store, self.model.device, *self._limits, ahead=self.ahead)
        self.manager.rotate(self.state.pool, self.state.guests)

    def _checkpoint(self, log: StepLog) -> None:
        """Save everything trained so far, and where the run is; the log is on disk before that."""
        log.sync()
        self.manager.flush()
        self.state.save(self.store)

    def _report(self, result: StepResult, seconds: float) -> Report:
        step, pool, skipped = self.state.step, self.state.pool, self.state.loss_guard.skipped
        rate, turned = result.tokens / seconds, step // self.training.rotate_every
        return Report(step, self.steps, result.loss, result.lr, result.tokens, rate, pool, turned, skipped)
