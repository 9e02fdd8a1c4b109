"""Adam on factored gradients: the hypernetwork's output layer is stepped within the backward pass.

That layer, N x H, is most of a model. Its gradient is the product of a (t + 1, N) and a (t + 1, H) factor and need
never exist: one pass over weight and moments gives the hidden vectors' gradients for all tasks and applies Adam.
"""

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .errors import InputError
from .hypernet import ChunkedHyperNetwork
from .model import HyperMask
from .regularizers import Anchor

GRADIENTS = ("auto", "factored", "dense")


class Adam(torch.optim.Adam):
    """torch.optim.Adam over all Parameters of a HyperMask model, with the same numbers in a fraction of the time.

    With a factored gradient, `loss.backward()` steps the hypernetwork's output layer and `step()` everything else.
    A step is then one mask, made by `model.mask(task)` and used for both the forward pass and the regulariser,
    one backward and one `step()`:

        mask = model.mask(task)
        loss = F.cross_entropy(model(x, mask), y) + model.regularizer(mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    The optimiser holds for as long as it lives, or until a newer one for the same model takes its place. Masks made
    in evaluation mode (`model.eval()`) have ordinary gradients. Tasks are added by `model.add_task(optimizer)`.

    Args:
        model: whose Parameters, both networks' and the embeddings', are trained.
        lr, betas, eps: as in torch.optim.Adam; lr may be a one-entry tensor.
        gradient: "factored"; "dense" for who clips or accumulates gradients: the layer's gradient as an ordinary
            `.grad`, slower, the same numbers; "auto": factored where the output layer is dense. A chunked
            hypernetwork's layer is small and always takes its dense gradient.
        exact_loss: with a factored gradient, whether the loss holds the output drift's value, at the cost of one
            more read of the layer per step. Otherwise `model.drifts(mask).output` is 0 until backward fills it in;
            gradients are the same.
        capturable: keep step counts on the device, for CUDA graphs.

    Raises:
        InputError: no HyperMask model, a wrong `gradient`, or "factored" with a chunked hypernetwork.
    """

    def __init__(
        self,
        model: HyperMask,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        gradient: str = "auto",
        exact_loss: bool = True,
        capturable: bool = False,
    ) -> None:
        if not isinstance(model, HyperMask):
            raise InputError(
                f"Adam takes the HyperMask model itself, all of whose Parameters it trains, not {type(model).__name__}"
            )
        if gradient not in GRADIENTS:
            raise InputError(f"gradient must be one of {', '.join(GRADIENTS)}, not {gradient!r}")
        chunked = isinstance(model.hypernet, ChunkedHyperNetwork)
        if chunked and gradient == "factored":
            raise InputError("a chunked hypernetwork has no factored gradient: use gradient='auto' or 'dense'")
        super().__init__(model.parameters(), lr=lr, betas=betas, eps=eps, fused=True, capturable=capturable)
        self.factored = not chunked and gradient != "dense"
        self.exact_loss = exact_loss
        self._layer: nn.Linear = model.hypernet.output
        self._embeddings = model.hypernet.embeddings
        self._task = -1  # whose embedding was last seen to be among the Parameters
        self._lr: tuple[tuple, Tensor] | None = None
        self._stepped = False
        self._replaced = False
        older = model._optimizer and model._optimizer()
        if older is not None:
            older._replaced = True
        model._optimizer = weakref.ref(self) if self.factored else None

    def output_layer(self, hidden: Tensor, anchor: Anchor) -> tuple[Tensor, Tensor]:
        """Logits a_t (N,) of the current task, and R over the earlier ones; their backward steps the layer.

        Args:
            hidden: (t + 1, H) last hidden layer of tasks 0..t.
            anchor: of task t.
        """
        targets = anchor.targets[0] if anchor.targets else hidden.new_empty(0, self._layer.out_features)
        return _OutputLayer.apply(hidden, targets, self)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._stepped = False
        super().zero_grad(set_to_none)

    def step(self, closure: Any = None) -> None:
        """Adam on everything but what backward has stepped already. Closures are for dense gradients only."""
        if self._replaced:
            raise InputError("a newer hmf.optim.Adam has taken over this model: step that one")
        if self.factored and (closure is not None or self._layer.weight.grad is not None):
            raise InputError(
                "the hypernetwork's output layer has got a dense gradient: make masks by model.mask(task) in "
                "training mode with an integer task, without a closure, or use gradient='dense'"
            )
        self._stepped = False
        return super().step(closure)

    def step_output_layer(
        self, hidden: Tensor, grad_logits: Tensor, targets: Tensor, drift_weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The backward pass of `output_layer`: (hidden_grad (t + 1, H), R); see `ops.hypernet_adam`."""
        if self._stepped:
            raise InputError(
                "a second backward pass before optimizer.step(): make one mask per step, mask = model.mask(task), for "
                "both model(x, mask) and model.regularizer(mask), or use gradient='dense' to accumulate"
            )
        self._check_embedding(len(hidden) - 1)
        self._stepped = True
        weight, bias = self._layer.weight, self._layer.bias
        state, bias_state = self._state_of(weight), self._state_of(bias)
        for step in (state["step"], bias_state["step"]):
            step.add_(1)
        group = self.param_groups[0]
        return ops.hypernet_adam(
            hidden,
            grad_logits,
            targets,
            drift_weight,
            weight,
            bias,
            state["exp_avg"],
            state["exp_avg_sq"],
            bias_state["exp_avg"],
            bias_state["exp_avg_sq"],
            state["step"],
            self._lr_beside(weight),
            *group["betas"],
            group["eps"],
        )

    def _lr_beside(self, weight: Tensor) -> Tensor:
        """The learning rate as a tensor like weight. A number is copied when it changes: to a GPU that is a wait."""
        lr = self.param_groups[0]["lr"]
        if isinstance(lr, Tensor):
            return lr.to(weight)
        key = lr, weight.dtype, weight.device
        if self._lr is None or self._lr[0] != key:
            self._lr = key, weight.new_tensor(lr)
        return self._lr[1]

    def _check_embedding(self, task: int) -> None:
        """Raises InputError where the task was added without telling the optimiser."""
        if task == self._task:
            return
        embedding = self._embeddings[task]
        if embedding.requires_grad and not any(p is embedding for group in self.param_groups for p in group["params"]):
            raise InputError(
                f"the optimizer would not train task {task}, which is newer: add tasks by model.add_task(optimizer)"
            )
        self._task = task

    def _state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """The same entries as torch.optim.Adam's, so that a state_dict serves either."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state


class _OutputLayer(torch.autograd.Function):
    """The dense output layer for the current task, whose backward pass is also its Adam step."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, optimizer: Adam) -> tuple[Tensor, Tensor]:
        weight, bias = optimizer._layer.weight, optimizer._layer.bias
        logits = ops.hypernet_logits(hidden[-1:, None], weight, bias, weight.shape[0])[0]
        if optimizer.exact_loss:
            drift = ops.output_drift(hidden[:-1, None], weight, bias, targets)
        else:
            drift = hidden.new_zeros(())
        ctx.save_for_backward(hidden, targets)
        ctx.optimizer, ctx.drift = optimizer, drift.detach()  # shares its memory: backward fills the value in
        return logits, drift

    @staticmethod
    def backward(ctx: Any, grad_logits: Tensor, grad_drift: Tensor) -> tuple[Tensor, None, None]:
        hidden, targets = ctx.saved_tensors
        hidden_grad, drift = ctx.optimizer.step_output_layer(hidden, grad_logits, targets, grad_drift)
        ctx.drift.copy_(drift)
        return hidden_grad, None, None
