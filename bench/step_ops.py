"""Ops of a training step: thresholds, masked weights, drifts, and the one-pass backward and Adam. CPU and GPU."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from hypermask_fast import ops
from hypermask_fast.ops import kept_rank, reference

from .case import OURS, Case, Unavailable
from .experiments import BLOCK, Experiment
from .op_run import OpRun, Results, gradients, sets, uniform

PYTORCH = "PyTorch"
# What a machine's memory gives right then: the arrays that `hypernet_adam` changes, each read and written once.
PLAIN_PASS = {"cpu": "pass in place", "cuda": "copy"}


def cases(experiments: dict[str, Experiment], device: torch.device, quick: bool) -> list[Case]:
    permuted = experiments["permuted-mnist"]
    earlier = permuted.tasks - 1
    return [
        thresholds(3001 if quick else 2_000_000),
        masked_weights(permuted),
        weight_drift(permuted),
        output_drift(permuted, earlier),
        hypernet_adam(permuted, 1, PLAIN_PASS[device.type]),
        hypernet_adam(permuted, 10, PLAIN_PASS[device.type]),
    ]


def thresholds(size: int) -> Case:
    """Exact selection over one segment, p = 30."""
    rank = kept_rank(30, size)

    def build(contender: str, device: torch.device) -> OpRun:
        many = [uniform(size, low=-3, high=3, seed=k, device=device) for k in range(sets(4 * size, device))]
        ranks = torch.tensor([rank], device=device)
        if contender == "numpy.percentile" and device.type != "cpu":
            raise Unavailable("numpy works on the CPU")
        functions: dict[str, Callable[[Tensor], Tensor]] = {
            "reference": lambda logits: reference.mask_thresholds(logits.double(), (0, size), ranks),
            OURS: lambda logits: ops.mask_thresholds(logits, (0, size), ranks),
            "torch.sort": lambda logits: logits.abs().sort().values[rank],
            "torch.kthvalue": lambda logits: logits.abs().kthvalue(rank + 1).values,
            "torch.topk": lambda logits: logits.abs().topk(rank + 1, largest=False, sorted=False).values.max(),
            "numpy.percentile": lambda logits: torch.from_numpy(
                np.percentile(logits.abs().numpy(), 30, method="higher", keepdims=True)
            ),
        }

        def call(logits: Tensor) -> Results:
            return {"threshold": functions[contender](logits)}

        return OpRun([partial(call, logits) for logits in many], graph=contender != "reference")

    return Case(
        name="thresholds",
        experiment="thresholds",
        task=None,
        shapes=f"{size} entries, p 30",
        contenders=(OURS, "torch.sort", "numpy.percentile", "torch.kthvalue", "torch.topk"),
        build=build,
        floor=lambda: (4.0 * size, 0.0),
        tolerance=lambda name: 1e-6,
    )


@dataclass
class _Target:
    """Target weights, logits and what belongs to them, of a whole network."""

    weights: list[Tensor]
    previous: Tensor
    logits: Tensor
    thresholds: Tensor
    offsets: tuple[int, ...]

    @classmethod
    def of(cls, experiment: Experiment, contender: str, device: torch.device, number: int) -> "_Target":
        layout = experiment.layout()
        dtype = torch.float64 if contender == "reference" else torch.float32
        logits = uniform(layout.size, low=-2, high=2, seed=10 * number + 1, device=device).to(dtype)
        previous = uniform(layout.size, low=-0.1, high=0.1, seed=10 * number + 2, device=device).to(dtype)
        moved = previous + uniform(layout.size, low=-0.01, high=0.01, seed=10 * number + 3, device=device).to(dtype)
        weights = [view.clone().requires_grad_() for view in layout.views(moved)]
        limits = torch.full((len(layout.segments),), 0.5, device=device, dtype=dtype)
        return cls(weights, previous, logits.requires_grad_(), limits, layout.offsets)

    def leaves(self) -> dict[str, Tensor]:
        return {f"weight.{s}": w for s, w in enumerate(self.weights)} | {"logits": self.logits}


def _module(contender: str):
    return ops if contender == OURS else reference


def _targets(experiment: Experiment, contender: str, device: torch.device) -> list[_Target]:
    count = 1 if contender == "reference" else sets(12 * experiment.layout().size, device)
    return [_Target.of(experiment, contender, device, number) for number in range(count)]


def masked_weights(experiment: Experiment) -> Case:
    """W * m of all layers, forward and backward."""
    size = experiment.layout().size

    def build(contender: str, device: torch.device) -> OpRun:
        targets = _targets(experiment, contender, device)
        weights = targets[0].weights
        outputs = [uniform(w.numel(), seed=4 + s, device=device).to(w).view_as(w) for s, w in enumerate(weights)]

        def call(target: _Target) -> Results:
            made = _module(contender).masked_weights(target.weights, target.logits, target.thresholds, target.offsets)
            leaves = target.leaves()
            found = torch.autograd.grad(made, list(leaves.values()), outputs)
            named = {f"masked.{s}": m for s, m in enumerate(made)}
            return named | {f"grad/{name}": g for name, g in zip(leaves, found, strict=True)}

        return OpRun([partial(call, target) for target in targets], graph=contender != "reference")

    # Forward: W and logits read, product written; backward: gradient, W and logits read, both gradients written.
    floor = (4.0 * 8 * size, 0.0)
    return _op("masked_weights", f"N {size}, forward and backward", build, lambda: floor)


def weight_drift(experiment: Experiment) -> Case:
    """D, 1-norm with the mask, forward and backward."""
    size = experiment.layout().size

    def build(contender: str, device: torch.device) -> OpRun:
        targets = _targets(experiment, contender, device)

        def call(target: _Target) -> Results:
            value = _module(contender).weight_drift(
                target.weights, target.previous, target.offsets, 1, target.logits, target.thresholds
            )
            return {"drift": value} | gradients(value, target.leaves())

        return OpRun([partial(call, target) for target in targets], graph=contender != "reference")

    # Forward: W, W_prev and logits read; backward: the same, both gradients written.
    floor = (4.0 * 8 * size, 0.0)
    return _op("weight_drift", f"N {size}, 1-norm, masked, forward and backward", build, lambda: floor)


def output_drift(experiment: Experiment, tasks: int) -> Case:
    """R over the earlier tasks with the layer's dense gradient, forward and backward."""
    size, width = experiment.layout().size, experiment.config.hypernet.hidden[-1]

    def build(contender: str, device: torch.device) -> OpRun:
        dtype = torch.float64 if contender == "reference" else torch.float32
        hidden = uniform(tasks, 1, width, seed=1, device=device).to(dtype).requires_grad_()
        weight = uniform(size, width, low=-0.1, high=0.1, seed=2, device=device).to(dtype).requires_grad_()
        bias = uniform(size, low=-0.1, high=0.1, seed=3, device=device).to(dtype).requires_grad_()
        targets = uniform(tasks, size, seed=4, device=device).to(dtype)

        def call() -> Results:
            value = _module(contender).output_drift(hidden, weight, bias, targets)
            return {"drift": value} | gradients(value, {"hidden": hidden, "weight": weight, "bias": bias})

        return OpRun([call])

    # Forward: layer and targets read; backward: the same, the layer's gradient written.
    floor = (4.0 * (3 * size * (width + 1) + 2 * tasks * size), 6.0 * size * width * tasks)
    return _op("output_drift", f"{size} x {width}, {tasks} tasks, forward and backward", build, lambda: floor)


