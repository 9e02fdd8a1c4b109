"""Networks of one's own: what a Trainer shows and leaves, and how its run is loaded, evaluated and exported."""

import io
import json
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save
from support.networks import blob_model, blob_scenario
from torch import nn

import hypermask_fast as hmf
from hypermask_fast import InputError, cli, data
from hypermask_fast.training import checkpoint, describe, evaluation, exported, report, run
from hypermask_fast.training.config import TrainingConfig
from hypermask_fast.training.result import Result
from hypermask_fast.training.trainer import Trainer

CONFIG = TrainingConfig(iterations=30, batch_size=32, lr=1e-2, checkpoint_every=15)


def network() -> nn.Module:
    """That of `blob_model`."""
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 2))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder, trainer) of a run that no test changes."""
    folder = tmp_path_factory.mktemp("own")
    trainer = Trainer(blob_model(), blob_scenario(), CONFIG, seed=5, run_dir=folder / "run", report=folder / "report")
    trainer.fit()
    return folder, trainer


# -- progress ---------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Silent:
    """A logger that is told, and does nothing."""

    def begin_task(self, *_): ...

    step = advance = message = close = begin_task


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("logger", [None, Silent()])
@pytest.mark.parametrize("progress", [None, True, False])
def test_progress_is_shown_where_asked_for_or_on_a_terminal(monkeypatch, progress, logger, terminal):
    stream = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    Trainer(blob_model(1), blob_scenario(1), CONFIG, progress=progress, logger=logger).fit()
    shown = terminal and logger is None if progress is None else progress
    assert ("blobs, 1 task of 2 classes, Sequential; hypernetwork 8-12, sparsity 20 %" in stream.getvalue()) == shown
    assert ("after task 1: " in stream.getvalue()) == shown
    assert ("\x1b[" in stream.getvalue()) == (shown and terminal)


def test_no_progress_unasked_where_rich_is_missing(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    Trainer(blob_model(1), blob_scenario(1), CONFIG).fit()
    assert sys.stderr.getvalue() == ""
    with pytest.raises(InputError, match="the progress bar needs rich"):
        Trainer(blob_model(1), blob_scenario(1), CONFIG, progress=True)


def test_the_progress_display_is_closed_after_an_error(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())

    def fail(result):
        raise InterruptedError

    trainer = Trainer(blob_model(1), blob_scenario(1), CONFIG, progress=True, on_task_end=fail)
    with pytest.raises(InterruptedError):
        trainer.fit()
    assert sys.stderr.getvalue().endswith("\x1b[?25h"), "the cursor is shown again"


# -- report and result ------------------------------------------------------------------------------------------------


def test_a_report_is_left_where_asked_for(trained):
    folder, trainer = trained
    assert {path.name for path in (folder / "report").iterdir()} == set(report.FILES)
    stored = json.loads((folder / "report" / "metrics.json").read_text())
    assert stored["matrix"] == trainer.result.matrix.tolist()
    assert (stored["title"], stored["seed"]) == ("blobs, 3 tasks of 2 classes, Sequential", 5)


def test_a_report_of_another_run_is_not_replaced(trained, tmp_path):
    folder, _ = trained
    before = {path.name: path.read_bytes() for path in (folder / "report").iterdir()}
    trainer = Trainer(blob_model(), blob_scenario(), CONFIG, run_dir=tmp_path / "run", report=folder / "report")
    with pytest.raises(InputError, match=r"report holds the reports of a run \(metrics.json\): choose another folder"):
        trainer.fit()
    assert before == {path.name: path.read_bytes() for path in (folder / "report").iterdir()}
    assert not (tmp_path / "run").exists() and trainer.result.steps == 0
    (tmp_path / "file").write_text("mine")
    trainer = Trainer(blob_model(), blob_scenario(), CONFIG, report=tmp_path / "file")
    with pytest.raises(InputError, match="cannot write .*file"):
        trainer.fit()
    assert trainer.result.steps == 0


def test_a_resumed_run_goes_on_with_its_report(trained, tmp_path):
    def stop() -> bool:
        return trainer.result.steps == 40

    settings = {"seed": 5, "run_dir": tmp_path / "run", "report": tmp_path / "report"}
    trainer = Trainer(blob_model(), blob_scenario(), CONFIG, stop=stop, **settings)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    Trainer(blob_model(), blob_scenario(), CONFIG, **settings).fit(resume=True)
    for name in ("metrics.json", "accuracy_matrix.csv"):
        assert (tmp_path / "report" / name).read_bytes() == (trained[0] / "report" / name).read_bytes()


def test_a_result_prints_as_the_table(monkeypatch):
    result = Result(torch.tensor([[90.0, 20.0], [80.0, 95.5]]).double(), torch.tensor([10.0, 11.0]).double())
    lines = str(result).splitlines()
    assert lines[0].split() == ["after", "task", "0", "1"] and "forgetting           10.00 points" in lines
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert str(result) == repr(result)


@pytest.mark.parametrize("chunk_size", [None, 50])
def test_what_is_said_of_a_model(chunk_size):
    shape = hmf.HypernetConfig(8, (12, 10), chunk_size)
    model = blob_model(2, hypernetwork=shape, beta=0.5, fidelity="official")
    about = describe.about_training(model, blob_scenario(2), CONFIG, 3)
    chunks = " in chunks of 50" if chunk_size else ""
    assert about.title == "blobs, 2 tasks of 2 classes, Sequential"
    assert about.details == (
        f"hypernetwork 8-12-10{chunks}, sparsity 20 %, beta 0.5, lam 0.001, 30 iterations of 32 samples, lr 0.01, "
        "seed 3, official fidelity"
    )


# -- loading ----------------------------------------------------------------------------------------------------------


def test_a_trainers_run_is_loaded_into_a_model_made_like_its_own(trained):
    folder, trainer = trained
    model = blob_model()
    assert run.load_model(folder / "run", model) == 3 and not model.training
    found = [evaluation.accuracy(model, task.test, t, 50) for t, task in enumerate(blob_scenario().tasks)]
    assert found == trainer.result.matrix[-1].tolist()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": 30}, "another model: sparsity is 20.0 there, 30.0 here"),
        ({"fidelity": "official"}, "another model: fidelity is 'default' there, 'official' here"),
        ({"exclude": "4.*"}, "another model: masked is "),
        ({"hypernetwork": hmf.HypernetConfig(8, (13,))}, "another network: hypernet.output.weight is "),
        ({"tasks": 4}, "another network: hypernet.embeddings.3 is not in the checkpoint"),
    ],
)
def test_another_model_is_refused(trained, settings, message):
    model = blob_model(**settings)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError, match=message):
        run.load_model(trained[0] / "run", model)
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_run_under_way_is_loaded_as_it_stands(tmp_path):
    trainer = Trainer(blob_model(), blob_scenario(), CONFIG, run_dir=tmp_path, stop=lambda: trainer.result.steps == 40)
    assert str(trainer.result).splitlines()[0].split() == ["after", "task", "0", "1", "2"]
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    model = blob_model()
    assert run.load_model(tmp_path, model) == 1
    assert all(torch.equal(value, trainer.model.state_dict()[name]) for name, value in model.state_dict().items())


def test_what_load_model_can_t_use(tmp_path):
    with pytest.raises(InputError, match="load_model takes a HyperMask model like the one that was trained, not Seq"):
        run.load_model(tmp_path, network())
    with pytest.raises(InputError, match="no checkpoint in"):
        run.load_model(tmp_path, blob_model())


@pytest.mark.parametrize("words", [["evaluate"], ["export", "--task", "0", "--to", "net"]])
def test_the_command_line_names_the_function(trained, capsys, words):
    assert cli.main([*words, str(trained[0] / "run")]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "hypermask_fast.training.run.load_model(folder, model) loads it" in line


# -- exports ----------------------------------------------------------------------------------------------------------


def test_a_network_of_one_s_own_is_exported(trained, tmp_path):
    folder, scenario = trained[0], blob_scenario()
    model, path = blob_model(), tmp_path / "task1.safetensors"
    run.load_model(folder / "run", model)
    exported.export_model(model, scenario, 1, path)
    net = exported.load_exported(path, network())
    x = scenario.tasks[1].test.inputs
    torch.testing.assert_close(net(x), model(x, task=1))
    with pytest.raises(InputError, match=r"of a network of one's own: load_exported\(path, net\) needs one"):
        exported.load_exported(path)
    other = nn.Sequential(nn.Linear(8, 2), nn.Linear(16, 2))
    before = other[0].weight.clone()
    with pytest.raises(InputError, match=r"task1.safetensors is of another network: .*size mismatch for 0.weight"):
        exported.load_exported(path, other)
    assert torch.equal(other[0].weight, before)
    for task in (3, -1, True, "0"):
        with pytest.raises(InputError, match="is not one of blobs's: 0 to 2"):
            exported.export_model(model, scenario, task, tmp_path / "other")
    with pytest.raises(InputError, match="already exists"):
        exported.export_model(model, scenario, 1, path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


PIXELS = torch.randint(256, (60, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(60) % 6
TRANSFORMS = {
    "none": None,
    "scale": data.Scale(),
    "normalised": data.Normalize((0.25,), (0.5,)),
    "permuted": data.PermutePixels(torch.randperm(36, generator=torch.Generator().manual_seed(0)), pad=1),
    "composed": data.Compose(data.Normalize((0.1,), (0.2,)), data.Scale()),
    "unknown": lambda x: x.float() / 99,
    "partly unknown": data.Compose(data.Scale(), lambda x: x / 99),
}


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_an_export_says_what_it_takes_and_gives(tmp_path, kind):
    given = {} if TRANSFORMS[kind] is None else {"prepare": TRANSFORMS[kind]}
    groups = [(4, 2), (5, 0)]
    scenario = data.split_by_class(PIXELS, LABELS, PIXELS, LABELS, groups, name="pixels", **given)
    net = nn.Sequential(nn.Flatten(), nn.Linear(36 if kind == "permuted" else 16, 2))
    model = hmf.HyperMask(net, 2, hypernetwork=hmf.HypernetConfig(2, (2,)))
    exported.export_model(model, scenario.to("cpu"), 1, tmp_path / "net")
    loaded = exported.load_exported(tmp_path / "net", nn.Sequential(nn.Flatten(), nn.Linear(len(net[1].weight[0]), 2)))
    about = loaded.exported
    assert (about.scenario, about.task, about.task_name, about.class_names) == ("pixels", 1, "5,0", ("5", "0"))
    assert about.input_shape == scenario.input_shape
    if "unknown" in kind:
        assert about.prepare is None
        return
    test = scenario.tasks[1].test
    x, _ = test.batch(torch.arange(10))
    assert torch.equal(about.prepare(test.inputs[:10]), x)
    torch.testing.assert_close(loaded(about.prepare(test.inputs[:10])), model.eval()(x, task=1))
    if kind == "normalised":
        assert (about.prepare.mean, about.prepare.std) == ((0.25,), (0.5,))


def test_classes_without_names_are_numbered(trained, tmp_path):
    exported.export_model(trained[1].model, blob_scenario(), 0, tmp_path / "net")
    about = exported.load_exported(tmp_path / "net", network()).exported
    assert (about.task_name, about.class_names, about.input_shape) == ("blobs 0", ("0", "1"), (8,))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({}, None),
        ({"task_name": None, "class_names": None, "prepare": None}, None),  # as version 0.1.0 wrote it
        ({"class_names": '["a"]'}, "it names 1 of 2 classes"),
        ({"class_names": "7"}, "not a network exported"),
        ({"prepare": '[{"name": "Nothing"}]'}, "no transform is called 'Nothing'"),
        ({"prepare": "[7]"}, "not a network exported"),
        ({"prepare": '[{"name": "PermutePixels", "permutation": [0, 0], "pad": 0}]'}, "exactly once"),
        ({"prepare": '[{"name": "Normalize", "mean": [1]}]'}, "not a network exported"),
        ({"input_shape": "{"}, "not a network exported"),
        ({"task": "one"}, "not a network exported"),
        ({"scenario": None}, "not a network exported"),
    ],
)
def test_metadata_that_is_older_or_altered(trained, tmp_path, changed, message):
    exported.export_model(trained[1].model, blob_scenario(), 0, tmp_path / "net")
    with safe_open(tmp_path / "net", framework="pt") as file:
        metadata = file.metadata()
    metadata = {name: value for name, value in (metadata | changed).items() if value is not None}
    (tmp_path / "other").write_bytes(save(network().state_dict(), metadata))
    if message is not None:
        with pytest.raises(InputError, match=message):
            exported.load_exported(tmp_path / "other", network())
        return
    about = exported.load_exported(tmp_path / "other", network()).exported
    assert (about.class_names, about.task) == (("0", "1"), 0)
    assert (about.task_name, about.prepare) == (("0", None) if changed else ("blobs 0", data.Scale()))


@pytest.mark.parametrize(("entry", "value"), [("threads", 0), ("threads", "two"), ("model", 7), ("model", {})])
def test_what_a_checkpoint_says_of_threads_and_model_is_checked(trained, tmp_path, entry, value):
    trainer = trained[1]
    tensors, state, _ = checkpoint.load(trained[0] / "run")
    checkpoint.save(tmp_path, "003-0000000", tensors, state | {entry: value})
    with pytest.raises(InputError, match=entry):
        run.load_model(tmp_path, blob_model())
    with pytest.raises(InputError, match=entry):
        Trainer(blob_model(), trainer.scenario, CONFIG, run_dir=tmp_path).fit(resume=True)
