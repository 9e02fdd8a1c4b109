"""Ops of a training step: thresholds, masked weights, drifts, and the one-pass backward and Adam. CPU and GPU."""

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.adam import adam

from hypermask_fast import ops

from . import op_cases
from .case import OURS, Case, Unavailable
from .experiments import Experiment
from .op_case import BOTH, FORWARD, OpCase, case_of
from .op_run import OpRun

PYTORCH = "PyTorch"
# What a machine's memory gives right then: the arrays that `hypernet_adam` changes, each read and written once.
PLAIN_PASS = {"cpu": "pass in place", "cuda": "copy"}
# hypernet_adam's work with the factors kept between them.
IN_TWO_PASSES = op_cases.output_residuals, op_cases.hidden_gradient, op_cases.factored_adam
# As many tasks as make arithmetic decide on a GPU, where tensor cores then make the gradients: with and without these.
MANY_TASKS = 40, 100
WITHOUT_TENSOR_CORES = "multiply-adds"
# Calls of an eager op in a row on a GPU: its own Python, some 60 us a call, then passes while the device works.
EAGER_CALLS = 10


def cases(experiments: dict[str, Experiment], device: torch.device, quick: bool) -> list[Case]:
    permuted = experiments["permuted-mnist"]
    shapes, width = permuted.shapes(), permuted.config.hypernet.hidden[-1]
    size = sum(map(prod, shapes))
    return [
        thresholds(3001 if quick else 2_000_000),
        _against_pytorch(op_cases.masked_weights(shapes), BOTH),
        _against_pytorch(op_cases.weight_drift(shapes), BOTH),
        # Passes over the dense layer take longer than a launch.
        _against_pytorch(op_cases.output_drift(permuted.tasks - 1, size, width), BOTH, graph=False),
        hypernet_adam(1, size, width, PLAIN_PASS[device.type]),
        hypernet_adam(10, size, width, PLAIN_PASS[device.type]),
        *(_of_many_tasks(tasks, size, width) for tasks in MANY_TASKS if device.type == "cuda"),
        *(_against_pytorch(make(10, size, width), FORWARD, graph=False) for make in IN_TWO_PASSES),
    ]


def _against_pytorch(op_case: OpCase, direction: str, graph: bool = True) -> Case:
    contenders = {OURS: lambda: ops.OPS[op_case.op], PYTORCH: lambda: op_case.definition}
    case = case_of(op_case, op_case.op, contenders, direction, graph=graph)
    return case if graph else replace(case, build=_in_a_row(case.build))


def _in_a_row(build: Callable[[str, torch.device], OpRun]) -> Callable[[str, torch.device], OpRun]:
    """On a GPU its runs make `EAGER_CALLS` calls each."""

    def repeated(contender: str, device: torch.device) -> OpRun:
        run = build(contender, device)
        return run.repeated(EAGER_CALLS) if device.type == "cuda" else run

    return repeated


def thresholds(size: int) -> Case:
    """Exact selection over one segment, p = 30."""

    def selecting(select: Callable[[Tensor, int], Any]) -> Callable[..., Any]:
        rank = ops.kept_rank(30, size)
        return lambda logits, offsets, ranks: select(logits.abs(), rank)

    def by_percentile(magnitude: Tensor, rank: int) -> Tensor:
        if magnitude.is_cuda:
            raise Unavailable("numpy works on the CPU")
        return torch.from_numpy(np.percentile(magnitude.numpy(), 30, method="higher", keepdims=True))

    contenders = {
        OURS: lambda: ops.mask_thresholds,
        "torch.sort": lambda: selecting(lambda magnitude, rank: magnitude.sort().values[rank]),
        "numpy.percentile": lambda: selecting(by_percentile),
        "torch.kthvalue": lambda: selecting(lambda magnitude, rank: magnitude.kthvalue(rank + 1).values),
        "torch.topk": lambda: selecting(
            lambda magnitude, rank: magnitude.topk(rank + 1, largest=False, sorted=False).values.max()
        ),
    }
    return case_of(op_cases.mask_thresholds([size], 30), "thresholds", contenders, FORWARD)


def _of_many_tasks(tasks: int, size: int, width: int) -> Case:
    return hypernet_adam(tasks, size, width, PLAIN_PASS["cuda"], {WITHOUT_TENSOR_CORES: lambda: _without_tensor_cores})


def hypernet_adam(
    tasks: int, size: int, width: int, plain_pass: str, besides: Mapping[str, Callable[[], Callable]] | None = None
) -> Case:
    """Backward of the dense output layer for `tasks` tasks and its Adam step, and `besides` by other means; one of
    `PLAIN_PASS` beside it."""
    op_case = op_cases.hypernet_adam(tasks, size, width)
    contenders = {OURS: lambda: ops.hypernet_adam, PYTORCH: lambda: _adam_by_fused_step, **(besides or {})}
    case = case_of(op_case, f"hypernet_adam/{tasks}", contenders, FORWARD, graph=False)

    def build(contender: str, device: torch.device) -> OpRun:
        if contender != plain_pass:
            return case.build(contender, device)
        inputs = op_case.inputs(FORWARD, device, torch.float32)
        return OpRun([_plain_pass(contender, inputs[4:10])])

    return replace(
        case,
        contenders=(*case.contenders, plain_pass),
        build=_in_a_row(build),
        reference=lambda contender: "" if contender == plain_pass else "reference",
    )


def _without_tensor_cores(*args: Any) -> tuple[Tensor, Tensor]:
    os.environ["HYPERMASK_TENSOR_TASKS"] = "1000000"  # the kernel is chosen as it is launched
    try:
        return ops.hypernet_adam(*args)
    finally:
        del os.environ["HYPERMASK_TENSOR_TASKS"]


def _plain_pass(contender: str, changed: tuple[Tensor, ...]) -> Callable[[], dict]:
    """Weight, bias and their moments in place, or copied to others: as many bytes read and written either way."""
    copies = [torch.empty_like(tensor) for tensor in changed] if contender == PLAIN_PASS["cuda"] else None

    def call() -> dict:
        if copies is None:
            for tensor in changed:
                tensor.neg_()
        else:
            for copy, tensor in zip(copies, changed, strict=True):
                copy.copy_(tensor)
        return {}

    return call


def _adam_by_fused_step(
    hidden: Tensor, grad: Tensor, targets: Tensor, drift_weight: Tensor, weight: Tensor, bias: Tensor,
    weight_m: Tensor, weight_v: Tensor, bias_m: Tensor, bias_v: Tensor, step: Tensor, lr: Tensor,
    beta1: float, beta2: float, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Matrix products and torch's fused Adam: what autograd and the optimiser do."""
    residual = torch.addmm(bias, hidden[:-1], weight.t()) - targets
    factors = torch.cat([2 * drift_weight * residual, grad[None]])
    hidden_grad = factors @ weight
    adam(
        [weight, bias], [factors.t() @ hidden, factors.sum(0)], [weight_m, bias_m], [weight_v, bias_v], [],
        [step - 1, step - 1],  # which it counts up first
        fused=True, amsgrad=False, beta1=beta1, beta2=beta2, lr=lr.item() if lr.device.type == "cpu" else lr,
        weight_decay=0.0, eps=eps, maximize=False,
    )  # fmt: skip
    return hidden_grad, residual.square().sum()
