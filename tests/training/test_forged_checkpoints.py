"""Checkpoints whose digests are right and whose content is not: refused in one line, before anything changes."""

import functools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support import forging
from support.forging import Edit, Forged, forge

from hypermask_fast import InputError
from hypermask_fast.data import Scenario
from hypermask_fast.training import checkpoint, report, run
from hypermask_fast.training.config import RunConfig, load_preset
from hypermask_fast.training.interrupt import Stopped

SMALL = {
    "data.tasks": 2,
    "training.iterations": 6,
    "training.batch_size": 512,  # so that 6 iterations are several epochs
    "training.lr": 0.1,
    "training.validate_every": 2,
    "hypernet.hidden": "[6]",
    "hypernet.embedding": 4,
    "target.hidden": "[6, 5]",
}
# name -> settings, and the step after which the run was stopped (None: it is over)
RUNS: dict[str, tuple[dict[str, object], int | None]] = {
    "finished": ({}, None),
    "between tasks": ({}, 6),
    "within a task": ({}, 11),
    "best": ({"training.keep": "best", "training.schedule": "plateau"}, 11),
    "chunks": ({"hypernet.chunk_size": 100}, 11),
    "batch norm": ({"target.name": "resnet20", "target.width": 16, "training.batch_size": 8}, 11),
}
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
_scenarios: dict[str, Scenario] = {}


@functools.cache
def config_of(kind: str) -> RunConfig:
    return load_preset("split-digits").with_values(SMALL | RUNS[kind][0])


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with a run of each kind."""
    folder = tmp_path_factory.mktemp("runs")
    for kind, (_, steps) in RUNS.items():
        asked = iter(range(1, 100))
        try:
            # asked after every step but a task's last, and after every task but the last
            run.train(config_of(kind), folder / kind, stop=lambda asked=asked, steps=steps: next(asked) == steps)
        except Stopped:
            assert steps is not None
        for name in report.FILES:  # so that a run is copied quickly
            (folder / kind / name).unlink(missing_ok=True)
    return folder


@pytest.fixture(autouse=True)
def _digits_read_once(monkeypatch):
    read = run.read_scenario
    monkeypatch.setattr(run, "read_scenario", lambda c: _scenarios.get("") or _scenarios.setdefault("", read(c)))


def _without(prefix: str) -> Edit:
    def edit(forged: Forged) -> None:
        for name in [name for name in forged.tensors if name.startswith(prefix)]:
            del forged.tensors[name]

    return edit


CASES: dict[str, list[tuple[str, Edit]]] = {
    "finished": [*forging.state_edits(False, False), *forging.tensor_edits(["generator.cpu"])],
    "between tasks": [*forging.manifest_edits(), *forging.tensor_file_edits()],
    "within a task": [
        *forging.state_edits(True, False),
        *forging.tensor_edits(
            [
                "model.net.3.weight",
                "model.hypernet.embeddings.1",
                "generator.cpu",
                "result.baseline",
                "result.matrix",
                "optimizer.net.1.weight/exp_avg",
                "optimizer.hypernet.output.weight/exp_avg_sq",
                "optimizer.hypernet.embeddings.1/step",
                "anchor.weights",
                "anchor.targets.0",
            ]
        ),
        ("all moments of a layer missing", _without("optimizer.net.3.weight/")),
        ("all moments missing", _without("optimizer.")),
        ("anchor missing", _without("anchor.")),
    ],
    "best": [
        *((name, edit) for name, edit in forging.state_edits(True, True) if "plateau" in name or "best" in name),
        *forging.tensor_edits(["best.net.3.weight"]),
        ("best model missing", _without("best.")),
    ],
    "chunks": forging.tensor_edits(["anchor.targets.0", "anchor.targets.2", "model.hypernet.chunk_embeddings"]),
    "batch norm": [  # a larger network: what the others lack
        (name, edit)
        for name, edit in forging.tensor_edits([f"model.net.bn.{name}" for name in BUFFERS])
        if name.endswith(("negative", "NaN", "infinite", "missing"))
    ],
}


def resume(folder: Path, kind: str) -> None:
    run.train(config_of(kind), folder, resume=True)


def evaluate(folder: Path, kind: str) -> None:
    run.load_run(folder)


def export(folder: Path, kind: str) -> None:
    run.export_task(folder, 0, folder.with_suffix(".safetensors"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def problem(folder: Path, command: Callable[[Path, str], None], kind: str) -> str:
    """How the command did otherwise than to refuse the checkpoint in one short line; "" where it did not."""
    before = contents(folder)
    try:
        command(folder, kind)
    except InputError as error:
        line = str(error)
        if "\n" in line or (f"{folder}/checkpoint" not in line and f"checkpoint in {folder}" not in line):
            return f"told {line!r}"
        if len(line) > 300 + len(str(folder)):
            return f"told at length {line!r}"
        return "" if contents(folder) == before else "changed the folder"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


@pytest.mark.parametrize("kind", RUNS)
def test_forged(tmp_path, made, kind):
    """More than five hundred in all; `problems` names those that are not refused as they should be."""
    problems = []
    for i, (name, edit) in enumerate(CASES[kind]):
        folder = shutil.copytree(made / kind, tmp_path / "run")
        forge(folder, edit)
        for command in (resume, (evaluate, export)[i % 2]):  # these two read alike
            if told := problem(folder, command, kind):
                problems.append(f"{name}, {command.__name__}: {told}")
        shutil.rmtree(folder)
        assert not list(tmp_path.iterdir()), "nothing was exported"
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("kind", RUNS)
def test_as_they_were_saved_they_are_taken(tmp_path, made, kind):
    folder = shutil.copytree(made / kind, tmp_path / "run")
    forge(folder, lambda _: None)
    run.load_run(folder, data_dir=tmp_path)  # whose tasks may be of any length
    for command in (evaluate, export, resume):
        command(folder, kind)
    assert checkpoint.load(folder).state["task"] == 2
