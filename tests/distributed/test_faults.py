"""Under torchrun: ranks that are killed, and what a restart may go on with."""

import random
import sys

import pytest
from support.kill_ranks import TRAIN, killed, torchrun
from support.launched import command
from support.launching import ranks

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for torchrun's processes in /proc")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run's folder where nobody is killed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert all(rank.code == 0 for rank in ranks(2, command, [*TRAIN, "--out", str(folder)]))
    return folder


def test_killed_ranks_change_no_number(tmp_path, whole):
    """Once before there is a checkpoint to go on from, and once after."""
    code, said = killed(tmp_path / "run", [(0, 0.5), (5, 0.0)], random.Random(0))
    assert code == 0, said
    assert said.count("exitcode: -9") == 2, said
    assert (tmp_path / "run" / "metrics.json").read_bytes() == (whole / "metrics.json").read_bytes()
    ours = [line for line in said.splitlines() if "Traceback" in line or "hypermask-fast:" in line]
    assert all("rank" in line or "interrupted" in line for line in ours) and len(ours) <= 2, said


def test_a_restart_goes_on_with_no_run_but_its_own(tmp_path, whole):
    """A folder with another run is refused, as often as torchrun tries."""
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    agent = torchrun([*TRAIN, "--out", str(whole), "--set", "training.log_every=5"], restarts=1)
    said, _ = agent.communicate()
    assert agent.returncode != 0
    assert said.count("already holds a run") == 2, said
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == before
