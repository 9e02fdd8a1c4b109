"""Which entries the masks of a model's tasks keep, what they share, and what is left for more tasks."""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..errors import InputError
from ..masking.layout import Segment
from ..model import HyperMask
from . import learned as records
from .inspection import Inspection, Masks, Matrix
from .learned import Drift, Learned, kept_bits, masked_segments

_BLOCK = 2**22  # entries, over all tasks, that are looked at at once


class _Counts(NamedTuple):
    """Sums over entries, T tasks.

    overlap: (T, T) kept by both; products: (T, T) m_i m_j; sums: (T,) of m; first: (T,) kept by this task and by none
    before; by_tasks: (T + 1,) kept by so many.
    """

    overlap: np.ndarray
    products: np.ndarray
    sums: np.ndarray
    first: np.ndarray
    by_tasks: np.ndarray

    @classmethod
    def total(cls, parts: Iterable["_Counts"]) -> "_Counts":
        """Their sums. No part outlives the next one: among large blocks, small arrays that stay scatter the heap."""
        parts = iter(parts)
        sums = cls(*(array.copy() for array in next(parts)))
        for part in parts:
            for total, array in zip(sums, part, strict=True):
                total += array
        return sums


@torch.no_grad()
def inspect(
    model: HyperMask,
    tasks: Iterable[int] | None = None,
    *,
    learned: Mapping[int, Learned] | Iterable[Learned] = (),
    inputs: Mapping[int, Tensor] | None = None,
) -> Inspection:
    """Kept shares, overlaps, used capacity and drift of a model's masks. Nothing of the model changes.

    Of T tasks and N masked entries, T N / 8 bytes are held at once, N numbers, and blocks of a few million. Each
    task's mask is made once, and its entries once more, block by block.

    Args:
        model: any HyperMask model.
        tasks: ids, in the order in which capacity is counted; None: `model.tasks`.
        learned: records that `record` made of tasks as they were learned: their drift is measured.
        inputs: task -> the samples that its record was made with: its outputs are compared too.

    Raises:
        InputError: no task, one that is not there or is named twice, masks that are not finite, a sharded
            hypernetwork, output layers that are not known yet, a record of another network, or inputs that are not the
            record's.
    """
    records.check_model(model)
    records.check_layout_known(model)
    chosen = _checked(model, tasks)
    then = {each.task: each for each in (learned.values() if isinstance(learned, Mapping) else learned)}
    segments = masked_segments(model.layout)
    if not segments:
        raise InputError("this model masks an output layer's bias alone, on which no mask acts: nothing to inspect")
    kept: list[list[np.ndarray]] = []  # of each task, of each tensor
    drifts = []
    for task in chosen:
        mask = model.mask(task)
        kept.append([kept_bits(mask, number) for number in segments])
        if task in then:
            moved = records.drift(then[task], mask, kept[-1])
            drifts.append(_with_outputs(moved, then[task], model, (inputs or {}).get(task)))
    counts = [
        _Counts.total(_blocks(model, chosen, segment, [of_task[i] for of_task in kept]))
        for i, segment in enumerate(segments.values())
    ]
    tensors = [_masks(s.name, s.size, count) for s, count in zip(segments.values(), counts, strict=True)]
    whole = _masks("all", sum(tensor.entries for tensor in tensors), _Counts.total(counts))
    embeddings = torch.stack([model.hypernet.embeddings[task] for task in chosen]).double()
    cosine = F.cosine_similarity(embeddings[:, None], embeddings[None], dim=-1).clamp(-1, 1)
    return Inspection(
        chosen, float(model.sparsity), whole, tuple(tensors), _matrix(cosine.cpu().numpy()), tuple(drifts)
    )


def _checked(model: HyperMask, tasks: Iterable[int] | None) -> tuple[int, ...]:
    chosen = model.check_tasks(tasks)
    if not chosen:
        raise InputError("inspect needs a task or more, not none")
    for number, task in enumerate(chosen):
        if task in chosen[:number]:
            raise InputError(f"task {task} is named twice")
    return chosen


def _with_outputs(moved: Drift, then: Learned, model: HyperMask, x: Tensor | None) -> Drift:
    if x is None or then.outputs is None:
        return moved
    if records.fingerprint(x) != then.inputs:
        raise InputError(f"task {then.task} was recorded with other samples than these: give those, or none")
    changed, points = records.output_change(then.outputs, records.outputs(model, then.task, x))
    return dataclasses.replace(moved, samples=len(x), predictions_changed=changed, probability_change=points)


def _blocks(model: HyperMask, tasks: Sequence[int], segment: Segment, kept: list[np.ndarray]) -> Iterator[_Counts]:
    """Counts of each block of a tensor's entries; kept: of each task, a bit for each entry."""
    block = max(_BLOCK // len(tasks) // 8, 1) * 8
    device = model.hypernet.output.weight.device
    for start in range(0, segment.size, block):
        stop = min(start + block, segment.size)
        bits = np.stack([each[start // 8 : -(-stop // 8)] for each in kept])
        keeps = torch.from_numpy(np.unpackbits(bits, axis=1, count=stop - start)).to(device).bool()
        with torch.autocast(device.type, enabled=False):
            logits = model.hypernet.stretch(tasks, segment.start + start, segment.start + stop)
        yield _counted(logits.double().tanh().abs().where(keeps, 0), keeps)


def _counted(values: Tensor, keeps: Tensor) -> _Counts:
    """values: (T, entries) float64 masks, 0 where `keeps` (T, entries) is False."""
    tasks, entries = keeps.shape
    marks = keeps.float()  # as logits of 0 and 1, which the op counts from .5 on
    overlap = ops.mask_overlap(marks, marks.new_full((tasks, 1), 0.5), [0, entries])[0]
    keepers = keeps.sum(0)
    first = keeps.byte().argmax(0)[keepers > 0]
    found = (
        overlap,
        values @ values.t(),
        values.sum(1),
        first.bincount(minlength=tasks),
        keepers.bincount(minlength=tasks + 1),
    )
    return _Counts(*(tensor.cpu().numpy() for tensor in found))


def _masks(name: str, entries: int, counts: _Counts) -> Masks:
    if not np.isfinite(counts.products).all():
        raise InputError(f"the masks of {name} are not finite: has training diverged?")
    kept, norms = np.diagonal(counts.overlap), np.sqrt(np.diagonal(counts.products))
    with np.errstate(divide="ignore", invalid="ignore"):
        jaccard = counts.overlap / (kept[:, None] + kept[None] - counts.overlap)
        cosine = np.minimum(counts.products / (norms[:, None] * norms[None]), 1)
        mean = counts.sums / kept
    return Masks(
        name,
        entries,
        _row(100 * kept / entries),
        _row(mean),
        _matrix(jaccard),
        _matrix(cosine),
        _row(100 * counts.first.cumsum() / entries),
        _row(100 * counts.by_tasks / entries),
    )


def _row(values: np.ndarray) -> tuple[float, ...]:
    return tuple(values.tolist())


def _matrix(values: np.ndarray) -> Matrix:
    return tuple(tuple(None if math.isnan(value) else value for value in row) for row in values.tolist())
