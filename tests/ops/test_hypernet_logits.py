"""hypernet_logits: h W^T + b of every chunk, one after another, cut to size."""

import pytest
import torch
from support.backends import CPU, on
from support.comparing import check
from support.dense import SHAPES, dense_problem
from support.tolerances import assert_close

from hypermask_fast.ops import reference


def logits_of(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("chunks", "rows", "size"), [(1, 10, 10), (3, 4, 10), (2, 5, 10)])
def test_definition_by_hand(chunks, rows, size):
    hidden, weight, bias = logits_of(2, chunks, 3), logits_of(rows, 3, seed=1), logits_of(rows, seed=2)
    by_hand = torch.stack([torch.cat([weight @ h + bias for h in task])[:size] for task in hidden])
    torch.testing.assert_close(reference.hypernet_logits(hidden, weight, bias, size), by_hand)


@on(*CPU, "cuda")
@pytest.mark.parametrize(("rows", "width"), [*SHAPES, (101, 25), (3000, 100), (515, 64)])
def test_logits_and_gradients(backend, rows, width):
    weight, bias, hidden, _, _ = dense_problem(rows, width, 0)
    leaves = [hidden[:, None], weight, bias]
    check(backend, lambda module, *leaves: module.hypernet_logits(*leaves, rows), leaves, "dense", "dense")


@on("emulated")
@pytest.mark.parametrize(("rows", "width"), [*SHAPES, (203, 100), (201, 25)])
def test_logits(backend, rows, width):
    """The gradients are PyTorch's own products."""
    weight, bias, hidden, _, _ = dense_problem(rows, width, 20)
    for h in hidden[:, None, None]:
        expected = reference.hypernet_logits(h.double(), weight.double(), bias.double(), rows)
        assert_close(backend.hypernet_logits(h, weight, bias, rows), expected, "dense", "logits")
