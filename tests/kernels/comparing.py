"""Run an op and its float64 reference on the same tensors and compare the output and every gradient."""

from collections.abc import Callable, Sequence

import torch
from kernel_tolerances import TOLERANCES
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")  # garbage in the interpreter


def randn(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def assert_close(name: str, ours: Tensor, reference: Tensor, dtype: torch.dtype) -> None:
    assert ours.shape == reference.shape, f"{name}: {tuple(ours.shape)}, not {tuple(reference.shape)}"
    if reference.numel() == 0:
        return
    error = (ours.double() - reference).abs().max() / reference.abs().max().clamp_min(1e-30)
    assert error <= TOLERANCES[dtype], f"{name}: relative error {error:.2e}, NaN where nothing was written"


def assert_matches(
    op: Callable[..., Tensor], reference: Callable[..., Tensor], tensors: Sequence[Tensor], dtype: torch.dtype
) -> Tensor:
    """op(*tensors) against reference(*tensors in float64), outputs and gradients; returns op's output.

    Each tensor keeps its strides; the tolerance is that of dtype.
    """
    ours = [t.detach().requires_grad_() for t in tensors]
    theirs = [t.detach().double().requires_grad_() for t in tensors]
    y, expected = op(*ours), reference(*theirs)
    assert_close("output", y, expected, dtype)
    grad = torch.randn(expected.shape, device=DEVICE).to(y.dtype)
    gradients = torch.autograd.grad(y, ours, grad)
    expected_gradients = torch.autograd.grad(expected, theirs, grad.double())
    for position, (got, wanted) in enumerate(zip(gradients, expected_gradients, strict=True)):
        assert got.dtype == tensors[position].dtype
        assert_close(f"gradient of argument {position}", got, wanted, dtype)
    return y.detach()


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
