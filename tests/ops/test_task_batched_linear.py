import pytest
import torch
from comparing import DEVICE, DTYPES, assert_close, assert_matches, exact_threshold, randn

from hypermask_fast.errors import InputError
from hypermask_fast.kernels import task_batched_linear
from hypermask_fast.ops import reference
from hypermask_fast.ops.task_rows import TaskRows

CASES = [  # tasks, batch, in, out, how the rows meet the tasks
    (1, 1, 1, 1, "ids"),
    (3, 40, 33, 70, "ids"),
    (9, 100, 5, 6, "ids"),  # more than one tile of a task's rows
    (5, 0, 4, 3, "ids"),
    (4, 3, 0, 5, "ids"),
    (3, 20, 33, 70, "every task"),
    (3, 20, 33, 20, "rows of its own"),
    (2, 0, 3, 3, "every task"),
    (0, 4, 3, 3, "every task"),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias_per_task", [False, True])
@pytest.mark.parametrize(("tasks", "batch", "inputs", "outputs", "meeting"), CASES)
def test_matches_reference(tasks, batch, inputs, outputs, meeting, bias_per_task, dtype):
    x = randn(*((tasks,) if meeting == "rows of its own" else ()), batch, inputs, dtype=dtype)
    weight, logits = randn(outputs, inputs, dtype=dtype), randn(tasks, outputs, inputs, dtype=dtype)
    bias = randn(*((tasks,) if bias_per_task else ()), outputs, dtype=dtype)
    thresholds = torch.stack([exact_threshold(a) for a in logits]) if tasks else logits.new_zeros(0)
    ids = torch.randint(0, tasks, (batch,), device=DEVICE) if meeting == "ids" else None
    assert_matches(
        lambda x, w, a, b: task_batched_linear(x, w, a, thresholds, ids, b),
        lambda x, w, a, b: reference.task_batched_linear(x, w, a, thresholds.double(), ids, b),
        (x, weight, logits, bias),
        dtype,
    )


@pytest.mark.parametrize("with_ids", [False, True])
def test_strided_inputs_without_bias(with_ids):
    dtype = torch.float32
    x, weight = randn(20, 9, dtype=dtype).t(), randn(14, 40, dtype=dtype)[::2, ::2]
    logits = randn(20, 7, 3, dtype=dtype).permute(2, 1, 0)
    thresholds = randn(6, dtype=dtype).abs()[::2]
    ids = torch.tensor([2, 0, 0, 2, 2, 0, 2, 0, 0], device=DEVICE) if with_ids else None  # nobody meets task 1
    assert_matches(
        lambda x, w, a: task_batched_linear(x, w, a, thresholds, ids),
        lambda x, w, a: reference.task_batched_linear(x, w, a, thresholds.double(), ids),
        (x, weight, logits),
        dtype,
    )


def test_ids_that_are_no_tasks_give_nan_rows(monkeypatch):
    monkeypatch.delenv("HYPERMASK_DEBUG", raising=False)
    x, weight, logits = (randn(*s, dtype=torch.float32) for s in ((4, 6), (5, 6), (2, 5, 6)))
    thresholds, ids = torch.zeros(2, device=DEVICE), torch.tensor([1, 2, -1, 0], device=DEVICE)
    logits.requires_grad_()
    y = task_batched_linear(x, weight, logits, thresholds, ids)
    assert y[1:3].isnan().all()
    known = torch.tensor([0, 3], device=DEVICE)
    expected = reference.task_batched_linear(x[known], weight, logits, thresholds, ids[known])
    assert_close("known rows", y[known], expected.double())
    y.backward(torch.ones_like(y))
    assert logits.grad.isfinite().all()


def test_debug_mode_refuses_ids_that_are_no_tasks(monkeypatch):
    monkeypatch.setenv("HYPERMASK_DEBUG", "1")
    arguments = (torch.ones(2, 3), torch.ones(4, 3), torch.ones(2, 4, 3), torch.ones(2), torch.tensor([0, 2]))
    with pytest.raises(InputError, match="task_ids must be 0 to 1"):
        task_batched_linear(*(a.to(DEVICE) for a in arguments))


def test_ids_sorted_beforehand():
    """`TaskRows` in place of the ids, also of several rows for each; sorted for another number of tasks they raise."""
    x, weight, logits = (randn(*s, dtype=torch.float32) for s in ((10, 6), (5, 6), (3, 5, 6)))
    thresholds, ids = torch.zeros(3, device=DEVICE), torch.tensor([2, 0, 7, 0, -1], device=DEVICE)
    rows = TaskRows.of(ids, 3)
    assert rows.order.tolist() == [1, 3, 0, 2, 4] and rows.begins.tolist() == [0, 2, 2, 3, 5]
    twice = TaskRows.of(rows, 3).repeated(2)
    for found, wanted in zip(twice, TaskRows.of(ids.repeat_interleave(2), 3), strict=True):
        assert torch.equal(found, wanted)
    y = task_batched_linear(x, weight, logits, thresholds, twice)
    expected = task_batched_linear(x, weight, logits, thresholds, ids.repeat_interleave(2))
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    with pytest.raises(InputError, match="these rows are sorted for 3 tasks, not for 2"):
        task_batched_linear(x, weight, logits[:2], thresholds[:2], twice)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(6, 4)}, "x must be"),
        ({"x": torch.ones(2, 6, 3)}, "x must be"),
        ({"logits": torch.ones(4, 3)}, "logits must be"),
        ({"logits": torch.ones(())}, "logits must be"),
        ({"thresholds": torch.ones(3)}, "thresholds must be"),
        ({"task_ids": torch.zeros(6).int()}, "task_ids must be"),
        ({"task_ids": torch.zeros(5).long()}, "task_ids must be"),
        ({"bias": torch.ones(3, 4)}, "bias must be"),
        ({"weight": torch.ones(4, 3).double()}, "float64"),
    ],
)
def test_bad_input(change, message):
    good = {
        "x": torch.ones(6, 3), "weight": torch.ones(4, 3), "logits": torch.ones(2, 4, 3),
        "thresholds": torch.ones(2), "task_ids": torch.zeros(6).long(), "bias": torch.ones(4),
    }  # fmt: skip
    with pytest.raises(InputError, match=message):
        task_batched_linear(**{name: t.to(DEVICE) for name, t in (good | change).items()})
