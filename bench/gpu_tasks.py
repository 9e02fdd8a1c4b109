"""Many tasks in one batch: the task is unknown, so all are tried; or every row brings its own. permuted-mnist's MLP."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from hypermask_fast import reference

from .case import OURS, Case
from .op_run import OpRun, Results, uniform

LOOP, MASKS_READY, PER_CALL = "loop over tasks", "loop, W*m made before", "loop, masks generated per call"
DTYPE = torch.bfloat16
_WIDTH = 100  # of the hypernetwork's last hidden layer


@dataclass
class _Network:
    """An MLP's weights, every task's logits and thresholds, and the dense hypernetwork layer that gives the logits."""

    weights: list[Tensor]  # (out, in)
    biases: list[Tensor]
    logits: list[Tensor]  # (T, out, in)
    thresholds: list[Tensor]  # (T,)
    hidden: Tensor  # (T, H)
    layer: list[Tensor] | None  # (out * in, H) each

    @classmethod
    def of(cls, widths: tuple[int, ...], tasks: int, device: torch.device, contender: str) -> "_Network":
        dtype = torch.float64 if contender == "reference" else DTYPE

        def rounded(*shape: int, scale: float, seed: int) -> Tensor:
            return uniform(*shape, low=-scale, high=scale, seed=seed, device=device).to(DTYPE).to(dtype)

        hidden = rounded(tasks, _WIDTH, scale=1.0, seed=1)
        weights, biases, logits, layer = [], [], [], []
        for s, (inputs, outputs) in enumerate(pairwise(widths)):
            weights.append(rounded(outputs, inputs, scale=(3 / inputs) ** 0.5, seed=10 + s))
            biases.append(rounded(outputs, scale=0.1, seed=20 + s))
            made = rounded(outputs * inputs, _WIDTH, scale=0.2, seed=30 + s)
            # Logits are part of the input: generated in float32 once, so that every contender has the same.
            values = (hidden.float() @ made.float().t()).to(DTYPE).to(dtype)
            logits.append(values.view(tasks, outputs, inputs))
            layer.append(made)
        limits = [torch.full((tasks,), 0.5, device=device, dtype=dtype) for _ in weights]
        return cls(weights, biases, logits, limits, hidden, layer if contender == PER_CALL else None)

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

    def forward(self, x: Tensor, masked: list[Tensor]) -> Tensor:
        for i, (weight, bias) in enumerate(zip(masked, self.biases, strict=True)):
            x = F.linear(x if i == 0 else F.relu(x), weight, bias)
        return x

    def batched(self, x: Tensor, task_ids: Tensor | None) -> Tensor:
        """All layers by the library's kernel: (T, B, classes), with task_ids (B, classes)."""
        from .gpu_cases import kernels

        layer = kernels().task_batched_linear
        for i, rows in enumerate(zip(self.weights, self.logits, self.thresholds, self.biases, strict=True)):
            weight, logits, limits, bias = rows
            x = layer(x if i == 0 else F.relu(x), weight, logits, limits, task_ids, bias)
        return x


def task_cases(quick: bool) -> list[Case]:
    widths = (40, 24, 20, 10) if quick else (1024, 1000, 1000, 10)
    tasks = 3 if quick else 10
    return [all_tasks(widths, tasks, 12 if quick else 1000), mixed_tasks(widths, tasks, 12 if quick else 256)]


def _sizes(widths: tuple[int, ...]) -> int:
    return sum(a * b for a, b in pairwise(widths))


def all_tasks(widths: tuple[int, ...], tasks: int, batch: int) -> Case:
    """Every task's masked network over one batch, and each row's task of lowest entropy."""

    def build(contender: str, device: torch.device) -> OpRun:
        network = _Network.of(widths, tasks, device, contender)
        x = uniform(batch, widths[0], seed=2, device=device).to(DTYPE).to(network.hidden.dtype)
        ready = [network.masked(task) for task in range(tasks)] if contender == MASKS_READY else []
        select = reference.entropy_select
        if contender.startswith(OURS):
            from .gpu_cases import kernels

            select = kernels().entropy_select

        def outputs() -> Tensor:
            if contender.startswith(OURS):
                return network.batched(x, None)
            masks: Callable[[int], list[Tensor]] = {PER_CALL: network.generated, MASKS_READY: ready.__getitem__}.get(
                contender, network.masked
            )
            return torch.stack([network.forward(x, masks(task)) for task in range(tasks)])

        def call() -> Results:
            with torch.no_grad():
                logits = outputs()
                select(logits)  # part of the time; near ties make it no good for the gate
            return {"logits": logits}

        return OpRun([call], graph=contender.endswith("captured"))

    size = _sizes(widths)
    floor = (2.0 * (size * (tasks + 1) + batch * widths[0]), 2.0 * tasks * batch * size)
    contenders = (OURS, "ours captured", LOOP, MASKS_READY, PER_CALL)
    return _case("all_tasks", f"{tasks} tasks, batch {batch}, MLP {widths}", contenders, build, floor)


def mixed_tasks(widths: tuple[int, ...], tasks: int, batch: int) -> Case:
    """Rows of one batch, each with its own task."""

    def build(contender: str, device: torch.device) -> OpRun:
        network = _Network.of(widths, tasks, device, contender)
        x = uniform(batch, widths[0], seed=2, device=device).to(DTYPE).to(network.hidden.dtype)
        ids = torch.randint(tasks, (batch,), generator=torch.Generator().manual_seed(3)).to(device)
        ready = [network.masked(task) for task in range(tasks)] if contender == MASKS_READY else None

        def looped() -> Tensor:
            y = x.new_empty(batch, widths[-1])
            for task in range(tasks):
                rows = (ids == task).nonzero().flatten()
                y[rows] = network.forward(x[rows], ready[task] if ready else network.masked(task))
            return y

        def call() -> Results:
            with torch.no_grad():
                return {"y": network.batched(x, ids) if contender.startswith(OURS) else looped()}

        return OpRun([call], graph=contender.endswith("captured"))

    size = _sizes(widths)
    floor = (2.0 * (size * (tasks + 1) + batch * widths[0]), 2.0 * batch * size)
    contenders = (OURS, "ours captured", LOOP, MASKS_READY)
    return _case("mixed_tasks", f"{batch} rows of {tasks} tasks, MLP {widths}", contenders, build, floor)


def _case(name: str, shapes: str, contenders: tuple[str, ...], build: Callable, floor: tuple[float, float]) -> Case:
    return Case(
        name=name,
        experiment=name,
        task=None,
        shapes=shapes,
        contenders=contenders,
        build=build,
        floor=lambda: floor,
        # Generated again per call, a logit in bfloat16 may fall on the threshold's other side.
        tolerance=lambda tensor: 5e-2,
        dtype="bfloat16",
    )