def hypernet_adam(experiment: Experiment, tasks: int, plain_pass: str) -> Case:
    """Backward of the dense output layer for `tasks` tasks and its Adam step; one of `PLAIN_PASS` beside it."""
    size, width = experiment.layout().size, experiment.config.hypernet.hidden[-1]

    def build(contender: str, device: torch.device) -> OpRun:
        inputs = _adam_inputs(size, width, tasks, device)
        return OpRun([(_plain_pass if contender == plain_pass else _adam_call)(contender, inputs)])

    moved = 4.0 * (6 * size * (width + 1) + tasks * size)
    work = 6.0 * size * width * tasks
    shapes = f"{size} x {width}, {tasks} task{'s' if tasks > 1 else ''}"
    return _op(f"hypernet_adam/{tasks}", shapes, build, lambda: (moved, work), plain_pass)


def _adam_inputs(size: int, width: int, tasks: int, device: torch.device) -> list[Tensor]:
    """In the order of `reference.hypernet_adam`."""

    made = partial(uniform, device=device)

    def moments(*shape: int) -> list[Tensor]:
        return [made(*shape, low=-1e-3, high=1e-3, seed=7), made(*shape, low=0, high=1e-6, seed=8)]

    weight_m, weight_v = moments(size, width)
    bias_m, bias_v = moments(size)
    weight, bias = (made(*s, low=-0.1, high=0.1, seed=5) for s in ((size, width), (size,)))
    inputs = [made(tasks, width, seed=1), made(size, low=-1e-3, high=1e-3, seed=2), made(tasks - 1, size)]
    inputs += [torch.tensor(1e-3), weight, bias, weight_m, weight_v, bias_m, bias_v]
    inputs += [torch.tensor(100.0), torch.tensor(1e-3)]
    return [tensor.to(device) for tensor in inputs]


