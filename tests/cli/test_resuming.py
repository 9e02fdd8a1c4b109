"""`hypermask-fast train --resume`: runs that were interrupted, and what is refused."""

import dataclasses
import shutil
from pathlib import Path

import pytest
from support.command_line import TINY, contents, table, train

from hypermask_fast import cli, commands
from hypermask_fast.training import run
from hypermask_fast.training.config import RunConfig


@pytest.fixture
def interrupted(monkeypatch, capsys):
    """Trains in a folder until Control-C after so many steps."""
    from hypermask_fast.training.step import TaskWork

    step = TaskWork.step

    def train_until(folder: Path, steps: int) -> None:
        done = []

        def interrupted_step(self, *args):
            done.append(1)
            if len(done) > steps:
                raise KeyboardInterrupt
            return step(self, *args)

        with monkeypatch.context() as patch:
            patch.setattr(TaskWork, "step", interrupted_step)
            assert train(folder, "--seed", "3") == 130
        assert "--resume" in capsys.readouterr().err

    return train_until


def test_an_interrupt_before_there_is_a_run_recommends_nothing(tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    for owner, name in ((run, "read_scenario"), (commands.train, "load_preset")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, interrupt)
            assert train(tmp_path / "run") == 130
        assert capsys.readouterr().err == "hypermask-fast: interrupted\n"
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("steps", [2, 5, 11])
def test_an_interrupted_run_resumes_to_the_same_files(tmp_path, finished, interrupted, steps):
    interrupted(tmp_path / "run", steps)
    assert train(tmp_path / "run", "--seed", "3", "--resume") == 0
    for name in ("metrics.json", "config.toml", "accuracy_matrix.csv", "log.csv"):
        assert (tmp_path / "run" / name).read_bytes() == (finished / name).read_bytes(), name


def test_resuming_a_finished_run_changes_no_number(tmp_path, finished):
    assert train(tmp_path / "run", "--seed", "3") == 0
    assert cli.main(["train", "split-digits", "--out", str(tmp_path / "run"), "--resume"]) == 0
    for name in ("metrics.json", "config.toml", "log.csv"):
        assert (tmp_path / "run" / name).read_bytes() == (finished / name).read_bytes(), name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["split-digits", "--set", "training.lr=0.5"], "training.lr=0.5 contradicts"),
        (["split-digits", "--seed", "4"], "seed=4 contradicts"),
        (["split-digits", "--fidelity", "official"], "fidelity=official contradicts"),
        (["split-mnist"], "another preset"),
    ],
)
def test_resume_refuses_what_contradicts_the_run(finished, refused, words, message):
    before = contents(finished)
    assert message in refused("train", *words, "--out", finished, "--resume")
    assert contents(finished) == before


def test_resume_needs_a_run(tmp_path, refused):
    assert "holds no run" in refused("train", "split-digits", "--out", tmp_path, "--resume")
    assert "holds no run" in refused("train", "split-digits", "--out", tmp_path / "none", "--resume")
    assert list(tmp_path.iterdir()) == []


def test_a_run_under_way_is_evaluated_on_what_it_has_learned(tmp_path, interrupted, refused, capsys):
    interrupted(tmp_path / "early", 5)
    assert "not learned its first task yet" in refused("evaluate", tmp_path / "early")
    interrupted(tmp_path / "later", 13)  # one task of 8 steps, and a part of the next
    assert "0 to 0" in refused("export", tmp_path / "later", "--task", 1, "--to", tmp_path / "net")
    assert cli.main(["evaluate", str(tmp_path / "later")]) == 0
    assert len(table(capsys.readouterr().out)) == 1 + 1, "task 0 and the mean"


def test_resume_refuses_a_run_that_is_not_what_it_was(finished, tmp_path, refused):
    resume = ["train", "split-digits", "--out", tmp_path, "--resume"]
    for name, content in contents(finished).items():
        (tmp_path / name).write_bytes(content)
    config = (tmp_path / "config.toml").read_text()
    (tmp_path / "config.toml").write_text(config.replace("iterations = 8", "iterations = 9"))
    assert "other settings" in refused(*resume)
    assert "other settings" in refused("evaluate", tmp_path)
    (tmp_path / "config.toml").write_text(config)
    (tmp_path / "checkpoint.json").unlink()
    before = contents(tmp_path)
    assert "checkpoint.json is missing" in refused(*resume)
    assert contents(tmp_path) == before


def test_titles_decide_nothing(finished, tmp_path):
    """Neither one that was edited nor, as version 0.1.0 had it, one that the checkpoint knows."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    config = RunConfig.load(folder / "config.toml")
    (folder / "config.toml").write_text(dataclasses.replace(config, title="edited").to_toml())
    assert cli.main(["evaluate", str(folder)]) == 0
    assert cli.main(["train", "split-digits", "--out", str(folder), "--resume"]) == 0


def test_runs_of_version_0_1_0_go_on(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(RunConfig, "digest", RunConfig.digest_with_title)
        assert train(tmp_path / "run", "--set", "title=Split digits: 5 tasks") == 0
    assert cli.main(["evaluate", str(tmp_path / "run")]) == 0
    assert train(tmp_path / "run", "--resume") == 0


def test_the_same_command_resumes_a_run_of_another_network(tmp_path, refused, capsys):
    words = ["train", "split-cifar10", "--out", str(tmp_path / "run"), *TINY]
    words += ["--set", "target.name=mlp", "--set", "data.scenario=split-digits", "--set", "data.validation=40"]
    assert cli.main(words) == 0
    assert cli.main([*words, "--resume"]) == 0
    capsys.readouterr()
    told = "holds a run of another preset, split-digits with mlp, not split-cifar10 with resnet20"
    assert told in refused("train", "split-cifar10", "--out", tmp_path / "run", "--resume")


def test_a_run_goes_on_from_another_data_folder(finished, tmp_path):
    for name, content in contents(finished).items():
        (tmp_path / name).write_bytes(content)
    assert cli.main(["train", "split-digits", "--out", str(tmp_path), "--data-dir", str(tmp_path), "--resume"]) == 0
