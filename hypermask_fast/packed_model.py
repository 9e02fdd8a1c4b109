"""Packed tasks that run: a network and their masks, without a hypernetwork."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InputError
from .masking import mixed
from .masking.cache import DEFAULT_BYTES, Counted, Entry, KeptMask, WeightCache
from .masking.masked_network import MaskedNetwork
from .masking.norms import OWN, TaskStatistics
from .packing import Packed


def load_packed(path: str | os.PathLike[str], net: nn.Module, cache_bytes: int = DEFAULT_BYTES) -> "PackedModel":
    """A file by `Packed.save`, ready to run: `load_packed("tasks.safetensors", net)(x, task=3)`.

    Args:
        net: a network like the one that was packed, on any device; it is changed in place and gets the weights.
        cache_bytes: how many bytes of W * m may be kept between passes; the task used least recently goes first.

    Raises:
        InputError: no such file, another kind of file or a damaged one, or another network: then the line names the
            first difference. The network is left as it was.
    """
    return PackedModel(Packed.load(path), net, cache_bytes, where=str(Path(path)))


class PackedModel(MaskedNetwork):
    """y = net(x; W * m_t) for the tasks in `packed`, in evaluation mode, from any number of threads.

    W * m of the tasks in use is kept, within `cache_bytes`.

    Attributes:
        packed: the masks.
        cache: what is kept.
    """

    def __init__(
        self, packed: Packed, net: nn.Module, cache_bytes: int = DEFAULT_BYTES, *, where: str = "the packed tasks"
    ) -> None:
        network = packed.network
        network.check(net, where)
        layout = network.layout(net)
        cache, needed = WeightCache(), 0
        for name, weight in packed.weights().items():
            needed += weight.nbytes
            if not net.get_parameter(name).is_floating_point():
                raise InputError(f"{name} is {net.get_parameter(name).dtype} in the network given")
        cache.resize(cache_bytes, needed)
        super().__init__(
            net,
            layout,
            len(packed.tasks),
            batch_statistics=network.batch_statistics,
            heads_named=True,
            classes=network.classes,
        )
        self.packed, self.cache = packed, cache
        try:
            self._fill(where)
        except InputError:
            self.unconvert()
            raise
        self.requires_grad_(False)
        self.eval()

    @property
    def tasks(self) -> tuple[int, ...]:
        """Ids of the tasks that are there."""
        return self.packed.tasks

    def train(self, mode: bool = True) -> "PackedModel":
        """See nn.Module.train. Raises InputError for training mode."""
        if mode:
            raise InputError("packed tasks are for evaluation: train the HyperMask model that they come from")
        super().train(False)
        return self

    def forward(self, *inputs: Any, task: int | Tensor | None = None, **kwargs: Any) -> Any:
        """net(*inputs, **kwargs) under the mask of `task`.

        Args:
            inputs, kwargs: what the network takes. Where `task` is not given by name, the last one of the inputs is it.
            task: an int or 0-dim int64 tensor, or an int64 tensor (batch,) with one task per sample.

        Raises:
            InputError: a task that is not there; a tensor that can be no task, or whose length is not the batch's.
        """
        if task is None:
            if not inputs:
                raise InputError("which task? model(x, task), or by name, model(x, task=0)")
            *inputs, task = inputs  # pyright: ignore[reportAssignmentType]
        self._check_network(tuple(inputs), kwargs)
        if isinstance(task, Tensor) and task.dim() == 1:
            count = mixed.samples(tuple(inputs), kwargs)
            if task.dtype != torch.int64 or len(task) != count:
                raise InputError(
                    f"one task per sample is an int64 tensor ({count},), not {task.dtype} of {tuple(task.shape)}"
                )
            if count:
                return self._group_by_group(tuple(inputs), kwargs, task, self._masks)
            task = self.tasks[0]  # an empty batch has outputs of the same form under every mask
        elif isinstance(task, Tensor):
            if task.dtype != torch.int64 or task.dim():
                raise InputError(
                    f"a task tensor is int64, 0-dim or one id per sample, not {task.dtype} of {tuple(task.shape)}"
                )
            task = int(task)
        (mask,) = self._masks([task])  # pyright: ignore[reportArgumentType]
        return self._through(mask, tuple(inputs), kwargs)

    def forward_all_tasks(self, *inputs: Any, **kwargs: Any) -> Any:
        """(tasks, batch, ...) outputs of every task on the same batch, in the order of `tasks`."""
        self._check_network(tuple(inputs), kwargs)
        return mixed.stacked([self._through(mask, tuple(inputs), kwargs) for mask in self._masks(self.tasks)])

    # -- inside ---------------------------------------------------------------------------------------------------

    def _masks(self, tasks: Iterable[int]) -> list[KeptMask]:
        """W * m of each of these tasks, from the cache or made."""
        tasks = list(tasks)
        for task in tasks:
            self.packed.check_task(task)
        plain = self.weights()
        applied = [w for w, s in zip(plain, self.layout.segments, strict=True) if s.selected]
        masks = []
        with self.cache.lock:
            for task in tasks:
                entry = self.cache.get(task)
                if entry is None or not entry.counted.still(None, applied):
                    self.cache.made += 1
                    entry = self._made(task, plain, Counted(None, applied))
                    self.cache.put(task, entry, beside=tasks)
                else:
                    self.cache.hits += 1
                effective = [own if kept is None else kept for kept, own in zip(entry.weights, plain, strict=True)]
                masks.append(KeptMask(self.tasks.index(task), self.layout, tuple(plain), tuple(effective)))
        return masks

    def _made(self, task: int, plain: list[nn.Parameter], counted: Counted) -> Entry:
        masks = self.packed.unpack(task)
        weights: list[Tensor | None] = []
        with torch.inference_mode(False), torch.no_grad():
            for weight, segment in zip(plain, self.layout.segments, strict=True):
                mask = masks.get(segment.name)
                weights.append(None if mask is None else (weight * mask.to(weight.device)).to(weight.dtype))
        return Entry(tuple(weights), None, counted, sum(w.nbytes for w in weights if w is not None))

    def _fill(self, where: str) -> None:
        """Gives the network the packed weights and everything else; their dtypes are the file's."""
        found = self.packed.shared() | {f"net.{name}": weight for name, weight in self.packed.weights().items()}
        mine = rest_of(self) | {f"net.{s.name}": w for w, s in zip(self.weights(), self.layout.segments, strict=True)}
        for name in [*found, *mine]:
            if name not in found or name not in mine:
                other = f"the network in {where}" if name in mine else "the network given"
                raise InputError(f"{name.removeprefix('net.')} is not in {other}: it is another network")
            if found[name].shape != mine[name].shape:
                shapes = f"{tuple(found[name].shape)} in {where}, and {tuple(mine[name].shape)} in the network given"
                raise InputError(f"{name.removeprefix('net.')} is {shapes}")
        for name, tensor in mine.items():
            tensor.data = found[name].to(tensor.device, copy=True)


