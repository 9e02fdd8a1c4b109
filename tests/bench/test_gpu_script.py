"""bench/gpu.sh, with something else in Python's place: what it calls, in which order, and how much time each gets."""

import os
import re
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from bench import registry

ROOT = Path(__file__).parents[2]
_INSTEAD = """#!/usr/bin/env bash
case "$*" in
*get_device_capability*) echo 90; exit ;;
*xdist*) exit 1 ;;
*"bench.table"*) exit ;;
esac
echo "$LIMIT $*" >>"$CALLS"
case "$*" in *"${FAILS:-nothing}"*) exit 3 ;; esac
"""


@pytest.fixture
def script(tmp_path):
    """(arguments, variables) -> (exit status, what it printed, [(limit, what Python was given)])."""
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
    wanted = ["setup.py", "pytest", "hypernet_adam all_tasks mixed_tasks", "permuted-mnist/task9 split-mnist/task4"]
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


def test_a_phase_that_fails_does_not_take_the_others_along_unless_it_is_the_build(script):
    code, printed, calls = script("tests", "kernels", FAILS="pytest")
    assert code == 1 and "failed: tests" in printed and "masked_linear" in calls[-1][1]
    code, printed, calls = script("build", "kernels", FAILS="setup.py")
    assert code == 1 and "failed: build" in printed and len(calls) == 1


def test_every_name_in_it_is_one_that_can_be_measured(script):
    measured = [what.split("--limit ")[1].split(" --")[0].split()[1:] for _, what in script()[2] if "--limit" in what]
    assert len(measured) == 5
    for names in measured:
        registry.select(names, torch.device("cuda"), False)
