"""Adam per cartridge: every cartridge has its own moments and step count, which are saved with it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.adam import adam

BETAS, EPSILON = (0.9, 0.999), 1e-8


@torch.no_grad()
def adam_step(kv: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: int, lr: float) -> None:
    """One step of ``torch.optim.Adam`` in place (fused, no weight decay).

    Args: kv, grad, exp_avg, exp_avg_sq: float32, one shape. step: this cartridge's own count, 1 for its first step.
    """
    assert step >= 1
    adam(
        [kv], [grad], [exp_avg], [exp_avg_sq], [], [torch.tensor(step - 1.0, device=kv.device)], fused=True, lr=lr,
        beta1=BETAS[0], beta2=BETAS[1], eps=EPSILON, weight_decay=0.0, amsgrad=False, maximize=False,
    )  # fmt: skip


def learning_rate(peak: float, own_step: int, warmup: int, global_step: int, total_steps: int, final: float) -> float:
    """lr = peak x warm-up(the cartridge's own step) x linear decay(global step) (2606.04557).

    Args:
        own_step: the step about to be taken by this cartridge, 1 for its first: the first is already warmed up.
        warmup: own steps until the peak; global_step: 0-based; final: where the decay ends, as a share of the peak.
    """
    warm = min(1.0, own_step / max(1, warmup))
    progress = global_step / max(1, total_steps - 1)
    return peak * warm * (1 - (1 - final) * min(1.0, progress))
