"""training.inspect and `hypermask-fast inspect`: what a run leaves of its masks, and that it changes nothing else."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from support.launched import command
from support.launching import ranks
from support.networks import blob_model, blob_scenario

import hypermask_fast as hmf
from hypermask_fast import InputError, cli
from hypermask_fast.data import TensorSplit
from hypermask_fast.training import inspecting, logs
from hypermask_fast.training.config import TrainingConfig, stored_config
from hypermask_fast.training.run import load_model
from hypermask_fast.training.trainer import Trainer

SETTINGS = {
    "data.tasks": "3",
    "training.iterations": "6",
    "training.log_every": "3",
    "training.checkpoint_every": "2",
    "target.hidden": "[8]",
    "hypernet.hidden": "[4]",
    "hypernet.embedding": "3",
    "training.lr": "0.05",
}
TINY = [word for key, value in SETTINGS.items() for word in ("--set", f"{key}={value}")]
INSPECT = ("--set", "training.inspect=true")


def train(folder: Path, *options: str) -> int:
    return cli.main(["train", "split-digits", "--device", "cpu", "--out", str(folder), *TINY, *options])


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[bool, Path]:
    """A run that inspects and one that doesn't; no test changes them."""
    folder = tmp_path_factory.mktemp("runs")
    assert train(folder / "inspects", *INSPECT) == 0 and train(folder / "plain") == 0
    return {True: folder / "inspects", False: folder / "plain"}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = folder.glob("checkpoint-*")
    return load_file(path)


def inspections(folder: Path) -> dict[str, bytes]:
    """All that an inspection has written to a run's folder."""
    files = [folder / inspecting.HISTORY, folder / inspecting.TABLE, *(folder / inspecting.RECORDS).iterdir()]
    return {file.name: file.read_bytes() for file in files}


def test_no_trained_number_depends_on_it(runs):
    mine, plain = tensors(runs[True]), tensors(runs[False])
    assert mine.keys() == plain.keys() and all(torch.equal(mine[name], plain[name]) for name in mine)
    for name in ("metrics.json", "log.csv", "accuracy_matrix.csv"):
        assert (runs[True] / name).read_bytes() == (runs[False] / name).read_bytes(), name
    assert {path.name for path in runs[True].iterdir()} - {path.name for path in runs[False].iterdir()} == {
        inspecting.HISTORY,
        inspecting.TABLE,
        inspecting.RECORDS,
    }
    digests = {stored_config(folder).digest() for folder in runs.values()}
    assert len(digests) == 1


def test_json_and_rows_after_every_task(runs):
    history = json.loads((runs[True] / inspecting.HISTORY).read_text())
    assert [entry["after_task"] for entry in history] == [0, 1, 2]
    assert [entry["tasks"] for entry in history] == [[0], [0, 1], [0, 1, 2]]
    assert [[each["task"] for each in entry["drift"]] for entry in history] == [[0], [0, 1], [0, 1, 2]]
    for entry in history:
        last = entry["drift"][-1]  # the task just learned is what it is
        assert last["whole"]["flipped"] == last["whole"]["mask_change"] == last["predictions_changed"] == 0
    assert history[2]["drift"][0]["whole"]["logit_change"] > 0 and history[2]["drift"][0]["samples"] > 0
    with (runs[True] / inspecting.TABLE).open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["after_task"], row["task"]) for row in rows] == [
        (str(k), str(t)) for k in range(3) for t in range(k + 1)
    ]
    assert float(rows[-2]["flipped"]) == history[2]["drift"][1]["whole"]["flipped"]
    assert float(rows[-2]["used"]) == history[2]["whole"]["used"][1]


def test_the_last_inspection_is_that_of_the_command(runs, tmp_path, capsys):
    assert cli.main(["inspect", str(runs[True]), "--to", str(tmp_path / "new")]) == 0
    shown = capsys.readouterr().out
    assert "flipped %" in shown and f"wrote {tmp_path / 'new' / 'masks-drift.png'}" in shown
    found = json.loads((tmp_path / "new" / "masks.json").read_text())
    last = json.loads((runs[True] / inspecting.HISTORY).read_text())[-1]
    assert found["drift"] == last["drift"] and found["whole"] == last["whole"]
    assert "split-digits, 3 tasks of 2 classes" in found["title"] and "seed 0" in found["title"]


def test_without_records_drift_is_not_known_and_a_run_s_folder_is_not_written(runs, capsys):
    before = {path: path.read_bytes() for path in runs[False].rglob("*") if path.is_file()}
    assert cli.main(["inspect", str(runs[False]), "--tasks", "2", "0"]) == 0
    shown = capsys.readouterr().out
    assert "not recorded (train with --set training.inspect=true)" in shown and "flipped" not in shown
    assert [line.split()[0] for line in shown.splitlines()[3:5]] == ["2", "0"]
    assert before == {path: path.read_bytes() for path in runs[False].rglob("*") if path.is_file()}


