"""How many processors a process may use, by files of Linux that are made up; and what the command line makes of it."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from hypermask_fast import threads
from hypermask_fast.threads import Processors, processors, variables

ROOT = Path(__file__).parents[1]
DECIDING = (*threads.HOW_TO_WAIT, *threads.HOW_MANY)


def written(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    return root


@pytest.fixture
def eight(monkeypatch):
    """A machine of eight cores, all of them allowed."""
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)


VERSION_2 = {
    "proc/self/cgroup": "0::/user.slice/job",
    "proc/self/mountinfo": "31 23 0:28 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate",
}
VERSION_1 = {
    "proc/self/cgroup": "5:memory:/\n4:cpu,cpuacct:/docker/ab12/job\n1:name=systemd:/docker/ab12\n0::/",
    "proc/self/mountinfo": (
        "30 23 0:27 / /proc rw - proc proc rw\n"
        "31 23 0:28 /docker/ab12 /sys/fs/cgroup/cpu,cpuacct ro,nosuid - cgroup cgroup rw,cpu,cpuacct\n"
        "32 23 0:29 / /sys/fs/cgroup/cpuset ro - cgroup cgroup rw,cpuset\n"
        "33 23 0:30 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw"
    ),
}
OWN_1 = "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_"
OUTER_1 = "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_"


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        (VERSION_2, None),
        (VERSION_2 | {"sys/fs/cgroup/user.slice/job/cpu.max": "max 100000"}, None),
        (VERSION_2 | {"sys/fs/cgroup/user.slice/job/cpu.max": "250000 100000"}, 2.5),
        (VERSION_2 | {"sys/fs/cgroup/user.slice/cpu.max": "150000 50000"}, 3.0),
        (
            VERSION_2
            | {
                "sys/fs/cgroup/user.slice/job/cpu.max": "600000 100000",
                "sys/fs/cgroup/user.slice/cpu.max": "20000 10000",
            },
            2.0,
        ),
        # a container's own view: its group's path is of the host, its files are at the top
        (VERSION_2 | {"proc/self/cgroup": "0::/../outside", "sys/fs/cgroup/cpu.max": "400000 100000"}, 4.0),
        (VERSION_1 | {f"{OWN_1}quota_us": "-1", f"{OWN_1}period_us": "100000"}, None),
        (VERSION_1 | {f"{OWN_1}quota_us": "50000", f"{OWN_1}period_us": "100000"}, 0.5),
        (VERSION_1 | {f"{OUTER_1}quota_us": "300000", f"{OUTER_1}period_us": "100000"}, 3.0),
        (
            VERSION_1
            | {f"{OWN_1}quota_us": "400000", f"{OWN_1}period_us": "100000"}
            | {f"{OUTER_1}quota_us": "300000", f"{OUTER_1}period_us": "200000"},
            1.5,
        ),
        # both versions at once, the quota with the second
        (VERSION_1 | {"sys/fs/cgroup/unified/cpu.max": "100000 100000"}, 1.0),
        *(
            (VERSION_2 | {"sys/fs/cgroup/user.slice/job/cpu.max": text}, None)
            for text in ("", "100000", "100000 0", "-100000 100000", "many few", "1 2 3")
        ),
        ({"proc/self/cgroup": "what\n\n1:cpu", "proc/self/mountinfo": "\n1 2 - \n1 2 3 / / rw - cgroup"}, None),
    ],
)
def test_quotas_of_a_group_and_of_those_around_it(tmp_path, eight, files, quota):
    assert processors(written(tmp_path, files)) == Processors(8, 8, 8, quota)


@pytest.mark.parametrize(
    ("quota", "number"), [(None, 8), (0.2, 1), (0.5, 1), (1.0, 1), (1.4, 1), (1.5, 2), (2.5, 3), (7.6, 8), (64.0, 8)]
)
def test_threads_are_the_quota_rounded_and_no_more_than_the_cores(quota, number):
    assert Processors(64, 16, 8, quota).threads == number


def test_affinity_and_two_threads_of_one_core(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 4, 1, 2}, raising=False)
    siblings = {i: f"{i % 4},{i % 4 + 4}" for i in range(8)}
    files = {f"sys/devices/system/cpu/cpu{i}/topology/thread_siblings_list": text for i, text in siblings.items()}
    assert processors(written(tmp_path, files)) == Processors(8, 4, 3, None)


def test_elsewhere_all_processors_count(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert processors(tmp_path) == Processors(1, 1, 1, None)


def test_the_environment_has_the_last_word():
    free, limited = Processors(8, 8, 8, None), Processors(8, 8, 8, 2.0)
    assert variables({}, free) == threads.WAITING
    assert variables({}, limited) == threads.WAITING | {"OMP_NUM_THREADS": "2"}
    assert variables({}, replace(limited, quota=7.5)) == threads.WAITING
    for name in threads.HOW_TO_WAIT:
        assert variables({name: "1"}, limited) == {"OMP_NUM_THREADS": "2"}
        assert variables({name: ""}, free) == threads.WAITING
    for name in threads.HOW_MANY:
        assert variables({name: "8"}, limited) == threads.WAITING


# -- in processes of their own ----------------------------------------------------------------------------------------


def ran(words: list[str], folder: Path, **environment: str) -> str:
    """What a process says that begins without any of the variables but these."""
    inherited = {name: value for name, value in os.environ.items() if name not in DECIDING}
    done = subprocess.run(
        [sys.executable, *words],
        env={**inherited, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def env_of(words: list[str], folder: Path, **environment: str) -> dict[str, str]:
    lines = ran(words, folder, **environment).splitlines()
    return {name: value.strip() for name, value in (line.split(":", 1) for line in lines)}


CHOICE = " ".join(f"{name}={value}" for name, value in threads.WAITING.items())


def test_env_tells_what_the_command_line_has_chosen(tmp_path):
    told = env_of(["-m", "hypermask_fast", "env"], tmp_path)
    assert told["waiting"] == f"{CHOICE}, set by the command line"
    assert CHOICE in told["in your program"]
    assert f"{os.cpu_count()} logical cores visible, {processors().allowed} in the affinity mask" in told["cpu"]


def test_env_tells_what_the_environment_has_chosen(tmp_path):
    told = env_of(["-m", "hypermask_fast", "env"], tmp_path, OMP_WAIT_POLICY="PASSIVE", OMP_NUM_THREADS="1")
    assert told["waiting"] == "OMP_WAIT_POLICY=PASSIVE, set by the environment"
    assert told["threads"] == "1 threads used (OMP_NUM_THREADS=1, set by the environment)"


def test_a_library_changes_nothing_and_env_says_so(tmp_path):
    told = env_of(["-m", "hypermask_fast.env"], tmp_path)
    assert told["waiting"].startswith("OpenMP's default") and CHOICE in told["in your program"]
    program = "import os; before = dict(os.environ); import hypermask_fast; assert dict(os.environ) == before"
    ran(["-c", program], tmp_path)


_BY_QUOTA = """
import os, sys
from pathlib import Path
sys.argv = ["hypermask-fast", "env"]
os.cpu_count, os.sched_getaffinity = lambda: 8, lambda pid: set(range(8))
import importlib.util
spec = importlib.util.spec_from_file_location("hypermask_fast.threads", {module!r})
module = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = module
spec.loader.exec_module(module)
module.processors.__defaults__ = (Path({root!r}),)
from hypermask_fast.cli import main
sys.exit(main())
"""


def test_threads_of_the_command_line_go_by_the_quota(tmp_path):
    written(tmp_path, VERSION_2 | {"sys/fs/cgroup/user.slice/job/cpu.max": "120000 100000"})
    program = _BY_QUOTA.format(module=threads.__file__, root=str(tmp_path))
    told = env_of(["-c", program], tmp_path)
    assert told["cpu"] == "8 logical cores visible, 8 in the affinity mask, a quota of 1.2 (cgroup)"
    assert told["threads"] == "1 threads used (OMP_NUM_THREADS=1, set by the command line)"
    assert told["in your program"].endswith("OMP_NUM_THREADS=1")
    by_torchrun = env_of(["-c", program], tmp_path, OMP_NUM_THREADS="1")  # which sets it so for its processes
    assert by_torchrun["threads"] == "1 threads used (OMP_NUM_THREADS=1, set by the environment)"


_CHILD = """
import subprocess, sys
import hypermask_fast
sys.exit(subprocess.call([sys.executable, "-c", "import os; print([os.environ.get(n) for n in {names}])"]))
"""


def test_what_a_command_starts_inherits_its_choice(tmp_path):
    script = tmp_path / "hypermask-fast"
    script.write_text(_CHILD.format(names=list(threads.WAITING)))
    assert ran([str(script)], tmp_path).strip() == str(list(threads.WAITING.values()))


_AFTER_TORCH = """
import os, torch
before = dict(os.environ)
import hypermask_fast
print("unchanged" if dict(os.environ) == before else "changed")
"""


def test_nothing_is_claimed_where_pytorch_was_there_before(tmp_path):
    """Its OpenMP has read the variables already."""
    script = tmp_path / "hypermask-fast"
    script.write_text(_AFTER_TORCH)
    assert ran([str(script)], tmp_path) == "unchanged\n"
