"""TaskMask: one task's mask over a whole network, and which mask the running forward pass uses."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from . import reference
from .layout import MaskLayout


@dataclass(frozen=True, eq=False)
class TaskMask:
    """What the hypernetwork generated for one task, made by `HyperMask.mask`.

    Made once, it serves a forward pass, the regulariser and any number of evaluation batches.

    Attributes:
        task: the task's id, an int or a 0-dim int64 tensor.
        layout: the flat space it lies in.
        logits: (N,) mask logits a.
        thresholds: (S,) thresholds on |a|.
        effective: one tensor per segment, as the layers use them: W * m; the output layer's bias as it is.
    """

    task: int | Tensor
    layout: MaskLayout
    logits: Tensor
    thresholds: Tensor
    effective: tuple[Tensor, ...]

    def masks(self) -> dict[str, Tensor]:
        """Parameter name -> mask |tanh a| where |a| >= thr, of the parameter's shape, values in [0, 1]."""
        views = self.layout.views(self.logits)
        return {
            segment.name: reference.semi_binary_mask(view, threshold)
            for segment, view, threshold in zip(self.layout.segments, views, self.thresholds, strict=True)
        }

    def sparsity(self) -> Tensor:
        """Scalar: percent of the masked entries (the output layer's bias apart) whose mask is 0."""
        masks = self.masks()
        applied = [masks[segment.name] for segment in self.layout.segments if segment.selected]
        zeros = sum((mask == 0).sum() for mask in applied)
        return 100.0 * zeros / sum(mask.numel() for mask in applied)


class _Active(threading.local):
    """Per thread, so that two threads can run two tasks through one model; torch.compile traces through it."""

    mask: TaskMask | None = None


_active = _Active()


def active_mask() -> TaskMask | None:
    """The mask of the forward pass this thread is in; None outside of one."""
    return _active.mask


@contextmanager
def use_mask(mask: TaskMask) -> Iterator[None]:
    """Masked layers called inside use `mask`; afterwards nothing of it is left behind."""
    before = _active.mask
    _active.mask = mask
    try:
        yield
    finally:
        _active.mask = before
