"""bench/gpu.sh, with something else in Python's place: what it calls, in which order, and how much time each gets."""

import os
import re
import subprocess
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import gpu_first, registry

ROOT = Path(__file__).parents[2]
_INSTEAD = """#!/usr/bin/env bash
case "$*" in
*get_device_capability*) echo 90; exit ;;
*xdist*) exit 1 ;;
*"bench.table"*) exit ;;
esac
echo "$LIMIT $*" >>"$CALLS"
call="HYPERMASK_CUDA=${HYPERMASK_CUDA:-} $*"
[[ "$call" == ${DEAF:-nothing} ]] && trap '' INT
[[ "$call" == ${HANGS:-${DEAF:-nothing}} ]] && exec sleep 60
[[ "$call" == ${FAILS:-nothing} ]] || exit 0
echo "${SAYS:-it fails}"
exit 3
"""


@pytest.fixture
def script(tmp_path):
    """(arguments, variables) -> (exit status, what it printed, [(limit, what Python was given)]).

    Patterns of calls: FAILS, that say $SAYS and fail; HANGS, that do not end; DEAF, that heed no interrupt either.
    """
    python, calls = tmp_path / "python", tmp_path / "calls"
    python.write_text(_INSTEAD)
    python.chmod(0o755)

    def run(*arguments, **variables):
        calls.write_text("")
        environment = os.environ | {"PYTHON": str(python), "OUT": str(tmp_path / "out"), "CALLS": str(calls)}
        done = subprocess.run(
            ["bash", "bench/gpu.sh", *arguments],
            cwd=ROOT, env=environment | variables, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        made = [line.split(" ", 1) for line in calls.read_text().splitlines()]
        return done.returncode, done.stdout, [(int(limit), what) for limit, what in made]

    return run


def test_what_has_a_target_goes_first_and_has_its_time(script):
    code, _, calls = script()
    assert code == 0
    wanted = [
        "setup.py",
        "bench.smoke",
        "pytest",
        "hypernet_adam all_tasks mixed_tasks",
        "permuted-mnist/task9 split-mnist/task4",
    ]
    wanted += ["masked_linear chunk_masked_linear", "masked_conv2d/forward masked_conv2d/both", "bench.paths"]
    wanted += ["thresholds"]
    at = [next(i for i, (_, what) in enumerate(calls) if word in what) for word in wanted]
    assert at == sorted(at)
    limits = [calls[i][0] for i in at]
    shares = [limits[0], *(after - before for before, after in pairwise(limits))]  # what is not taken goes on
    assert sum(shares) <= 570 - 10  # each can take all of its own
    table = (ROOT / "bench" / "README.md").read_text()
    said = [int(share) for share in re.findall(r"^\| \w+ \| .* \| (\d+) \|$", table, re.MULTILINE)]
    assert said == pytest.approx(shares, abs=5)  # seconds pass here, too


def test_names_are_measured_within_the_time(script):
    code, _, calls = script("hypernet_adam/10", TOTAL="100")
    assert code == 0 and len(calls) == 1
    limit, what = calls[0]
    assert limit <= 90 and what.endswith("hypernet_adam/10")
    assert 0 < int(re.search(r"--limit (\d+)", what)[1]) < limit
    code, printed, calls = script("kernels", TOTAL="12")
    assert code == 1 and not calls and "kernels: no time left" in printed


def outcomes(printed):
    """Phase -> its line at the end."""
    return dict(re.findall(r"^== (\w+): (.*)$", printed, re.MULTILINE))


def test_a_phase_that_fails_does_not_take_the_others_along(script):
    code, printed, calls = script("tests", "kernels", FAILS="*-m pytest*", SAYS="FAILED tests/ops/test_x.py::test_y")
    assert code == 1 and "failed: tests" in printed and "masked_linear" in calls[-1][1]
    found = outcomes(printed)
    assert found["tests"].startswith("failed, exit 3 after") and found["kernels"].startswith("ok after")
    assert printed.count("FAILED tests/ops/test_x.py::test_y") == 2  # as it happens, and at the end
    code, printed, _ = script("kernels")
    assert code == 0 and "FAILED" not in printed  # which an earlier call's log holds


def test_where_cuda_can_not_be_built_the_rest_is_and_what_follows_runs(script):
    code, printed, calls = script("build", "smoke", "kernels", FAILS="HYPERMASK_CUDA=1*setup.py*")
    assert code == 1 and "failed: build" in printed
    assert outcomes(printed)["build"].endswith("; without CUDA's kernels: what follows is Triton's")
    given = [what for _, what in calls]
    assert (
        sum("setup.py" in what for what in given) == 2 and "bench.smoke" in given[-2] and "masked_linear" in given[-1]
    )
    code, printed, calls = script("build", "kernels", FAILS="*setup.py*")
    assert code == 1 and outcomes(printed)["build"].endswith("Triton's; and without the CPU's")
    assert "masked_linear" in calls[-1][1]
    assert sum("unlink" in what for _, what in calls) == 2  # nothing of an earlier build is taken for this one's


def test_a_build_of_cuda_that_hangs_leaves_time_for_the_rest(script):
    code, printed, calls = script("build", "kernels", HANGS="HYPERMASK_CUDA=1*setup.py*", TOTAL="82")
    assert code == 1 and outcomes(printed)["build"].endswith("what follows is Triton's")
    assert sum("setup.py" in what for _, what in calls) == 2 and "masked_linear" in calls[-1][1]


def test_old_setuptools_are_named(script):
    code, printed, _ = script("build", FAILS="*import setuptools*")
    assert code == 0 and outcomes(printed)["build"].endswith("pip install 'setuptools>=77'")


def test_a_phase_that_hangs_is_ended_and_said(script):
    code, printed, calls = script("tests", "kernels", DEAF="*-m pytest*", TOTAL="76")
    assert code == 1 and outcomes(printed)["tests"].startswith("out of time after")
    assert "masked_linear" in calls[-1][1] and outcomes(printed)["kernels"].startswith("ok")


def test_what_the_smoke_phase_finds_is_said_first_and_stops_nothing(script):
    wrong = "SMOKE masked_linear by triton: y is off by 3 times its tolerance of 2e-05"
    code, printed, calls = script("smoke", "tests", FAILS="*bench.smoke*", SAYS=wrong)
    assert code == 1 and "pytest" in calls[-1][1]
    summary = printed.split("\n\n", 1)[1].splitlines()
    assert summary[0] == wrong and summary[-1].startswith("failed: smoke")
    assert [line.split(":")[0] for line in summary if line.startswith("==")] == ["== smoke", "== tests"]


def test_the_gpus_own_tests_come_first():
    names = ["test_a", "test_b[triton]", "test_c[cuda]", "test_d", "test_on_cuda_x"]
    items = [SimpleNamespace(name=name) for name in names]
    gpu_first.pytest_collection_modifyitems(items)
    assert [item.name for item in items] == [names[i] for i in (2, 4, 1, 0, 3)]


def test_every_name_in_it_is_one_that_can_be_measured(script):
    measured = [what.split("--limit ")[1].split(" --")[0].split()[1:] for _, what in script()[2] if "--limit" in what]
    assert len(measured) == 5
    for names in measured:
        registry.select(names, torch.device("cuda"), False)
