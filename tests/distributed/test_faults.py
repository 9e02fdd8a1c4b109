"""Under torchrun: ranks that are killed, and what a restart may go on with."""

import random
import sys

import pytest
from support.kill_ranks import TRAIN, killed, torchrun

from hypermask_fast import cli

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for torchrun's processes in /proc")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert cli.main([*TRAIN, "--out", str(folder)]) == 0
    return folder


def test_killed_ranks_change_no_number(tmp_path, alone):
    """Once before there is a checkpoint to go on from, and once after."""
    code, said = killed(tmp_path / "run", [(0, 0.5), (5, 0.0)], random.Random(0))
    assert code == 0, said
    assert said.count("exitcode: -9") == 2, said
    assert (tmp_path / "run" / "metrics.json").read_bytes() == (alone / "metrics.json").read_bytes()
    ours = [line for line in said.splitlines() if "Traceback" in line or "hypermask-fast:" in line]
    assert all("rank" in line or "interrupted" in line for line in ours) and len(ours) <= 2, said


def test_a_restart_goes_on_with_no_run_but_its_own(tmp_path, alone):
    """A folder with another run is refused, as often as torchrun tries."""
    before = {path.name: path.read_bytes() for path in alone.iterdir()}
    agent = torchrun([*TRAIN, "--out", str(alone), "--set", "training.log_every=5"], restarts=1)
    said, _ = agent.communicate()
    assert agent.returncode != 0
    assert said.count("already holds a run") == 2, said
    assert {path.name: path.read_bytes() for path in alone.iterdir()} == before
