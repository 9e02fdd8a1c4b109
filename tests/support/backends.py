"""The ops by each backend, under the names that tests are parametrised with.

`BACKENDS` are what the fixture `backend` takes: the extension on each instruction set, the CUDA sources run by a CPU,
Triton (interpreted where there is no GPU), CUDA on a GPU. A backend has every op as a differentiable function of the
definition's signature, the `device` that its tensors must be on, and `kind`, its kind of tolerance.

The layer ops have `LAYERS` instead: "plain" is W * m by the fastest backend there is and then PyTorch's own product,
"plain-alone" the same as where no extension is built. "automatic" is what is taken where nobody asks for a backend.

What depends on the library's inner names stands here, `EXTENSION` and `native_problem`, and in `internals`.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from hypermask_fast import ops
from hypermask_fast.ops import registry
from support import internals
from support.comparing import DEVICE

ISAS = ("baseline", "avx2", "avx512")
CPU = tuple(f"cpu-{isa}" for isa in ISAS)
NATIVE = (*CPU, "emulated")
BACKENDS = (*NATIVE, "triton", "cuda")
LAYERS = ("plain", "plain-alone", "triton")

EXTENSION = torch.ops.hypermask_native  # the operators of csrc/


def native_problem() -> str:
    """Why the extension is not to be had, "" if it is."""
    return registry.problem("cpu")


def on(*backends: str) -> pytest.MarkDecorator:
    """Runs a test that takes the fixture `backend` with these."""
    return pytest.mark.parametrize("backend", backends, indirect=True)


def operators_of(*backends: str) -> pytest.MarkDecorator:
    """Runs a test that takes the fixture `operators` with those of these native backends."""
    return pytest.mark.parametrize("operators", backends, indirect=True)


@contextmanager
def instruction_set(isa: str) -> Iterator[None]:
    """The extension runs with this instruction set; a test is skipped where the machine lacks it."""
    if problem := native_problem():
        pytest.skip(problem)
    before = EXTENSION.cpu_isa(-1)
    try:
        EXTENSION.cpu_isa(ISAS.index(isa))
    except RuntimeError as error:
        pytest.skip(str(error))
    try:
        yield
    finally:
        EXTENSION.cpu_isa(before)


class Public:
    """The public functions, by a backend that is asked for by name."""

    def __init__(self, name: str, backend: str, device: str = "cpu", kinds: dict[str, str] | None = None) -> None:
        self.name, self.backend, self.device = name, backend, torch.device(device)
        self._kinds = kinds

    def __getattr__(self, op: str) -> Callable:
        return functools.partial(getattr(ops, op), backend=self.backend)

    def kind(self, kind: str) -> str:
        """The tolerance of this backend in place of `kind`."""
        return kind if self._kinds is None else self._kinds.get(kind, self._kinds["other"])


PLAIN = Public("plain", "plain", DEVICE, {"other": "triton"})


@contextmanager
def missing(*backends: str) -> Iterator[None]:
    """As where these are not installed; nobody is warned of it."""
    with pytest.MonkeyPatch.context() as patch:
        internals.missing(patch, **dict.fromkeys(backends, "it is not installed"))
        internals.nobody_is_warned(patch)
        yield


def differentiable(forward: Callable, backward: Callable, *leaves: Tensor) -> tuple[Tensor, ...]:
    """forward(*leaves), a tuple, with backward(grads, results, leaves) as the leaves' gradients."""

    class Op(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *leaves: Tensor) -> tuple[Tensor, ...]:
            results = tuple(forward(*leaves))
            ctx.save_for_backward(*leaves, *results)
            return results

        @staticmethod
        def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
            saved = ctx.saved_tensors
            count = len(saved) - len(grads)
            return tuple(backward([g.contiguous() for g in grads], saved[count:], saved[:count]))

    return Op.apply(*leaves)


