"""Training data of tasks, in whatever form they are at hand, as batches."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

from ..checks import check_whole
from ..data import Scenario, Split
from ..errors import InputError
from .features import TaskModel

Data = Split | tuple[Tensor, Tensor] | Iterable[tuple[Any, Tensor]]
TasksData = Scenario | Mapping[int, Data] | Sequence[Data]


@contextmanager
def evaluating(model: TaskModel) -> Iterator[None]:
    """In evaluation mode; afterwards, after an error too, every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def by_task(model: TaskModel, data: TasksData, part: str = "train") -> dict[int, Data]:
    """Task -> its data, of a Scenario that part. Raises InputError: none, a task that the model lacks, no such form."""
    if isinstance(data, Scenario):
        found: dict[int, Data] = {t: getattr(task, part) for t, task in enumerate(data.tasks) if t in model.tasks}
    elif isinstance(data, Mapping):
        found = dict(data)
    elif isinstance(data, Sequence) and not isinstance(data, str):
        found = dict(enumerate(data))
    else:
        raise InputError(
            "data are a Scenario, a mapping {task: its data} or a list with one entry per task, not "
            f"{type(data).__name__}"
        )
    if not found:
        raise InputError("there is no task's data to fit")
    for task in found:
        if task not in model.tasks:
            raise InputError(f"data of task {task}: this model has tasks {', '.join(map(str, model.tasks))}")
    return found


def check_read_again(data: Mapping[int, Data]) -> None:
    """Raises InputError where a task's validation data can be read only once, such as a generator."""
    for task, of_task in data.items():
        if isinstance(of_task, Iterator):
            raise InputError(
                f"validation data of task {task} are a {type(of_task).__name__}, which can be read only once: give a "
                "list of batches, tensors or a DataLoader"
            )


def batches(data: Data, size: int, where: str) -> Iterator[tuple[tuple, dict[str, Any], Tensor]]:
    """The network's positional and named inputs, and (B,) int64 labels, batch by batch; empty batches are left out.

    Args:
        data: a `Split`, two tensors (inputs, labels), or an iterable of (inputs, labels) batches such as a DataLoader.
            Inputs: what the network takes, a tensor, a tuple of several, or a dict of named ones.
        size: samples per batch, of a Split or of tensors.
        where: "task 2", for messages.

    Raises:
        InputError: it is none of these, or labels are not (B,) int64 of 0 or more.
    """
    size = check_whole("batch_size", size, 1)
    if isinstance(data, Split):
        pairs: Iterable[Any] = data.chunks(size)
    elif isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], Tensor) and isinstance(data[1], Tensor):
        inputs, labels = cast("tuple[Tensor, Tensor]", data)
        if len(inputs) != len(labels):
            raise InputError(f"{where} has {len(inputs)} inputs and {len(labels)} labels")
        pairs = zip(inputs.split(size), labels.split(size), strict=True)
    elif isinstance(data, Iterable) and not isinstance(data, (str, Tensor)):
        pairs = data
    else:
        raise InputError(f"data of {where} are {type(data).__name__}, not a Split, (inputs, labels) or batches")
    for pair in pairs:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise InputError(f"a batch of {where} is (inputs, labels), not {type(pair).__name__}")
        x, y = pair
        if not isinstance(y, Tensor) or y.dtype != torch.int64 or y.dim() != 1 or (len(y) and y.min() < 0):
            kind = f"{y.dtype} of {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
            raise InputError(f"labels of {where} are (batch,) int64 of 0 or more, not {kind}")
        if len(y):
            inputs = tuple(x) if isinstance(x, (tuple, list)) else () if isinstance(x, Mapping) else (x,)
            yield inputs, dict(x) if isinstance(x, Mapping) else {}, y
