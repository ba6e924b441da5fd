"""The head's losses and gradients against logits and cross-entropy in full, where fused heads are known to go wrong.

Pitfalls: LONGCONTEXT.md §4. Under ZeRO-3 they are tested with real processes in tests/parallel/test_sequence.py.
"""

import pytest
import torch
import torch.nn.functional as F

from phi3v_dist.model.attention import IGNORE
from phi3v_dist.model.loss import Head

TOKENS, HIDDEN, VOCAB = 3000, 48, 1031  # more tokens and words than a chunk holds, and no multiple of anything


def make(seed: int, dtype: torch.dtype = torch.float64) -> tuple[Head, torch.Tensor, torch.Tensor]:
    """A head, hidden states that want a gradient, and targets of which every fifth is none."""
    torch.manual_seed(seed)
    head = Head(HIDDEN, VOCAB, bias=False, dtype=dtype)
    hidden = torch.randn(TOKENS, HIDDEN, dtype=dtype).requires_grad_()
    targets = torch.randint(VOCAB, (TOKENS,))
    targets[::5] = IGNORE
    return head, hidden, targets


def in_full(head: Head, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(hidden @ head.weight.T, targets, ignore_index=IGNORE, reduction="none")


def test_losses_are_those_of_the_logits_that_generation_sees() -> None:
    head, hidden, targets = make(1, torch.float32)
    logits = head(hidden)
    expected = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")
    assert torch.allclose(head(hidden, targets), expected, rtol=0, atol=2e-6)  # measured 9.5e-7
    assert not expected[::5].any() and expected[1::5].all()


@pytest.mark.parametrize("num_parts", [1, 2, 5])
@pytest.mark.parametrize("scale", [1.0, 2 / 2399, 37.5], ids=["sum", "over the labels of the step", "scaled up"])
def test_gradients_are_right_whatever_the_sum_is_scaled_by_afterwards_and_however_often_it_accumulates(
    scale: float, num_parts: int
) -> None:
    """A kernel that runs backward inside forward leaves the scale out of the head's gradient alone."""
    head, hidden, targets = make(2, torch.float32)
    for part, wanted in zip(hidden.chunk(num_parts), targets.chunk(num_parts), strict=True):
        (head(part, wanted).sum() * scale).backward()
    found = head.weight.grad.clone(), hidden.grad.clone()
    head.weight.grad = hidden.grad = None
    (in_full(head, hidden, targets).sum() * scale).backward()
    for mine, full in zip(found, (head.weight.grad, hidden.grad), strict=True):
        assert (mine - full).norm() <= 2e-6 * full.norm()


def test_in_bf16_the_sum_is_taken_in_fp32() -> None:
    """torch's own sum in bf16 is far off, and the comparison sees it."""
    head, hidden, targets = make(3, torch.bfloat16)
    exact = in_full(head.double(), hidden.double(), targets).sum()
    head = head.bfloat16()
    losses = head(hidden, targets)
    assert losses.dtype == torch.float32
    assert abs(losses.sum() / exact - 1) < 3e-4
    options = torch.nn.LinearCrossEntropyOptions()
    theirs = F.linear_cross_entropy(hidden, head.weight, targets, reduction="sum", ignore_index=IGNORE, options=options)
    assert abs(theirs / exact - 1) > 1e-3


def test_a_row_without_a_label_gives_zeros_and_gradients_of_zero() -> None:
    head, hidden, targets = make(4, torch.float32)
    losses = head(hidden, torch.full_like(targets, IGNORE))
    losses.sum().backward()
    assert not losses.any() and not head.weight.grad.any() and not hidden.grad.any()