def rest_of(model: MaskedNetwork, tasks: Iterable[int] | None = None) -> dict[str, Tensor]:
    """By name, all that the passes of a masked network read besides W and the masks.

    tasks: of what is per task, which ones, numbered anew; None: all, as they are.
    """
    applied = {id(w) for w, s in zip(model.weights(), model.layout.segments, strict=True) if s.selected}
    rest: dict[str, Tensor] = {f"net.{n}": p for n, p in model.net.named_parameters() if id(p) not in applied}
    per_task = {id(buffer) for module in model.statistics() for buffer in module.stacked().values()}
    for name, buffer in model.net.named_buffers():
        if not name.rpartition(".")[2].startswith(OWN) or not _is_statistic(model, name):
            some = tasks is not None and id(buffer) in per_task
            rest[f"net.{name}"] = buffer[list(tasks)] if some and tasks is not None else buffer
    for name, values in model.own.items():
        chosen: Any = range(len(values)) if tasks is None else tasks  # pyright: ignore[reportArgumentType]
        rest |= {f"own.{name}.{row}": values[task] for row, task in enumerate(chosen)}  # pyright: ignore
    return rest


def _is_statistic(model: MaskedNetwork, name: str) -> bool:
    return isinstance(model.net.get_submodule(name.rpartition(".")[0]), TaskStatistics)
