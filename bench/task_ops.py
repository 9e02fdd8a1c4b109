"""Many tasks in one batch: the task is unknown, so all are tried; or every row brings its own. permuted-mnist's MLP.

Logits and thresholds are at hand in every contender but those that generate them per call: "loop, masks generated per
call", and "ours, the model", which is the call a user makes. Nothing is dropped (p = 0), as in the preset.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hypermask_fast import HyperMask, HypernetConfig, ops
from hypermask_fast.ops import reference
from hypermask_fast.training.targets import MLP

from .case import OURS, Case
from .op_run import OpRun, Results, by_backend, compiled, uniform

LOOP, MASKS_READY, PER_CALL = "loop over tasks", "loop, W*m made before", "loop, masks generated per call"
COMPILED = "torch.compile"  # of the loop, which all rows pass under every task
CAPTURED, MODEL, MODEL_READY = "ours captured", "ours, the model", "ours, the model, masks made before"
_WIDTH = 100  # of the hypernetwork's last hidden layer
Forward = Callable[[Tensor], Tensor]


@dataclass
class _Network:
    """An MLP's weights, every task's logits and thresholds, and the dense hypernetwork layer that gives the logits."""

    weights: list[Tensor]  # (out, in)
    biases: list[Tensor]
    logits: list[Tensor]  # (T, out, in)
    thresholds: list[Tensor]  # (T,)
    hidden: Tensor  # (T, H)
    layer: list[Tensor] | None  # (out * in, H) each, for who generates the logits

    @classmethod
    def of(
        cls, widths: tuple[int, ...], tasks: int, device: torch.device, dtype: torch.dtype, contender: str
    ) -> "_Network":
        stored = torch.float64 if contender == "reference" else dtype

        def rounded(*shape: int, scale: float, seed: int) -> Tensor:
            return uniform(*shape, low=-scale, high=scale, seed=seed, device=device).to(dtype).to(stored)

        hidden = rounded(tasks, _WIDTH, scale=1.0, seed=1).abs()  # as they are after an elu, so that they pass one
        weights, biases, logits, layer = [], [], [], []
        for s, (inputs, outputs) in enumerate(pairwise(widths)):
            weights.append(rounded(outputs, inputs, scale=(3 / inputs) ** 0.5, seed=10 + s))
            biases.append(rounded(outputs, scale=0.1, seed=20 + s))
            made = rounded(outputs * inputs, _WIDTH, scale=0.2, seed=30 + s)
            # Logits are part of the input: generated in float32 once, so that every contender has the same.
            values = (hidden.float() @ made.float().t()).to(dtype).to(stored)
            logits.append(values.view(tasks, outputs, inputs))
            layer.append(made)
        limits = [torch.zeros(tasks, device=device, dtype=stored) for _ in weights]
        generates = contender == PER_CALL or contender.startswith(MODEL)
        return cls(weights, biases, logits, limits, hidden, layer if generates else None)

    @property
    def tasks(self) -> int:
        return len(self.hidden)

    def masked(self, task: int) -> list[Tensor]:
        """W * m of every layer for one task, from the logits."""
        rows = zip(self.weights, self.logits, self.thresholds, strict=True)
        return [w * reference.semi_binary_mask(a[task], limit[task]) for w, a, limit in rows]

    def generated(self, task: int) -> list[Tensor]:
        """The same from the hypernetwork's layer: what a call costs that keeps no masks."""
        masked = []
        for weight, layer, limits in zip(self.weights, self.layer, self.thresholds, strict=True):
            logits = (layer @ self.hidden[task]).view_as(weight)
            masked.append(weight * reference.semi_binary_mask(logits, limits[task]))
        return masked

    @torch.no_grad()
    def model(self) -> HyperMask:
        """The same as a user of the library has it: float32 Parameters and a hypernetwork that gives these logits."""
        width = self.hidden.shape[1]
        with self.hidden.device:
            net = MLP(self.weights[0].shape[1], [w.shape[0] for w in self.weights[:-1]], self.weights[-1].shape[0])
            model = HyperMask(net, self.tasks, 0.0, HypernetConfig(width, (width,)), exclude=["*.bias"]).eval()
        layers = [module for module in net if isinstance(module, nn.Linear)]
        for layer, weight, bias in zip(layers, self.weights, self.biases, strict=True):
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
        for embedding, hidden in zip(model.hypernet.embeddings, self.hidden, strict=True):
            embedding.copy_(hidden)
        (trunk,), output = model.hypernet.trunk, model.hypernet.output
        trunk.weight.copy_(torch.eye(width))
        output.weight.copy_(torch.cat(self.layer))
        for layer in (trunk, output):
            layer.bias.zero_()
        return model

    def forward(self, x: Tensor, masked: list[Tensor]) -> Tensor:
        for i, (weight, bias) in enumerate(zip(masked, self.biases, strict=True)):
            x = F.linear(x if i == 0 else F.relu(x), weight, bias)
        return x

    def batched(self, x: Tensor, task_ids: Tensor | None) -> Tensor:
        """All layers by the library's kernel: (T, B, classes), with task_ids (B, classes)."""
        layer = by_backend("task_batched_linear", "triton")
        for i, rows in enumerate(zip(self.weights, self.logits, self.thresholds, self.biases, strict=True)):
            weight, logits, limits, bias = rows
            x = layer(x if i == 0 else F.relu(x), weight, logits, limits, task_ids, bias)
        return x


