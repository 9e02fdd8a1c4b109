"""mask_overlap: how many entries two tasks' masks both keep. Counts are exact on every backend."""

import pytest
import torch
from support.arguments import valid
from support.backends import CPU, on
from support.comparing import INF, NAN, sized_offsets
from support.refusals import assert_refused, each_change, whoever_is_asked

from hypermask_fast import ops
from hypermask_fast.ops import reference

each_backend = on(*CPU, "emulated", "cuda")


def test_mask_overlap_counts_what_both_masks_keep():
    """By counting the masks themselves, and with ties, NaN and infinities, which are kept."""
    logits = torch.randn(4, 30, dtype=torch.float64)
    logits[0, :3], logits[1, :3] = torch.tensor([NAN, -INF, 0.25]), torch.tensor([NAN, 0.1, -0.25])
    thresholds, offsets = torch.full((4, 2), 0.25, dtype=torch.float64), [0, 12, 30]
    overlap = reference.mask_overlap(logits, thresholds, offsets)
    kept = torch.stack([reference.semi_binary_mask(row, torch.tensor(0.25)) != 0 for row in logits])
    assert overlap.shape == (2, 4, 4) and overlap.dtype == torch.int64
    for s, (begin, end) in enumerate(((0, 12), (12, 30))):
        for i in range(4):
            for j in range(4):
                assert overlap[s, i, j] == (kept[i, begin:end] & kept[j, begin:end]).sum()


def check(backend, logits, thresholds, offsets):
    counted = backend.mask_overlap(logits.to(backend.device), thresholds.to(backend.device), offsets)
    assert counted.dtype == torch.int64
    assert torch.equal(counted.cpu(), reference.mask_overlap(logits.double(), thresholds.double(), offsets))


@each_backend
@pytest.mark.parametrize("size", [1, 31, 32, 33, 63, 64, 65, 4095, 4096, 4097, 16_384, 16_385, 40_000])
@pytest.mark.parametrize("tasks", [1, 2, 7])
def test_mask_overlap_of_every_size(backend, size, tasks):
    check(backend, torch.randn(tasks, size), torch.rand(tasks, 1), [0, size])


@each_backend
@pytest.mark.parametrize("count", [1, 63, 64, 65, 130])
def test_mask_overlap_of_many_segments_among_other_entries(backend, count):
    offsets = sized_offsets([(7 * i) % 71 * (i % 5 != 0) for i in range(count)], 3)
    check(backend, torch.randn(3, offsets[-1] + 5), torch.rand(3, count), offsets)


@each_backend
def test_mask_overlap_of_many_tasks(backend):
    """More than a block's shared memory holds the whole tiles of."""
    check(backend, torch.randn(130, 5000), torch.rand(130, 2), [0, 4500, 5000])


@each_backend
def test_mask_overlap_of_ties_and_of_what_is_not_finite(backend):
    logits = torch.tensor([NAN, INF, -INF, 0.5, -0.5, 0.0, 0.25]).repeat(3, 11)
    thresholds = torch.tensor([[0.5], [0.0], [NAN]])
    check(backend, logits, thresholds, [0, 77])


@each_backend
def test_mask_overlap_of_strided_logits(backend):
    """As the op takes them; the operators themselves take contiguous ones."""
    logits = torch.randn(100, 3).t()
    check(backend, logits if backend.name != "emulated" else logits.contiguous(), torch.rand(3, 1), [5, 90])


@each_backend
@pytest.mark.parametrize(("tasks", "offsets"), [(0, [0, 5]), (2, [0]), (2, [0, 0, 0]), (3, [4, 4])])
def test_mask_overlap_of_nothing(backend, tasks, offsets):
    check(backend, torch.randn(tasks, 5), torch.rand(tasks, len(offsets) - 1), offsets)


@each_backend
def test_mask_overlap_lets_no_gradient_flow(backend):
    logits = torch.randn(2, 50, device=backend.device)
    if backend.name != "emulated":
        logits.requires_grad_()
    assert not backend.mask_overlap(logits, torch.rand(2, 1, device=backend.device), [0, 50]).requires_grad


@pytest.mark.native
def test_mask_overlap_operator_passes_opcheck():
    torch.library.opcheck(
        torch.ops.hypermask_native.mask_overlap.default, (torch.randn(3, 40), torch.rand(3, 2), [0, 10, 40])
    )


def test_mask_overlap_compiles_to_one_graph():
    given = tuple(valid("mask_overlap").values())
    compiled = torch.compile(lambda *values: ops.mask_overlap(*values) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*given), ops.mask_overlap(*given) + 1)


@whoever_is_asked
@each_change(
    ({"logits": torch.ones(5)}, "logits must be (T, N), not (5,)"),
    ({"offsets": [0, 3, 2]}, "offsets must ascend from 0 or more to at most 5 entries, not [0, 3, 2]"),
    ({"offsets": [0, 6]}, "offsets must ascend from 0 or more to at most 5 entries, not [0, 6]"),
    ({"thresholds": torch.ones(2)}, "thresholds must have shape (2, 1), not (2,)"),
    ({"thresholds": torch.ones(2, 2)}, "thresholds must have shape (2, 1), not (2, 2)"),
    ({"thresholds": torch.ones(3, 1)}, "thresholds must have shape (2, 1), not (3, 1)"),
)
def test_mask_overlap_refuses_what_does_not_fit(asked, change, message):
    small = {"logits": torch.ones(2, 5), "thresholds": torch.ones(2, 1), "offsets": [0, 5]}
    assert_refused("mask_overlap", asked, small | change, message)
