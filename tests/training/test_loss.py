"""The loss against explicit sums in float64; the optimiser against torch's own."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from cas.training.loss import distillation_loss, distillation_mean
from cas.training.optim import adam_step, learning_rate

VOCABULARY = 32


def case(
    seed: int, rows: int = 6, k: int = 8, student: float = 2.0, teacher: float = 2.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student logits [N, V] (a leaf), teacher log-probabilities [N, V] in float64, and its top k as they are stored."""
    generator = torch.Generator().manual_seed(seed)
    logits = (student * torch.randn(rows, VOCABULARY, generator=generator)).requires_grad_()
    full = (teacher * torch.randn(rows, VOCABULARY, generator=generator)).double().log_softmax(-1)
    top = full.topk(k, dim=-1)
    return logits, full, top.indices, top.values.float()


def explicit(logits: Tensor, top_ids: Tensor, top_logprobs: Tensor) -> Tensor:
    """KL over k + 1 classes, row by row, in float64."""
    rows = []
    for student, ids, logprobs in zip(logits.double(), top_ids, top_logprobs.double(), strict=True):
        q = student.softmax(-1)
        others = torch.ones(len(q), dtype=torch.bool)
        others[ids] = False
        p, q = torch.cat([logprobs.exp(), (1 - logprobs.exp().sum())[None]]), torch.cat([q[ids], q[others].sum()[None]])
        rows.append((p * (p / q).log()).sum())
    return torch.stack(rows)


