"""Run an op and its float64 reference on the same tensors and compare the output and every gradient.

Errors are the largest ones, over the reference's largest magnitude. In float32 one tolerance holds. In float16 and
bfloat16 the yardstick is PyTorch: the reference run in that dtype. An op may be twice as far from float64, and a
rounding of the result: |ours - fp64| <= 2 |PyTorch's - fp64| + eps / 2.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import repeat

import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import GridExecutor
from triton.runtime.jit import JITFunction

from hypermask_fast.kernels import host

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Sums of a few hundred products in another order: measured up to 7e-7 in the interpreter. A GPU's exponential and
# division are approximate too, an entry of the mask off by up to 6e-7, and cuDNN takes the algorithm that it likes.
FLOAT32_TOLERANCE = 1e-5 if DEVICE == "cuda" else 2e-6
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")  # garbage in the interpreter


def randn(*shape: int, dtype: torch.dtype) -> Tensor:
    """The same numbers on every device."""
    return torch.randn(shape).to(DEVICE, dtype)


@contextmanager
def launches() -> Iterator[list[str]]:
    """The names of the Triton kernels launched within."""
    owner, method = (GridExecutor, "__call__") if host.INTERPRETED else (JITFunction, "run")
    run, launched = getattr(owner, method), []

    def record(self, *args, **kwargs):
        launched.append((self.fn if host.INTERPRETED else self).__name__)
        return run(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, method, record)
        yield launched


def relative_error(values: Tensor, reference: Tensor) -> float:
    return ((values.double() - reference).abs().max() / reference.abs().max().clamp_min(1e-30)).item()


def assert_close(name: str, ours: Tensor, reference: Tensor, peer: Tensor | None = None) -> None:
    """ours against the float64 reference; peer: the reference in a half-precision dtype, None where all is float32."""
    assert ours.shape == reference.shape, f"{name}: {tuple(ours.shape)}, not {tuple(reference.shape)}"
    if reference.numel() == 0:
        return
    allowed = FLOAT32_TOLERANCE
    if peer is not None:
        allowed = 2 * relative_error(peer, reference) + torch.finfo(peer.dtype).eps / 2
    error = relative_error(ours, reference)
    assert error <= allowed, f"{name}: error {error:.2e} of {allowed:.2e} allowed, NaN where nothing was written"


def in_half(dtype: torch.dtype, function: Callable[..., Sequence[Tensor]], *tensors: Tensor) -> Sequence[Tensor | None]:
    """function(*tensors) in float16 or bfloat16 as `assert_close`'s peers; Nones where dtype is float32."""
    return repeat(None) if dtype == torch.float32 else function(*(t.detach().to(dtype) for t in tensors))


def output_and_gradients(
    function: Callable[..., Tensor], tensors: Sequence[Tensor], grad: Tensor
) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = function(*leaves)
    return y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))


def assert_matches(
    op: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    tensors: Sequence[Tensor],
    dtype: torch.dtype,
    peer: Callable[..., Tensor] | None = None,
) -> Tensor:
    """op(*tensors) against reference(*tensors in float64), outputs and gradients; returns op's output.

    Each tensor keeps its strides; dtype is the one that the products are in. In half precision the yardstick is
    peer(*tensors), without one the reference on tensors in dtype.
    """
    shape = op(*tensors).shape
    grad = randn(*shape, dtype=dtype)
    found = output_and_gradients(op, tensors, grad)
    expected = output_and_gradients(reference, [t.double() for t in tensors], grad)
    if peer is None:
        peers = in_half(dtype, lambda *halves: output_and_gradients(reference, halves, grad), *tensors)
    else:
        peers = output_and_gradients(peer, tensors, grad)
    dtypes = dtype, *(t.dtype for t in tensors)
    names = "output", *(f"gradient of argument {position}" for position in range(len(tensors)))
    for name, got, wanted, half, stored in zip(names, found, expected, peers, dtypes, strict=False):
        assert got.dtype == stored, f"{name}: {got.dtype}, not {stored}"
        assert_close(name, got, wanted, half)
    return found[0]


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
