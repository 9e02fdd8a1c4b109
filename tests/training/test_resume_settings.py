"""What may be asked for at --resume: what changes none of the numbers so far. A finished run says that it is."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hypermask_fast import cli
from hypermask_fast.training.config import RunConfig, load_preset
from hypermask_fast.training.step import TaskWork

SMALL = {
    "data.tasks": "2",
    "training.iterations": "12",
    "training.log_every": "4",
    "training.checkpoint_every": "3",
    "target.hidden": "[6]",
    "hypernet.hidden": "[4]",
    "hypernet.embedding": "3",
}
NUMBERS = ("metrics.json", "accuracy_matrix.csv", "config.toml", "log.csv")


def train(folder: Path, settings: dict[str, str], *options: str) -> int:
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    return cli.main(["train", "split-digits", "--device", "cpu", "--out", str(folder), *words, *options])


@pytest.fixture
def stopped(tmp_path, monkeypatch, capsys):
    """Makes a run that was killed after so many steps."""

    def stopped_run(steps: int, changed: dict[str, str] | None = None) -> Path:
        step, done = TaskWork.step, []

        def dies(*args):
            done.append(1)
            if len(done) > steps:
                raise KeyboardInterrupt
            return step(*args)

        with monkeypatch.context() as patch:
            patch.setattr(TaskWork, "step", dies)
            settings = SMALL | (changed or {})
            if "training.epochs" in settings:
                del settings["training.iterations"]
            assert train(tmp_path / "run", settings) == (0 if steps == 24 else 130)
        capsys.readouterr()
        return tmp_path / "run"

    return stopped_run


def assert_as_if_new(run_dir: Path, settings: dict[str, str], names: tuple[str, ...] = NUMBERS) -> None:
    """The run has the files of one that had these settings from its beginning."""
    fresh = run_dir.with_name("fresh")
    assert train(fresh, settings) == 0
    for name in names:
        assert (run_dir / name).read_bytes() == (fresh / name).read_bytes(), name


@pytest.mark.parametrize("steps", [2, 7, 17])
def test_how_often_it_saves_and_logs_may_change(stopped, steps):
    run_dir = stopped(steps)
    changed = {
        "training.checkpoint_every": "5",
        "training.log_every": "2",
        "training.validate_every": "7",
        "title": "t",
    }
    assert train(run_dir, changed, "--resume") == 0
    assert_as_if_new(run_dir, SMALL | changed, ("metrics.json", "accuracy_matrix.csv", "config.toml"))


def test_a_change_is_not_lost_by_a_kill_before_the_next_checkpoint(stopped, monkeypatch, capsys):
    run_dir = stopped(4)

    def dies(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TaskWork, "step", dies)
        assert train(run_dir, {"training.checkpoint_every": "5"}, "--resume") == 130
    assert RunConfig.load(run_dir / "config.toml").training.checkpoint_every == 5
    assert train(run_dir, {}, "--resume") == 0
    assert_as_if_new(run_dir, SMALL | {"training.checkpoint_every": "5"})


@pytest.mark.parametrize("without", ["method.ramp=false", "method.sparsity=0"])
@pytest.mark.parametrize("length", ["iterations", "epochs"])
@pytest.mark.parametrize("killed_again", [False, True])
def test_more_iterations_of_the_first_task_without_a_ramp(stopped, monkeypatch, without, length, killed_again):
    key, value = without.split("=")
    before, after = ("12", "20") if length == "iterations" else ("2", "4")
    settings = {name: text for name, text in SMALL.items() if name != "training.iterations"}
    settings |= {key: value, f"training.{length}": before}
    run_dir = stopped(7, settings)
    longer = {f"training.{length}": after}
    if killed_again:
        with monkeypatch.context() as patch:
            patch.setattr(TaskWork, "step", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            assert train(run_dir, longer, "--resume") == 130
        longer = {}
    assert train(run_dir, longer, "--resume") == 0
    assert_as_if_new(run_dir, settings | {f"training.{length}": after})


def test_more_iterations_before_anything_was_saved(stopped):
    run_dir = stopped(2)
    assert not (run_dir / "checkpoint.json").exists()
    assert train(run_dir, {"training.iterations": "15"}, "--resume") == 0
    assert_as_if_new(run_dir, SMALL | {"training.iterations": "15"})


@pytest.mark.parametrize(
    ("steps", "before", "asked", "reason"),
    [
        (7, {}, "training.iterations=20", "method.ramp spreads the sparsity of task 0 over its iterations"),
        (17, {"method.ramp": "false"}, "training.iterations=20", "a task that was trained for less is finished"),
        (24, {"method.ramp": "false"}, "training.iterations=20", "a task that was trained for less is finished"),
        (7, {"method.ramp": "false"}, "training.iterations=11", "has training.iterations=12: more may be asked for"),
        (7, {"method.ramp": "false"}, "training.epochs=30", "has training.iterations=12: more may be asked for"),
        (7, {"training.keep": "best"}, "training.validate_every=5", "contradicts the run"),
        (7, {}, "training.evaluation_batch=7", "contradicts the run"),
        (7, {}, "training.lr=0.1", "contradicts the run"),
        (7, {}, "data.tasks=3", "contradicts the run"),
        (7, {}, "method.ramp=false", "contradicts the run"),
        (7, {}, "seed=5", "contradicts the run"),
    ],
)
def test_what_would_change_numbers_is_refused_with_the_reason(stopped, capsys, steps, before, asked, reason):
    run_dir = stopped(steps, before)
    files = {path: path.read_bytes() for path in run_dir.iterdir()}
    assert train(run_dir, dict([asked.split("=")]), "--resume") == 2
    told = capsys.readouterr().err
    assert reason in told and asked in told and told.count("\n") == 1
    assert {path: path.read_bytes() for path in run_dir.iterdir()} == files


def test_a_configuration_that_was_edited_follows_the_same_rules(stopped, capsys):
    run_dir = stopped(7, {"method.ramp": "false"})
    config = (run_dir / "config.toml").read_text()
    (run_dir / "config.toml").write_text(config.replace("iterations = 12", "iterations = 11"))
    assert train(run_dir, {}, "--resume") == 2
    assert "other settings" in capsys.readouterr().err
    (run_dir / "config.toml").write_text(config.replace("iterations = 12", "iterations = 14"))
    assert train(run_dir, {}, "--resume") == 0
    assert_as_if_new(run_dir, SMALL | {"method.ramp": "false", "training.iterations": "14"})


def test_a_finished_run_says_so(tmp_path, capsys):
    run_dir = tmp_path / "run"
    assert train(run_dir, SMALL) == 0
    (run_dir / "metrics.json").unlink()  # as a kill right after the last checkpoint leaves it
    capsys.readouterr()
    assert train(run_dir, {}, "--resume") == 0
    shown = capsys.readouterr()
    average = json.loads((run_dir / "metrics.json").read_text())["summary"]["average_accuracy"]
    told = f"{run_dir} is finished, with an average accuracy of {average:.2f} %: {run_dir / 'metrics.json'}\n"
    assert (shown.out, shown.err) == (told, "")


@pytest.mark.skipif(sys.platform == "win32", reason="a terminal as Unix has it")
@pytest.mark.parametrize("arguments", [["train", "split-digits", "--resume"], ["train", "split-digits"]])
def test_a_run_that_goes_on_says_so_before_pytorch_is_imported(tmp_path, arguments):
    """On a terminal; where errors are read by a program, they stay alone."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("import os; os._exit(7)")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(__file__).parents[2]}"}
    command = [sys.executable, "-m", "hypermask_fast", *arguments]
    shown, terminal = os.openpty()
    assert subprocess.run(command, stderr=terminal, env=environment).returncode == 7
    os.write(terminal, b"end\n")
    said = b"hypermask-fast: resuming; PyTorch is being loaded first\r\n" if "--resume" in arguments else b""
    read = b""
    while not read.endswith(b"end\r\n"):  # a terminal gives line by line
        read += os.read(shown, 1000)
    assert read == said + b"end\r\n"
    done = subprocess.run(command, capture_output=True, env=environment)
    assert (done.returncode, done.stderr) == (7, b"")


def test_presets_differ_in_what_the_digest_leaves_out_alone():
    config = load_preset("split-digits")
    same = {"training.log_every": 3, "training.checkpoint_every": 0, "training.validate_every": 9, "title": "mine"}
    assert config.with_values(same).digest() == config.digest()
    best = config.with_values({"training.keep": "best"})
    assert best.with_values({"training.validate_every": 9}).digest() != best.digest()
    assert config.with_values({"training.evaluation_batch": 9}).digest() != config.digest()
