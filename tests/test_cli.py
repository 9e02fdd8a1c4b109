import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from hypermask_fast import InputError, cli, commands
from hypermask_fast.training import describe, run, targets
from hypermask_fast.training.config import RunConfig, load_preset, presets
from hypermask_fast.training.result import Result

SETTINGS = {
    "data.tasks": "2",
    "training.iterations": "8",
    "training.log_every": "4",
    "training.checkpoint_every": "3",
    "target.hidden": "[8]",
    "hypernet.hidden": "[4]",
    "hypernet.embedding": "3",
}
TINY = [word for key, value in SETTINGS.items() for word in ("--set", f"{key}={value}")]
FILES = {"config.toml", "metrics.json", "timing.json", "accuracy_matrix.csv", "accuracy_matrix.png", "log.csv"}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def train(folder: Path, *options: str) -> int:
    return cli.main(["train", "split-digits", "--device", "cpu", "--out", str(folder), *TINY, *options])


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished run that no test changes."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert train(folder, "--seed", "3") == 0
    return folder


@pytest.fixture
def refused(capsys):
    """Runs a command line that must be refused in one line with exit code 2; returns the line."""

    def run_refused(*words: object) -> str:
        assert cli.main([str(word) for word in words]) == 2
        line = capsys.readouterr().err
        assert line.startswith("hypermask-fast: error: ") and line.count("\n") == 1
        return line

    return run_refused


# -- train ------------------------------------------------------------------------------------------------------------


def test_train_writes_its_files_and_shows_the_matrix(tmp_path, capsys):
    assert train(tmp_path / "run", "--seed", "3") == 0
    shown = capsys.readouterr()
    assert contents(tmp_path / "run").keys() >= FILES
    assert re.search(r"^ +1( +\d+\.\d\d){2}$", shown.out, re.M), "the last row of the matrix"
    assert "average accuracy" in shown.out
    assert "task 1 (digits 2, 3) of 0 to 1: iterations 1 to 8\n" in shown.err
    assert re.search(r"^after task 1 \(digits 2, 3\): [\d.]+ [\d.]+ \(average", shown.err, re.M)
    stored = RunConfig.load(tmp_path / "run" / "config.toml")
    assert stored == load_preset("split-digits").with_values({**SETTINGS, "seed": 3})
    assert len((tmp_path / "run" / "log.csv").read_text().splitlines()) == 1 + 2 * 2


def test_the_same_seed_gives_the_same_numbers_and_another_gives_others(tmp_path, finished):
    assert train(tmp_path / "same", "--seed", "3") == 0
    assert train(tmp_path / "other", "--seed", "4") == 0
    metrics = [(folder / "metrics.json").read_bytes() for folder in (finished, tmp_path / "same", tmp_path / "other")]
    assert metrics[0] == metrics[1]
    assert json.loads(metrics[0])["matrix"] != json.loads(metrics[2])["matrix"]


def test_a_folder_with_a_run_is_refused_and_left_alone(finished, refused):
    before = contents(finished)
    assert "already holds a run" in refused("train", "split-digits", "--out", finished, *TINY)
    assert contents(finished) == before


def test_folders_in_other_use_are_refused(tmp_path, refused):
    (tmp_path / "mine.txt").write_text("mine")
    assert "is not empty" in refused("train", "split-digits", "--out", tmp_path, *TINY)
    assert "is a file" in refused("train", "split-digits", "--out", tmp_path / "mine.txt", *TINY)
    assert contents(tmp_path) == {"mine.txt": b"mine"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["split-digit"], "did you mean 'split-digits'"),
        (["nothing.toml"], "cannot read configuration nothing.toml"),
        (
            ["split-digits", "--set", "training.batchsize=1"],
            "'training.batchsize' (did you mean 'training.batch_size'?)",
        ),
        (["split-digits", "--set", "training.lr"], "--set takes key=value"),
        (["split-digits", "--set", "method.sparsity=101"], "from 0 to 100, not 101"),
        (["split-digits", "--set", "data.scenario=split-digit"], "split-digits"),
        (["split-digits", "--set", "data.tasks=6"], "1 .. 5, not 6"),
        (["split-digits", "--set", "target.name=vgg"], "there are mlp, resnet20, zenkenet"),
        (["split-digits", "--set", "target.name=zenkenet"], "zenkenet"),
        (["split-digits", "--set", "method.beta=-1"], "beta must be"),
        (["split-mnist"], "--data-dir"),
        (["split-digits", "--seed", "-1"], "seed must be"),
    ],
)
def test_bad_input_to_train_leaves_no_folder(tmp_path, refused, words, message):
    assert message in refused("train", *words, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_missing_data_files_leave_no_folder(tmp_path, refused):
    (tmp_path / "data").mkdir()
    line = refused("train", "split-mnist", "--data-dir", tmp_path / "data", "--out", tmp_path / "run")
    assert str(tmp_path / "data") in line
    assert not (tmp_path / "run").exists()


def test_a_network_without_an_output_per_class_leaves_no_folder(tmp_path, monkeypatch, refused):
    monkeypatch.setattr(run, "build_target", lambda *_: targets.MLP(64, (), 1))
    assert "has 2 classes per task" in refused("train", "split-digits", "--out", tmp_path / "run", *TINY)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(tmp_path, refused):
    assert "sees no GPU" in refused("train", "split-digits", "--device", "cuda", "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_configuration_file_is_a_preset(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(load_preset("split-digits").with_values({**SETTINGS, "title": "mine"}).to_toml())
    assert cli.main(["train", str(path), "--out", str(tmp_path / "run")]) == 0
    title = "mine: split-digits, 2 tasks of 2 classes, MLP-8"
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["title"] == title


def test_default_folder_is_named_after_the_preset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "split-digits", *TINY]) == 0
    assert contents(tmp_path / "runs" / "split-digits").keys() >= FILES


