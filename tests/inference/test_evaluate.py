"""`hypermask-fast evaluate` with the task unknown."""

import csv
import json

import pytest
import torch
from support.networks import blob_model, blob_scenario
from torch import nn

import hypermask_fast as hmf
from hypermask_fast import InputError, cli
from hypermask_fast.data import Scenario, TaskData, TensorSplit
from hypermask_fast.inference import METHODS
from hypermask_fast.training import evaluation, run
from hypermask_fast.training.config import load_preset
from hypermask_fast.training.confusion import confusion_figure


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    config = load_preset("split-digits").with_values(
        {"data.tasks": 3, "training.iterations": 30, "training.log_every": 30, "training.checkpoint_every": 0}
    )
    folder = tmp_path_factory.mktemp("runs") / "three"
    run.train(config, folder)
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("method", ["known", *METHODS])
def test_every_method_is_measured_and_written_where_it_is_asked(method, finished, tmp_path, capsys):
    before = contents(finished)
    assert cli.main(["evaluate", str(finished), "--task-id", method, "--to", str(tmp_path / "new" / "folder")]) == 0
    assert contents(finished) == before, "a reader leaves the run as it is"
    said = capsys.readouterr()
    assert "seconds per 1,000 samples" in said.err
    assert ("looks at a batch as a whole" in said.err) == method.startswith("gradient")
    _, model, scenario = run.load_run(finished)
    found = json.loads((tmp_path / "new" / "folder" / f"evaluation-{method}.json").read_text())
    assert len(found["tasks"]) == 3 and found["method"] == method
    assert [sum(row) for row in found["confusion"]] == [len(task.test) for task in scenario.tasks]
    classes = [task["class_percent"] for task in found["tasks"]]
    assert found["mean"]["class_percent"] == pytest.approx(sum(classes) / 3)
    for percent in (f"{value:.2f}" for value in classes):
        assert percent in said.out
    if method != "known":
        evaluation.fit(model, scenario, method)
        x, y = next(scenario.tasks[1].test.chunks(10000))
        prediction = hmf.predict(model, x, method=method)
        row = torch.bincount(prediction.task, minlength=3)
        assert found["confusion"][1] == row.tolist()
        right = ((prediction.task == 1) & (prediction.label == y)).double().mean().item()
        assert classes[1] == pytest.approx(100 * right)
    with (tmp_path / "new" / "folder" / f"evaluation-{method}.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [[int(row[f"taken_for_{j}"]) for j in range(3)] for row in rows] == found["confusion"]
    assert (tmp_path / "new" / "folder" / f"evaluation-{method}.png").read_bytes().startswith(b"\x89PNG")


def test_the_first_tasks_alone(finished, tmp_path, capsys):
    words = ["evaluate", str(finished), "--task-id", "entropy", "--after", "2", "--to", str(tmp_path)]
    assert cli.main(words) == 0
    found = json.loads((tmp_path / "evaluation-entropy-after-2.json").read_text())
    _, model, scenario = run.load_run(finished)
    x = scenario.tasks[0].test.inputs
    x, _ = next(scenario.tasks[0].test.chunks(10000))
    expected = hmf.predict(model, x, model.all_masks([0, 1])).task
    assert found["confusion"][0] == torch.bincount(expected, minlength=2).tolist()
    assert len(capsys.readouterr().out.splitlines()) == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--after", "0"], "--after 0: the run has learned 3 tasks"),
        (["--after", "4"], "--after 4: the run has learned 3 tasks"),
        (["--shuffled"], "--shuffled is for unknown tasks"),
        (["--batch-size", "0"], "--batch-size must be 1 or more"),
        (["--task-id", "entropy", "--layer", "1"], "entropy looks at no layer's features"),
        (["--task-id", "fecam", "--layer", "nothing"], "no layer 'nothing' to take features of; it has"),
    ],
)
def test_what_can_t_be_evaluated(finished, words, message, capsys):
    assert cli.main(["evaluate", str(finished), *words]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_what_is_there_is_not_replaced(finished, tmp_path, capsys):
    (tmp_path / "evaluation-known.csv").write_text("mine")
    assert cli.main(["evaluate", str(finished), "--to", str(tmp_path)]) == 2
    assert "evaluation-known.csv is there already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation-known.csv"]