def _adam_call(contender: str, inputs: list[Tensor]) -> Callable[[], Results]:
    functions = {OURS: ops.hypernet_adam, "reference": _adam_in_float64, PYTORCH: _adam_by_fused_step}
    names = ("weight", "bias", "weight_m", "weight_v", "bias_m", "bias_v")

    def call() -> Results:
        hidden_grad, drift = functions[contender](*inputs)
        return {"hidden_grad": hidden_grad, "drift": drift} | dict(zip(names, inputs[4:10], strict=True))

    return call


def _plain_pass(contender: str, inputs: list[Tensor]) -> Callable[[], Results]:
    """Weight, bias and their moments in place, or copied to others: as many bytes read and written either way."""
    changed = inputs[4:10]
    copies = [torch.empty_like(tensor) for tensor in changed] if contender == PLAIN_PASS["cuda"] else None

    def call() -> Results:
        if copies is None:
            for tensor in changed:
                tensor.neg_()
        else:
            for copy, tensor in zip(copies, changed, strict=True):
                copy.copy_(tensor)
        return {}

    return call


def _adam_in_float64(
    hidden: Tensor, grad: Tensor, targets: Tensor, drift_weight: Tensor, *rest: Tensor
) -> tuple[Tensor, Tensor]:
    """The reference, some rows at a time: all of them in float64 would need several times the layer's memory."""
    *layer, step, lr = rest
    total_grad, total = torch.zeros_like(hidden, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    total_grad, total = total_grad.to(hidden.device), total.to(hidden.device)
    rows = max(1, BLOCK // hidden.shape[1])
    for start in range(0, len(grad), rows):
        part = slice(start, start + rows)
        double = [tensor[part].double() for tensor in layer]
        hidden_grad, drift = reference.hypernet_adam(
            hidden.double(), grad[part].double(), targets[:, part].double(), drift_weight.double(), *double, step, lr
        )
        total_grad += hidden_grad
        total += drift
        for tensor, value in zip(layer, double, strict=True):
            tensor[part].copy_(value)
    return total_grad, total


def _adam_by_fused_step(
    hidden: Tensor,
    grad: Tensor,
    targets: Tensor,
    drift_weight: Tensor,
    weight: Tensor,
    bias: Tensor,
    weight_m: Tensor,
    weight_v: Tensor,
    bias_m: Tensor,
    bias_v: Tensor,
    step: Tensor,
    lr: Tensor,
) -> tuple[Tensor, Tensor]:
    """Matrix products and torch's fused Adam: what autograd and the optimiser do."""
    residual = torch.addmm(bias, hidden[:-1], weight.t()) - targets
    factors = torch.cat([2 * drift_weight * residual, grad[None]])
    hidden_grad = factors @ weight
    torch._fused_adam_(
        [weight, bias], [factors.t() @ hidden, factors.sum(0)], [weight_m, bias_m], [weight_v, bias_v], [],
        [step.clone(), step.clone()], lr=lr.item() if lr.device.type == "cpu" else lr, beta1=0.9, beta2=0.999,
        weight_decay=0.0, eps=1e-8, amsgrad=False, maximize=False,
    )  # fmt: skip
    return hidden_grad, residual.square().sum()


def _op(name: str, shapes: str, build: Callable, floor: Callable[[], tuple[float, float]], *rates: str) -> Case:
    """An op against the same in eager PyTorch, in float32; `rates`: contenders that show what the machine can do."""
    return Case(
        name=name,
        experiment=name,
        task=None,
        shapes=shapes,
        contenders=(OURS, PYTORCH, *rates),
        build=build,
        floor=floor,
        reference=lambda contender: "" if contender in rates else "reference",
        # The hidden vectors' gradient is a sum over N terms, which float32 matrix products add up in any order.
        tolerance=lambda tensor: 1e-4 if tensor == "hidden_grad" else 2e-5,
    )
