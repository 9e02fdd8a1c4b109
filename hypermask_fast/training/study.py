"""Several runs together: read from their folders, grouped by settings, and what holds over the seeds of a group, as in:

    groups = grouped(read_runs(["runs/seed-0", "runs/seed-1", "runs/other-0", "runs/other-1"]))
    groups[0].estimate("average_accuracy")                       # mean, standard deviation, 95 % interval
    paired(groups[0], groups[1], "average_accuracy").estimate    # of the differences, seed by seed

Runs that differ in their seed alone are one group.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import own_code
from ..checks import shown
from ..errors import InputError
from ..extras import needed_for
from ..text import text_table
from . import describe
from .config import RunConfig, stored_config
from .metrics import METRIC_UNITS, Summary, summarize, tasks_learned
from .report import METRICS

LEVEL = 0.95  # of confidence intervals


@dataclass(frozen=True)
class Run:
    """What a run's folder says of it.

    Attributes:
        matrix: (T, T) float64, percent; NaN: not measured. See `metrics`.
        baseline: (T,) percent, of the untrained model; NaN: not measured.
        learned: tasks that it has learned so far.
    """

    folder: Path
    config: RunConfig
    matrix: np.ndarray
    baseline: np.ndarray
    learned: int

    @property
    def summary(self) -> Summary:
        return summarize(self.matrix, self.baseline)

    @property
    def is_finished(self) -> bool:
        return self.learned == len(self.matrix)


@dataclass(frozen=True)
class Estimate:
    """What n independent values say of their mean.

    Attributes:
        mean: of the values.
        std: their standard deviation, with n - 1; None for one value.
        low: lower end of the mean's 95 % confidence interval.
        high: its upper end. The interval is mean -+ t(0.975, n - 1) std / sqrt(n), with Student's t; None
            for one value.
        count: n.
    """

    mean: float
    std: float | None
    low: float | None
    high: float | None
    count: int

    @property
    def half_width(self) -> float:
        """Of the interval; NaN for one value."""
        return float("nan") if self.high is None else self.high - self.mean


@dataclass(frozen=True)
class Group:
    """Finished runs of the same settings but for the seed, one run per seed, by ascending seed.

    Attributes:
        label: the settings that set the group apart from the others, such as "method.beta=0.1"; empty for one group.
    """

    label: str
    runs: tuple[Run, ...]

    @property
    def seeds(self) -> list[int]:
        return [run.config.seed for run in self.runs]

    @property
    def config(self) -> RunConfig:
        """Of its first run."""
        return self.runs[0].config

    @property
    def title(self) -> str:
        """What its runs are, and their settings; two lines."""
        return f"{describe.title(self.config)}\n{describe.details(self.config, self.seeds)}"

    def values(self, metric: str) -> np.ndarray:
        """(runs,) a field of `Summary`, run by run. Raises InputError: no such metric, or too few tasks for it."""
        if metric not in METRIC_UNITS:
            raise InputError(f"no metric {metric!r}: there are {', '.join(METRIC_UNITS)}")
        values = [getattr(run.summary, metric) for run in self.runs]
        if None in values:
            raise InputError(f"{metric.replace('_', ' ')} needs more tasks, or a measured baseline: it is not known")
        return np.array(values, dtype=np.float64)

    def estimate(self, metric: str) -> Estimate:
        """Over the seeds, of a metric; see `values`."""
        return estimate(self.values(metric))

    @property
    def just_learned(self) -> np.ndarray:
        """(runs, T) percent: accuracy on each task right after it was learned."""
        return np.array([np.diagonal(run.matrix) for run in self.runs])

    @property
    def at_the_end(self) -> np.ndarray:
        """(runs, T) percent: accuracy on each task after the last one was learned."""
        return np.array([run.matrix[-1] for run in self.runs])

    @property
    def average_so_far(self) -> np.ndarray:
        """(runs, T) percent: after each task, the mean accuracy on the tasks learned until then, that one included."""
        return np.array([[run.matrix[t, : t + 1].mean() for t in range(len(run.matrix))] for run in self.runs])

    @property
    def mean_matrix(self) -> np.ndarray:
        """(T, T) percent: the accuracy matrix, mean over the runs."""
        return np.mean([run.matrix for run in self.runs], axis=0)


@dataclass(frozen=True)
class Paired:
    """Differences of two groups on the seeds that both have: second minus first.

    Attributes:
        seeds: those that both groups have.
        differences: second minus first, of each of these seeds.
        estimate: over them.
    """

    seeds: tuple[int, ...]
    differences: tuple[float, ...]
    estimate: Estimate


# -- reading ----------------------------------------------------------------------------------------------------------


def read_run(folder: Path | str) -> Run:
    """A run as config.toml and metrics.json in its folder say; its checkpoint is not needed.

    Raises:
        InputError: no run, no task learned yet, or metrics.json is damaged.
    """
    folder = Path(folder)
    config, path = stored_config(folder), folder / METRICS
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        matrix = np.array(stored["matrix"], dtype=np.float64)  # null becomes NaN
        baseline = np.array(stored["baseline"], dtype=np.float64)
        learned = tasks_learned(matrix)
        summarize(matrix, baseline)
        _check_percentages(matrix, baseline, learned)
    except FileNotFoundError as error:
        raise InputError(f"the run in {folder} has not learned its first task yet (no {METRICS})") from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:  # InputError is a ValueError
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise InputError(f"{path} is damaged or no run's: {reason}") from error
    if learned == 0:
        raise InputError(f"the run in {folder} has not learned its first task yet")
    return Run(folder, config, matrix, baseline, learned)


def _check_percentages(matrix: np.ndarray, baseline: np.ndarray, learned: int) -> None:
    """Raises InputError for an accuracy that is none, or one that every run has measured and this one lacks."""
    found = np.concatenate([matrix.ravel(), baseline])
    wrong = found[(found < 0) | (found > 100)]
    if len(wrong):
        raise InputError(f"an accuracy is 0 to 100 %, not {wrong[0]}")
    for i, j in np.argwhere(np.isnan(matrix[:learned])).tolist():
        if j <= i:
            raise InputError(f"the accuracy on task {j} after task {i} is missing")


def read_runs(folders: Iterable[Path | str]) -> list[Run]:
    """`read_run` of each. InputError: none, one of them twice, or what `read_run` raises."""
    if isinstance(folders, (str, Path)):
        raise InputError(f"give a list of runs' folders, such as [{str(folders)!r}]")
    chosen = [Path(folder) for folder in folders]
    if not chosen:
        raise InputError("no run to read: give the folder of one or more")
    seen: set[Path] = set()
    for folder in chosen:
        if folder.resolve() in seen:
            raise InputError(f"{folder} is given twice")
        seen.add(folder.resolve())
    return [read_run(folder) for folder in chosen]


# -- grouping ---------------------------------------------------------------------------------------------------------


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Groups of runs that differ in nothing but the seed, in the order of their first runs.

    Raises:
        InputError: no run, runs of different scenarios or numbers of tasks, one that is not finished, or two of the
            same settings and seed.
    """
    if not runs:
        raise InputError("no run to compare: give one or more")
    first = runs[0]
    for run in runs:
        names = [describe.scenario_name(each.config) for each in (first, run)]
        if names[0] != names[1]:
            raise _not_alike("scenarios", first, run, names)
        editions = [each.config.settled().data.edition for each in (first, run)]
        if editions[0] != editions[1]:
            raise _not_alike(f"editions of {run.config.data.scenario}'s data", first, run, editions)
        if len(run.matrix) != len(first.matrix):
            raise _not_alike("numbers of tasks", first, run, [len(each.matrix) for each in (first, run)])
        if not run.is_finished:
            raise InputError(
                f"the run in {run.folder} has learned {run.learned} of its {len(run.matrix)} tasks: go on with it by "
                "--resume, or leave it out"
            )
    found: dict[str, dict[int, Run]] = {}
    for run in runs:
        of_seed = found.setdefault(replace(run.config, seed=0).digest(), {})
        if run.config.seed in of_seed:
            other = of_seed[run.config.seed].folder
            raise InputError(f"{other} and {run.folder} are the same run: all settings and seed {run.config.seed}")
        of_seed[run.config.seed] = run
    members = [tuple(of_seed[seed] for seed in sorted(of_seed)) for of_seed in found.values()]
    labels = _labels([_flat(each[0].config) for each in members])
    return [Group(label, each) for label, each in zip(labels, members, strict=True)]


