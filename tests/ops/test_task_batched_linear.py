"""task_batched_linear: y_b = x_b (W * m_t)^T + b_t with t = task_ids[b], or every task over every row."""

import pytest
import torch
import torch.nn.functional as F
from support.backends import LAYERS, on
from support.comparing import DEVICE, DTYPES, assert_matches, exact_threshold, launches, randn
from support.refusals import assert_kernel_refuses, assert_refused, changed, each_change, whoever_is_asked
from support.tolerances import assert_close

from hypermask_fast import InputError, ops
from hypermask_fast.ops import reference
from hypermask_fast.ops.task_rows import TaskRows

CASES = [  # tasks, batch, in, out, how the rows meet the tasks
    (1, 1, 1, 1, "ids"),
    (3, 40, 33, 70, "ids"),
    (3, 100, 33, 70, "ids"),  # on the CPU a product per task
    (9, 100, 5, 6, "ids"),  # more than one tile of a task's rows
    (5, 0, 4, 3, "ids"),
    (4, 3, 0, 5, "ids"),
    (3, 20, 33, 70, "every task"),
    (3, 20, 33, 20, "rows of its own"),
    (2, 0, 3, 3, "every task"),
    (0, 4, 3, 3, "every task"),
]


def masked(op, thresholds, ids):
    """The op as a function of what it differentiates."""
    return lambda x, w, a, b=None: op(x, w, a, thresholds, ids, b)


def inputs_of(tasks, batch, inputs, outputs, own_rows=False, dtype=torch.float32):
    """x, weight and logits."""
    x = randn(*((tasks,) if own_rows else ()), batch, inputs, dtype=dtype)
    return x, randn(outputs, inputs, dtype=dtype), randn(tasks, outputs, inputs, dtype=dtype)


def integers(*values):
    return torch.tensor(values, dtype=torch.int64, device=DEVICE)


# The definition


@pytest.mark.parametrize("bias_per_task", [False, True])
def test_task_batched_linear_is_masked_linear_row_by_row(bias_per_task):
    x, weight, logits, bias = (
        torch.randn(s, dtype=torch.float64) for s in ((5, 7), (4, 7), (3, 4, 7), (3, 4) if bias_per_task else (4,))
    )
    thresholds = torch.tensor([0.1, 0.5, 0.0], dtype=torch.float64)
    mask = torch.where(logits.abs() >= thresholds[:, None, None], logits.tanh().abs(), 0.0)
    every = [F.linear(x, weight * mask[t], bias[t] if bias_per_task else bias) for t in range(3)]
    ids = [2, 0, 0, 2, 1]
    of_rows = torch.stack([every[task][row] for row, task in enumerate(ids)])
    torch.testing.assert_close(
        reference.task_batched_linear(x, weight, logits, thresholds, None, bias), torch.stack(every)
    )
    y = reference.task_batched_linear(x, weight, logits, thresholds, torch.tensor(ids), bias)
    torch.testing.assert_close(y, of_rows)


# Plain and Triton


