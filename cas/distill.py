"""The loss: the teacher's top-k probabilities plus one class for all the rest."""

from __future__ import annotations

import torch
from torch import Tensor


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
    normaliser = torch.logaddexp(top.logsumexp(1), rest)
    log_q = top - normaliser[:, None]
    p_rest = (-torch.expm1(log_p.logsumexp(1))).clamp(min=0.0)
    unseen = p_rest > 0
    log_p_rest = torch.where(unseen, p_rest, 1.0).log()
    rest_term = torch.where(unseen, p_rest * (log_p_rest - (rest - normaliser)), 0.0)
    return (log_p.exp() * (log_p - log_q)).sum(1) + rest_term


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Cross-entropy with the teacher's own words, float32 [N]: the objective that distillation is compared with."""
    return torch.nn.functional.cross_entropy(logits.float(), ids, reduction="none")