# -- resume -----------------------------------------------------------------------------------------------------------


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


def test_a_run_under_way_is_evaluated_on_what_it_has_learned(tmp_path, interrupted, refused, capsys):
    interrupted(tmp_path / "early", 5)
    assert "not learned its first task yet" in refused("evaluate", tmp_path / "early")
    interrupted(tmp_path / "later", 13)  # one task of 8 steps, and a part of the next
    assert "0 to 0" in refused("export", tmp_path / "later", "--task", 1, "--to", tmp_path / "net")
    assert cli.main(["evaluate", str(tmp_path / "later")]) == 0
    assert len(table(capsys.readouterr().out)) == 1 + 1, "task 0 and the mean"


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


# -- evaluate and export ----------------------------------------------------------------------------------------------


def table(text: str) -> list[list[float]]:
    return [[float(cell) for cell in re.findall(r"\d+\.\d\d", line)] for line in text.splitlines()[1:]]


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


def test_folders_that_can_t_be_made_are_named(tmp_path, finished, refused):
    (tmp_path / "file").write_text("mine")
    assert "file/run: Not a directory" in refused("train", "split-digits", "--out", tmp_path / "file" / "run", *TINY)
    assert "/proc/net.safetensors" in refused("export", finished, "--task", 0, "--to", "/proc/net.safetensors")


def test_folders_without_permission_are_named(tmp_path, monkeypatch, refused):
    def forbidden(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "is_file", forbidden)
    assert "config.toml: Permission denied" in refused("evaluate", tmp_path)


@pytest.mark.parametrize("seed", [2**63 - 1, 2**45])
def test_large_seeds(tmp_path, seed):
    assert train(tmp_path / "run", "--seed", str(seed)) == 0


@pytest.mark.parametrize(
    ("steps", "seconds", "shown"),
    [(1, 40.0, "0.025 steps"), (1, 2.5, "0.4 steps"), (6, 1.0, "6 steps"), (25, 2.0, "12 steps"), (9000, 3, "3000 s")],
)
def test_slow_runs_have_a_rate_too(tmp_path, monkeypatch, capsys, steps, seconds, shown):
    result = Result(torch.eye(2).double(), torch.zeros(2).double(), float(seconds), steps)
    monkeypatch.setattr(run, "train", lambda *_, **__: result)
    assert train(tmp_path / "run") == 0
    assert f", {shown}" in capsys.readouterr().out


def test_warnings_take_one_line(tmp_path, capsys):
    assert train(tmp_path / "run", "--set", "method.sparsity=0.3") == 0
    assert "hypermask-fast: warning: sparsity is in percent: 0.3" in capsys.readouterr().err.splitlines()[0]


# -- the rest ---------------------------------------------------------------------------------------------------------


def test_presets_lists_every_preset(capsys):
    assert cli.main(["presets"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(presets())
    assert all(describe.title(config) in line for line, config in zip(lines, presets().values(), strict=True))


def test_presets_shows_a_preset_as_a_configuration_file(tmp_path, capsys, refused):
    assert cli.main(["presets", "split-mnist"]) == 0
    (tmp_path / "mine.toml").write_text(capsys.readouterr().out)
    assert RunConfig.load(tmp_path / "mine.toml") == load_preset("split-mnist")
    assert "unknown preset" in refused("presets", "nothing")


@pytest.mark.parametrize("words", [[], ["trian"], ["train"], ["evaluate", "somewhere", "--task-id", "guess"]])
def test_wrong_usage_exits_with_2_in_one_line(capsys, words):
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith("hypermask-fast: error: ") and line.count("\n") == 1


def test_other_exceptions_keep_their_traceback(monkeypatch):
    def fail():
        raise RuntimeError("a bug")

    monkeypatch.setattr(commands.presets, "presets", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["presets"])