@pytest.mark.parametrize("stop_at", [(0, 1), (0, 6), (1, 1), (1, 5), (2, 3)])
def test_a_resumed_run_has_the_same_inspections(runs, tmp_path, monkeypatch, stop_at):
    """Stopped within a task or, with (0, 6), after it was inspected and before the checkpoint is saved."""
    advance, save, here = logs.CsvLog.advance, Trainer._save, [0, 0]

    class Killed(BaseException): ...

    def advanced(self, iterations):
        here[1] += iterations
        if tuple(here) == stop_at and stop_at != (0, 6):
            raise Killed
        return advance(self, iterations)

    def saved(self, *given):
        if stop_at == (0, 6) and self._at.task == 1:
            raise Killed
        here[:] = [self._at.task, self._at.iteration]
        return save(self, *given)

    with monkeypatch.context() as patched:
        patched.setattr(logs.CsvLog, "advance", advanced)
        patched.setattr(Trainer, "_save", saved)
        with pytest.raises(Killed):
            train(tmp_path / "run", *INSPECT)
    assert train(tmp_path / "run", "--resume") == 0
    assert inspections(tmp_path / "run") == inspections(runs[True])
    assert (tmp_path / "run" / "metrics.json").read_bytes() == (runs[True] / "metrics.json").read_bytes()


def test_it_can_be_asked_for_when_a_run_is_resumed(runs, tmp_path, monkeypatch):
    after = Trainer._after_task

    class Killed(BaseException): ...

    def killed(self):
        after(self)
        if self._at.task == 1:
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_after_task", killed)
        with pytest.raises(Killed):
            train(tmp_path / "run")
    assert train(tmp_path / "run", "--resume", *INSPECT) == 0
    mine = json.loads((tmp_path / "run" / inspecting.HISTORY).read_text())
    whole = json.loads((runs[True] / inspecting.HISTORY).read_text())
    assert [entry["after_task"] for entry in mine] == [1, 2]
    assert [each["task"] for each in mine[-1]["drift"]] == [1, 2]  # task 0 was learned before
    assert mine[-1]["whole"] == whole[-1]["whole"] and mine[-1]["drift"] == whole[-1]["drift"][1:]
    with (tmp_path / "run" / inspecting.TABLE).open() as file:
        assert [row["flipped"] == "" for row in csv.DictReader(file)] == [True, False, True, False, False]


def test_in_two_processes_one_of_them_inspects(runs, tmp_path):
    words = ["train", "split-digits", "--device", "cpu", "--out", str(tmp_path / "run"), *TINY, *INSPECT]
    words += ["--set", "training.shard=none"]
    assert [rank.code for rank in ranks(2, command, words)] == [0, 0]
    assert (tmp_path / "run" / "metrics.json").read_bytes() == (runs[True] / "metrics.json").read_bytes()
    mine, alone = (json.loads((folder / inspecting.HISTORY).read_text()) for folder in (tmp_path / "run", runs[True]))
    for entry, expected in zip(mine, alone, strict=True):
        assert entry["tasks"] == expected["tasks"]
        assert entry["whole"]["mean_kept_value"] == pytest.approx(expected["whole"]["mean_kept_value"], rel=1e-3)


