"""A split is one data set (training, validation or test part of a task) that hands out batches on a device.

`TensorSplit` keeps everything in memory on that device and does its work in batches, so a training step needs
no loader and no copy; `DatasetSplit` reads any map-style torch Dataset through DataLoader, for data that does
not fit in memory or that is random per item. Both are a `Split`, and equal data gives equal batches from
either.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..errors import InputError
from .items import Collate
from .transforms import UNIT_SCALE, Transform, move

Batch = tuple[Tensor, Tensor]
_CPU = torch.device("cpu")


@runtime_checkable
class Split(Protocol):
    """What training and evaluation ask of data.

    Every batch is a pair (x, y) on `device`: x (B, ...) float32, the model input, and y (B,) int64.
    """

    @property
    def device(self) -> torch.device:
        """Where the batches are."""
        ...

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def to(self, device: torch.device | str) -> Split:
        """The same data with its batches on `device`."""
        ...

    def batch(self, index: Tensor, train: bool = False) -> Batch:
        """The samples index (B,) int64, in that order; augmented where `train`."""
        ...

    def batches(self, rows: Tensor | Iterable[Tensor], train: bool = False) -> Iterator[Batch]:
        """`batch(row, train)` for each row of an int64 (steps, B) tensor or iterable of index tensors."""
        ...

    def chunks(self, size: int) -> Iterator[Batch]:
        """All samples in order, `size` at a time (the last batch may be smaller), never augmented."""
        ...


@dataclass(frozen=True, eq=False)
class TensorSplit:
    """A data set held as two tensors on one device; batch i is prepare(augment(inputs[i])), labels[i].

    Args:
        inputs: (n, ...) uint8 or float32, the stored form.
        labels: (n,) int64 on the same device.
        prepare: batched and deterministic, (B, ...) stored form to (B, ...) float32 model input. The default
            scales uint8 to [0, 1] and leaves float32 alone.
        augment: batched and random, stored form to stored form; used for training batches only. None: no
            augmentation. It must draw from torch's default generator of its argument's device, so that a
            checkpoint of that generator resumes training bit for bit.

    Raises:
        InputError: no tensors, or a dtype, length or device other than the above.
    """

    inputs: Tensor
    labels: Tensor
    prepare: Transform = UNIT_SCALE
    augment: Transform | None = None

    def __post_init__(self) -> None:
        inputs, labels = self.inputs, self.labels
        if not isinstance(inputs, Tensor) or inputs.dtype not in (torch.uint8, torch.float32) or inputs.dim() < 1:
            raise InputError(f"inputs must be (n, ...) uint8 or float32, not {_describe(inputs)}")
        if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.dim() != 1:
            raise InputError(f"labels must be (n,) int64, not {_describe(labels)}")
        if len(inputs) != len(labels):
            raise InputError(f"inputs and labels differ in number: {len(inputs)} and {len(labels)}")
        if inputs.device != labels.device:
            raise InputError(f"inputs are on {inputs.device}, labels on {labels.device}: put both on one device")

    @property
    def device(self) -> torch.device:
        return self.inputs.device

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str, moved: dict[int, Tensor] | None = None) -> TensorSplit:
        """The split on `device`, prepare and augment included.

        Args:
            device: where to.
            moved: tensors moved before, by id of the original, which the caller keeps alive. Splits that
                share a tensor then share its copy too, as the tasks of permuted-mnist do.
        """
        moved = {} if moved is None else moved
        for tensor in (self.inputs, self.labels):
            if id(tensor) not in moved:
                moved[id(tensor)] = tensor.to(device)
        return replace(
            self,
            inputs=moved[id(self.inputs)],
            labels=moved[id(self.labels)],
            prepare=move(self.prepare, device),
            augment=move(self.augment, device),
        )

    def batch(self, index: Tensor, train: bool = False) -> Batch:
        """The samples `index`; augmented where `train`. Never waits for the device: CUDA graphs capture it.

        Args:
            index: (B,) int64, 0 to n - 1, on the split's device (from elsewhere it is copied there, which
                does wait).
            train: whether to augment.

        Returns:
            x (B, ...) float32 and y (B,) int64.

        Raises:
            InputError: `augment` or `prepare` has given no tensor, another dtype, or another number of samples.
        """
        index = index.to(self.device)
        x = self.inputs.index_select(0, index)
        if train and self.augment is not None:
            x = _transformed("augment", self.augment, x, x.dtype)
        return _transformed("prepare", self.prepare, x, torch.float32), self.labels.index_select(0, index)

    def batches(self, rows: Tensor | Iterable[Tensor], train: bool = False) -> Iterator[Batch]:
        """`batch(row, train)` for each row; a (steps, B) tensor moves to the device once, at the start."""
        for row in rows.to(self.device) if isinstance(rows, Tensor) else rows:
            yield self.batch(row, train)

    def chunks(self, size: int) -> Iterator[Batch]:
        """All samples in order, `size` at a time, never augmented; an empty split yields nothing.

        Raises:
            InputError: size < 1, or what `batch` raises.
        """
        for start in _chunk_starts(len(self), size):
            x = _transformed("prepare", self.prepare, self.inputs[start : start + size], torch.float32)
            if x.untyped_storage().data_ptr() == self.inputs.untyped_storage().data_ptr():
                x = x.clone()  # a network may change its input in place, which is not to change the data
            yield x, self.labels[start : start + size]


@dataclass(frozen=True, eq=False)
class DatasetSplit:
    """Any map-style torch Dataset of (input, label) items as a split; batches are read as they are asked for.

    An input is a tensor or array of one shape throughout: float (made float32), or uint8 with channels first
    (scaled to [0, 1]). A label is an integer. The dataset's own transforms apply to every batch, training or
    not, so a dataset with random augmentation belongs in a training split only; `train` has no effect here.

    Randomness per item: without workers items draw from the default generators of this process, and nothing
    else here does, so checkpoints of these resume bit for bit. With workers each call of `batches` or
    `chunks` draws one seed for its workers from the CPU's default generator: the same seed and calls give the
    same items, but a call cut short and begun again in the middle does not go on as it would have.

    Args:
        dataset: with `__len__` and `__getitem__(int)`.
        label_map: the item's label to the task's, e.g. {7: 0, 3: 1}; None keeps labels.
        num_workers: DataLoader's processes; 0 reads in this one.
        device: where the batches go; its name does too.
        num_classes: if given, labels (after label_map) must be 0 .. num_classes - 1.

    Raises:
        InputError: not a map-style dataset; num_workers < 0. While reading: an item that is not as above.
    """

    dataset: Any
    label_map: Mapping[int, int] | None = None
    num_workers: int = 0
    device: torch.device = _CPU
    num_classes: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "device", torch.device(self.device))
        if not hasattr(self.dataset, "__len__") or not hasattr(self.dataset, "__getitem__"):
            kind = type(self.dataset).__name__
            raise InputError(f"a dataset must be map-style, with __len__ and __getitem__; {kind} is not")
        if self.num_workers < 0:
            raise InputError(f"num_workers must be 0 or more, not {self.num_workers}")

    def __len__(self) -> int:
        return len(self.dataset)

    def to(self, device: torch.device | str) -> DatasetSplit:
        return replace(self, device=device)

    def batch(self, index: Tensor, train: bool = False) -> Batch:
        """The samples index (B,) int64, read in this process. Raises InputError for a wrong item."""
        collated = self._collate([self.dataset[i] for i in index.tolist()])
        return self._deliver(collated)

    def batches(self, rows: Tensor | Iterable[Tensor], train: bool = False) -> Iterator[Batch]:
        """`batch(row)` for each row of an int64 (steps, B) tensor or iterable, read by DataLoader."""
        rows = rows.cpu() if isinstance(rows, Tensor) else rows
        return self._load(row.tolist() for row in rows)

    def chunks(self, size: int) -> Iterator[Batch]:
        """All samples in order, `size` at a time. Raises InputError for size < 1."""
        n = len(self)
        return self._load(list(range(s, min(s + size, n))) for s in _chunk_starts(n, size))

    def _load(self, rows: Iterable[list[int]]) -> Iterator[Batch]:
        """Batches of the items of each row, in order."""
        loader = DataLoader(
            self.dataset,
            batch_sampler=rows,
            num_workers=self.num_workers,
            collate_fn=self._collate,
            pin_memory=self.device.type == "cuda",
            # DataLoader draws a seed for its workers from the default generator even when it has none;
            # drawing it from a throwaway generator then leaves the default one to the items.
            generator=None if self.num_workers else torch.Generator(),
        )
        for collated in loader:
            yield self._deliver(collated)

    @property
    def _collate(self) -> Collate:
        return Collate(self.label_map, self.num_classes)

    def _deliver(self, collated: Batch | InputError) -> Batch:
        """The batch on the device; raises the InputError that `Collate` found instead."""
        if isinstance(collated, InputError):
            raise collated
        x, y = collated
        return x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)


def empty_split() -> TensorSplit:
    """A split without samples, as where nothing is held out to validate."""
    return TensorSplit(torch.zeros(0, dtype=torch.float32), torch.zeros(0, dtype=torch.int64))


def _chunk_starts(n: int, size: int) -> range:
    if size < 1:
        raise InputError(f"the size of a chunk must be 1 or more, not {size}")
    return range(0, n, size)


def _transformed(name: str, transform: Transform, x: Tensor, dtype: torch.dtype) -> Tensor:
    """transform(x). Raises InputError unless it is a tensor of that dtype with as many samples as x."""
    found = transform(x)
    if not isinstance(found, Tensor) or found.dim() < 1 or len(found) != len(x) or found.dtype != dtype:
        wanted = str(dtype).removeprefix("torch.")
        raise InputError(
            f"{name} must make {wanted} of {len(x)} samples of a batch of {len(x)}, not {_describe(found)}"
        )
    return found


def _describe(tensor: object) -> str:
    if not isinstance(tensor, Tensor):
        return f"{type(tensor).__name__}, which is no tensor"
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