def cases(quick: bool, dtype: torch.dtype = torch.bfloat16) -> list[Case]:
    """dtype: of the inputs; another one only to see that everything runs where there is no GPU."""
    widths = (40, 24, 20, 10) if quick else (1024, 1000, 1000, 10)
    tasks = 3 if quick else 10
    return [
        all_tasks(widths, tasks, 12 if quick else 1000, dtype),
        mixed_tasks(widths, tasks, 12 if quick else 256, dtype),
    ]


def _sizes(widths: tuple[int, ...]) -> int:
    return sum(a * b for a, b in pairwise(widths))


def _masked(contender: str, network: _Network) -> Callable[[int], list[Tensor]]:
    """Task -> W * m of every layer, as a loop over tasks gets them."""
    if contender == MASKS_READY:
        return [network.masked(task) for task in range(network.tasks)].__getitem__
    return network.generated if contender == PER_CALL else network.masked


def _under_every_task(contender: str, network: _Network) -> Forward:
    """x (B, inputs) -> (T, B, classes)."""
    if contender in (OURS, CAPTURED):
        return lambda x: network.batched(x, None)
    if contender.startswith(MODEL):
        model = network.model()
        with torch.no_grad():
            masks = model.all_masks() if contender == MODEL_READY else None
        return lambda x: model.forward_all_tasks(x, masks=masks)
    masked = _masked(contender, network)
    return lambda x: torch.stack([network.forward(x, masked(task)) for task in range(network.tasks)])


def _under_own_task(contender: str, network: _Network, ids: Tensor) -> Forward:
    """x (B, inputs) -> (B, classes), row i under task ids[i]."""
    if contender in (OURS, CAPTURED):
        return lambda x: network.batched(x, ids)
    if contender == MODEL:
        model = network.model()
        return lambda x: model(x, task=ids)
    if contender == COMPILED:  # no sizes that depend on ids: a graph without a wait for the device
        every, rows = _under_every_task(contender, network), torch.arange(len(ids), device=ids.device)
        return lambda x: every(x)[ids, rows]
    masked = _masked(contender, network)

    def looped(x: Tensor) -> Tensor:
        y = x.new_empty(len(ids), network.weights[-1].shape[0])
        for task in range(network.tasks):
            rows = (ids == task).nonzero().flatten()
            y[rows] = network.forward(x[rows], masked(task))
        return y

    return looped


def _select(contender: str) -> Forward:
    """(T, B, classes) -> (B,), each row's task of lowest entropy."""
    if contender in (OURS, CAPTURED):
        return by_backend("entropy_select", "triton")
    return ops.entropy_select if contender.startswith(MODEL) else reference.entropy_select


def _run(contender: str, function: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor) -> OpRun:
    """Calls without gradients, of which the gate sees the first result; the model's in float32 under autocast."""
    if contender == COMPILED:
        function = compiled(function)
    mixed = contender.startswith(MODEL) and x.dtype == torch.bfloat16
    x = x.float() if contender.startswith(MODEL) else x

    def call() -> Results:
        with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16) if mixed else nullcontext():
            return {"y": function(x)[0]}

    return OpRun([call], graph=contender == CAPTURED)


def all_tasks(widths: tuple[int, ...], tasks: int, batch: int, dtype: torch.dtype) -> Case:
    """Every task's masked network over one batch, and each row's task of lowest entropy."""

    def build(contender: str, device: torch.device) -> OpRun:
        network = _Network.of(widths, tasks, device, dtype, contender)
        x = uniform(batch, widths[0], seed=2, device=device).to(dtype).to(network.hidden.dtype)
        forward, select = _under_every_task(contender, network), _select(contender)

        def function(x: Tensor) -> tuple[Tensor, ...]:
            logits = forward(x)
            return logits, select(logits)  # part of the time; near ties make it no good for the gate

        return _run(contender, function, x)

    size = _sizes(widths)
    floor = (2.0 * (size * (tasks + 1) + batch * widths[0]), 2.0 * tasks * batch * size)
    contenders = (OURS, CAPTURED, MODEL, MODEL_READY, LOOP, MASKS_READY, PER_CALL, COMPILED)
    return _case("all_tasks", f"{tasks} tasks, batch {batch}, MLP {widths}", contenders, build, floor, dtype)


def mixed_tasks(widths: tuple[int, ...], tasks: int, batch: int, dtype: torch.dtype) -> Case:
    """Rows of one batch, each with its own task."""

    def build(contender: str, device: torch.device) -> OpRun:
        network = _Network.of(widths, tasks, device, dtype, contender)
        x = uniform(batch, widths[0], seed=2, device=device).to(dtype).to(network.hidden.dtype)
        ids = torch.randint(tasks, (batch,), generator=torch.Generator().manual_seed(3)).to(device)
        forward = _under_own_task(contender, network, ids)
        return _run(contender, lambda x: (forward(x),), x)

    size = _sizes(widths)
    floor = (2.0 * (size * (tasks + 1) + batch * widths[0]), 2.0 * batch * size)
    contenders = (OURS, CAPTURED, MODEL, LOOP, MASKS_READY, PER_CALL, COMPILED)
    return _case("mixed_tasks", f"{batch} rows of {tasks} tasks, MLP {widths}", contenders, build, floor, dtype)


def _case(
    name: str,
    shapes: str,
    contenders: tuple[str, ...],
    build: Callable,
    floor: tuple[float, float],
    dtype: torch.dtype,
) -> Case:
    return Case(
        name=name,
        experiment=name,
        task=None,
        shapes=shapes,
        contenders=contenders,
        build=build,
        floor=lambda: floor,
        tolerance=lambda tensor: 2e-2,
        dtype=str(dtype).removeprefix("torch."),
    )
