"""The dense output layer as one autograd node for all tasks, whose gradient stays in factors or is stepped at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import ops, trunk
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


@dataclass(frozen=True)
class Work:
    """What the nodes below are to do; their other arguments are the layer's weight and bias, targets (t, N) of the
    earlier tasks, and what gives the hidden vectors: these themselves, (t + 1, H), or all tensors of the trunk.

    Attributes:
        task: whose embedding the stepper has to train; net: the hypernetwork; stepper: who steps the layer.
        embeddings: how many tensors the trunk's rows are, before its layers; 0 where hidden vectors are given.
        rows: (K,) int64, which of the hidden vectors are used, the last one always; None: all.
        scale: R is so many times the sum over the tasks that are used.
    """

    task: int
    net: Any
    stepper: OutputStepper
    embeddings: int = 0
    rows: Tensor | None = None
    scale: float = 1.0

    def hidden(self, given: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
        """Hidden vectors of the tasks that are used, and what `of_given` needs of the trunk."""
        kept: Sequence[Tensor] = ()
        hidden = given[0]
        if self.embeddings:
            kept = trunk.run(given[: self.embeddings], given[self.embeddings :])
            hidden = kept[-2]
        return hidden if self.rows is None else hidden.index_select(0, self.rows), kept

    def of_given(self, grad: Tensor | None, given: Sequence[Tensor], kept: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """Gradients of what gives the hidden vectors, from theirs; those of tasks that are not used are 0."""
        if grad is None:
            return [None] * len(given)
        if self.rows is not None:
            count = self.embeddings or len(given[0])
            grad = grad.new_zeros(count, grad.shape[1]).index_copy_(0, self.rows, grad)
        count = self.embeddings
        return trunk.gradients(grad, kept, given[:count], given[count:]) if count else [grad]


class FactoredOutput(torch.autograd.Function):
    """The dense output layer for tasks 0..t, read once forward and once backward, whose weight's gradient stays in
    factors: the residuals that the forward pass has kept, and the current task's gradient of logits."""

    @staticmethod
    def forward(
        ctx: Any, work: Work, weight: Tensor, bias: Tensor, targets: Tensor, *given: Tensor
    ) -> tuple[Tensor, Tensor]:
        hidden, kept = work.hidden(given)
        residuals, drift = ops.output_residuals(hidden, weight, bias, targets)
        drift = _scaled(drift, work.scale)
        ctx.save_for_backward(hidden, weight, *given, *kept)
        ctx.work, ctx.given = work, len(given)
        ctx.residuals, ctx.given_away = residuals, False
        logits = residuals[-1:]
        if work.net.processes is not None:
            logits, drift = work.net.processes.gather(logits, drift)
        return logits[0].clone(), drift  # a copy: backward writes its gradient there

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # the decorator hides the names
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        work: Work = ctx.work
        hidden, weight, *rest = ctx.saved_tensors
        given, kept = rest[: ctx.given], rest[ctx.given :]
        work.stepper.check_task(work.task)
        grad_logits, grad_drift = _means(work, *grads)
        residuals = ctx.residuals.clone() if ctx.given_away else ctx.residuals  # the graph is kept, and passed again
        ctx.given_away = True
        hidden_grad, *others = _gradients(ctx, hidden, weight, residuals, grad_logits, grad_drift)
        (hidden_grad,) = _sums(work, hidden_grad)
        return None, *others, None, *work.of_given(hidden_grad, given, kept)


def _scaled(value: Any, scale: float) -> Any:
    return value if scale == 1 else value * scale