@pytest.fixture
def sharded():
    """A sharded model, on the one rank of a process group."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield hmf.distributed.shard(blob_model())
    finally:
        dist.destroy_process_group()


def test_a_sharded_hypernetwork_is_refused_before_anything_is_done(sharded, tmp_path):
    with pytest.raises(
        InputError, match=r"training\.inspect = true needs all of the hypernetwork in each process: set "
    ):
        Trainer(sharded, blob_scenario(), config(), run_dir=tmp_path)
    for look in (lambda: hmf.analysis.inspect(sharded), lambda: hmf.analysis.record(sharded, 0)):
        with pytest.raises(InputError, match="a sharded hypernetwork's masks are looked at in one process"):
            look()
    assert list(tmp_path.iterdir()) == []


# -- a Trainer of one's own --------------------------------------------------------------------------------------------


class Recorder:
    def __init__(self):
        self.rows = []

    def step(self, task, iteration, values):
        self.rows.append((task, iteration, values))

    def begin_task(self, *_): ...

    advance = message = begin_task

    def close(self): ...


def config(**settings) -> TrainingConfig:
    return TrainingConfig(**{"iterations": 4, "lr": 0.05, "log_every": 4, "inspect": True} | settings)


def test_a_trainer_tells_its_loggers(tmp_path):
    recorder = Recorder()
    Trainer(blob_model(), blob_scenario(), config(), logger=recorder, report=tmp_path).fit()
    told = [(task, iteration, values) for task, iteration, values in recorder.rows if "inspect/used" in values]
    assert [row[:2] for row in told] == [(0, 4), (1, 4), (2, 4)]
    assert set(told[0][2]) == {"inspect/used", "inspect/free", "inspect/mean_kept_value"}
    assert set(told[2][2]) - set(told[0][2]) == {
        "inspect/flipped",
        "inspect/mask_change",
        "inspect/predictions_changed",
    }
    assert all(isinstance(value, float) for *_, values in told for value in values.values())
    assert told[2][2]["inspect/free"] == pytest.approx(100 - told[2][2]["inspect/used"])
    drift = json.loads((tmp_path / inspecting.HISTORY).read_text())[2]["drift"][:2]  # of the tasks before the last
    assert told[2][2]["inspect/flipped"] == pytest.approx(sum(each["whole"]["flipped"] for each in drift) / 2)
    changes = [each["predictions_changed"] for each in drift]
    assert told[2][2]["inspect/predictions_changed"] == pytest.approx(sum(changes) / 2)


@pytest.mark.parametrize("where", ["run_dir", "report"])
def test_a_trainer_s_folder(tmp_path, where):
    Trainer(blob_model(), blob_scenario(), config(), **{where: tmp_path}).fit()
    records = inspecting.read_records(tmp_path, range(3))
    assert sorted(records) == [0, 1, 2]
    if where == "run_dir":
        model = blob_model()
        assert load_model(tmp_path, model) == 3
        scenario = blob_scenario()
        found = hmf.analysis.inspect(
            model, learned=records, inputs=inspecting.recorded_samples(scenario, records)
        ).to_dict(pairs=False)
        last = json.loads((tmp_path / inspecting.HISTORY).read_text())[-1]
        assert {"after_task": 2, **json.loads(json.dumps(found))} == last


def test_another_run_s_inspection_is_not_replaced(tmp_path):
    (tmp_path / inspecting.TABLE).write_text("mine")
    for where in ("run_dir", "report"):
        with pytest.raises(InputError, match=r"holds the inspection of a run \(inspect\.csv\): choose another folder"):
            Trainer(blob_model(), blob_scenario(), config(), **{where: tmp_path}).fit()
    assert (tmp_path / inspecting.TABLE).read_text() == "mine"
    Trainer(blob_model(), blob_scenario(), config(inspect=False), run_dir=tmp_path / "other").fit()


def test_data_that_are_others_now_are_not_compared():
    first, other = blob_scenario(), blob_scenario(seed=1)
    model = blob_model()
    records = {0: hmf.analysis.record(model, 0, inspecting.first_samples(first, 0))}
    assert torch.equal(inspecting.recorded_samples(first, records)[0], first.tasks[0].test.batch(torch.arange(100))[0])
    assert inspecting.recorded_samples(other, records) == {}


def test_data_that_are_random_leave_the_generator_alone(monkeypatch):
    scenario = blob_scenario()
    batch = TensorSplit.batch
    monkeypatch.setattr(TensorSplit, "batch", lambda *given: (batch(*given)[0] + torch.rand(8), batch(*given)[1]))
    before = torch.get_rng_state()
    inspecting.first_samples(scenario, 0)
    assert torch.equal(before, torch.get_rng_state())


def test_csv_log_has_no_row_for_it(tmp_path):
    log = logs.CsvLog(tmp_path / "log.csv")
    log.step(0, 5, {"loss": 1.0})
    log.step(0, 5, {"inspect/used": 70.0})
    log.close()
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 2


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def refused(capsys):
    """Runs a command line that must be refused in one line with exit code 2; returns the line."""

    def run_refused(*words: object) -> str:
        assert cli.main([str(word) for word in words]) == 2
        shown = capsys.readouterr()
        line = shown.err
        assert shown.out == ""  # it is refused before the work
        assert line.startswith("hypermask-fast: error: ") and line.count("\n") == 1
        return line

    return run_refused


def test_inspect_refuses_what_is_not_there(runs, tmp_path, refused):
    assert "holds no run" in refused("inspect", tmp_path)
    for task in ("3", "-1"):
        line = refused("inspect", runs[True], "--tasks", "0", task)
        assert f"task {task} is not among those this run has learned: 0 to 2" in line
    assert "task 1 is named twice" in refused("inspect", runs[True], "--tasks", "1", "1")
    (tmp_path / "masks.json").write_text("mine")
    assert "masks.json exists: choose another folder" in refused("inspect", runs[True], "--to", tmp_path)
    (tmp_path / "run").mkdir()
    shutil.copy(runs[True] / "config.toml", tmp_path / "run")
    assert "has not learned its first task yet" in refused("inspect", tmp_path / "run")


def test_damaged_records_and_reports_are_named(runs, tmp_path, refused):
    shutil.copytree(runs[True], tmp_path / "run")
    path = tmp_path / "run" / inspecting.RECORDS / "task-001.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    assert "task-001.safetensors is no record of a learned task" in refused("inspect", tmp_path / "run")
    for text in ("", "{}", "[1]", '[{"after_task": "0"}]'):
        (tmp_path / inspecting.HISTORY).write_text(text)
        with pytest.raises(InputError, match=r"inspect\.json is damaged \("):
            inspecting.Inspector(tmp_path, 1)
