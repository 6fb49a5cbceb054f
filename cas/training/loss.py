"""The loss: the teacher's top-k probabilities plus one class for all the rest."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

AT_ONCE = 1 << 24  # logits held at a time: 64 MiB of float32


def distillation_loss(logits: Tensor, top_ids: Tensor, top_logprobs: Tensor) -> Tensor:
    """KL(teacher || student) per token over the classes {k kept tokens, everything else}.

    Merging classes can only lower a KL, so this is a lower bound of the full one, never negative, and equal to it when
    k is the vocabulary. (Context distillation, 2506.06266, section 4.2; top-k as in 2606.04557. All k entries stay,
    whatever mass they hold, and the caller means over tokens, not over entries.)

    Args:
        logits: [N, V] student logits, any float dtype; computed in float32.
        top_ids: int64 [N, K], distinct within a row; top_logprobs: float32 [N, K], the teacher's log-probabilities.
    Returns: float32 [N], in nats.
    """
    logits = logits.float()
    top = logits.gather(1, top_ids)
    log_p = top_logprobs.float()
    if top_ids.shape[1] == logits.shape[1]:
        return (log_p.exp() * (log_p - (top - logits.logsumexp(1, keepdim=True)))).sum(1)
    # The rest by itself, not as 1 - sum(q): that difference has no correct digit once the student is sure.
    rest = logits.scatter(1, top_ids, -torch.inf).logsumexp(1)
    normalizer = torch.logaddexp(top.logsumexp(1), rest)
    log_q = top - normalizer[:, None]
    p_rest = (-torch.expm1(log_p.logsumexp(1))).clamp(min=0.0)
    unseen = p_rest > 0
    log_p_rest = torch.where(unseen, p_rest, 1.0).log()
    rest_term = torch.where(unseen, p_rest * (log_p_rest - (rest - normalizer)), 0.0)
    return (log_p.exp() * (log_p - log_q)).sum(1) + rest_term


def rows_at_once(head: torch.nn.Linear) -> int:
    """How many rows of logits :func:`distillation_mean` holds at a time."""
    return max(1, AT_ONCE * (4 if head.weight.is_cuda else 1) // head.out_features)


def distillation_mean(hidden: Tensor, head: torch.nn.Linear, top_ids: Tensor, top_logprobs: Tensor) -> Tensor:
    """The mean of :func:`distillation_loss` over rows, from the states before the output layer, in the memory of a few
    rows: every chunk's logits are turned into the gradient of its states before the next chunk's are made.

    Args:
        hidden: [N, D]; head: the frozen output layer, without a bias; logits are what it gives.
        top_ids, top_logprobs: as in the reference.
    Returns: float32 scalar, in nats; its gradient flows to ``hidden``.
    """
    mean: Tensor = _Mean.apply(hidden, head, top_ids, top_logprobs.float())
    return mean


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: torch.nn.Linear, ids: Tensor, logprobs: Tensor) -> Tensor:
        losses, gradient, rows = [], torch.empty_like(hidden), rows_at_once(head)
        for start in range(0, len(hidden), rows):
            chunk = slice(start, start + rows)
            logits = head(hidden[chunk])
            loss, by_logits = _loss_and_gradient(logits.float(), ids[chunk], logprobs[chunk])
            losses.append(loss)
            torch.mm(by_logits.div_(len(hidden)).to(hidden.dtype), head.weight, out=gradient[chunk])
        ctx.save_for_backward(gradient)
        return torch.cat(losses).mean()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (by_hidden,) = ctx.saved_tensors
        return by_hidden * gradients[0].to(by_hidden.dtype), None, None, None


def _loss_and_gradient(logits: Tensor, top_ids: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """The reference's losses and their gradients by logits, which are overwritten.

    A kept token's gradient is q - p. The rest as one class has q_r - p_r, shared out by softmax among its tokens.
    """
    top = logits.gather(1, top_ids)
    rest = logits.scatter_(1, top_ids, -torch.inf)
    highest = rest.amax(1, keepdim=True).clamp_min(torch.finfo(rest.dtype).min)
    sums = rest.sub_(highest).exp_().sum(1, keepdim=True)
    log_rest = sums.log() + highest
    normalizer = torch.logaddexp(top.logsumexp(1, keepdim=True), log_rest)
    log_q, log_q_rest = top - normalizer, log_rest - normalizer
    p = log_p.exp()
    whole = top_ids.shape[1] == logits.shape[1]
    p_rest = torch.zeros_like(sums) if whole else (-torch.expm1(log_p.logsumexp(1, keepdim=True))).clamp(min=0.0)
    rest_term = torch.where(p_rest > 0, p_rest * (p_rest.clamp_min(1e-45).log() - log_q_rest), 0.0)
    mass = p.sum(1, keepdim=True) + p_rest  # 1 but for rounding
    rest.mul_((log_q_rest.exp() * mass - p_rest) / sums.clamp_min(torch.finfo(sums.dtype).tiny))
    rest.scatter_(1, top_ids, log_q.exp() * mass - p)
    return (p * (log_p - log_q)).sum(1) + rest_term[:, 0], rest
