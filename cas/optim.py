"""Adam per cartridge: every cartridge has its own moments and its own step count, and they travel with it."""

from __future__ import annotations

import torch
from torch import Tensor

BETAS, EPSILON = (0.9, 0.999), 1e-8


@torch.no_grad()
def adam_step(kv: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: int, lr: float) -> None:
    """One Adam step in place, as ``torch.optim.Adam`` does it (no weight decay).

    Args: kv, grad, exp_avg, exp_avg_sq: float32, one shape. step: this cartridge's own count, 1 for its first step.
    """
    assert step >= 1
    exp_avg.lerp_(grad, 1 - BETAS[0])
    exp_avg_sq.mul_(BETAS[1]).addcmul_(grad, grad, value=1 - BETAS[1])
    denominator = exp_avg_sq.sqrt().div_((1 - BETAS[1] ** step) ** 0.5).add_(EPSILON)
    kv.addcdiv_(exp_avg, denominator, value=-lr / (1 - BETAS[0] ** step))


def learning_rate(peak: float, own_step: int, warmup: int, global_step: int, total_steps: int, final: float) -> float:
    """lr = peak x warm-up(the cartridge's own step) x linear decay(global step) (2606.04557).

    Args:
        own_step: the step about to be taken by this cartridge, 1 for its first: the first is already warmed up.
        warmup: own steps until the peak; global_step: 0-based; final: where the decay ends, as a share of the peak.
    """
    warm = min(1.0, own_step / max(1, warmup))
    progress = global_step / max(1, total_steps - 1)
    return peak * warm * (1 - (1 - final) * min(1.0, progress))
