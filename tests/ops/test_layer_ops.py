"""What every layer op promises alike, on every backend: gradients one by one, strides, thresholds, empty dimensions,
autocast, one compiled graph for all tasks. What an op has of its own stands in test_<op>.py.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from support import backends
from support.comparing import DEVICE, DTYPES, INF, NAN, assert_matches, in_half, output_and_gradients, randn
from support.tolerances import assert_close
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode

from hypermask_fast.ops import reference

F32 = torch.float32
pytestmark = backends.on(*backends.LAYERS)


@dataclass(frozen=True)
class Product:
    """An op with the arguments that its tensors do not give; `shapes` of the tensors, logits' source last."""

    op: str
    wrap: Callable
    shapes: dict[str, tuple[int, ...]]

    def by(self, ops) -> Callable:
        """The op of a backend or of the reference, as a function of (threshold, *tensors)."""
        return self.wrap(getattr(ops, self.op))

    def tensors(self, dtype: torch.dtype = F32) -> list[torch.Tensor]:
        return [randn(*shape, dtype=dtype) for shape in self.shapes.values()]


def linear(op):
    return lambda t, x, w, b, a: op(x, w, a, t, b)


def convolution(op):
    return lambda t, x, w, b, a: op(x, w, a, t, b, (2, 1), (1, 2), (1, 2), 2)


def chunk_linear(op):
    return lambda t, x, w, b, h, ow, ob: op(x, w, h, ow, ob, 16, t, b)


def chunk_convolution(op):
    return lambda t, x, w, b, h, ow, ob: op(x, w, h, ow, ob, 5, t, b, 1, 1, 1, 2)


def task_rows(op):
    ids = torch.tensor([2, 0, 0, 2, 2], device=DEVICE)  # nobody meets task 1
    return lambda t, x, w, b, a: op(x, w, a, t.expand(3), ids, b)


def every_task(op):
    return lambda t, x, w, b, a: op(x, w, a, t.expand(3), None, b)