@on("automatic", *LAYERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias_per_task", [False, True])
@pytest.mark.parametrize(("tasks", "batch", "inputs", "outputs", "meeting"), CASES)
def test_task_batched_linear_matches_the_definition(
    backend, tasks, batch, inputs, outputs, meeting, bias_per_task, dtype
):
    x, weight, logits = inputs_of(tasks, batch, inputs, outputs, meeting == "rows of its own", dtype)
    bias = randn(*((tasks,) if bias_per_task else ()), outputs, dtype=dtype)
    thresholds = torch.stack([exact_threshold(a) for a in logits]) if tasks else logits.new_zeros(0)
    ids = torch.randint(0, tasks, (batch,), device=DEVICE) if meeting == "ids" else None
    op = masked(backend.task_batched_linear, thresholds, ids)
    definition = masked(reference.task_batched_linear, thresholds.double(), ids)
    assert_matches(op, definition, (x, weight, logits, bias), dtype)


@on("plain", "plain-alone")
@pytest.mark.parametrize("ids", [[2, 0, 0, 2, 2], [1] * 5, [], None, [2, 0, 0, 1, 2] * 60, [1] * 300])
@pytest.mark.parametrize("bias_shape", [None, (4,), (3, 4)])
def test_task_batched_linear_in_groups_matches_the_definition_in_float64(backend, ids, bias_shape):
    """Against the definition, in which every task meets every row, as it does in the op where the rows are few."""
    rows = 5 if ids is None else len(ids)
    ids = None if ids is None else integers(*ids)
    shapes = [(rows, 7), (4, 7), (3, 4, 7), *([bias_shape] if bias_shape else [])]
    tensors = [torch.randn(shape, dtype=torch.float64).to(DEVICE).requires_grad_() for shape in shapes]
    thresholds = torch.tensor([0.1, 0.5, 0.0], dtype=torch.float64, device=DEVICE)
    results = []
    for op in (backend.task_batched_linear, reference.task_batched_linear):
        y = masked(op, thresholds, ids)(*tensors)
        grads = torch.autograd.grad(y.square().sum(), tensors, allow_unused=True, materialize_grads=True)
        results.append((y, *grads))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@on("automatic", *LAYERS)
def test_task_batched_linear_of_rows_of_their_own_and_of_no_tasks(backend):
    x, weight, logits = inputs_of(3, 5, 7, 4, own_rows=True)
    thresholds = torch.full((3,), 0.2, device=DEVICE)
    y = backend.task_batched_linear(x, weight, logits, thresholds, None, None)
    torch.testing.assert_close(y, reference.task_batched_linear(x, weight, logits, thresholds))
    nobody = backend.task_batched_linear(x[0], weight, logits[:0], thresholds[:0], None, None)
    assert nobody.shape == (0, 5, 4)


@on(*LAYERS)
@pytest.mark.parametrize("with_ids", [False, True])
def test_task_batched_linear_takes_any_strides_without_bias(backend, with_ids):
    x, weight = randn(20, 9).t(), randn(14, 40)[::2, ::2]
    logits = randn(20, 7, 3).permute(2, 1, 0)
    thresholds = randn(6).abs()[::2]
    ids = integers(2, 0, 0, 2, 2, 0, 2, 0, 0) if with_ids else None  # nobody meets task 1
    op = masked(backend.task_batched_linear, thresholds, ids)
    assert_matches(op, masked(reference.task_batched_linear, thresholds.double(), ids), (x, weight, logits))


@on("reference", "automatic", *LAYERS)
def test_task_batched_linear_takes_ids_sorted_beforehand(backend):
    """`TaskRows` in place of the ids, also of several rows for each; sorted for another number of tasks they raise."""
    x, weight, logits = inputs_of(3, 10, 6, 5)
    thresholds, ids = torch.zeros(3, device=DEVICE), integers(2, 0, 1, 0, 2)
    twice = TaskRows.of(ids, 3).repeated(2)
    op = lambda *args: backend.task_batched_linear(x, weight, *args, None)  # noqa: E731
    assert torch.equal(op(logits, thresholds, twice), op(logits, thresholds, ids.repeat_interleave(2)))
    if backend.name != "reference":  # which looks at the ids alone
        with pytest.raises(InputError, match="these rows are sorted for 3 tasks, not for 2"):
            op(logits[:2], thresholds[:2], twice)


def test_task_rows_of_repeated_ids():
    ids = integers(2, 0, 7, 0, -1)
    rows = TaskRows.of(ids, 3)
    assert rows.order.tolist() == [1, 3, 0, 2, 4] and rows.begins.tolist() == [0, 2, 2, 3, 5]
    twice = TaskRows.of(rows, 3).repeated(2)
    for found, wanted in zip(twice, TaskRows.of(ids.repeat_interleave(2), 3), strict=True):
        assert torch.equal(found, wanted)


def test_task_batched_linear_by_triton_launches_one_kernel_for_all_tasks(triton):
    x, weight, logits = inputs_of(3, 10, 6, 5)
    rows = TaskRows.of(integers(*[0, 1, 2, 2, 0] * 2), 3)
    with launches() as launched:
        ops.task_batched_linear(x, weight, logits, torch.zeros(3, device=DEVICE), rows, backend="triton")
        ops.task_batched_linear(x, weight, logits, torch.zeros(3, device=DEVICE), backend="triton")
    assert len(launched) == 2


@on("plain", "plain-alone", "automatic")
@pytest.mark.parametrize("times", [1, 100])
@pytest.mark.parametrize("per_task", [False, True])
def test_task_batched_linear_leaves_out_tasks_that_no_row_has(backend, times, per_task):
    """What is NaN there reaches neither results nor gradients, of few rows or of many."""
    x, weight, logits = inputs_of(4, 3 * times, 7, 5)
    logits[1:3] = torch.nan
    bias = randn(4, 5) if per_task else randn(5)
    leaves = [t.requires_grad_() for t in (x, weight, logits, bias)]
    limits = torch.full((4,), 0.2, device=DEVICE)
    y = backend.task_batched_linear(x, weight, logits, limits, integers(3, 0, 3).repeat(times), bias)
    expected = reference.task_batched_linear(
        *(x, weight, logits[::3], limits[::3], integers(1, 0, 1).repeat(times), bias[::3] if per_task else bias)
    )
    torch.testing.assert_close(y, expected)
    wanted = torch.autograd.grad(expected.square().sum(), leaves)
    for ours, theirs in zip(torch.autograd.grad(y.square().sum(), leaves), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


# Ids that are no tasks


def test_task_batched_linear_by_triton_gives_nan_rows_for_ids_that_are_no_tasks(triton, monkeypatch):
    monkeypatch.delenv("HYPERMASK_DEBUG", raising=False)
    x, weight, logits = inputs_of(2, 4, 6, 5)
    thresholds, ids = torch.zeros(2, device=DEVICE), integers(1, 2, -1, 0)
    logits.requires_grad_()
    y = ops.task_batched_linear(x, weight, logits, thresholds, ids, backend="triton")
    assert y[1:3].isnan().all()
    known = integers(0, 3)
    expected = reference.task_batched_linear(x[known], weight, logits, thresholds, ids[known])
    assert_close(y[known], expected, "triton", "known rows")
    y.backward(torch.ones_like(y))
    assert logits.grad.isfinite().all()
    many, sorted_ids = integers(2, 0, 7, 0, -1), TaskRows.of(integers(2, 0, 7, 0, -1), 2).repeated(2)
    wide = randn(10, 6)
    by_ids, by_rows = (
        ops.task_batched_linear(wide, weight, logits, thresholds, rows, backend="triton")
        for rows in (many.repeat_interleave(2), sorted_ids)
    )
    torch.testing.assert_close(by_rows, by_ids, rtol=0, atol=0, equal_nan=True)


def test_task_batched_linear_by_triton_looks_at_the_ids_in_debug_mode(triton, monkeypatch):
    monkeypatch.setenv("HYPERMASK_DEBUG", "1")
    arguments = (torch.ones(2, 3), torch.ones(4, 3), torch.ones(2, 4, 3), torch.ones(2), torch.tensor([0, 2]))
    with pytest.raises(InputError, match="task_ids must be 0 to 1"):
        ops.task_batched_linear(*(a.to(DEVICE) for a in arguments), backend="triton")


@on("reference", "plain", "plain-alone", "automatic")
@pytest.mark.skipif(DEVICE != "cpu", reason="where values are at hand they are looked at")
@pytest.mark.parametrize("rows", [2, 300])
@pytest.mark.parametrize("wrong", [-1, 3])
def test_task_batched_linear_refuses_ids_that_are_no_tasks(backend, wrong, rows):
    x, weight, logits = inputs_of(3, rows, 7, 4)
    ids = torch.tensor([0, wrong] * (rows // 2))
    for _ in range(2):
        with pytest.raises(InputError, match="task_ids must be 0 to 2"):
            backend.task_batched_linear(x, weight, logits, torch.zeros(3), ids, None)


@on("reference", "plain", "plain-alone", "automatic")
def test_task_batched_linear_in_a_compiled_graph_gives_nan_rows_for_ids_that_are_no_tasks(backend):
    """Nobody looks at them: their rows are NaN, and no other task's."""
    x, weight, logits = inputs_of(3, 4, 7, 4)
    limits = torch.zeros(3, device=DEVICE)
    op = lambda x, ids: backend.task_batched_linear(x, weight, logits, limits, ids, None)  # noqa: E731
    torch._dynamo.reset()
    y = torch.compile(op, fullgraph=True, backend="eager")(x, integers(2, 3, -1, 0))
    assert y[1:3].isnan().all()
    torch.testing.assert_close(y[::3], op(x[::3], integers(2, 0)))


# Bad input

does_not_fit = each_change(
    ({"x": torch.ones(3, 4)}, "x must be (batch, 5), or (2, batch, 5) without task_ids, not (3, 4)"),
    ({"x": torch.ones(2, 3, 5)}, "x must be (batch, 5), or (2, batch, 5) without task_ids, not (2, 3, 5)"),
    (
        {"x": torch.ones(3, 3, 5), "task_ids": None},
        "x must be (batch, 5), or (2, batch, 5) without task_ids, not (3, 3, 5)",
    ),
    ({"weight": torch.ones(5)}, "weight must be (out, in), not (5,)"),
    ({"logits": torch.ones(2, 5, 4)}, "logits must have shape (2, 4, 5), not (2, 5, 4)"),
    ({"logits": torch.ones(4, 5)}, "logits must be (tasks, out, in), not (4, 5)"),
    ({"logits": torch.ones(())}, "logits must be (tasks, out, in), not ()"),
    ({"thresholds": torch.ones(3)}, "thresholds must have shape (2,), not (3,)"),
    ({"task_ids": torch.tensor([1, 0, 1]).int()}, "task_ids must be int64, not torch.int32"),
    ({"task_ids": torch.tensor([1, 0, 1])[:1]}, "task_ids must have shape (3,), not (1,)"),
    ({"task_ids": torch.tensor([1, 0, 1]).repeat(2)}, "task_ids must have shape (3,), not (6,)"),
    ({"bias": torch.ones(3, 4)}, "bias must be (4,) or (2, 4), not (3, 4)"),
)


@whoever_is_asked
@does_not_fit
def test_task_batched_linear_refuses_what_does_not_fit(asked, change, message):
    assert_refused("task_batched_linear", asked, change, message)


@does_not_fit
def test_task_batched_linear_by_triton_called_directly_refuses_in_the_same_words(triton, change, message):
    assert_kernel_refuses(triton, "task_batched_linear", change, message)


@each_change(
    ({"weight": torch.ones(4, 5).double()}, "float64"),
)
def test_task_batched_linear_by_triton_called_directly_refuses_other_dtypes(triton, change, message):
    with pytest.raises(InputError, match=message):
        triton.task_batched_linear(**changed("task_batched_linear", change))
