"""The definitions against independent formulations (numpy, plain loops) and against numerical gradients."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.utils import counters
from torch.autograd import gradcheck

from hypermask_fast import InputError
from hypermask_fast.ops import kept_rank, reference


def logits_of(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@given(
    size=st.sampled_from([1, 2, 3, 10, 63, 101, 1000]),
    sparsity=st.integers(0, 1000).map(lambda tenths: tenths / 10),
    seed=st.integers(0, 5),
)
def test_kept_set_is_the_percentiles(size, sparsity, seed):
    """|tanh a| >= numpy's percentile, the method's wording, keeps what rank selection by |a| keeps."""
    logits = logits_of(size, seed=seed)
    mask = logits.tanh().abs()
    ranks = torch.tensor([kept_rank(sparsity, size)])
    ours = reference.semi_binary_mask(logits, reference.mask_thresholds(logits, [0, size], ranks)[0])
    threshold = np.percentile(mask.numpy(), sparsity)
    # Where rounding puts the position within an ulp of a rank, both neighbours are right.
    if abs(sparsity * (size - 1) / 100 - round(sparsity * (size - 1) / 100)) < 1e-9:
        threshold -= 1e-12
    assert torch.equal(ours, torch.where(mask >= threshold, mask, 0.0))


@pytest.mark.parametrize(("sparsity", "kept"), [(0, 11), (30, 8), (50, 6), (99, 1), (100, 1)])
def test_number_kept(sparsity, kept):
    logits = logits_of(11)
    ranks = torch.tensor([kept_rank(sparsity, 11)])
    mask = reference.semi_binary_mask(logits, reference.mask_thresholds(logits, [0, 11], ranks)[0])
    assert (mask > 0).sum() == kept


@pytest.mark.parametrize("sparsity", [-1, 100.1, math.nan, math.inf, "30", None, True])
def test_sparsity_outside_of_0_to_100(sparsity):
    with pytest.raises(InputError, match="percentage from 0 to 100"):
        kept_rank(sparsity, 10)


def test_thresholds_are_per_segment_and_row():
    logits = logits_of(2, 10)
    thresholds = reference.mask_thresholds(logits, [0, 4, 4, 10], torch.tensor([1, 0, 3]))
    assert thresholds.shape == (2, 3)
    for row in range(2):
        assert thresholds[row, 0] == logits[row, :4].abs().sort().values[1]
        assert thresholds[row, 1] == 0
        assert thresholds[row, 2] == logits[row, 4:].abs().sort().values[3]


def test_ties_are_all_kept():
    logits = torch.tensor([1.0, -1.0, 1.0, 0.5])
    threshold = reference.mask_thresholds(logits, [0, 4], torch.tensor([2]))[0]
    assert (reference.semi_binary_mask(logits, threshold) > 0).tolist() == [True, True, True, False]


def test_nan_ranks_above_inf_and_shows():
    logits = torch.tensor([0.1, math.nan, -math.inf, 2.0])
    thresholds = [reference.mask_thresholds(logits, [0, 4], torch.tensor([rank]))[0] for rank in (1, 2, 3)]
    assert thresholds[:2] == [2.0, math.inf]
    assert thresholds[2].isnan()
    mask = reference.semi_binary_mask(logits, thresholds[1])
    assert mask[1].isnan() and mask[2] == 1 and mask[0] == 0 and mask[3] == 0


def test_thresholds_in_a_compiled_graph():
    """Ranks are values that only the running graph knows: one graph for all of them, and the same thresholds."""
    compiled = torch.compile(reference.mask_thresholds, fullgraph=True, backend="eager")
    logits = logits_of(2, 10)
    logits[0, :3] = torch.tensor([math.nan, -math.inf, 0.0])
    counters.clear()
    for ranks in ([1, 0, 3], [3, 0, 0], [2, 0, 5]):
        given = logits, [0, 4, 4, 10], torch.tensor(ranks)
        torch.testing.assert_close(compiled(*given), reference.mask_thresholds(*given), rtol=0, atol=0, equal_nan=True)
    assert counters["stats"]["unique_graphs"] == 1


def test_mask_gradient():
    logits = logits_of(5, 7).requires_grad_()
    threshold = logits.detach().abs().median() + 1e-3
    assert gradcheck(lambda a: reference.semi_binary_mask(a, threshold), logits)
    mask = reference.semi_binary_mask(logits, threshold)
    (gradient,) = torch.autograd.grad(mask.sum(), logits)
    assert torch.equal(gradient == 0, mask == 0)


def test_masked_layers():
    weight, bias = logits_of(6, 4, seed=1), logits_of(6, seed=2)
    logits, threshold, x = logits_of(6, 4, seed=3), torch.tensor(0.4), logits_of(3, 4, seed=4)
    mask = torch.where(logits.abs() >= 0.4, logits.tanh().abs(), 0.0)
    assert torch.equal(reference.masked_linear(x, weight, logits, threshold, bias), x @ (weight * mask).T + bias)
    kernel, image = logits_of(6, 2, 3, 3, seed=5), logits_of(2, 4, 9, 8, seed=6)
    logits = logits_of(6, 2, 3, 3, seed=7)
    mask = torch.where(logits.abs() >= 0.4, logits.tanh().abs(), 0.0)
    ours = reference.masked_conv2d(image, kernel, logits, threshold, bias, (2, 1), 1, (1, 2), 2)
    assert torch.equal(ours, F.conv2d(image, kernel * mask, bias, (2, 1), 1, (1, 2), 2))
    (masked,) = reference.masked_weights([kernel], logits.flatten(), threshold[None], [0, kernel.numel()])
    assert torch.equal(masked, kernel * mask)


def test_masked_weights_gradient():
    weights = [logits_of(3, 4, seed=1).requires_grad_(), logits_of(5, seed=2).requires_grad_()]
    logits = logits_of(17, seed=3).requires_grad_()
    thresholds = torch.tensor([0.5, 0.2], dtype=torch.float64)
    assert gradcheck(lambda a, *w: tuple(reference.masked_weights(w, a, thresholds, [0, 12, 17])), (logits, *weights))


@pytest.mark.parametrize(("chunks", "rows", "size"), [(1, 10, 10), (3, 4, 10), (2, 5, 10)])
def test_hypernet_logits_and_output_drift(chunks, rows, size):
    hidden, weight, bias = logits_of(2, chunks, 3), logits_of(rows, 3, seed=1), logits_of(rows, seed=2)
    by_hand = torch.stack([torch.cat([weight @ h + bias for h in task])[:size] for task in hidden])
    torch.testing.assert_close(reference.hypernet_logits(hidden, weight, bias, size), by_hand)
    targets = logits_of(2, size, seed=3)
    torch.testing.assert_close(reference.output_drift(hidden, weight, bias, targets), ((by_hand - targets) ** 2).sum())
    inputs = tuple(t.requires_grad_() for t in (hidden, weight, bias))
    assert gradcheck(lambda h, w, b: reference.output_drift(h, w, b, targets), inputs)


def test_output_drift_without_earlier_tasks():
    assert reference.output_drift(torch.empty(0, 1, 3), torch.ones(5, 3), torch.ones(5), torch.empty(0, 5)) == 0


@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("masked", [True, False])
def test_weight_drift(norm, masked):
    weights = [logits_of(3, 4, seed=1).requires_grad_(), logits_of(5, seed=2).requires_grad_()]
    previous, offsets = logits_of(17, seed=3), [0, 12, 17]
    logits = logits_of(17, seed=4).requires_grad_() if masked else None
    thresholds = torch.tensor([0.5, 0.0], dtype=torch.float64) if masked else None

    def drift(first, second, logits=logits):
        return reference.weight_drift([first, second], previous, offsets, norm, logits, thresholds)

    change = torch.cat([w.detach().flatten() for w in weights]) - previous
    if masked:
        mask = logits.detach().tanh().abs()
        mask[:12] *= logits[:12].abs() >= 0.5
        change = change * mask
    parts = [change[:12], change[12:]]
    expected = sum(p.abs().sum() if norm == 1 else p.square().sum().sqrt() for p in parts)
    torch.testing.assert_close(drift(*weights).detach(), expected)
    assert gradcheck(drift, (*weights, logits) if masked else tuple(weights))


def test_masked_weights_drift():
    weights = [logits_of(3, 4, seed=1), logits_of(5, seed=2)]
    rest = logits_of(17, seed=4), torch.tensor([0.5, 0.0], dtype=torch.float64), [0, 12, 17]
    masked, drift = reference.masked_weights_drift(weights, *rest, logits_of(17, seed=3), 2)
    for one, other in zip(masked, reference.masked_weights(weights, *rest), strict=True):
        assert torch.equal(one, other)
    assert drift == reference.weight_drift(weights, logits_of(17, seed=3), rest[2], 2, *rest[:2])


def test_weight_drift_at_the_start_of_a_task_has_no_gradient():
    weight = logits_of(4).requires_grad_()
    for norm in (1, 2):
        reference.weight_drift([weight], weight.detach().clone(), [0, 4], norm).backward()
        assert torch.equal(weight.grad, torch.zeros(4, dtype=torch.float64))


def test_entropy_select():
    certain, unsure = torch.tensor([50.0, 0.0, -50.0]), torch.zeros(3)
    logits = torch.stack([torch.stack([unsure, certain, unsure]), torch.stack([certain, unsure, unsure])])
    assert reference.entropy_select(logits).tolist() == [1, 0, 0]
    extreme = torch.tensor([[[math.inf, 0.0]], [[-math.inf, 0.0]], [[1.0, 0.9]]])  # NaN, certain, unsure
    assert reference.entropy_select(extreme).tolist() == [1]
    p = logits_of(3, 7, 4).softmax(-1)
    expected = -(p * p.log()).sum(-1)
    assert torch.equal(reference.entropy_select(p.log()), expected.argmin(0))
