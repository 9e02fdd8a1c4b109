"""`hypermask-fast evaluate` and `export`: their numbers, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from support.command_line import contents, table

from hypermask_fast import InputError, cli
from hypermask_fast.training import run
from hypermask_fast.training.config import RunConfig


def test_evaluate_gives_the_accuracies_of_the_matrix(finished, capsys):
    assert cli.main(["evaluate", str(finished)]) == 0
    last = json.loads((finished / "metrics.json").read_text())["matrix"][-1]
    assert table(capsys.readouterr().out) == [[pytest.approx(v, abs=0.005)] for v in [*last, sum(last) / len(last)]]


def test_evaluate_with_the_task_unknown(finished, capsys):
    assert cli.main(["evaluate", str(finished), "--task-id", "entropy"]) == 0
    rows = table(capsys.readouterr().out)
    assert len(rows) == 3
    assert all(0 <= label <= task <= 100 for task, label in rows), "the class counts only where the task was found"


def test_export_gives_the_model_s_outputs(finished, tmp_path, capsys):
    path = tmp_path / "task1.safetensors"
    assert cli.main(["export", str(finished), "--task", "1", "--to", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "from hypermask_fast.training.exported import load_exported" in shown, "as in the documentation"
    assert f"load_exported('{path}')" in shown
    _, model, scenario = run.load_run(finished)
    x, _ = next(scenario.tasks[1].test.chunks(20))
    net = run.load_exported(path)
    assert not isinstance(net, type(model))
    torch.testing.assert_close(net(x), model(x, task=1))
    assert not torch.allclose(net(x), model(x, task=0))
    about = net.exported
    assert (about.scenario, about.task, about.task_name) == ("split-digits", 1, scenario.tasks[1].name)
    assert (about.class_names, about.input_shape) == (("2", "3"), (1, 8, 8))
    assert torch.equal(about.prepare(scenario.tasks[1].test.inputs[:20]), x)


@pytest.mark.parametrize("format", ["pt2", "onnx"])
def test_export_in_another_format(finished, format, tmp_path, capsys):
    path = tmp_path / f"task1.{format}"
    if format == "onnx":
        pytest.importorskip("onnxscript")
    assert cli.main(["export", str(finished), "--task", "1", "--to", str(path), "--format", format]) == 0
    assert str(path) in capsys.readouterr().out
    _, model, scenario = run.load_run(finished)
    x, _ = next(scenario.tasks[1].test.chunks(7))
    if format == "pt2":
        noted = {"scenario": "", "task": ""}
        y = torch.export.load(path, extra_files=noted).module()(x)
        assert noted["scenario"] == scenario.name and noted["task"] == "1"
    else:
        session = pytest.importorskip("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])
        y = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    torch.testing.assert_close(y, model(x, task=1))


def test_export_of_batch_norm_networks_of_both_kinds(tmp_path):
    config = RunConfig.from_dict(
        {
            "data": {"scenario": "split-digits", "tasks": 1},
            "target": {"name": "resnet20", "width": 16},
            "hypernet": {"hidden": [2], "embedding": 2},
            "training": {"iterations": 1, "batch_size": 4},
        }
    )
    for fidelity in ("default", "official"):
        folder, path = str(tmp_path / fidelity), str(tmp_path / f"{fidelity}.safetensors")  # names do as well as Paths
        run.train(config.with_values({"fidelity": fidelity}), folder)
        run.export_task(folder, 0, path)
        _, model, scenario = run.load_run(folder)
        x, _ = next(scenario.tasks[0].test.chunks(10))
        torch.testing.assert_close(run.load_exported(path)(x), model(x, task=0))


def test_bad_input_to_evaluate_and_export(finished, tmp_path, refused):
    out = tmp_path / "net.safetensors"
    assert "holds no run" in refused("evaluate", tmp_path)
    assert "0 to 1" in refused("export", finished, "--task", 2, "--to", out)
    assert "0 to 1" in refused("export", finished, "--task", -1, "--to", out)
    assert "not a folder" in refused("export", finished, "--task", 0, "--to", tmp_path / "none" / "net")
    assert not out.exists()
    out.write_text("mine")
    assert "already exists" in refused("export", finished, "--task", 0, "--to", out)
    assert out.read_text() == "mine"
    with pytest.raises(InputError, match="not a network exported"):
        run.load_exported(out)
    with pytest.raises(InputError, match="not a network exported"):
        run.load_exported(tmp_path / "none")


def test_damaged_checkpoints_are_refused(finished, tmp_path, refused):
    for name, content in contents(finished).items():
        (tmp_path / name).write_bytes(content)
    (weights,) = tmp_path.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-10])
    for words in (["evaluate", tmp_path], ["train", "split-digits", "--out", tmp_path, "--resume"]):
        assert "cut off" in refused(*words)
    damaged = contents(tmp_path)
    assert damaged.keys() == contents(finished).keys()
    assert all(damaged[name] == content for name, content in contents(finished).items() if name != weights.name)


def test_a_checkpoint_of_another_network_is_refused(finished, tmp_path, refused):
    for name, content in contents(finished).items():
        (tmp_path / name).write_bytes(content)
    config = RunConfig.load(tmp_path / "config.toml").with_values({"target.hidden": [9]})
    (tmp_path / "config.toml").write_text(config.to_toml())
    assert "another network" in refused("evaluate", tmp_path)


def test_a_run_without_a_learned_task(finished, tmp_path, refused):
    (tmp_path / "config.toml").write_bytes((finished / "config.toml").read_bytes())
    assert "not learned its first task yet" in refused("evaluate", tmp_path)


def test_folders_without_permission_are_named(tmp_path, monkeypatch, refused):
    def forbidden(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "is_file", forbidden)
    assert "config.toml: Permission denied" in refused("evaluate", tmp_path)