def _not_alike(what: str, a: Run, b: Run, values: Sequence[object]) -> InputError:
    return InputError(
        f"runs of different {what} can't be compared: {values[0]} in {a.folder}, {values[1]} in {b.folder}"
    )


def _flat(config: RunConfig) -> dict[str, Any]:
    """Dotted settings that decide a number, without the seed."""
    data = replace(config.data, dir=None, scenario=own_code.short(config.data.scenario))
    target = replace(config.target, name=own_code.short(config.target.name))
    values = replace(config, title="", data=data, target=target).to_dict()
    del values["seed"], values["title"]
    for name in ("log_every", "checkpoint_every", "inspect", "shard"):
        del values["training"][name]
    tables = {key: value for key, value in values.items() if isinstance(value, dict)}
    flat = {key: value for key, value in values.items() if key not in tables}
    return flat | {f"{table}.{key}": value for table, inner in tables.items() for key, value in inner.items()}


def _labels(settings: Sequence[dict[str, Any]]) -> list[str]:
    """Of each configuration, the settings in which it differs from another."""
    keys = dict.fromkeys(key for values in settings for key in values)
    differ = [key for key in keys if any(values.get(key) != settings[0].get(key) for values in settings)]
    return [
        ", ".join(f"{key}={_word(values[key]) if key in values else '(not set)'}" for key in differ)
        for values in settings
    ]