class Emulated:
    """The operators of csrc/cuda, run by a CPU, as the ops that the extension makes of them."""

    name, device = "emulated", torch.device("cpu")

    def __init__(self, operators) -> None:
        self.operators = operators

    def __getattr__(self, op: str) -> Callable:
        """An op without a gradient, whose operator takes its arguments."""
        return getattr(self.operators, op)

    def kind(self, kind: str) -> str:
        return kind

    def mask_thresholds(self, logits: Tensor, offsets: Sequence[int], ranks: Tensor) -> Tensor:
        return self.operators.mask_thresholds(logits.detach().contiguous(), offsets, ranks)

    def semi_binary_mask(self, logits: Tensor, threshold: Tensor) -> Tensor:
        (mask,) = differentiable(
            lambda a: (self.operators.semi_binary_mask(a, threshold),),
            lambda grads, _, leaves: (self.operators.semi_binary_mask_backward(*grads, *leaves, threshold),),
            logits.contiguous(),
        )
        return mask

    def masked_weights(self, weights, logits, thresholds, offsets) -> list[Tensor]:
        def forward(*leaves):
            return self.operators.masked_weights([*leaves[:-1]], leaves[-1], thresholds, offsets)

        def backward(grads, _, leaves):
            return flat(self.operators.masked_weights_backward(grads, [*leaves[:-1]], leaves[-1], thresholds, offsets))

        return [*differentiable(forward, backward, *contiguous(weights), logits.contiguous())]

    def weight_drift(self, weights, previous, offsets, norm=1, logits=None, thresholds=None) -> Tensor:
        count = len(weights)

        def arguments(leaves):
            return (
                [*leaves[:count]],
                previous,
                offsets,
                norm,
                *((leaves[count], thresholds) if masked else (None, None)),
            )

        def backward(grads, norms, leaves):
            return flat(self.operators.weight_drift_backward(*grads, *norms, *arguments(leaves)))[: len(leaves)]

        masked = logits is not None
        leaves = *contiguous(weights), *([logits.contiguous()] if masked else [])
        (norms,) = differentiable(lambda *leaves: (self.operators.weight_drift(*arguments(leaves)),), backward, *leaves)
        return norms.sum()

    def masked_weights_drift(
        self, weights, logits, thresholds, offsets, previous, norm=1
    ) -> tuple[list[Tensor], Tensor]:
        def arguments(leaves):
            return [*leaves[:-1]], leaves[-1], thresholds, offsets, previous, norm

        def forward(*leaves):
            return flat(self.operators.masked_weights_drift(*arguments(leaves)))

        def backward(grads, results, leaves):
            *grad_masked, grad_norms = grads
            return flat(
                self.operators.masked_weights_drift_backward(grad_masked, grad_norms, results[-1], *arguments(leaves))
            )

        *masked, norms = differentiable(forward, backward, *contiguous(weights), logits.contiguous())
        return masked, norms.sum()

    def output_drift(self, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
        (drift,) = differentiable(
            lambda *leaves: (self.operators.output_drift(*leaves, targets),),
            lambda grads, _, leaves: self.operators.output_drift_backward(*grads, *leaves, targets),
            *contiguous((hidden, weight, bias)),
        )
        return drift

    def hypernet_logits(self, hidden: Tensor, weight: Tensor, bias: Tensor, size: int) -> Tensor:
        """Without a gradient, which is PyTorch's own."""
        assert hidden.shape[:2] == (1, 1) and size == len(bias)
        return self.operators.hypernet_logits(*contiguous((hidden.reshape(-1), weight, bias))).unsqueeze(0)

    def hypernet_adam(self, *args) -> tuple[Tensor, Tensor]:
        return self.operators.hypernet_adam(*args[:12], *with_defaults(args[12:]))

    def factored_adam(self, *args) -> None:
        self.operators.factored_adam(*args[:8], *with_defaults(args[8:]))


def with_defaults(settings: tuple) -> tuple:
    """Adam's settings from beta1 on, all of them."""
    defaults = 0.9, 0.999, 1e-8, 0.0, False, False, 0
    return *settings, *defaults[len(settings) :]


def contiguous(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.contiguous() for t in tensors]


def flat(results: Sequence) -> list[Tensor]:
    """([a, b], c) as [a, b, c]."""
    return [t for part in results for t in ([part] if isinstance(part, Tensor) else part)]


@contextmanager
def opened(name: str, emulated: Callable) -> Iterator[Public | Emulated]:
    """The backend of this name; a test is skipped where it is not to be had. `emulated()`: see `emulation`."""
    if name == "emulated":
        yield Emulated(emulated())
    elif name.startswith("cpu-"):
        with instruction_set(name.removeprefix("cpu-")):
            yield Public(name, "cpu")
    elif name == "plain":
        yield PLAIN
    elif name == "plain-alone":
        with missing("cpu", "cuda"):
            yield Public(name, "plain", DEVICE, {"other": "triton"})
    elif name in ("automatic", "reference"):
        yield Public(name, "auto" if name == "automatic" else name, DEVICE, {"other": "triton"})
    else:
        if problem := registry.problem(name):
            pytest.skip(problem)
        kinds = {"other": "triton"} if name == "triton" else {"other": "cuda", "dense": "cuda dense"}
        yield Public(name, name, DEVICE if name == "triton" else "cuda", kinds)


@contextmanager
def opened_operators(name: str, emulated: Callable) -> Iterator:
    """The operators themselves, of the extension with an instruction set or of csrc/cuda run by a CPU."""
    if name == "emulated":
        yield emulated()
    else:
        with instruction_set(name.removeprefix("cpu-")):
            yield EXTENSION
