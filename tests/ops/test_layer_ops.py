"""What every product promises alike: gradients one by one, strides, thresholds, empty dimensions, autocast."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from comparing import DEVICE, DTYPES, assert_close, assert_matches, in_half, output_and_gradients, randn
from torch._subclasses.fake_tensor import FakeTensorMode

from hypermask_fast import kernels
from hypermask_fast.ops import reference
from hypermask_fast.ops.plain import mask_first

F32 = torch.float32


@dataclass(frozen=True)
class Product:
    """An op and its definition as functions of (threshold, *tensors), and W * m before PyTorch's own product; `shapes`
    of the tensors, logits' source last."""

    op: Callable
    reference: Callable
    mask_first: Callable
    shapes: dict[str, tuple[int, ...]]

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


def product(name: str, wrap: Callable, **shapes: tuple[int, ...]) -> Product:
    return Product(*(wrap(getattr(module, name)) for module in (kernels, reference, mask_first)), shapes)


PRODUCTS = {
    "masked_linear": product("masked_linear", linear, x=(5, 16), w=(32, 16), b=(32,), a=(32, 16)),
    "masked_conv2d": product(
        "masked_conv2d", convolution, x=(4, 4, 12, 13), w=(6, 2, 3, 3), b=(6,), a=(6, 2, 3, 3)
    ),
    "chunk_masked_linear": product(
        "chunk_masked_linear", chunk_linear, x=(5, 16), w=(32, 16), b=(32,), h=(17, 6), ow=(32, 6), ob=(32,)
    ),
    "chunk_masked_conv2d": product(
        "chunk_masked_conv2d", chunk_convolution,
        x=(2, 4, 6, 7), w=(6, 2, 3, 3), b=(6,), h=(12, 6), ow=(10, 6), ob=(10,),
    ),
    "task rows": product("task_batched_linear", task_rows, x=(5, 16), w=(12, 16), b=(3, 12), a=(3, 12, 16)),
    "every task": product("task_batched_linear", every_task, x=(5, 16), w=(12, 16), b=(12,), a=(3, 12, 16)),
}  # fmt: skip
each_product = pytest.mark.parametrize("case", PRODUCTS.values(), ids=PRODUCTS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)
SMALL = torch.tensor(0.4, device=DEVICE)


@each_product
def test_each_gradient_alone(case):
    """No kernel relies on another's gradient being wanted, and what nobody wants is None."""
    tensors = case.tensors()
    everything = [t.clone().requires_grad_() for t in tensors]
    y = case.op(SMALL, *everything)
    grad = randn(*y.shape, dtype=F32)
    expected = torch.autograd.grad(y, everything, grad)
    for wanted in range(len(tensors)):
        given = [t.clone().requires_grad_(i == wanted) for i, t in enumerate(tensors)]
        case.op(SMALL, *given).backward(grad)
        for i, (t, e) in enumerate(zip(given, expected, strict=True)):
            assert (t.grad is None) == (i != wanted)
            if i == wanted:
                assert torch.equal(t.grad, e), list(case.shapes)[i]


@each_product
@each_dtype
@pytest.mark.parametrize("reduce", [torch.sum, torch.mean])
def test_expanded_gradient(case, reduce, dtype):
    """The gradient of a sum is one number with strides of 0."""

    def gradients(op, threshold, tensors):
        one = torch.ones((), dtype=tensors[0].dtype, device=DEVICE)
        return output_and_gradients(lambda *t: reduce(op(threshold, *t)), tensors, one)[1:]

    tensors = case.tensors(dtype)
    wanted = gradients(case.reference, SMALL.double(), [t.double() for t in tensors])
    peers = in_half(dtype, lambda *halves: gradients(case.reference, SMALL, halves), *tensors)
    for name, g, e, p in zip(case.shapes, gradients(case.op, SMALL, tensors), wanted, peers, strict=False):
        assert_close(name, g, e, p)


def reversed_strides(t: torch.Tensor) -> torch.Tensor:
    order = list(range(t.dim()))[::-1]
    return t.permute(order).contiguous().permute(order)


def every_other(t: torch.Tensor) -> torch.Tensor:
    wide = t.new_full([2 * n for n in t.shape], float("nan"))
    view = wide[tuple(slice(None, None, 2) for _ in t.shape)]
    return view.copy_(t)


@each_product
@each_dtype
@pytest.mark.parametrize("layout", [reversed_strides, every_other])
def test_any_strides(case, layout, dtype):
    tensors = [layout(t) for t in case.tensors(dtype)]
    threshold = torch.full((2, 2), 0.4, device=DEVICE)[::2, ::2].view(())
    assert_matches(
        lambda *t: case.op(threshold, *t), lambda *t: case.reference(threshold.double(), *t), tensors, dtype
    )  # fmt: skip


@each_product
@each_dtype
@pytest.mark.parametrize("threshold", [0.0, 1e9, float("inf")])
def test_threshold_that_drops_nothing_or_all(case, threshold, dtype):
    t, tensors = torch.tensor(threshold, device=DEVICE), case.tensors(dtype)
    assert_matches(lambda *z: case.op(t, *z), lambda *z: case.reference(t.double(), *z), tensors, dtype)
    if threshold > 0:  # exactly nothing is left of the weight, in the output and in its gradients
        leaves = [z.requires_grad_() for z in tensors]
        gradients = torch.autograd.grad(case.op(t, *leaves).sum(), leaves)
        assert all(not g.any() for name, g in zip(case.shapes, gradients, strict=True) if name != "b")


@each_product
@each_dtype
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_are_not_finite_stay_in_their_outputs(case, value, dtype):
    """NaN is kept and shows, infinite ones are a mask of 1; nothing else is touched."""
    tensors = case.tensors(dtype)
    tensors[-1].view(-1)[3] = value
    y = case.op(SMALL, *tensors)
    expected = case.reference(SMALL.double(), *(t.double() for t in tensors))
    assert torch.equal(y.isnan(), expected.isnan())
    peer = None if dtype == F32 else case.reference(SMALL, *tensors).nan_to_num()
    assert_close("finite part", y.nan_to_num(), expected.nan_to_num(), peer)


def under_autocast(op: Callable, dtype: torch.dtype) -> Callable:
    def call(*tensors):
        with torch.autocast(DEVICE, dtype):
            return op(SMALL, *tensors)

    return call


@each_product
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_autocast(case, dtype):
    """As PyTorch's own layers on W * m: output in autocast's dtype, each gradient in its tensor's own."""
    assert_matches(
        under_autocast(case.op, dtype),
        lambda *t: case.reference(SMALL.double(), *t),
        case.tensors(),
        dtype,
        peer=under_autocast(case.mask_first, dtype),
    )


@each_product
def test_autocast_dtypes_of_bfloat16(case):
    """The same by the shape functions alone, for bfloat16's values can't be had in the interpreter."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        leaves = [t.requires_grad_() for t in case.tensors()]
        y = under_autocast(case.op, torch.bfloat16)(*leaves)
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
def test_nothing_in_a_dimension(name, dtype):
    op, wrap, shapes = EMPTY[name]
    ours, theirs = wrap(getattr(kernels, op)), wrap(getattr(reference, op))
    tensors = [randn(*shape, dtype=dtype) for shape in shapes]
    assert_matches(lambda *t: ours(SMALL, *t), lambda *t: theirs(SMALL.double(), *t), tensors, dtype)
