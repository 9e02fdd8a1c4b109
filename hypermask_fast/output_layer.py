"""The dense output layer as one autograd node for all tasks, whose gradient stays in factors or is stepped at once."""

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import ops
from .factored import FactoredGradient, Factors, SteppedGradient
from .processes import Shards

# Whether a node is part of the backward pass that is under way. There is no public way to ask.
_will_be_run: Any = torch._C._will_engine_execute_node  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]


class Pending:
    """Lives as long as a forward pass's graph waits for its backward pass."""


class OutputStepper(Protocol):
    """Who takes the dense output layer's gradient in factors: an optimiser, see `HyperNetwork.step_with`.

    Attributes:
        step_in_backward: whether it would rather step the layer within the backward pass.
    """

    step_in_backward: bool

    def check_task(self, task: int) -> None:
        """Raises InputError where it does not train this task's embedding; called by every backward pass."""
        ...

    def announce(self, pending: "Pending") -> None:
        """A backward pass that may step the layer is to come, for as long as `pending` lives."""
        ...

    def steps_now(self, pending: "Pending") -> bool:
        """Whether this backward pass is to step the layer. Raises InputError where that would be wrong."""
        ...

    def step_output_layer(
        self, hidden: Tensor, grad_logits: Tensor, targets: Tensor, drift_weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients of hidden (t + 1, H), and R, before the step that this call makes; see `ops.hypernet_adam`."""
        ...

    def replaced(self) -> None:
        """Another one steps the layer from now on."""
        ...


class FactoredOutput(torch.autograd.Function):
    """The dense output layer for tasks 0..t, read once forward and once backward, whose weight's gradient stays in
    factors: the residuals that the forward pass has kept, and the current task's gradient of logits.

    scale: R is so many times the sum over the tasks that are given."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor,
        targets: Tensor,
        task: int,
        net: Any,
        stepper: OutputStepper,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        residuals, drift = ops.output_residuals(hidden, weight, bias, targets)
        drift = _scaled(drift, scale)
        ctx.save_for_backward(hidden, weight)
        ctx.task, ctx.net, ctx.stepper, ctx.scale = task, net, stepper, scale
        ctx.residuals, ctx.given_away = residuals, False
        logits = residuals[-1:]
        if net.processes is not None:
            logits, drift = net.processes.gather(logits, drift)
        return logits[0].clone(), drift  # a copy: backward writes its gradient there

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # the decorator hides the names
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        grad_logits, grad_drift = grads
        hidden, weight = ctx.saved_tensors
        ctx.stepper.check_task(ctx.task)
        grad_logits, grad_drift = _means(ctx, grad_logits, grad_drift)
        residuals = ctx.residuals.clone() if ctx.given_away else ctx.residuals  # the graph is kept, and passed again
        ctx.given_away = True
        hidden_grad, *others = _gradients(ctx, hidden, weight, residuals, grad_logits, grad_drift)
        return *_sums(ctx, hidden_grad), *others, None, None, None, None, None


def _scaled(value: Any, scale: float) -> Any:
    return value if scale == 1 else value * scale


def _means(ctx: Any, grad_logits: Tensor, grad_drift: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the logits that are generated here, (n,), as means over the processes, and of the sum over tasks
    that the drift is `scale` times."""
    grad_drift = _scaled(grad_drift, ctx.scale)
    if ctx.net.processes is None:
        return grad_logits, grad_drift
    own, grad_drift = ctx.net.processes.means(grad_logits[None], grad_drift)
    return own[0], grad_drift


def _sums(ctx: Any, hidden_grad: Tensor | None, *drift: Tensor) -> list[Tensor | None]:
    """Gradient of hidden, where it is needed, and the drift, over the logits of all processes."""
    if ctx.net.processes is None:
        return [hidden_grad, *drift]
    if hidden_grad is None:
        return [None, *(ctx.net.processes.sums(*drift) if drift else ())]
    return ctx.net.processes.sums(hidden_grad, *drift)


def _gradients(
    ctx: Any, hidden: Tensor, weight: Tensor, residuals: Tensor, grad_logits: Tensor, grad_drift: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of hidden, weight and bias, as far as they are needed; residuals become factors of the weight's."""
    residuals[-1] = grad_logits
    scales = torch.ones_like(hidden[:, 0])
    scales[:-1] = 2 * grad_drift
    of_hidden, of_weight, of_bias = ctx.needs_input_grad[:3]
    hidden_grad = bias_grad = None
    if of_hidden or of_bias:
        hidden_grad, bias_grad = ops.hidden_gradient(residuals, scales, weight)
    factors = FactoredGradient.of(Factors(residuals, scales, hidden)) if of_weight else None
    return hidden_grad if of_hidden else None, factors, bias_grad if of_bias else None


class SteppedOutput(torch.autograd.Function):
    """The same, whose backward pass is also the layer's step; where that can't be, it is `FactoredOutput`'s."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor,
        targets: Tensor,
        task: int,
        net: Any,
        stepper: OutputStepper,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        logits = ops.hypernet_logits(hidden[-1:, None], weight, bias, weight.shape[0])
        if net.processes is not None:
            (logits,) = net.processes.gather(logits)
        drift = hidden.new_zeros(())
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.task, ctx.net, ctx.stepper, ctx.scale = task, net, stepper, scale
        ctx.pending = Pending()
        stepper.announce(ctx.pending)
        ctx.drift = drift.detach()  # shares its memory: backward fills the value in
        return logits[0], drift

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # the decorator hides the names
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        grad_logits, grad_drift = grads
        ctx.stepper.check_task(ctx.task)
        reaches = _reaches_weight(ctx)
        steps = reaches and ctx.stepper.steps_now(ctx.pending)
        if reaches or not ctx.needs_input_grad[1]:
            ctx.pending = None
        hidden, weight, bias, targets = ctx.saved_tensors
        grad_logits, grad_drift = _means(ctx, grad_logits, grad_drift)
        if steps:
            hidden_grad, drift = ctx.stepper.step_output_layer(hidden, grad_logits, targets, grad_drift)
            others = SteppedGradient(weight), None
        else:
            residuals, drift = ops.output_residuals(hidden, weight, bias, targets)
            hidden_grad, *others = _gradients(ctx, hidden, weight, residuals, grad_logits, grad_drift)
        hidden_grad, drift = _sums(ctx, hidden_grad if ctx.needs_input_grad[0] else None, drift)
        ctx.drift.copy_(_scaled(drift, ctx.scale))
        return hidden_grad, *others, None, None, None, None, None


def _reaches_weight(ctx: Any) -> bool:
    """Whether this pass will give the weight its gradient: torch.autograd.grad asks for some tensors' alone."""
    if not ctx.needs_input_grad[1]:
        return False
    accumulates = ctx.next_functions[1][0]
    if isinstance(ctx.net.processes, Shards):  # the weight is a DTensor's local part
        accumulates = accumulates.next_functions[0][0]
    try:
        return _will_be_run(accumulates)
    except RuntimeError:  # the weight itself is asked for
        return False