def _meeting():
    """Two tasks whose samples only batch norm's batch statistics tell apart: a constant shift of all inputs."""
    generator = torch.Generator().manual_seed(0)

    def split(task, count):
        y = torch.arange(count) % 2
        return TensorSplit(torch.randn(count, 8, generator=generator) + 3 * y[:, None] - 1 + 4 * task, y)

    tasks = tuple(TaskData(f"{t}", split(t, 60), split(t, 20), split(t, 40)) for t in range(2))
    return Scenario("meeting", tasks, (8,), 2)


def test_shuffled_mixes_tasks_in_batches_and_says_where_that_matters():
    scenario = _meeting()
    model = blob_model(2, fidelity="official").eval()
    seen = []
    model.net.register_forward_pre_hook(lambda net, args: seen.append(args[0]))
    apart = evaluation.inferred(model, scenario, "entropy", 10)
    assert {len(x) for x in seen} == {40}, "a task's whole test set, for the batch's statistics"
    assert all((x.mean() > 2.4) == (seen[0].mean() > 2.4) for x in seen[:2])
    seen.clear()
    mixed = evaluation.inferred(model, scenario, "entropy", 10, shuffled=True)
    assert {len(x) for x in seen} == {40} and all(1 < x.mean() < 4 for x in seen), "both tasks in every batch"
    assert apart.samples.tolist() == mixed.samples.tolist() == [40, 40]
    assert "gives the task away" in evaluation.gives_away(model, "entropy", False)
    assert evaluation.gives_away(model, "entropy", True) is None
    assert evaluation.gives_away(blob_model(2), "entropy", False) is None
    with pytest.raises(InputError, match="shuffled is for unknown tasks"):
        evaluation.inferred(model, scenario, "known", 10, shuffled=True)


@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_without_such_batch_norm_neither_order_nor_size_of_batches_matter(batch):
    model, scenario = blob_model(3).eval(), blob_scenario()
    once = evaluation.inferred(model, scenario, "max_softmax", 50)
    for shuffled in (False, True):
        again = evaluation.inferred(model, scenario, "max_softmax", batch, shuffled)
        assert torch.equal(again.confusion, once.confusion) and torch.equal(again.right, once.right)


@pytest.mark.parametrize("batch", [13, 40])
def test_batch_norm_without_running_statistics_is_given_each_split_whole(batch):
    """Otherwise accuracy would depend on the size of the batches, whose last one can be a single sample, too."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16, track_running_stats=False), nn.ReLU(), nn.Linear(16, 2))
    model, scenario, seen = hmf.HyperMask(net, 2, 30, hmf.HypernetConfig(6, (8,))).eval(), _meeting(), []
    net.register_forward_pre_hook(lambda net, args: seen.append(len(args[0])))
    assert "gives the task away" in evaluation.gives_away(model, "entropy", False)
    evaluation.accuracy(model, scenario.tasks[0].test, 0, batch)
    evaluation.inferred(model, scenario, "entropy", batch)
    assert set(seen) == {40}


def test_statistics_that_are_there_are_used_unless_they_are_stale():
    model, scenario = blob_model(3).eval(), blob_scenario()
    evaluation.fit(model, scenario, "fecam")
    first = model.fitted["fecam"]
    evaluation.fit(model, scenario, "fecam_task")
    assert model.fitted["fecam"] is first
    with torch.no_grad():
        model.net[0].weight.add_(0.01)
    evaluation.fit(model, scenario, "fecam")
    assert model.fitted["fecam"] is not first


def test_a_picture_of_many_tasks_has_no_numbers():
    for tasks, texts in ((3, 9), (30, 0)):
        confusion = torch.eye(tasks, dtype=torch.int64) * 5
        result = evaluation.Inferred("entropy", confusion, confusion.diagonal(), 1.0)
        figure = confusion_figure(result, {"title": "costs $5"})
        assert len(figure.axes[0].texts) == texts
        assert figure.axes[0].get_title() == "costs \\$5\nentropy: task found 100.0 %, class found 100.0 %"


def test_one_task_is_found_by_every_method(finished, capsys):
    assert cli.main(["evaluate", str(finished), "--task-id", "gradient+entropy", "--after", "1"]) == 0
    assert "100.00" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["evaluate", "inspect", "compare"])
def test_where_nothing_can_be_written_nothing_is_computed(command, finished, tmp_path, capsys):
    (tmp_path / "file").touch()
    for folder, why in (("file", "is a file: give a folder (--to)"), ("file/below", "Not a directory")):
        assert cli.main([command, str(finished), "--to", str(tmp_path / folder)]) == 2
        said = capsys.readouterr()
        assert said.out == "" and why in said.err and said.err.count("\n") == 1
