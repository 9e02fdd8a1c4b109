"""Code of the user's that raises while a run trains or is tested."""

import pytest

from hypermask_fast import cli

TINY = ["--device", "cpu", "--set", "training.iterations=4", "--set", "hypernet.hidden=[4]"]

MINE = """
import torch
from hypermask_fast.data import DatasetSplit, Scenario, TaskData


class Samples:
    def __init__(self, breaks):
        self.breaks = breaks

    def __len__(self):
        return 30

    def __getitem__(self, i):
        if i == self.breaks:
            raise OSError("the disk is gone")
        return torch.randn(6), i % 2


def breaks(train, test, workers=0):
    train, test = (DatasetSplit(Samples(i), num_workers=n) for i, n in ((train, workers), (test, 0)))
    return Scenario("mine", (TaskData("", train, None, test),), (6,), 2)


def in_training():
    return breaks(7, None)


def in_a_process():
    return breaks(7, None, 1)


def in_a_test():
    return breaks(None, 7)
"""


@pytest.mark.parametrize(
    ("function", "place"), [("in_training", ", line 15,"), ("in_a_process", ""), ("in_a_test", ", line 15,")]
)
def test_code_that_raises_later_is_told_in_a_line(function, place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    assert cli.main(["train", "split-digits", "--out", "run", "--scenario", f"mine.py:{function}", *TINY]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"hypermask-fast: error: mine.py{place} raised OSError: the disk is gone"
    assert not (tmp_path / "run").exists()


def test_what_this_library_raises_in_the_users_code_keeps_its_traceback(tmp_path, monkeypatch):
    fault = 'from hypermask_fast.text import text_table; text_table([3], "<")'
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE.replace('raise OSError("the disk is gone")', fault))
    with pytest.raises(TypeError):
        cli.main(["train", "split-digits", "--out", "run", "--scenario", "mine.py:in_training", *TINY])
