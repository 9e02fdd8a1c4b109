"""Under torchrun: ranks that are killed, and what a restart may go on with."""

import random
import sys

import pytest
from support.kill_ranks import TRAIN, killed
from support.launched import command
from support.launching import agent_store, ranks

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


def contents(folder):
    """Of all files but .lock, which whoever is killed leaves there."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {path.relative_to(folder): path.read_bytes() for path in files}


def test_a_restart_goes_on_with_no_run_but_its_own(tmp_path, whole):
    """Its own it goes on with as often as it is started; a folder with another run stays as it is."""
    words, store = [*TRAIN, "--out", str(tmp_path / "run")], agent_store()
    for rank, step in ((1, 10), (0, 3)):
        ended = ranks(2, command, words, {rank: (step, "die", 0.0)}, store=store)
        assert sorted(each.code for each in ended) == [-9, 3]
    before = contents(tmp_path / "run")
    another = agent_store()
    for _ in range(2):
        ended = ranks(2, command, words, store=another)
        assert sorted(each.code for each in ended) == [2, 3]
        assert [each.err for each in ended if each.err] == [
            f"hypermask-fast: error: {tmp_path / 'run'} already holds a run: go on with it by --resume, or choose "
            "another folder (--out)\n"
        ]
    assert contents(tmp_path / "run") == before
    assert [each.code for each in ranks(2, command, words, store=store)] == [0, 0]
    assert (tmp_path / "run" / "metrics.json").read_bytes() == (whole / "metrics.json").read_bytes()


def test_a_rank_that_never_comes_is_named(tmp_path):
    """Which a start before has left its keys of."""
    store, words = agent_store(), ["train", "nothing", "--timeout", "2"]
    assert [each.code for each in ranks(2, command, words, store=store)] == [2, 2]
    (ended,) = ranks(1, command, words, store=store, environment={"WORLD_SIZE": "2"})
    assert ended.code == 3
    assert ended.err == "hypermask-fast: error: waited in vain for rank 1 at the command's beginning (--timeout 2)\n"