def _means(work: Work, grad_logits: Tensor, grad_drift: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the logits that are generated here, (n,), as means over the processes, and of the sum over tasks
    that the drift is `scale` times."""
    grad_drift = _scaled(grad_drift, work.scale)
    if work.net.processes is None:
        return grad_logits, grad_drift
    own, grad_drift = work.net.processes.means(grad_logits[None], grad_drift)
    return own[0], grad_drift


def _sums(work: Work, hidden_grad: Tensor | None, *drift: Tensor) -> list[Tensor | None]:
    """Gradient of hidden, where it is needed, and the drift, over the logits of all processes."""
    if work.net.processes is None:
        return [hidden_grad, *drift]
    if hidden_grad is None:
        return [None, *(work.net.processes.sums(*drift) if drift else ())]
    return work.net.processes.sums(hidden_grad, *drift)


def _needs_hidden(ctx: Any) -> bool:
    """Whether anything that gives the hidden vectors needs a gradient."""
    return any(ctx.needs_input_grad[4:])


def _gradients(
    ctx: Any, hidden: Tensor, weight: Tensor, residuals: Tensor, grad_logits: Tensor, grad_drift: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of hidden, weight and bias, as far as they are needed; residuals become factors of the weight's."""
    residuals[-1] = grad_logits
    scales = torch.ones_like(hidden[:, 0])
    scales[:-1] = 2 * grad_drift
    of_hidden, (of_weight, of_bias) = _needs_hidden(ctx), ctx.needs_input_grad[1:3]
    hidden_grad = bias_grad = None
    if of_hidden or of_bias:
        hidden_grad, bias_grad = ops.hidden_gradient(residuals, scales, weight)
    factors = FactoredGradient.of(Factors(residuals, scales, hidden)) if of_weight else None
    return hidden_grad if of_hidden else None, factors, bias_grad if of_bias else None


class SteppedOutput(torch.autograd.Function):
    """The same, whose backward pass is also the layer's step; where that can't be, it is `FactoredOutput`'s."""

    @staticmethod
    def forward(
        ctx: Any, work: Work, weight: Tensor, bias: Tensor, targets: Tensor, *given: Tensor
    ) -> tuple[Tensor, Tensor]:
        hidden, kept = work.hidden(given)
        logits = ops.hypernet_logits(hidden[-1:, None], weight, bias, weight.shape[0])
        if work.net.processes is not None:
            (logits,) = work.net.processes.gather(logits)
        drift = hidden.new_zeros(())
        ctx.save_for_backward(hidden, weight, bias, targets, *given, *kept)
        ctx.work, ctx.given = work, len(given)
        ctx.pending = Pending()
        work.stepper.announce(ctx.pending)
        ctx.drift = drift.detach()  # shares its memory: backward fills the value in
        return logits[0], drift

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # the decorator hides the names
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        work: Work = ctx.work
        work.stepper.check_task(work.task)
        reaches = _reaches_weight(ctx)
        steps = reaches and work.stepper.steps_now(ctx.pending)
        if reaches or not ctx.needs_input_grad[1]:
            ctx.pending = None
        hidden, weight, bias, targets, *rest = ctx.saved_tensors
        given, kept = rest[: ctx.given], rest[ctx.given :]
        grad_logits, grad_drift = _means(work, *grads)
        if steps:
            hidden_grad, drift = work.stepper.step_output_layer(hidden, grad_logits, targets, grad_drift)
            others = _stepped(work.net, weight), None
        else:
            residuals, drift = ops.output_residuals(hidden, weight, bias, targets)
            hidden_grad, *others = _gradients(ctx, hidden, weight, residuals, grad_logits, grad_drift)
        hidden_grad, drift = _sums(work, hidden_grad if _needs_hidden(ctx) else None, drift)
        ctx.drift.copy_(_scaled(drift, work.scale))
        return None, *others, None, *work.of_given(hidden_grad, given, kept)


def _stepped(net: Any, weight: Tensor) -> Tensor | None:
    """What the weight's node is given. A whole weight's gradient, which there is none of yet, is set here: to send it
    through autograd takes longer than all else that is done for it."""
    gradient = SteppedGradient(weight)
    if isinstance(net.processes, Shards):
        return gradient
    net.output.weight.grad = gradient
    return None


def _reaches_weight(ctx: Any) -> bool:
    """Whether this pass will give the weight its gradient: torch.autograd.grad asks for some tensors' alone."""
    if not ctx.needs_input_grad[1]:
        return False
    accumulates = ctx.next_functions[0][0]  # of the tensors among the arguments
    if isinstance(ctx.work.net.processes, Shards):  # the weight is a DTensor's local part
        accumulates = accumulates.next_functions[0][0]
    try:
        return _will_be_run(accumulates)
    except RuntimeError:  # the weight itself is asked for
        return False
