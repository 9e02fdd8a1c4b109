"""Run an op and its definition on the same tensors, and compare the results and every gradient."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import repeat

import pytest
import torch
from torch import Tensor

from hypermask_fast.ops import reference
from support.tolerances import assert_close

DEVICE = (
    "cuda" if torch.cuda.is_available() else "cpu"
)  # where Triton's kernels run: without a GPU they are interpreted
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")  # garbage in the interpreter
NAN, INF = float("nan"), float("inf")

Build = Callable[..., Tensor | Sequence[Tensor]]


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """On `DEVICE`; the same numbers on every device."""
    return torch.randn(shape).to(DEVICE, dtype)


def sized_offsets(sizes: Sequence[int], start: int = 0) -> list[int]:
    """The borders of segments of these sizes, one behind another."""
    return [start, *(start + torch.tensor(sizes, dtype=torch.int64).cumsum(0)).tolist()]


def double(x: Tensor) -> Tensor:
    """A float64 copy that takes a gradient."""
    return x.detach().double().requires_grad_()


@contextmanager
def launches() -> Iterator[list[str]]:
    """The names of the Triton kernels launched within."""
    from triton.runtime.interpreter import GridExecutor
    from triton.runtime.jit import JITFunction

    from hypermask_fast.kernels import host

    owner, method = (GridExecutor, "__call__") if host.INTERPRETED else (JITFunction, "run")
    run, launched = getattr(owner, method), []

    def record(self, *args, **kwargs):
        launched.append((self.fn if host.INTERPRETED else self).__name__)
        return run(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, method, record)
        yield launched


def in_half(dtype: torch.dtype, function: Callable[..., Sequence[Tensor]], *tensors: Tensor) -> Sequence[Tensor | None]:
    """function(*tensors) in float16 or bfloat16 as `assert_close`'s peers; Nones where dtype is float32."""
    return repeat(None) if dtype == torch.float32 else function(*(t.detach().to(dtype) for t in tensors))


def results_of(function: Build, tensors: Sequence[Tensor]) -> list[Tensor]:
    """What function(*tensors) returns, one tensor or several, as a list."""
    results = function(*tensors)
    return [results] if isinstance(results, Tensor) else list(results)


def output_and_gradients(
    function: Build, tensors: Sequence[Tensor], grad: Tensor | Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The results of function(*tensors), then the gradient of each tensor where `grad` comes from above.

    `grad` is one tensor, or one for each result.
    """
    leaves = [t.detach().requires_grad_() for t in tensors]
    results = results_of(function, leaves)
    grads = [grad] if isinstance(grad, Tensor) else grad
    from_above = [g.to(y.device, y.dtype) for g, y in zip(grads, results, strict=True)]
    return *(y.detach() for y in results), *torch.autograd.grad(results, leaves, from_above)


def assert_matches(
    op: Build,
    definition: Build,
    tensors: Sequence[Tensor],
    dtype: torch.dtype = torch.float32,
    peer: Build | None = None,
    *,
    kinds: tuple[str, str] = ("triton", "triton"),
) -> Tensor | list[Tensor]:
    """op(*tensors) against definition(*tensors in float64), results and gradients; returns op's result.

    Each tensor keeps its strides; dtype is the one that the products are in. In half precision the yardstick is
    peer(*tensors), without one the definition on tensors in dtype. kinds: the tolerances of results and of gradients.
    """
    wide = [t.double() for t in tensors]
    shapes = [y.shape for y in results_of(definition, wide)]
    grads = [torch.randn(shape).to(dtype) for shape in shapes]
    found = output_and_gradients(op, tensors, grads)
    expected = output_and_gradients(definition, wide, grads)
    if peer is None:
        peers = in_half(dtype, lambda *halves: output_and_gradients(definition, halves, grads), *tensors)
    else:
        peers = output_and_gradients(peer, tensors, grads)
    results = len(shapes)
    dtypes = *(dtype for _ in shapes), *(t.dtype for t in tensors)
    for i, (got, wanted, half, stored) in enumerate(zip(found, expected, peers, dtypes, strict=False)):
        name = f"result {i}" if i < results else f"gradient of argument {i - results}"
        assert got.dtype == stored, f"{name}: {got.dtype}, not {stored}"
        assert_close(got, wanted, kinds[i >= results], name, peer=half)
    assert len(found) == len(expected) == results + len(tensors)
    return found[0] if results == 1 else list(found[:results])


def check(
    backend, build: Callable[..., Tensor | Sequence[Tensor]], tensors: Sequence[Tensor], result: str, gradient: str
) -> Tensor | list[Tensor]:
    """build(backend, *tensors) on its device against build(reference, *tensors in float64): results and gradients.

    What else `build` needs it brings to its tensors: `thresholds.to(logits)`. result, gradient: kinds of tolerances,
    in place of which a GPU's backends have their own.
    """
    put = [t.detach().to(backend.device) for t in tensors]
    kinds = backend.kind(result), backend.kind(gradient)
    dtype = put[0].dtype
    return assert_matches(
        lambda *t: build(backend, *t), lambda *t: build(reference, *t), put, dtype, kinds=kinds
    )  # fmt: skip


def exact_threshold(logits: Tensor, fraction: float = 0.3) -> Tensor:
    """The magnitude of one of the logits: entries that equal the threshold must be kept."""
    magnitudes = logits.detach().abs().flatten().sort().values
    if len(magnitudes) == 0:
        return logits.new_zeros(())
    return magnitudes[int(fraction * (len(magnitudes) - 1))].clone()


def gap_threshold(logits: Tensor) -> Tensor:
    """A threshold in the widest gap between middling magnitudes, which another rounding cannot cross."""
    magnitudes = logits.detach().double().abs().flatten().sort().values
    low, high = int(0.2 * len(magnitudes)), int(0.6 * len(magnitudes))
    if high - low < 2:
        return torch.full((), 0.1, device=logits.device)
    gaps = magnitudes[low + 1 : high] - magnitudes[low : high - 1]
    widest = low + int(gaps.argmax())
    return (magnitudes[widest : widest + 2].mean()).float()