PRODUCTS = {
    "masked_linear": Product("masked_linear", linear, {"x": (5, 16), "w": (32, 16), "b": (32,), "a": (32, 16)}),
    "masked_conv2d": Product(
        "masked_conv2d", convolution, {"x": (4, 4, 12, 13), "w": (6, 2, 3, 3), "b": (6,), "a": (6, 2, 3, 3)},
    ),
    "chunk_masked_linear": Product(
        "chunk_masked_linear", chunk_linear,
        {"x": (5, 16), "w": (32, 16), "b": (32,), "h": (17, 6), "ow": (32, 6), "ob": (32,)},
    ),
    "chunk_masked_conv2d": Product(
        "chunk_masked_conv2d", chunk_convolution,
        {"x": (2, 4, 6, 7), "w": (6, 2, 3, 3), "b": (6,), "h": (12, 6), "ow": (10, 6), "ob": (10,)},
    ),
    "task rows": Product(
        "task_batched_linear", task_rows, {"x": (5, 16), "w": (12, 16), "b": (3, 12), "a": (3, 12, 16)},
    ),
    "every task": Product(
        "task_batched_linear", every_task, {"x": (5, 16), "w": (12, 16), "b": (12,), "a": (3, 12, 16)},
    ),
}  # fmt: skip
each_product = pytest.mark.parametrize("case", PRODUCTS.values(), ids=PRODUCTS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
SMALL = torch.tensor(0.4, device=DEVICE)


def assert_is_the_definition(case: Product, backend, threshold: torch.Tensor, tensors, dtype: torch.dtype) -> None:
    """Values and every gradient."""
    op, definition = case.by(backend), case.by(reference)
    assert_matches(lambda *t: op(threshold, *t), lambda *t: definition(threshold.double(), *t), tensors, dtype)


@each_product
def test_layer_ops_make_each_gradient_alone(backend, case):
    """No kernel relies on another's gradient being wanted, and what nobody wants is None."""
    op, tensors = case.by(backend), case.tensors()
    everything = [t.clone().requires_grad_() for t in tensors]
    y = op(SMALL, *everything)
    grad = randn(*y.shape)
    expected = torch.autograd.grad(y, everything, grad)
    for wanted in range(len(tensors)):
        given = [t.clone().requires_grad_(i == wanted) for i, t in enumerate(tensors)]
        op(SMALL, *given).backward(grad)
        for i, (t, e) in enumerate(zip(given, expected, strict=True)):
            assert (t.grad is None) == (i != wanted)
            if i == wanted:
                assert torch.equal(t.grad, e), list(case.shapes)[i]


@each_product
@each_dtype
@pytest.mark.parametrize("reduce", [torch.sum, torch.mean])
def test_layer_ops_take_an_expanded_gradient(backend, case, reduce, dtype):
    """The gradient of a sum is one number with strides of 0."""

    def gradients(op, threshold, tensors):
        one = torch.ones((), dtype=tensors[0].dtype, device=DEVICE)
        return output_and_gradients(lambda *t: reduce(op(threshold, *t)), tensors, one)[1:]

    tensors, definition = case.tensors(dtype), case.by(reference)
    wanted = gradients(definition, SMALL.double(), [t.double() for t in tensors])
    peers = in_half(dtype, lambda *halves: gradients(definition, SMALL, halves), *tensors)
    for name, g, e, p in zip(case.shapes, gradients(case.by(backend), SMALL, tensors), wanted, peers, strict=False):
        assert_close(g, e, "triton", name, peer=p)


def reversed_strides(t: torch.Tensor) -> torch.Tensor:
    order = list(range(t.dim()))[::-1]
    return t.permute(order).contiguous().permute(order)


def every_other(t: torch.Tensor) -> torch.Tensor:
    wide = t.new_full([2 * n for n in t.shape], NAN)
    view = wide[tuple(slice(None, None, 2) for _ in t.shape)]
    return view.copy_(t)


@each_product
@each_dtype
@pytest.mark.parametrize("layout", [reversed_strides, every_other])
def test_layer_ops_take_any_strides(backend, case, layout, dtype):
    threshold = torch.full((2, 2), 0.4, device=DEVICE)[::2, ::2].view(())
    assert_is_the_definition(case, backend, threshold, [layout(t) for t in case.tensors(dtype)], dtype)


@each_product
@each_dtype
@pytest.mark.parametrize("threshold", [0.0, 1e9, INF])
def test_layer_ops_with_a_threshold_that_drops_nothing_or_all(backend, case, threshold, dtype):
    t, tensors = torch.tensor(threshold, device=DEVICE), case.tensors(dtype)
    assert_is_the_definition(case, backend, t, tensors, dtype)
    if threshold > 0:  # exactly nothing is left of the weight, in the output and in its gradients
        leaves = [z.requires_grad_() for z in tensors]
        gradients = torch.autograd.grad(case.by(backend)(t, *leaves).sum(), leaves)
        assert all(not g.any() for name, g in zip(case.shapes, gradients, strict=True) if name != "b")


@each_product
@each_dtype
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_layer_ops_keep_logits_that_are_not_finite_in_their_outputs(backend, case, value, dtype):
    """NaN is kept and shows, infinite ones are a mask of 1; nothing else is touched."""
    tensors = case.tensors(dtype)
    tensors[-1].view(-1)[3] = value
    y = case.by(backend)(SMALL, *tensors)
    expected = case.by(reference)(SMALL.double(), *(t.double() for t in tensors))
    assert torch.equal(y.isnan(), expected.isnan())
    peer = None if dtype == F32 else case.by(reference)(SMALL, *tensors).nan_to_num()
    assert_close(y.nan_to_num(), expected.nan_to_num(), "triton", "finite part", peer=peer)


def under_autocast(op: Callable, dtype: torch.dtype) -> Callable:
    def call(*tensors):
        with torch.autocast(DEVICE, dtype):
            return op(SMALL, *tensors)

    return call


@each_product
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_layer_ops_under_autocast(backend, case, dtype):
    """As PyTorch's own layers on W * m: output in autocast's dtype, each gradient in its tensor's own."""
    definition, peer = case.by(reference), under_autocast(case.by(backends.PLAIN), dtype)
    op = under_autocast(case.by(backend), dtype)
    assert_matches(op, lambda *t: definition(SMALL.double(), *t), case.tensors(), dtype, peer=peer)


@each_product
def test_layer_ops_have_autocasts_dtypes_in_bfloat16(backend, case):
    """The same by the shape functions alone, for bfloat16's values can't be had in the interpreter."""
    if case is PRODUCTS["task rows"] and backend.backend == "plain":
        pytest.skip("it groups rows by their values, which fake tensors do not have")
    with FakeTensorMode(allow_non_fake_inputs=True):
        leaves = [t.requires_grad_() for t in case.tensors()]
        y = under_autocast(case.by(backend), torch.bfloat16)(*leaves)
        gradients = torch.autograd.grad(y.float().sum(), leaves)
    assert y.dtype == torch.bfloat16 and {g.dtype for g in gradients} == {F32}


EMPTY = {  # op, shapes with a 0 in each place that may hold one
    "no rows": ("masked_linear", linear, ((0, 16), (8, 16), (8,), (8, 16))),
    "no outputs": ("masked_linear", linear, ((5, 16), (0, 16), (0,), (0, 16))),
    "no inputs": ("masked_linear", linear, ((5, 0), (8, 0), (8,), (8, 0))),
    "no images": ("masked_conv2d", convolution, ((0, 4, 6, 7), (6, 2, 3, 3), (6,), (6, 2, 3, 3))),
    "chunks, no rows": ("chunk_masked_linear", chunk_linear, ((0, 4), (8, 4), (8,), (6, 3), (8, 3), (8,))),
    "chunks, no outputs": ("chunk_masked_linear", chunk_linear, ((5, 4), (0, 4), (0,), (6, 3), (8, 3), (8,))),
    "chunks, no inputs": ("chunk_masked_linear", chunk_linear, ((5, 0), (8, 0), (8,), (6, 3), (8, 3), (8,))),
    "chunks, no width": ("chunk_masked_linear", chunk_linear, ((5, 4), (8, 4), (8,), (6, 0), (8, 0), (8,))),
    "chunks, no images": (
        "chunk_masked_conv2d", chunk_convolution, ((0, 4, 6, 7), (6, 2, 3, 3), (6,), (12, 6), (10, 6), (10,)),
    ),
    "every task, no rows": ("task_batched_linear", every_task, ((0, 4), (8, 4), (8,), (3, 8, 4))),
    "every task, no outputs": ("task_batched_linear", every_task, ((5, 4), (0, 4), (0,), (3, 0, 4))),
    "every task, no inputs": ("task_batched_linear", every_task, ((5, 0), (8, 0), (3, 8), (3, 8, 0))),
    "task rows, no outputs": ("task_batched_linear", task_rows, ((5, 4), (0, 4), (0,), (3, 0, 4))),
    "task rows, no inputs": ("task_batched_linear", task_rows, ((5, 0), (8, 0), (3, 8), (3, 8, 0))),
}  # fmt: skip


@each_dtype
@pytest.mark.parametrize("name", EMPTY)
def test_layer_ops_with_nothing_in_a_dimension(backend, name, dtype):
    op, wrap, shapes = EMPTY[name]
    tensors = [randn(*shape, dtype=dtype) for shape in shapes]
    assert_is_the_definition(Product(op, wrap, {}), backend, SMALL, tensors, dtype)


def own(values, task):
    """Those of one task, whose id is a tensor (1,)."""
    return values.index_select(0, task)[0]


# An op under a task that is a tensor, as a compiled model calls it, and the shapes of what it differentiates; what each
# of the two tasks has of its own comes first.
COMPILED = {
    "masked_linear": (
        lambda op, task, limits, a, x, w, b: op(x, w, own(a, task), own(limits, task), b),
        ((2, 4, 5), (3, 5), (4, 5), (4,)),
    ),
    "masked_conv2d": (
        lambda op, task, limits, a, x, w, b: op(x, w, own(a, task), own(limits, task), b, 2, 1, 1, 2),
        ((2, 6, 2, 3, 3), (2, 4, 5, 5), (6, 2, 3, 3), (6,)),
    ),
    "chunk_masked_linear": (
        lambda op, task, limits, h, x, w, *layer: op(x, w, own(h, task), *layer, 2, own(limits, task)),
        ((2, 4, 3), (3, 5), (4, 5), (6, 3), (6,)),
    ),
    "chunk_masked_conv2d": (
        lambda op, task, limits, h, x, w, *layer: op(x, w, own(h, task), *layer, 2, own(limits, task)),
        ((2, 4, 3), (2, 1, 5, 5), (2, 1, 3, 3), (6, 3), (6,)),
    ),
    "task_batched_linear": (
        lambda op, task, limits, a, x, w, b: op(x, w, a, limits, task.expand(3), b),
        ((2, 4, 5), (3, 5), (4, 5), (2, 4)),
    ),
    "task_batched_linear, every task": (
        lambda op, task, limits, a, x, w, b: op(x, w, a, limits, None, b),
        ((2, 4, 5), (3, 5), (4, 5), (2, 4)),
    ),
}


@pytest.mark.parametrize("name", COMPILED)
def test_layer_ops_compile_to_one_graph_for_all_tasks(backend, name):
    """Forward and backward without a graph break, the eager numbers, and no other code for another task.

    To the bit where the graph holds the op itself; a graph of PyTorch's own products rounds as it likes.
    """
    rounding = {} if backend.backend == "plain" else {"rtol": 0, "atol": 0}
    call, shapes = COMPILED[name]
    op = getattr(backend, name.split(",")[0])
    step = lambda *tensors: call(op, *tensors)  # noqa: E731
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()
    counters.clear()
    for task, limits in ((0, (0.3, 0.4)), (1, (0.5, 0.2))):
        leaves = [randn(*shape).requires_grad_() for shape in shapes]
        given = torch.tensor([task], device=DEVICE), torch.tensor(limits, device=DEVICE), *leaves
        y, expected = compiled(*given), step(*given)
        torch.testing.assert_close(y, expected, **rounding)
        seed = torch.randn_like(y)
        ours, theirs = (torch.autograd.grad(found, leaves, seed) for found in (y, expected))
        torch.testing.assert_close(ours, theirs, **rounding)
    assert counters["stats"]["unique_graphs"] == 1
