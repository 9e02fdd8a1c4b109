"""What is kept of a task once it is learned, so that what later learning does to it can be measured.

Of each masked tensor: which entries the mask keeps, a bit an entry, and the logits of up to 4,096 entries, one from
each of as many equal stretches. For 475,202 entries in 6 tensors that is about 100 kB. Of the network: its outputs on a
few samples, whose SHA-256 says whether they are the same ones later.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..errors import InputError
from ..files import write_atomic
from ..inference import evaluating
from ..masking.layout import MaskLayout, Segment
from ..masking.masks import TaskMask
from ..model import HyperMask
from ..processes import Shards

SAMPLE = 4096  # entries of a tensor whose logits are kept
_ONES = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1)  # bits that are 1, of each byte
_GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class MaskDrift:
    """How far a mask has moved since its task was learned: of one tensor, or of all together.

    Attributes:
        name: the parameter's name, or "all".
        entries: n.
        flipped: percent of n that are kept now and were not, or were kept and are not; exact.
        mask_change: 100 ||m - m_then|| / ||m_then||, percent; None where the mask then was 0 everywhere. From the
            sample.
        logit_change: sqrt(mean (a - a_then)^2), the output drift per entry. From the sample.
    """

    name: str
    entries: int
    flipped: float
    mask_change: float | None
    logit_change: float


@dataclass(frozen=True)
class Drift:
    """What later learning has done to one task.

    Attributes:
        task: its id.
        whole: of all masked entries.
        tensors: of each masked tensor.
        samples: how many the outputs were compared on; 0: none, and then the next two are None.
        predictions_changed: percent of them with another argmax than then.
        probability_change: mean over them of (1/2) sum_c |p_c - p_then_c|, in points from 0 to 100.
    """

    task: int
    whole: MaskDrift
    tensors: tuple[MaskDrift, ...]
    samples: int = 0
    predictions_changed: float | None = None
    probability_change: float | None = None


@dataclass(frozen=True)
class Learned:
    """A task's mask as it was when `record` was called.

    Attributes:
        task: its id.
        names: of the masked tensors, without the output layers' biases.
        sizes: entries of each of them.
        kept: of each tensor, (ceil(n / 8),) uint8, a bit for each entry, the first one the highest.
        logits: of each tensor, those at `positions(n)`.
        thresholds: (tensors,), on |a|.
        outputs: (samples, classes) of the network; None: not recorded.
        inputs: SHA-256 of the samples; empty: none.
    """

    task: int
    names: tuple[str, ...]
    sizes: tuple[int, ...]
    kept: tuple[np.ndarray, ...]
    logits: tuple[Tensor, ...]
    thresholds: Tensor
    outputs: Tensor | None = None
    inputs: str = ""

    def save(self, path: Path | str) -> None:
        """Writes a safetensors file. Raises InputError where it can't be written."""
        tensors = {f"kept.{i}": torch.from_numpy(bits) for i, bits in enumerate(self.kept)}
        tensors |= {f"logits.{i}": values.contiguous() for i, values in enumerate(self.logits)}
        tensors["thresholds"] = self.thresholds.contiguous()
        if self.outputs is not None:
            tensors["outputs"] = self.outputs.contiguous()
        about = {"task": self.task, "names": self.names, "sizes": self.sizes, "inputs": self.inputs}
        write_atomic(Path(path), save(tensors, {"learned": json.dumps(about)}))

    @classmethod
    def load(cls, path: Path | str) -> "Learned":
        """What `save` wrote. Raises InputError where it is damaged or none of ours."""
        try:
            with safe_open(path, "pt") as file:
                about = json.loads(file.metadata()["learned"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            count = len(about["names"])
            return cls(
                int(about["task"]),
                tuple(about["names"]),
                tuple(about["sizes"]),
                tuple(tensors[f"kept.{i}"].numpy() for i in range(count)),
                tuple(tensors[f"logits.{i}"] for i in range(count)),
                tensors["thresholds"],
                tensors.get("outputs"),
                about["inputs"],
            )
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
            raise InputError(f"{path} is no record of a learned task: {reason}") from error


@torch.no_grad()
def record(model: HyperMask, task: int, x: Tensor | None = None) -> Learned:
    """What `inspect(model, learned=...)` compares this task with later; call it when the task is learned.

    Args:
        model: its mode stays as it is.
        task: its id.
        x: a few samples of the task, the same ones later, whose outputs are to be compared too: (samples, classes).

    Raises:
        InputError: no such task, a sharded hypernetwork, or output layers that are not known yet.
    """
    check_model(model)
    then = None if x is None else outputs(model, task, x)  # perhaps the first pass, which finds the output layers
    check_layout_known(model)
    mask = model.mask(task)
    segments = masked_segments(model.layout)
    return Learned(
        int(task),
        tuple(segment.name for segment in segments.values()),
        tuple(segment.size for segment in segments.values()),
        tuple(kept_bits(mask, number) for number in segments),
        tuple(_sampled(mask, segment) for segment in segments.values()),
        mask.thresholds[list(segments)].cpu(),
        then,
        "" if x is None else fingerprint(x),
    )


def masked_segments(layout: MaskLayout) -> dict[int, Segment]:
    """Number -> segment of every tensor that a mask is multiplied into."""
    return {number: segment for number, segment in enumerate(layout.segments) if segment.selected}


def check_model(model: HyperMask) -> None:
    """Raises InputError where it is no HyperMask model, or a sharded one."""
    if not isinstance(model, HyperMask):
        raise InputError(f"only a HyperMask model has masks to look at, not {type(model).__name__}")
    if isinstance(model.hypernet.processes, Shards):
        raise InputError("a sharded hypernetwork's masks are looked at in one process: load its checkpoint there")


def check_layout_known(model: HyperMask) -> None:
    """Raises InputError where it takes a first pass to know which layers are the output layers."""
    if model.heads() is None:
        raise InputError(
            "which layer is the output layer, whose bias is not masked, is found in the first pass: run one batch "
            "first, or name it: HyperMask(net, ..., heads='...')"
        )


def kept_bits(mask: TaskMask, number: int) -> np.ndarray:
    """(ceil(n / 8),) uint8: which entries of a segment the mask keeps; the bits beyond the last entry are 0."""
    segment = mask.layout.segments[number]
    kept = ~(mask.logits[segment.start : segment.stop].abs() < mask.thresholds[number])
    return np.packbits(kept.cpu().numpy())


def positions(size: int) -> np.ndarray:
    """Up to SAMPLE entries of a tensor, ascending: one from each of as many equal stretches, all of a small tensor.

    Where in its stretch an entry lies goes by multiples of the golden ratio, so that no column of a matrix is favoured.
    """
    if size <= SAMPLE:
        return np.arange(size)
    number = np.arange(SAMPLE)
    return np.unique(((number + number * _GOLDEN % 1) * (size / SAMPLE)).astype(np.int64))


def _sampled(mask: TaskMask, segment: Segment) -> Tensor:
    entries = torch.from_numpy(positions(segment.size) + segment.start)
    return mask.logits[entries.to(mask.logits.device)].cpu()


def drift(then: Learned, mask: TaskMask, kept: Sequence[np.ndarray]) -> Drift:
    """How far a task's mask has moved; kept: `kept_bits` of each masked tensor, now.

    Raises:
        InputError: the record is of another network.
    """
    segments = masked_segments(mask.layout)
    names, sizes = [s.name for s in segments.values()], [s.size for s in segments.values()]
    if (list(then.names), list(then.sizes)) != (names, sizes):
        raise InputError(f"the record of task {then.task} is of another network: its masked tensors are others")
    tensors, sums = [], []
    for i, (number, segment) in enumerate(segments.items()):
        flips = int(_ONES[then.kept[i] ^ kept[i]].sum())
        now = _sampled(mask, segment)
        moved = _moved(now, mask.thresholds[number].cpu(), then.logits[i], then.thresholds[i])
        of_all = moved * (segment.size / len(now))  # what all entries would give
        tensors.append(_mask_drift(segment.name, segment.size, flips, of_all))
        sums.append((segment.size, flips, of_all))
    whole = _mask_drift("all", sum(s[0] for s in sums), sum(s[1] for s in sums), np.sum([s[2] for s in sums], axis=0))
    return Drift(then.task, whole, tuple(tensors))


def _moved(now: Tensor, threshold_now: Tensor, then: Tensor, threshold_then: Tensor) -> np.ndarray:
    """(3,) sums over the sample: (m - m_then)^2, m_then^2, (a - a_then)^2."""
    a, b = now.double(), then.double()
    m = a.tanh().abs().where(~(now.abs() < threshold_now), 0)
    n = b.tanh().abs().where(~(then.abs() < threshold_then), 0)
    return np.array([float((m - n).square().sum()), float(n.square().sum()), float((a - b).square().sum())])


def _mask_drift(name: str, entries: int, flips: int, sums: np.ndarray) -> MaskDrift:
    change, size, logits = (float(value) for value in sums)
    relative = 100 * (change / size) ** 0.5 if size > 0 else None
    return MaskDrift(name, entries, 100 * flips / entries, relative, (logits / entries) ** 0.5)


# -- outputs ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def outputs(model: HyperMask, task: int, x: Tensor) -> Tensor:
    """(samples, classes) float32 on the CPU, of the network in evaluation mode. InputError: they are no such tensor."""
    with evaluating(model):
        y: Any = model(x, task=task)
    if not isinstance(y, Tensor) or y.dim() != 2 or len(y) != len(x):
        given = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise InputError(f"outputs are compared where they are ({len(x)}, classes), not {given}: leave the inputs out")
    return y.float().cpu()


def fingerprint(x: Tensor) -> str:
    """SHA-256 of a tensor's shape, dtype and bytes."""
    plain = x.detach().cpu().contiguous()
    words = f"{tuple(plain.shape)} {plain.dtype} ".encode()
    return hashlib.sha256(words + plain.flatten().view(torch.uint8).numpy().tobytes()).hexdigest()


def output_change(then: Tensor, now: Tensor) -> tuple[float, float]:
    """Percent of samples with another argmax, and 100 times the mean of (1/2) sum_c |p - p_then|."""
    changed = (now.argmax(-1) != then.argmax(-1)).double().mean()
    moved = (now.double().softmax(-1) - then.double().softmax(-1)).abs().sum(-1).mean() / 2
    return 100 * float(changed), 100 * float(moved)
