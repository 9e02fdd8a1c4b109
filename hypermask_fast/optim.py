"""Adam on factored gradients: the hypernetwork's output layer, most of a model, is stepped in one pass over it.

That layer's gradient, N x H, is the product of a (t + 1, N) and a (t + 1, H) factor. `FactoredGradient` keeps it so
from backward to step(), which forms each row of it while it steps the row.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import moments as kept
from . import ops
from .clipping import clip_grad_norm_
from .dense import HyperNetwork
from .errors import InputError
from .factored import FactoredGradient, Factors, SteppedGradient
from .ops.stepping import adam
from .output_layer import Pending
from .processes import Shards, local, placed_like
from .steppable import LayerNumbers, check_dense, count, hooks_of, hypermask_in, plain_step, steps_on_factors

__all__ = ["Adam", "AdamW", "FactoredGradient", "clip_grad_norm_"]

# PyTorch documents hooks for all optimisers, but not where they are kept.
_hooks: Any = import_module("torch.optim.optimizer")
_EVERYBODYS_HOOKS = _hooks._global_optimizer_pre_hooks, _hooks._global_optimizer_post_hooks  # noqa: SLF001


class Adam(torch.optim.Adam):
    """torch.optim.Adam over all Parameters of a HyperMask model: the same numbers in a fraction of the time.

    It is used as any optimiser is, in any loop: clipping, accumulation, a GradScaler, skipped steps, hooks, frozen
    parameters, closures and schedulers mean what they mean with torch.optim.Adam. `model.hypernet.output.weight.grad`
    is a `FactoredGradient`, which is a tensor. One mask per step, made by `model.mask(task)` and used for both the
    forward pass and the regulariser, spares generating it again:

        mask = model.mask(task)
        loss = F.cross_entropy(model(x, mask), y) + model.regularizer(mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    It holds for as long as it lives, or until a newer one for the same model takes its place. Masks made in evaluation
    mode (`model.eval()`) have ordinary gradients. Tasks are added by `model.add_task(optimizer)`.

    Args:
        model: a HyperMask, or a module with one in it (DistributedDataParallel's, say): all its Parameters are trained.
        lr, betas, eps, weight_decay, amsgrad, foreach, maximize, capturable, fused, decoupled_weight_decay: as in
            torch.optim.Adam; fused unless foreach is asked for. With amsgrad the output layer's gradient is made dense.
        params: the Parameters or groups of them to train, as torch.optim.Adam takes them, in place of all.
        moments: in which dtype both moments of the output layer's weight are kept, "float32" or "bfloat16": 8 bytes a
            weight in place of 12, and 20 that a step reads and writes in place of 28. Arithmetic is in float32. What is
            kept in bfloat16 is rounded up or down at random, in the mean to the value itself, so that small changes
            add up; the random bits follow from row, column and step. Everything else, the layer's bias too, has
            float32 moments.
        step_in_backward: step the output layer within `loss.backward()`, in one read less: for a loop with nothing
            between backward() and step(), and zero_grad() in each turn. What asks for the layer's gradient is refused
            then, a skipped step too. R, the output drift, is 0 in the loss until backward has filled it in
            (`model.drifts(mask).output`); its gradient is the same. Where that can't be done (frozen layer, hooks on
            it, amsgrad, a chunked hypernetwork, ...) the layer waits for step().

    Raises:
        InputError: no HyperMask model, float16 Parameters (in which Adam's eps is 0), differentiable=True, moments of
            another name, moments in bfloat16 with amsgrad or of a layer that is chunked or not float32, or an
            embedding whose gradients are sparse.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        params: Iterable[Any] | None = None,
        moments: str = "float32",
        step_in_backward: bool = False,
    ) -> None:
        self._model = hypermask_in(model, type(self).__name__)
        self._net: HyperNetwork = self._model.hypernet
        self.step_in_backward, self.moments = step_in_backward, moments
        kept.check(moments, self._net, amsgrad)
        if differentiable:
            raise InputError("differentiable=True: the output layer is stepped in place, use torch.optim.Adam for this")
        super().__init__(
            model.parameters() if params is None else params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            fused=not foreach if fused is None else fused,
            decoupled_weight_decay=decoupled_weight_decay,
        )
        check_dense(model, self.param_groups)
        self._begin()

    def _begin(self) -> None:
        """Takes the model's output layer over."""
        self._net = self._model.hypernet
        self._task = -1  # whose embedding was last seen to be among the Parameters
        self._numbers = LayerNumbers()
        self._armed, self._stepped, self._replaced = False, False, False
        self._pending: weakref.WeakSet[Pending] = weakref.WeakSet()
        self._one_count = False  # whether weight and bias are known to have been stepped as often
        self._step_supports_amp_scaling = False  # a GradScaler is to unscale the gradients before step()
        net, before = self._net, self._net.stepper
        if net.factored and self._group_of(net.output.weight) is not None:
            net.step_with(self)
        elif isinstance(before, Adam) and self._trains_some_of(before):  # an older one, whose place this one takes
            net.step_with(None)

    def __getstate__(self) -> dict[str, Any]:
        """The model goes along: a copy steps the copied model."""
        own = {"model": self._model, "step_in_backward": self.step_in_backward, "moments": self.moments}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        model, in_backward = state.pop("model", None), state.pop("step_in_backward", False)
        moments = state.pop("moments", "float32")
        super().__setstate__(state)
        self._one_count = False
        if model is not None:
            self._model, self.step_in_backward, self.moments = model, in_backward, moments
            self._begin()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        self._check_dtypes(self.param_groups[-1])

    @staticmethod
    def _check_dtypes(group: dict[str, Any]) -> None:
        if any(p.dtype == torch.float16 for p in group["params"]):
            raise InputError(
                "Adam's eps is 0 in float16, its quotients are not finite: keep float32 Parameters, use torch.autocast"
            )

    def replaced(self) -> None:
        """Called by the hypernetwork when a newer optimiser takes over."""
        self._replaced = True

    # -- what the hypernetwork asks in a backward pass: see `output_layer.OutputStepper` ------------------------------

    def check_task(self, task: int) -> None:
        """Raises InputError where the task was added without telling the optimiser."""
        if task == self._task:
            return
        first, embedding = self._net.embeddings[0], self._net.embeddings[task]
        if embedding.requires_grad and self._group_of(embedding) is None and self._group_of(first) is not None:
            raise InputError(
                f"the optimizer would not train task {task}, which is newer: add tasks by model.add_task(optimizer)"
            )
        self._task = task

    def announce(self, pending: Pending) -> None:
        self._pending.add(pending)

    def steps_now(self, pending: Pending) -> bool:
        """Whether the backward pass that calls this may step the layer. Raises InputError where it must not go on."""
        weight, bias = self._net.output.weight, self._net.output.bias
        group = self._group_of(weight)
        hooked = hooks_of(weight) or hooks_of(bias)
        if group is None or hooked or not bias.requires_grad or self._group_of(bias) is not group:
            return False
        if group["amsgrad"] or not steps_on_factors(weight, self.state.get(weight, {})) or not self._count_is_one():
            return False
        if self._net.processes is None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise InputError("step_in_backward in a group of processes: hmf.distributed.replicate(model) comes first")
        if self._stepped or any(other is not pending for other in self._pending):
            raise InputError(
                "step_in_backward, and a second backward pass before optimizer.step(), or a second mask with gradient: "
                "make one mask per step, mask = model.mask(task), for both model(x, mask) and model.regularizer(mask)"
            )
        if weight.grad is not None or not self._armed:
            raise InputError(
                "step_in_backward needs optimizer.zero_grad() before each backward pass: a loop of another optimizer "
                "would have the output layer stepped by this one"
            )
        return True

    def _count_is_one(self) -> bool:
        """Whether weight and bias have been stepped as often, so that one count serves both. Looked up, which on a GPU
        is a wait, when something may have changed it."""
        if not self._one_count:
            counts = [self.state.get(p, {}).get("step", 0) for p in self._net.output.parameters()]
            self._one_count = float(counts[0]) == float(counts[1])
        return self._one_count

    def step_output_layer(
        self, hidden: Tensor, grad_logits: Tensor, targets: Tensor, drift_weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The backward pass of the output layer with its step, as `output_layer.OutputStepper` promises it."""
        self._armed, self._stepped = False, True
        weight, bias = self._net.output.weight, self._net.output.bias
        group = self._group_of(weight)
        assert group is not None, "steps_now has seen it"
        state, bias_state = self._state_of(weight), self._state_of(bias)
        count((state["step"], bias_state["step"]))
        layer = local(weight)
        return ops.hypernet_adam(
            hidden,
            grad_logits,
            targets,
            drift_weight,
            layer,
            local(bias),
            local(state["exp_avg"]),
            local(state["exp_avg_sq"]),
            local(bias_state["exp_avg"]),
            local(bias_state["exp_avg_sq"]),
            *self._settings(group, state["step"], layer),
        )

    # -- the loop's own calls ---------------------------------------------------------------------------------------

    def zero_grad(self, set_to_none: bool = True) -> None:
        if self._stepped:
            raise InputError(
                "backward has stepped the output layer, but step() was not called: skipping a step, or two backward "
                "passes for one, needs step_in_backward=False"
            )
        if set_to_none:  # without the profiler's frame, which costs more than all else here
            for parameter in self._all_parameters():
                parameter.grad = None
        elif self._net.processes is None:
            super().zero_grad(set_to_none)
        else:  # one by one: a list that has DTensors has nothing else
            for parameter in self._all_parameters():
                if parameter.grad is not None:
                    local(parameter.grad.detach_().requires_grad_(False)).zero_()
        self._armed = True

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of Adam; returns what the closure does."""
        if self._watched():
            return self._step_with_hooks() if closure is None else self._step_with_hooks(closure)
        return self._step(closure)

    step.hooked = True  # pyright: ignore[reportFunctionMemberAccess]  # torch.optim would put them around each step

    def _watched(self) -> bool:
        """Whether there are hooks to be called around a step, or a profiler that is to see it."""
        hooks = self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks, *_EVERYBODYS_HOOKS
        return any(hooks) or torch.autograd._profiler_enabled()  # noqa: SLF001  # pyright: ignore

    def _step(self, closure: Callable[[], Any] | None = None) -> Any:
        if self._replaced:
            raise InputError("a newer hmf.optim.Adam has taken over this model: step that one")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._check_dtypes(group)
            if group["differentiable"]:
                raise InputError("differentiable=True in a parameter group: use torch.optim.Adam for this")
        weight = self._net.output.weight
        group = self._group_of(weight)
        kept.check(self.moments, self._net, group is not None and group["amsgrad"])
        grad, self._stepped = weight.grad, False
        with torch.no_grad():
            if grad is not None and isinstance(local(grad), SteppedGradient):
                weight.grad = grad = None  # it has served: nobody is to stumble over it between two steps
                plain_step(self)
                return loss
            self._one_count = False
            step_layer = self._step_of_layer(weight, grad)
            if step_layer is None:
                plain_step(self)
                return loss
            weight.grad = None
            try:
                plain_step(self)  # first, for it may refuse what it finds
            finally:
                weight.grad = grad
            step_layer()
        return loss

    _step_with_hooks = torch.optim.Optimizer.profile_hook_step(_step)

    def _step_of_layer(self, weight: Tensor, grad: Tensor | None) -> Callable[[], None] | None:
        """What steps the output layer's weight; None where that is torch.optim.Adam's, or it has no gradient."""
        group = self._group_of(weight)
        if grad is None or group is None:
            return None
        own = local(grad)
        factors: Factors | None = own.factors if isinstance(own, FactoredGradient) else None
        if factors is not None and not group["amsgrad"] and steps_on_factors(weight, self.state.get(weight, {})):
            return partial(self._step_layer, weight, group, partial(ops.factored_adam, *factors))
        if self.moments == "float32":
            return None
        dense = own.dense() if isinstance(own, FactoredGradient) else own
        # Moments that are rounded, which torch.optim.Adam can't.
        return partial(self._step_layer, weight, group, lambda w, m, v, *settings: adam(w, m, v, dense, *settings))

    def _step_layer(self, weight: Tensor, group: dict[str, Any], step: Callable[..., Any]) -> None:
        state, layer = self._state_of(weight), local(weight)
        state["step"].add_(1)
        moments = local(state["exp_avg"]), local(state["exp_avg_sq"])
        step(layer, *moments, *self._settings(group, state["step"], layer))

    def _init_group(  # pyright: ignore[reportIncompatibleMethodOverride]  # called by position
        self, group: dict[str, Any], *lists: list[Any]
    ) -> bool:
        """torch.optim.Adam's: the tensors that it steps. Of those that are sharded, the parts that are here."""
        has_complex = super()._init_group(group, *lists)
        for tensors in lists if self._net.processes is not None else ():
            tensors[:] = map(local, tensors)
        return has_complex

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """torch.optim.Adam's. Moments may be whole or in parts, wherever the model is sharded or not.

        Moments of the output layer that are kept in another dtype than here are converted, and a warning says so.

        Raises:
            InputError: moments of other shapes than the Parameters'.
        """
        kept.check_shapes(state_dict, self._all_parameters())
        super().load_state_dict(state_dict)
        weight = self._net.output.weight
        stored = kept.stored_dtype(state_dict, self._all_parameters(), weight)
        kept.convert(self.state.get(weight, {}), self._moments_dtype(weight), stored)
        for parameter in self._all_parameters():
            state = self.state.get(parameter, {})
            for name, value in state.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    state[name] = placed_like(value, parameter)

    # -- what both have in common -----------------------------------------------------------------------------------

    def _all_parameters(self) -> Iterator[Tensor]:
        for group in self.param_groups:
            yield from group["params"]

    def _trains_some_of(self, other: "Adam") -> bool:
        mine = {id(parameter) for parameter in self._all_parameters()}
        return any(id(parameter) in mine for group in other.param_groups for parameter in group["params"])

    def _group_of(self, parameter: Tensor) -> dict[str, Any] | None:
        for group in self.param_groups:
            for p in group["params"]:
                if p is parameter:
                    return group
        return None

    def _settings(self, group: dict[str, Any], step: Tensor, weight: Tensor) -> tuple[Any, ...]:
        """From `step` on, the arguments of `ops.factored_adam`."""
        processes = self._net.processes
        first_row = sum(processes.sizes[: processes.number]) if isinstance(processes, Shards) else 0
        return self._numbers.of(group, step, weight, first_row)

    def _moments_dtype(self, parameter: Tensor) -> torch.dtype:
        rounds = self.moments == "bfloat16" and parameter is self._net.output.weight
        return torch.bfloat16 if rounds else parameter.dtype

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        """The same entries as torch.optim.Adam's, so that a state_dict serves either."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            dtype = self._moments_dtype(parameter)
            state["exp_avg"] = torch.zeros_like(parameter, dtype=dtype)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=dtype)
        return state


class AdamW(Adam):
    """`Adam` with decoupled weight decay, w <- (1 - lr weight_decay) w, as torch.optim.AdamW; the same arguments."""

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(model, lr, betas, eps, weight_decay, amsgrad, decoupled_weight_decay=True, **settings)
