"""Presets of CIFAR-100 from the command line, on images in the true format; and runs whose data have become others."""

import json
from dataclasses import replace

import pytest
import torch
from support.datasets import write_cifar100

from hypermask_fast import InputError, cli
from hypermask_fast.data import SCENARIOS
from hypermask_fast.training import describe, run, study
from hypermask_fast.training.config import RunConfig, stored_config
from hypermask_fast.training.step import TaskWork

SMALL = {
    "data.validation_per_class": 1,
    "target.name": "mlp",
    "target.hidden": "[5]",
    "hypernet.embedding": 2,
    "hypernet.hidden": "[3]",
    "training.iterations": 3,
    "training.checkpoint_every": 2,
    "training.schedule": "constant",
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    write_cifar100(folder, 3)
    return folder


@pytest.fixture
def train(images):
    def command(preset, out, *options, **changed):
        settings = {**SMALL, **{key.replace("__", "."): value for key, value in changed.items()}}
        words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
        return cli.main(
            ["train", preset, "--data-dir", str(images), "--out", str(out), "--device", "cpu", *words, *options]
        )

    return command


@pytest.fixture
def killed(train, monkeypatch):
    """A run that was stopped after so many steps."""

    def stopped(preset, out, steps, **changed):
        step, done = TaskWork.step, []

        def dies(*args):
            done.append(1)
            if len(done) > steps:
                raise KeyboardInterrupt
            return step(*args)

        with monkeypatch.context() as patch:
            patch.setattr(TaskWork, "step", dies)
            assert train(preset, out, **changed) == 130

    return stopped


def test_tasks_of_different_sizes_from_the_command_line(tmp_path, train, killed, images, capsys):
    """A first task of 40 classes, then two of 3, of one head: trained, stopped, resumed, evaluated, exported."""
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert train("cifar100-40-20x3", whole, data__tasks=3) == 0
    killed("cifar100-40-20x3", out, 5, data__tasks=3)
    assert train("cifar100-40-20x3", out, "--resume", data__tasks=3) == 0
    assert (out / "metrics.json").read_bytes() == (whole / "metrics.json").read_bytes(), "augmentation goes on too"
    assert json.loads((out / "metrics.json").read_text())["title"] == (
        "cifar100-40-20x3, 3 tasks of 40 + 2 x 3 classes, MLP-5"
    )
    config, model, scenario = run.load_run(out)
    assert model.classes == scenario.classes == (40, 3, 3)
    x = scenario.tasks[0].test.inputs[:4]
    outputs = model(scenario.tasks[1].test.prepare(x), task=1)
    assert outputs.shape == (4, 40) and (outputs[:, 3:] == torch.finfo(torch.float32).min).all()
    for method in ("entropy", "energy", "gradient+entropy"):
        capsys.readouterr()
        assert cli.main(["evaluate", str(out), "--task-id", method, "--to", str(tmp_path / method)]) == 0
        found = json.loads((tmp_path / method / f"evaluation-{method}.json").read_text())
        assert [row["samples"] for row in found["tasks"]] == [40, 3, 3]
        assert "task 1 (classes 17, 81, 41)" in capsys.readouterr().out
    exported = tmp_path / "net.safetensors"
    assert cli.main(["export", str(out), "--task", "2", "--to", str(exported)]) == 0
    net = run.load_exported(exported)
    inputs = net.exported.prepare(x)
    assert net.exported.class_names == ("12", "37", "59")
    torch.testing.assert_close(net(inputs), model(inputs, task=2))
    assert describe.task_labels(config)[2] == "task 2 (classes 12, 37, 59)"


def read_all(out, images, capsys):
    """The lines of every command that would read the run's data, of which none may change its folder."""
    capsys.readouterr()
    lines = []
    resumed = ["train", "cifar100-5x20", "--resume", "--out", str(out), "--set", "target.name=mlp"]
    for command in (
        resumed,
        [*resumed, "--data-dir", str(images)],
        ["evaluate", str(out)],
        ["export", str(out), "--task", "0", "--to", str(out.parent / "net")],
    ):
        before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
        assert cli.main(command) == 2
        assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
        lines.append(capsys.readouterr().err.strip())
    return lines


@pytest.mark.parametrize("steps", [0, 2, 4])
def test_a_run_of_the_earlier_preset_is_told(tmp_path, killed, images, capsys, monkeypatch, steps):
    """As it was saved before: without an edition in config.toml, by a checkpoint whose digest knows of none."""
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setitem(SCENARIOS, "cifar100-5x20", earlier(SCENARIOS["cifar100-5x20"]))
        killed("cifar100-5x20", out, steps, data__tasks=2)
    assert "edition" not in (out / "config.toml").read_text()
    assert (out / "checkpoint.json").exists() == (steps > 0)
    for line in read_all(out, images, capsys):
        assert line.startswith("hypermask-fast") and "\n" not in line
        assert (
            "edition 1 of cifar100-5x20's data, which had another order of classes, another normalisation, and crops "
            "and flips alone, is no longer there: start a new run" in line
        )


def earlier(info):
    """The scenario as a version knew it that had no edition of it but the first."""
    return replace(info, edition=1, before="")


def test_a_new_run_says_the_edition_of_its_data(tmp_path, train, capsys):
    out = tmp_path / "run"
    assert train("cifar100-5x20", out, data__tasks=1) == 0
    assert RunConfig.load(out / "config.toml").data.edition == 2 == stored_config(out).data.edition
    assert train("cifar100-5x20", out, "--resume", data__tasks=1) == 0
    assert "is finished" in capsys.readouterr().out
    assert train("cifar100-5x20", tmp_path / "other", data__tasks=1, data__edition=1) == 2
    assert not (tmp_path / "other").exists()


def test_runs_on_different_editions_are_not_compared(tmp_path, train):
    old, new = tmp_path / "old", tmp_path / "new"
    assert train("cifar100-5x20", new, data__tasks=1) == 0
    old.mkdir()
    (old / "metrics.json").write_bytes((new / "metrics.json").read_bytes())
    (old / "config.toml").write_text((new / "config.toml").read_text().replace("edition = 2\n", ""))
    runs = study.read_runs([old, new])
    with pytest.raises(InputError, match="runs of different editions of cifar100-5x20's data can't be compared: 1 in"):
        study.grouped(runs)
    assert describe.task_labels(runs[0].config) == ["task 0"]
    assert describe.task_labels(runs[1].config) == ["task 0 (classes 87, 0, 52, ...)"]