def test_with_the_whole_vocabulary_it_is_the_full_kl() -> None:
    logits, full, ids, logprobs = case(0, k=VOCABULARY)
    expected = torch.nn.functional.kl_div(logits.double().log_softmax(-1), full, log_target=True, reduction="none").sum(
        -1
    )
    loss = distillation_loss(logits, ids, logprobs)
    assert loss.shape == (6,) and loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    loss.sum().backward()
    torch.testing.assert_close(logits.grad, (logits.softmax(-1) - full.exp().float()).detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("k", [1, 2, 8, VOCABULARY - 1])
def test_with_fewer_it_is_the_kl_with_one_class_for_the_rest(k: int) -> None:
    logits, full, ids, logprobs = case(1, k=k)
    loss = distillation_loss(logits, ids, logprobs)
    expected = explicit(logits, ids, logprobs)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    (ours,) = torch.autograd.grad(loss.sum(), logits)
    (theirs,) = torch.autograd.grad(expected.sum(), logits)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    whole = torch.nn.functional.kl_div(logits.double().log_softmax(-1), full, log_target=True, reduction="none").sum(-1)
    assert (expected <= whole + 1e-6).all()  # merging classes never adds


def test_more_classes_never_lower_it() -> None:
    before = torch.zeros(6)
    for k in range(1, VOCABULARY + 1):
        logits, _, ids, logprobs = case(2, k=k)
        loss = distillation_loss(logits, ids, logprobs).detach()
        assert (loss >= before - 1e-6).all()
        before = loss


def test_the_order_of_the_entries_does_not_matter() -> None:
    logits, _, ids, logprobs = case(3)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    a, b = distillation_loss(logits, ids, logprobs), distillation_loss(logits, ids[:, order], logprobs[:, order])
    torch.testing.assert_close(a, b)


@given(st.integers(0, 10_000), st.integers(1, VOCABULARY), st.floats(0, 60), st.floats(0, 60))
@settings(max_examples=150, deadline=None)
def test_never_negative_and_always_finite(seed: int, k: int, student: float, teacher: float) -> None:
    """However sure student and teacher are, of the same or of different tokens."""
    logits, _, ids, logprobs = case(seed, rows=3, k=k, student=student, teacher=teacher)
    loss = distillation_loss(logits, ids, logprobs)
    assert loss.isfinite().all()
    assert (loss >= -1e-6).all()  # but for rounding
    loss.sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all()
    assert logits.grad.abs().max() <= 1 + 1e-5  # a difference of two probabilities


@pytest.mark.parametrize("k", [1, 8, VOCABULARY])
def test_zero_for_equals(k: int) -> None:
    _, full, ids, logprobs = case(4, k=k)
    logits = (full.float() + 3.7).requires_grad_()  # logits are free up to a constant
    loss = distillation_loss(logits, ids, logprobs)
    assert loss.abs().max() < 1e-6
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("confidence", [30.0, 200.0, 5_000.0])
def test_a_very_sure_student(confidence: float, right: bool) -> None:
    """1 - sum(q) has no digit left here; the gradient must still pull, and only where it should."""
    logprobs = torch.tensor([[math.log(0.6), math.log(0.3)]])
    logits = torch.zeros(1, VOCABULARY)
    logits[0, 0 if right else 5] = confidence
    logits.requires_grad_()
    loss = distillation_loss(logits, torch.tensor([[0, 1]]), logprobs)
    # All other logits are 0: the student's log-probabilities by hand.
    sure = -math.log1p((VOCABULARY - 1) * math.exp(-confidence))
    if right:
        q = [sure, sure - confidence, sure - confidence + math.log(VOCABULARY - 2)]
    else:
        q = [sure - confidence, sure - confidence, sure]
    expected = sum(p * (math.log(p) - log_q) for p, log_q in zip((0.6, 0.3, 0.1), q, strict=True))
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert gradient.isfinite().all() and float(gradient.sum()) == pytest.approx(0, abs=1e-5)
    if right:
        assert gradient[0, 0].item() == pytest.approx(0.4, abs=1e-5)
        assert gradient[0, 1].item() == pytest.approx(-0.3, abs=1e-5)
        assert gradient[0, 2:].sum().item() == pytest.approx(-0.1, abs=1e-5)
    else:
        assert gradient[0, 0].item() == pytest.approx(-0.6, abs=1e-5)
        assert gradient[0, 5].item() == pytest.approx(0.9, abs=1e-5)


def test_a_teacher_without_doubt() -> None:
    """All its mass on one token, to the last bit and beyond: cross-entropy with that token."""
    logits, *_ = case(5, rows=1)
    logprobs = torch.tensor([[0.0, -400.0]])
    loss = distillation_loss(logits, torch.tensor([[3, 4]]), logprobs)
    assert loss.item() == pytest.approx(float(-logits.detach().log_softmax(-1)[0, 3]), rel=1e-6)
    rounded = distillation_loss(
        logits, torch.tensor([[3, 4]]), torch.tensor([[1e-7, -17.0]])
    )  # sums to a little over 1
    rounded.sum().backward()
    assert rounded.item() == pytest.approx(loss.item(), abs=1e-5)
    assert logits.grad is not None and logits.grad.isfinite().all()


def test_all_entries_stay_however_little_they_hold() -> None:
    """A flat teacher, whose 8 kept tokens hold a quarter of the mass."""
    ids, logprobs = torch.arange(8)[None], torch.full((1, 8), -math.log(VOCABULARY))
    logits = torch.zeros(1, VOCABULARY)
    logits[0, 0] = 1.0
    total = VOCABULARY - 1 + math.e
    q, rest = [math.e / total] + [1 / total] * 7, 24 / total
    expected = sum(1 / 32 * math.log(1 / 32 / x) for x in q) + 0.75 * math.log(0.75 / rest)
    assert distillation_loss(logits, ids, logprobs).item() == pytest.approx(expected, rel=1e-4)


def test_one_value_a_token_whatever_k_is() -> None:
    """A mean over tokens: with k times the entries the gradient does not shrink k times."""
    gradients = []
    for k in (2, VOCABULARY):
        logits, _, ids, logprobs = case(6, k=k)
        loss = distillation_loss(logits, ids, logprobs)
        assert loss.shape == (6,)
        gradients.append(torch.autograd.grad(loss.mean(), logits)[0].norm())
    assert gradients[1] >= gradients[0] * 0.9


def test_half_precision_logits_are_computed_in_float32() -> None:
    logits, _, ids, logprobs = case(7)
    half = logits.detach().to(torch.bfloat16)
    torch.testing.assert_close(distillation_loss(half, ids, logprobs), distillation_loss(half.float(), ids, logprobs))


def test_one_entry_without_doubt_is_the_next_token_loss() -> None:
    logits, *_ = case(8)
    ids = torch.tensor([3, 1, 4, 1, 5, 9])
    expected = torch.nn.functional.cross_entropy(logits, ids, reduction="none")
    torch.testing.assert_close(distillation_loss(logits, ids[:, None], torch.zeros(6, 1)), expected)


@given(st.integers(0, 10_000), st.integers(1, VOCABULARY), st.floats(0, 60), st.floats(0, 60), st.integers(1, 6))
@example(7135, 1, 46.0, 15.0, 1)
@settings(max_examples=150, deadline=None)
def test_the_mean_in_chunks_equals_the_reference(seed: int, k: int, student: float, teacher: float, rows: int) -> None:
    """With an output layer that hands the logits through, value and gradient are the reference's."""
    logits, _, ids, logprobs = case(seed, k=k, student=student, teacher=teacher)
    head = torch.nn.Linear(VOCABULARY, VOCABULARY, bias=False).requires_grad_(False)
    head.weight.copy_(torch.eye(VOCABULARY))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cas.training.loss.AT_ONCE", rows * VOCABULARY)
        mean = distillation_mean(logits, head, ids, logprobs)
    reference = distillation_loss(logits, ids, logprobs).mean()
    torch.testing.assert_close(mean, reference, rtol=1e-5, atol=1e-6)
    (ours,) = torch.autograd.grad(3 * mean, logits)
    (theirs,) = torch.autograd.grad(3 * reference, logits)
    # Both subtract logits that float32 rounds by their size; that moves a probability, and so a gradient, by as much.
    rounding = float(logits.detach().abs().max()) * 2**-24
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6 + rounding)


