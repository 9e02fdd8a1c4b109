"""hypernet_logits: h W^T + b of every chunk, one after another, cut to size."""

import pytest
import torch
from support.backends import CPU, on
from support.comparing import check
from support.dense import SHAPES, dense_problem
from support.refusals import assert_refused, each_change, whoever_is_asked
from support.tolerances import assert_close

from hypermask_fast import ops
from hypermask_fast.ops import reference


def logits_of(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("chunks", "rows", "size"), [(1, 10, 10), (3, 4, 10), (2, 5, 10)])
def test_hypernet_logits_definition_by_hand(chunks, rows, size):
    hidden, weight, bias = logits_of(2, chunks, 3), logits_of(rows, 3, seed=1), logits_of(rows, seed=2)
    by_hand = torch.stack([torch.cat([weight @ h + bias for h in task])[:size] for task in hidden])
    torch.testing.assert_close(reference.hypernet_logits(hidden, weight, bias, size), by_hand)


@on(*CPU, "cuda")
@pytest.mark.parametrize(("rows", "width"), [*SHAPES, (101, 25), (3000, 100), (515, 64)])
def test_hypernet_logits_match_the_definition(backend, rows, width):
    weight, bias, hidden, _, _ = dense_problem(rows, width, 0)
    leaves = [hidden[:, None], weight, bias]
    check(backend, lambda module, *leaves: module.hypernet_logits(*leaves, rows), leaves, "dense", "dense")


@on("emulated")
@pytest.mark.parametrize(("rows", "width"), [*SHAPES, (203, 100), (201, 25)])
def test_hypernet_logits_on_an_emulated_gpu_match_the_definition(backend, rows, width):
    """The gradients are PyTorch's own products."""
    weight, bias, hidden, _, _ = dense_problem(rows, width, 20)
    for h in hidden[:, None, None]:
        expected = reference.hypernet_logits(h.double(), weight.double(), bias.double(), rows)
        assert_close(backend.hypernet_logits(h, weight, bias, rows), expected, "dense", "logits")


def test_hypernet_logits_are_right_where_the_result_is_large():
    """More than 32 MiB, which csrc asks for in huge pages."""
    rows, tasks = 900_001, 10
    weight, bias, hidden = logits_of(rows, 1).float(), logits_of(rows, seed=1).float(), logits_of(tasks, 1).float()
    expected = reference.hypernet_logits(hidden[:, None], weight, bias, rows)
    torch.testing.assert_close(ops.hypernet_logits(hidden[:, None], weight, bias, rows), expected)


# Bad input

does_not_fit = each_change(
    ({"size": -1}, "size must be 0 to chunks * chunk_size = 50, not -1"),
    ({"size": 51}, "size must be 0 to chunks * chunk_size = 50, not 51"),
    (
        {"hidden": torch.ones(1, 6)},
        "hidden must be (T, chunks, H) and weight (chunk_size, H), not (1, 6) and (50, 6)",
    ),
    ({"hidden": torch.ones(1, 1, 5)}, "hidden must have shape (1, 1, 6), not (1, 1, 5)"),
    ({"bias": torch.ones(49)}, "bias must have shape (50,), not (49,)"),
)


@whoever_is_asked
@does_not_fit
def test_hypernet_logits_refuse_what_does_not_fit(asked, change, message):
    assert_refused("hypernet_logits", asked, change, message)
