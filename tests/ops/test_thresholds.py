"""mask_thresholds selects exactly: every comparison is of equal bits."""

import pytest
import torch

from hypermask_fast.ops import kept_rank, reference

pytestmark = pytest.mark.native


def check(cpu, logits, offsets, ranks):
    ranks = torch.as_tensor(ranks)
    actual = cpu.mask_thresholds(logits, offsets, ranks)
    expected = reference.mask_thresholds(logits, offsets, ranks)
    assert actual.shape == expected.shape
    assert torch.equal(actual.nan_to_num(nan=-1.0), expected.nan_to_num(nan=-1.0))


@pytest.mark.parametrize("size", [1, 2, 63, 256, 257, 1000, 7919, 32768, 32769, 200_003])
@pytest.mark.parametrize("sparsity", [0, 0.1, 30, 50, 99.9, 100])
def test_sizes_and_percentiles(cpu, isa, size, sparsity):
    check(cpu, torch.randn(size), [0, size], [kept_rank(sparsity, size)])


@pytest.mark.parametrize("size", [200, 5000, 100_000])
def test_ties_and_narrow_ranges(cpu, isa, size):
    ranks = [size // 3]
    check(cpu, torch.randint(-3, 4, (size,)).float(), [0, size], ranks)
    check(cpu, torch.full((size,), -0.75), [0, size], ranks)
    check(cpu, 1 + 1e-6 * torch.rand(size), [0, size], ranks)
    check(cpu, torch.randn(size) * 1e-41, [0, size], ranks)


def test_many_segments_and_rows(cpu, isa):
    sizes = [1, 40_000, 0, 7, 300, 0, 70_001, 1]
    offsets = [3]
    for size in sizes:
        offsets.append(offsets[-1] + size)
    ranks = [kept_rank(40, size) for size in sizes]
    check(cpu, torch.randn(2, 3, offsets[-1] + 5), offsets, ranks)
    check(cpu, torch.randn(offsets[-1] + 5, 2).t(), offsets, ranks)  # not contiguous
    check(cpu, torch.randn(0, offsets[-1]), offsets, ranks)


@pytest.mark.parametrize("size", [50, 1000, 70_000])
def test_nan_and_inf_rank_above(cpu, isa, size):
    logits = torch.randn(size)
    logits[::7] = float("nan")
    logits[1::7] = -float("inf")
    nans = logits.isnan().sum().item()
    for rank in (size // 2, size - nans - 1, size - nans, size - 1):
        check(cpu, logits, [0, size], [rank])


def test_no_gradient_flows(cpu):
    logits = torch.randn(100, requires_grad=True)
    assert not cpu.mask_thresholds(logits, [0, 100], torch.tensor([30])).requires_grad