def test_the_mean_of_a_half_precision_model_is_near_the_reference() -> None:
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(16, VOCABULARY, bias=False).requires_grad_(False).to(torch.bfloat16)
    hidden = torch.randn(6, 16, generator=generator).to(torch.bfloat16).requires_grad_()
    _, _, ids, logprobs = case(9)
    mean, reference = distillation_mean(hidden, head, ids, logprobs), distillation_loss(head(hidden), ids, logprobs)
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean, reference.mean())
    (ours,), (theirs,) = torch.autograd.grad(mean, hidden), torch.autograd.grad(reference.mean(), hidden)
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=1e-3)


# -- Adam per cartridge -------------------------------------------------------------------------------------------------


def test_adam_step_equals_torch_with_own_step_counts() -> None:
    """Three cartridges that take part in different steps, each beside a torch.optim.Adam of its own."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 2, 1, 16, 4), (2, 2, 1, 32, 4), (2, 2, 1, 16, 4)]
    ours = [torch.randn(shape, generator=generator) for shape in shapes]
    moments = [(torch.zeros(shape), torch.zeros(shape)) for shape in shapes]
    theirs = [kv.clone().requires_grad_() for kv in ours]
    adams = [torch.optim.Adam([kv], lr=1.0) for kv in theirs]
    counts = [0, 0, 0]
    for step in range(60):
        for n in range(3):
            if step % (n + 1):
                continue
            counts[n] += 1
            lr = learning_rate(0.05, counts[n], 5, step, 60, 0.02)
            grad = torch.randn(shapes[n], generator=generator) * 10.0 ** (step % 5 - 3)
            adam_step(ours[n], grad, *moments[n], counts[n], lr)
            theirs[n].grad = grad.clone()
            adams[n].param_groups[0]["lr"] = lr
            adams[n].step()
            torch.testing.assert_close(ours[n], theirs[n].detach(), rtol=1e-6, atol=1e-6)
    assert counts == [60, 30, 20]
    for n, adam in enumerate(adams):
        state = adam.state[theirs[n]]
        torch.testing.assert_close(moments[n][0], state["exp_avg"], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(moments[n][1], state["exp_avg_sq"], rtol=1e-6, atol=1e-6)


def test_adam_step_works_in_place_and_leaves_the_gradient() -> None:
    kv, grad = torch.ones(4), torch.tensor([1.0, -2.0, 0.0, 1e-30])
    first, second, pointer = torch.zeros(4), torch.zeros(4), kv.data_ptr()
    adam_step(kv, grad, first, second, 1, 0.1)
    assert kv.data_ptr() == pointer
    assert kv.tolist() == pytest.approx([0.9, 1.1, 1.0, 1.0])  # the first step is lr times the sign
    assert grad.tolist() == pytest.approx([1.0, -2.0, 0.0, 1e-30])
    with pytest.raises(AssertionError):
        adam_step(kv, grad, first, second, 0, 0.1)


def test_the_first_step_is_warmed_up_already() -> None:
    assert learning_rate(0.1, 1, 20, 0, 1000, 0.02) == pytest.approx(0.1 / 20)
    assert learning_rate(0.1, 10, 20, 0, 1000, 0.02) == pytest.approx(0.05)
    assert learning_rate(0.1, 20, 20, 0, 1000, 0.02) == learning_rate(0.1, 500, 20, 0, 1000, 0.02) == pytest.approx(0.1)
    assert learning_rate(0.1, 1, 0, 0, 1000, 0.02) == learning_rate(0.1, 1, 1, 0, 1000, 0.02) == pytest.approx(0.1)


def test_the_decay_is_linear_and_ends_at_final() -> None:
    rates = [learning_rate(0.1, 99, 20, step, 101, 0.02) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and rates[-1] == pytest.approx(0.002) and rates[50] == pytest.approx(0.051)
    differences = {round(a - b, 12) for a, b in pairwise(rates)}
    assert len(differences) == 1
    assert learning_rate(0.1, 99, 20, 500, 101, 0.02) == pytest.approx(0.002)  # never below
    assert learning_rate(0.1, 1, 1, 0, 1, 0.02) == pytest.approx(0.1)  # a run of one step


def test_warm_up_is_the_cartridge_s_own_and_decay_the_run_s() -> None:
    """A newcomer in the middle of a run starts small again, below the decayed peak."""
    assert learning_rate(0.1, 1, 10, 50, 101, 0.0) == pytest.approx(0.1 * 0.1 * 0.5)
