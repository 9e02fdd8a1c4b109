"""How many threads fit this process, and how long they had better spin while they wait for each other.

An OpenMP thread that has come to the end of its part spins until all others have. Where one of these is not scheduled,
because other processes have the cores or the container's quota is used up, the others spin for nothing. So a
process has no more threads than it has cores, and a thread that waits soon sleeps. Both are decided by environment
variables that PyTorch's OpenMP reads as it is loaded: the command line sets them, a library leaves them alone.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

# GNU's OpenMP reads the first (rounds, some 30 us), LLVM's and Intel's the others: a thread that yields at every look
# gives its whole time slice to other work. How others did: docs/design/training-step.md.
WAITING = {"GOMP_SPINCOUNT": "2000", "KMP_BLOCKTIME": "100us", "KMP_USE_YIELD": "0"}
HOW_TO_WAIT = ("OMP_WAIT_POLICY", "KMP_LIBRARY", *WAITING)
HOW_MANY = ("OMP_NUM_THREADS", "OMP_THREAD_LIMIT", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class Processors:
    """What this process may run on.

    Attributes:
        visible: logical processors of the machine.
        allowed: those in the process's affinity mask.
        cores: physical cores among these.
        quota: the processors whose time the cgroups grant, such as 1.5; None without a limit.
    """

    visible: int
    allowed: int
    cores: int
    quota: float | None

    @property
    def threads(self) -> int:
        """Threads that fit: the cores, or the quota rounded to the nearest whole number where that is less; 1 or more.

        The nearest: half a processor's time is worth a thread, less is not.
        """
        return self.cores if self.quota is None else max(1, min(self.cores, int(self.quota + 0.5)))


def processors(root: Path = Path("/")) -> Processors:
    """What this process may run on, by the files of Linux below `root`; elsewhere all processors count as allowed."""
    visible = os.cpu_count() or 1
    ids = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(visible))
    siblings = {
        _text(root / f"sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list") or str(number)
        for number in ids
    }
    return Processors(visible, len(ids), len(siblings), min(_quotas(root), default=None))


def variables(environment: Mapping[str, str], found: Processors) -> dict[str, str]:
    """What a program sets before it imports PyTorch, except for what the environment has decided already.

    The number of threads is left to PyTorch unless a quota asks for fewer than there are cores: it goes by the affinity
    mask and by physical cores itself.
    """

    chosen = {} if said(environment, HOW_TO_WAIT) else dict(WAITING)
    if found.threads < found.cores and not said(environment, HOW_MANY):
        chosen["OMP_NUM_THREADS"] = str(found.threads)
    return chosen


def said(environment: Mapping[str, str], names: Sequence[str]) -> dict[str, str]:
    """Those of the variables that the environment has."""
    return {name: environment[name] for name in names if environment.get(name)}


# -- cgroups ----------------------------------------------------------------------------------------------------------


def _quotas(root: Path) -> Iterator[float]:
    """Of the process's cgroup and of all that it is in, in both versions: the processors that each one grants."""
    own = {}  # controller, "" for version 2 -> the process's group
    for line in _text(root / "proc/self/cgroup").splitlines():
        with suppress(ValueError):
            _, controllers, group = line.split(":", 2)
            own |= dict.fromkeys(controllers.split(","), group)
    for line in _text(root / "proc/self/mountinfo").splitlines():
        before, _, after = (part.split() for part in line.partition(" - "))
        if len(before) < 5 or len(after) < 3:
            continue
        version, mounted, point = after[0], before[3], PurePosixPath(before[4])
        if version == "cgroup2" and "" in own:
            yield from _granted(root, point, _below(own[""], mounted), _of_version_2)
        elif version == "cgroup" and "cpu" in after[2].split(",") and "cpu" in own:
            yield from _granted(root, point, _below(own["cpu"], mounted), _of_version_1)


def _below(group: str, mounted: str) -> PurePosixPath:
    """A group's place below the one that is mounted; of a group that is not below it, as a container sees it, none."""
    with suppress(ValueError):
        return PurePosixPath(group).relative_to(mounted)
    return PurePosixPath()


def _granted(root: Path, point: PurePosixPath, group: PurePosixPath, read: Callable[[Path], float]) -> Iterator[float]:
    """The quotas of a group and of those that it is in, where they have one."""
    top = root / point.relative_to("/")
    for place in (group, *group.parents):
        with suppress(ValueError, ZeroDivisionError):  # "max", and groups that are not there
            if (quota := read(top / place)) > 0:  # version 1 says -1 for no limit
                yield quota


def _of_version_2(folder: Path) -> float:
    quota, period = _text(folder / "cpu.max").split()
    return int(quota) / int(period)


def _of_version_1(folder: Path) -> float:
    return int(_text(folder / "cpu.cfs_quota_us")) / int(_text(folder / "cpu.cfs_period_us"))


def _text(path: Path) -> str:
    """A file's text, "" where there is none."""
    try:
        return path.read_text().strip()
    except (OSError, ValueError):
        return ""
