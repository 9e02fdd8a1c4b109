"""The command line in several processes: one speaks, all end, and what one process can't do is told once."""

import json

import pytest
from support.launched import command
from support.launching import agent_store, ranks

from hypermask_fast import cli
from hypermask_fast.training.config import load_preset

SETTINGS = "data.tasks=2 training.iterations=20 training.log_every=5 training.checkpoint_every=8 target.hidden=[16]"
TRAIN = ["train", "split-digits", *(word for setting in SETTINGS.split() for word in ("--set", setting))]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run's folder in one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert cli.main([*TRAIN, "--out", str(folder)]) == 0
    return folder


def rows(folder):
    return [line.split(",") for line in (folder / "log.csv").read_text().splitlines()[1:]]


@pytest.mark.parametrize("count", [2, 3])
def test_the_numbers_of_one_process_told_once(tmp_path, alone, count):
    first, *others = ranks(count, command, [*TRAIN, "--out", str(tmp_path / "run")])
    assert first.code == 0 and first.err.count("after task 1") == 1 and "average accuracy" in first.out
    assert [(rank.code, rank.out, rank.err) for rank in others] == [(0, "", "")] * len(others)
    folder = tmp_path / "run"
    assert (folder / "checkpoint-002-0000000").is_dir(), "sharded"
    assert (folder / "metrics.json").read_bytes() == (alone / "metrics.json").read_bytes()
    assert (folder / "config.toml").read_bytes() == (alone / "config.toml").read_bytes()
    for mine, theirs in zip(rows(folder), rows(alone), strict=True):
        assert mine[:2] == theirs[:2]
        mine, theirs = ([float(x or 0) for x in row[2:]] for row in (mine, theirs))
        drifts = slice(2, 4)  # small distances, in which float32's rounding shows after some steps
        assert mine[drifts] == pytest.approx(theirs[drifts], rel=5e-3)
        mine[drifts] = theirs[drifts] = []
        assert mine == pytest.approx(theirs, rel=1e-4)


def test_other_commands_are_done_by_one_process(alone):
    first, second = ranks(2, command, ["evaluate", str(alone)])
    assert first.code == 0 and first.out.count("mean") == 1
    assert second == (0, "", "", 0)


LOST = "hypermask-fast: error: "


def one_line(ended, start):
    """The line, where of all ranks one has printed one, and nothing else."""
    texts = [rank.err for rank in ended if rank.err]
    lines = [line for text in texts for line in text.splitlines() if line.startswith("hypermask-fast:")]
    assert len(lines) == 1 and "Traceback" not in "".join(texts), texts
    assert lines[0].startswith(start), lines
    return lines[0]


REFUSED = {
    "batch": ([*TRAIN, "--set", "training.batch_size=2"], {}, "training.batch_size 2 is smaller than the number of"),
    "unknown": (["train", "nothing"], {}, "unknown preset 'nothing'"),
    "usage": (["train"], {}, "the following arguments are required"),
    "timeout": ([*TRAIN, "--timeout", "-1"], {}, "argument --timeout: must be above 0"),
    "differ": ([*TRAIN, "--seed", "RANK"], {}, "ranks 1 and 2 differ from rank 0 in their settings"),
    "data": (["train", "split-mnist", "--data-dir", "/nowhere"], {}, "/nowhere"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_all_find_wrong_is_told_once(tmp_path, case):
    """However late one of them asks who speaks, since torchrun's store outlives them."""
    words, environment, told = REFUSED[case]
    late = {2: (0, "late to ask", 6.0)} if case == "differ" else None
    ended = ranks(
        3, command, [*words, "--out", str(tmp_path / "run")], late, environment=environment, store=agent_store()
    )
    assert [rank.code for rank in ended] == [2, 2, 2]
    assert told in one_line(ended, "hypermask-fast: error: ")
    assert not (tmp_path / "run").exists()


def test_a_first_process_that_has_the_store_keeps_it_until_all_have_asked(tmp_path):
    """As without torchrun. Where no process is lost, how long it waits for the others decides nothing."""
    words = [*TRAIN, "--seed", "RANK", "--out", str(tmp_path / "run")]
    events = dict.fromkeys(range(2), (0, "patient", 100.0)) | {2: (0, "late to ask", 1.0)}
    ended = ranks(3, command, words, events)
    assert [rank.code for rank in ended] == [2, 2, 2]
    assert "ranks 1 and 2 differ from rank 0" in one_line(ended, LOST)


@pytest.mark.parametrize("missing", ["MASTER_ADDR", "RANK", "LOCAL_RANK"])
def test_variables_that_are_not_all_there(tmp_path, missing):
    for ended in ranks(2, command, [*TRAIN, "--out", str(tmp_path / "run")], environment={missing: ""}):
        assert ended.code == 2 and f"WORLD_SIZE is 2, but {missing} is not set" in one_line([ended], LOST)


def test_what_one_rank_alone_finds_wrong_ends_all(tmp_path):
    for rank in (0, 2):
        (tmp_path / f"{rank}.toml").write_text(load_preset("split-digits").to_toml())
    words = ["train", str(tmp_path / "RANK.toml"), "--out", str(tmp_path / "run")]
    ended = ranks(3, command, words, store=agent_store())
    assert sorted(rank.code for rank in ended) == [2, 3, 3]
    assert f"cannot read configuration {tmp_path / '1.toml'}" in one_line(ended, LOST)
    assert not (tmp_path / "run").exists()


FAULTS = {
    "die": (2, "rank 1 ended, seen at task 0 (digits 0, 1), iteration 9", {3, -9}),
    "fail": (2, "this rank's disk is full", {2, 3}),
    "sleep": (2, "waited in vain for rank 1 at task 0 (digits 0, 1), iteration 9", {3}),
}


@pytest.mark.parametrize("what", FAULTS)
def test_a_rank_that_fails_ends_all_with_one_line(tmp_path, what):
    count, told, codes = FAULTS[what]
    words = [*TRAIN, "--out", str(tmp_path / "run"), "--timeout", "5"]
    ended = ranks(count, command, words, {1: (10, what, 12.0)}, store=agent_store())
    assert {rank.code for rank in ended} == codes
    line = one_line(ended, LOST)
    assert told in line
    assert what != "sleep" or "--timeout 5" in line
    assert what == "fail" or "the checkpoint of task 0 (digits 0, 1), iteration 8 is kept" in line
    assert json.loads((tmp_path / "run" / "checkpoint.json").read_text())["state"]["iteration"] == 8


@pytest.mark.parametrize(("who", "then"), [(0, 2), (1, 1), (1, 3)])
def test_a_signal_to_one_rank_stops_all_at_one_place(tmp_path, alone, who, then):
    """And the run goes on in any number of processes."""
    words = [*TRAIN, "--out", str(tmp_path / "run")]
    ended = ranks(2, command, words, {who: (5, "terminate", 0.0)})
    assert [rank.code for rank in ended] == [143 if rank == who else 130 for rank in range(2)]
    line = one_line(ended, "hypermask-fast: interrupted: stopped at task ")
    assert "which is saved; the same command with --resume goes on" in line
    ended = ranks(then, command, [*words, "--resume"])
    assert [rank.code for rank in ended] == [0] * then, ended
    assert (tmp_path / "run" / "metrics.json").read_bytes() == (alone / "metrics.json").read_bytes()