def _word(value: Any) -> str:
    return value if isinstance(value, str) else shown(value)


# -- over seeds -------------------------------------------------------------------------------------------------------


def estimate(values: npt.ArrayLike) -> Estimate:
    """Mean, standard deviation and confidence interval of independent values, one per seed.

    Raises:
        InputError: no value, one that is not finite, or the package scipy is missing.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) == 0 or not np.isfinite(array).all():
        raise InputError(f"an estimate needs one or more finite numbers, not {shown(array.tolist())}")
    count, mean = len(array), float(array.mean())
    if count == 1:
        return Estimate(mean, None, None, None, 1)
    with needed_for("confidence intervals"):
        from scipy.special import stdtrit
    std = float(array.std(ddof=1))
    half = float(stdtrit(count - 1, (1 + LEVEL) / 2)) * std / count**0.5
    return Estimate(mean, std, mean - half, mean + half, count)


def paired(first: Group, second: Group, metric: str) -> Paired:
    """Second minus first, on the seeds that both groups have; see `Group.values`.

    Raises:
        InputError: no seed in common, or what `Group.values` raises.
    """
    values = [dict(zip(group.seeds, group.values(metric).tolist(), strict=True)) for group in (first, second)]
    seeds = sorted(values[0].keys() & values[1].keys())
    if not seeds:
        raise InputError(f"no seed in common: {describe.seed_words(first.seeds)}, {describe.seed_words(second.seeds)}")
    differences = tuple(values[1][seed] - values[0][seed] for seed in seeds)
    return Paired(tuple(seeds), differences, estimate(differences))


def differences(groups: Sequence[Group], metric: str) -> list[tuple[Group, Paired]]:
    """Each group but the first, less the first, on the seeds that both have; those without one in common are left out.

    Raises:
        InputError: no such metric, or too few tasks for it.
    """
    first, *others = groups
    return [(group, paired(first, group, metric)) for group in others if set(group.seeds) & set(first.seeds)]


def known_metrics(groups: Sequence[Group]) -> list[str]:
    """Those of `METRIC_UNITS` that all runs of these groups have: some need two tasks, or a measured baseline."""
    runs = [run for group in groups for run in group.runs]
    return [name for name in METRIC_UNITS if all(getattr(run.summary, name) is not None for run in runs)]


def metrics_table(groups: Sequence[Group]) -> str:
    """A line per group: number of seeds, then mean -+ half width of the interval of each metric, as text."""
    known = known_metrics(groups)
    rows = [["", "seeds", *(f"{name.replace('_', ' ')} ({METRIC_UNITS[name]})" for name in known)]]
    for group in groups:
        label = group.label or describe.title(group.config)
        rows.append([label, str(len(group.runs)), *(estimate_text(group.estimate(name)) for name in known)])
    below = f"mean \N{PLUS-MINUS SIGN} half of the {100 * LEVEL:.0f} % confidence interval over seeds (Student's t)"
    return f"{text_table(rows, '<' + '>' * (len(rows[0]) - 1), gap=3)}\n{below}"


def estimate_text(value: Estimate) -> str:
    """ "99.47 +- 0.12" with the sign; the mean alone for one value."""
    return f"{value.mean:.2f}" if value.high is None else f"{value.mean:.2f} \N{PLUS-MINUS SIGN} {value.half_width:.2f}"
