"""What `inspect` returns: plain numbers, and the same as text."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from ..text import text_table
from .learned import Drift

_WIDE = 10  # tasks up to which tables have a column for each
UNITS = {
    "sparsity, kept, used, free, by_tasks, flipped, mask_change, predictions_changed": "percent",
    "mean_kept_value, jaccard, cosine, embeddings, chance": "a number from 0 to 1 (of embeddings from -1)",
    "probability_change": "points, 0 to 100",
    "logit_change": "a difference of mask logits",
}
Matrix = tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True)
class Masks:
    """T tasks' masks over one tensor, or over all masked entries together. m: mask, K_t: the entries that task t keeps.

    Attributes:
        name: the parameter's name, or "all".
        entries: n.
        kept: (T,) 100 |K_t| / n, percent.
        mean_kept_value: (T,) mean of m over K_t.
        jaccard: (T, T) |K_i and K_j| / |K_i or K_j|, 0 to 1.
        cosine: (T, T) m_i m_j / (||m_i|| ||m_j||), zeros included; None where a mask is 0 everywhere.
        used: (T,) percent of n that the first 1, 2, ... T of these tasks keep between them.
        by_tasks: (T + 1,) percent of n that are kept by exactly 0, 1, ... T of these tasks.
    """

    name: str
    entries: int
    kept: tuple[float, ...]
    mean_kept_value: tuple[float, ...]
    jaccard: Matrix
    cosine: Matrix
    used: tuple[float, ...]
    by_tasks: tuple[float, ...]

    @property
    def free(self) -> float:
        """Percent of n that none of these tasks keeps: what another task could use alone."""
        return self.by_tasks[0]


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found.

    Attributes:
        tasks: ids, in the order of every row and column here.
        sparsity: percent, of the model.
        whole: the masks over all masked entries.
        tensors: the masks over each masked tensor. The bias of an output layer, on
            which no mask acts, is not among them.
        embeddings: (T, T) cosine of the tasks' embeddings, -1 to 1.
        drift: of those tasks that there was a record of.
    """

    tasks: tuple[int, ...]
    sparsity: float
    whole: Masks
    tensors: tuple[Masks, ...]
    embeddings: Matrix
    drift: tuple[Drift, ...] = ()

    @property
    def keeps_all(self) -> bool:
        """Whether every mask keeps every entry, so that only their values tell tasks apart."""
        return min(self.whole.kept) == 100

    @property
    def chance(self) -> float:
        """The Jaccard index to be expected of unrelated masks: q / (2 - q), q the kept share."""
        share = sum(self.whole.kept) / len(self.tasks) / 100
        return share / (2 - share)

    def to_dict(self, pairs: bool = True) -> dict[str, Any]:
        """JSON values: the fields' own names, and their units. pairs: with each tensor's own (T, T) matrices."""
        values = dataclasses.asdict(self) | {"chance": self.chance, "units": UNITS}
        values["whole"]["free"] = self.whole.free
        for tensor in values["tensors"]:
            tensor["free"] = tensor["by_tasks"][0]
            if not pairs:
                del tensor["jaccard"], tensor["cosine"]
        return values

    def table(self) -> str:
        """Tables of tasks, of tensors and, for up to ten tasks, of pairs. InputError: the package rich is missing."""
        return "\n\n".join(_tables(self))

    def __str__(self) -> str:
        try:
            return self.table()
        except InputError:  # the package rich is missing: printing must not fail for that
            return repr(self)


def _tables(found: Inspection) -> Iterator[str]:
    entries, count = found.whole.entries, len(found.tasks)
    yield f"{count} task{'' if count == 1 else 's'}, {entries:,} masked entries, sparsity {found.sparsity:g} %"
    yield _task_table(found)
    if found.drift:
        yield "\n".join(["what has changed for each task since it was learned:", _drift_table(found)])
    yield _tensor_table(found)
    if 2 <= count <= _WIDE:
        yield "\n".join([_about_pairs(found), _pair_table(found)])


def _about_pairs(found: Inspection) -> str:
    if found.keeps_all:
        return "every mask keeps every entry, so the Jaccard index is 1 for all pairs; cosine of the masks' values:"
    return f"Jaccard index of what two masks keep (unrelated masks: {found.chance:.2f}):"


def _task_table(found: Inspection) -> str:
    whole = found.whole
    head = ["task", "kept %", "mean kept value", "kept first here %", "used so far %", "free %", "most like earlier"]
    rows = [head]
    for i, task in enumerate(found.tasks):
        before = whole.used[i - 1] if i else 0.0
        row = [str(task), f"{whole.kept[i]:.2f}", f"{whole.mean_kept_value[i]:.3f}", f"{whole.used[i] - before:.2f}"]
        rows.append([*row, f"{whole.used[i]:.2f}", f"{100 - whole.used[i]:.2f}", _most_alike(found, i)])
    return text_table(rows, "".join("<" if title == "most like earlier" else ">" for title in head), gap=2)


def _most_alike(found: Inspection, row: int) -> str:
    """The earlier task whose mask has most in common with this one's."""
    pairs = found.whole.cosine if found.keeps_all else found.whole.jaccard
    values = [(value, task) for value, task in zip(pairs[row][:row], found.tasks, strict=False) if value is not None]
    if not values:
        return "-"
    value, task = max(values)
    return f"{task} ({'cosine' if found.keeps_all else 'Jaccard'} {value:.2f})"


def _drift_table(found: Inspection) -> str:
    drift = {each.task: each for each in found.drift}
    head = ["task", "flipped %", "mask changed %", "logits moved", "predictions changed %"]
    rows = [head, *([str(task), *_drift_cells(drift.get(task))] for task in found.tasks)]
    return text_table(rows, ">" * len(head), gap=2)


def _drift_cells(drift: Drift | None) -> list[str]:
    if drift is None:
        return ["-", "-", "-", "-"]
    change, predictions = (
        "-" if value is None else f"{value:.2f}" for value in (drift.whole.mask_change, drift.predictions_changed)
    )
    return [f"{drift.whole.flipped:.2f}", change, f"{drift.whole.logit_change:.4f}", predictions]


def _tensor_table(found: Inspection) -> str:
    wide = len(found.tasks) <= _WIDE
    of_tasks = [str(task) for task in found.tasks] if wide else ["lowest", "highest"]
    rows = [["tensor", "entries", "kept %", "mean kept value, task:", *of_tasks, "free %", "Jaccard", "cosine"]]
    for masks in (*found.tensors, found.whole):
        values = masks.mean_kept_value if wide else (min(masks.mean_kept_value), max(masks.mean_kept_value))
        row = [masks.name, f"{masks.entries:,}", _between(masks.kept), "", *(f"{value:.3f}" for value in values)]
        rows.append([*row, f"{masks.free:.2f}", _mean_of_pairs(masks.jaccard), _mean_of_pairs(masks.cosine)])
    return text_table(rows, "<" + ">" * (len(rows[0]) - 1), gap=2)


def _between(values: Sequence[float]) -> str:
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"


def _mean_of_pairs(matrix: Matrix) -> str:
    values = [value for i, row in enumerate(matrix) for value in row[:i] if value is not None]
    return f"{sum(values) / len(values):.2f}" if values else "-"


def _pair_table(found: Inspection) -> str:
    pairs = found.whole.cosine if found.keeps_all else found.whole.jaccard
    rows = [["task", *map(str, found.tasks)]]
    for task, row in zip(found.tasks, pairs, strict=True):
        rows.append([str(task), *("-" if value is None else f"{value:.2f}" for value in row)])
    return text_table(rows, ">" * len(rows[0]), gap=2)
