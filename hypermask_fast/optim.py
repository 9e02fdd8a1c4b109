"""Adam on factored gradients: the hypernetwork's output layer is stepped within the backward pass.

That layer, N x H, is most of a model. Its gradient is the product of a (t + 1, N) and a (t + 1, H) factor and need
never exist: one pass over weight and moments gives the hidden vectors' gradients for all tasks and applies Adam.
"""

from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .errors import InputError
from .model import HyperMask

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
        if gradient == "factored" and not model.hypernet.factored:
            raise InputError("a chunked hypernetwork has no factored gradient: use gradient='auto' or 'dense'")
        super().__init__(model.parameters(), lr=lr, betas=betas, eps=eps, fused=True, capturable=capturable)
        self.factored = model.hypernet.factored and gradient != "dense"
        self.exact_loss = exact_loss
        self._layer: nn.Linear = model.hypernet.output
        self._embeddings, self._tasks = model.hypernet.embeddings, model.hypernet.tasks
        self._task = -1  # whose embedding was last seen to be among the Parameters
        self._lr: tuple[tuple, Tensor] | None = None
        self._stepped = False
        self._replaced = False
        model.hypernet.step_with(self if self.factored else None)

    def replaced(self) -> None:
        """Called by the hypernetwork when a newer optimiser takes over."""
        self._replaced = True

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
        """The backward pass of the output layer, as `hypernet.OutputStepper` promises it."""
        if self._stepped:
            raise InputError(
                "a second backward pass before optimizer.step(): make one mask per step, mask = model.mask(task), for "
                "both model(x, mask) and model.regularizer(mask), or use gradient='dense' to accumulate"
            )
        self._check_embedding(self._tasks()[len(hidden) - 1])
        self._stepped = True
        weight, bias = self._layer.weight, self._layer.bias
        state, bias_state = self._state_of(weight), self._state_of(bias)
        for step in (state["step"], bias_state["step"]):
            step.add_(1)
        group = self.param_groups[0]
        beta1, beta2 = group["betas"]
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
            beta1,
            beta2,
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

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        """The same entries as torch.optim.Adam's, so that a state_dict serves either."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state
