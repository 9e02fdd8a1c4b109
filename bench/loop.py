"""What the features of `loop_features` are made of."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hypermask_fast as hmf

TASKS = 3


@dataclass
class Loop:
    """What a feature works with. A feature may put another optimiser or model in place.

    Attributes:
        x, y: (STEPS, batch, ...) batches.
        kept: whatever a feature wants to keep from step to step.
    """

    model: hmf.HyperMask
    optimizer: torch.optim.Optimizer
    x: Tensor
    y: Tensor
    task: int = 0
    step: int = 0
    kept: dict[str, Any] = field(default_factory=dict)

    @property
    def weight(self) -> nn.Parameter:
        return self.model.hypernet.output.weight  # pyright: ignore[reportReturnType]

    def loss(self, rows: slice = slice(None), task: int | Tensor | None = None) -> Tensor:
        mask = self.model.mask(self.task if task is None else task)
        output = self.model(self.x[self.step][rows], mask)
        loss = F.cross_entropy(output, self.y[self.step][rows])
        return loss + self.model.regularizer(mask) if task is None or isinstance(task, Tensor) else loss

    def keep(self, name: str, make: Callable[[], Any]) -> Any:
        """Made once per task."""
        key = f"{name} of task {self.task}"
        if key not in self.kept:
            self.kept[key] = make()
        return self.kept[key]

    def backward(self) -> None:
        self.optimizer.zero_grad()
        self.loss().backward()


@dataclass(frozen=True)
class Feature:
    """One thing that people do.

    Attributes:
        step: makes one step.
        settings: of both optimisers; begin: called with the loop as each task begins, before its optimiser is made.
        after: called with the loop once its optimiser is there.
        waits: whether `step_in_backward` has to refuse it, or else gives the same numbers.
    """

    step: Callable[[Loop], None]
    settings: dict[str, Any] = field(default_factory=dict)
    begin: Callable[[Loop], None] = lambda loop: None
    after: Callable[[Loop], None] = lambda loop: None
    waits: bool = False


FEATURES: dict[str, Feature] = {}


def feature(name: str, **about: Any) -> Callable[[Callable[[Loop], None]], Callable[[Loop], None]]:
    def enter(step: Callable[[Loop], None]) -> Callable[[Loop], None]:
        FEATURES[name] = Feature(step, **about)
        return step

    return enter
