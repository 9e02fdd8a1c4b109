"""The training loop: what it learns, what it keeps, and that a stopped run goes on as if never stopped."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from support.networks import TiedLayers, blob_model, blob_scenario
from support.training import Recorder, config
from torch import nn

import hypermask_fast as hmf
from hypermask_fast import InputError
from hypermask_fast.data import Scenario, TaskData, TensorSplit
from hypermask_fast.training import evaluation
from hypermask_fast.training import trainer as trainer_module
from hypermask_fast.training.config import TrainingConfig
from hypermask_fast.training.trainer import Trainer


def test_learns_every_task_and_keeps_the_first():
    recorder = Recorder()
    result = Trainer(blob_model(beta=1.0, lam=0.1), blob_scenario(), config(iterations=100), logger=recorder).fit()
    assert result.matrix.shape == (3, 3) and not result.matrix.isnan().any()
    assert result.matrix[2].min() > 90
    assert result.baseline.mean() < 80
    assert result.steps == recorder.advanced == 300
    assert recorder.tasks == [(0, 100, 0), (1, 100, 0), (2, 100, 0)]
    losses = [values["loss"] for task, _, values in recorder.rows if task == 2]
    assert losses[-1] < losses[0]
    sparsities = [values["sparsity"] for _, _, values in recorder.rows]
    assert sparsities[:10] == pytest.approx([2 * i for i in range(1, 11)])  # 20 percent, over the first task
    assert set(sparsities[10:]) == {20}


def test_without_ramp():
    recorder = Recorder()
    Trainer(blob_model(1), blob_scenario(1), config(), ramp=False, logger=recorder).fit()
    assert {values["sparsity"] for _, _, values in recorder.rows} == {20}


def test_same_seed_same_numbers():
    runs = [Trainer(blob_model(), blob_scenario(), config(), seed=seed).fit() for seed in (4, 4, 5)]
    assert torch.equal(runs[0].matrix, runs[1].matrix)
    assert not torch.equal(runs[0].matrix, runs[2].matrix)


@pytest.mark.parametrize("stop_at", [(0, 7), (0, 31), (1, 16), (2, 1), (2, 39)])
@pytest.mark.parametrize("settings", [{}, {"keep": "best", "schedule": "plateau", "validate_every": 9}], ids=str)
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, stop_at, settings):
    whole = Trainer(blob_model(), blob_scenario(), config(**settings), seed=4)
    expected = whole.fit()
    with pytest.raises(InterruptedError):
        Trainer(
            blob_model(), blob_scenario(), config(**settings), seed=4, run_dir=tmp_path, logger=Recorder(stop_at)
        ).fit()
    reported, recorder = [], Recorder()
    torch.manual_seed(99)  # whatever the new process has drawn
    resumed = Trainer(
        blob_model(lam=1e-3),
        blob_scenario(),
        config(**settings),
        seed=4,
        run_dir=tmp_path,
        logger=recorder,
        on_task_end=lambda result: reported.append(result.matrix.clone()),
    )
    result = resumed.fit(resume=True)
    assert recorder.tasks[0] == (stop_at[0], 40, (stop_at[1] - 1) // 15 * 15)  # not from the start again
    assert result.steps == 120
    assert torch.equal(result.matrix, expected.matrix) and torch.equal(result.baseline, expected.baseline)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    assert len(reported) == 3 - stop_at[0] + (stop_at[0] > 0)


def test_resume_of_a_finished_run_trains_nothing(tmp_path):
    first = Trainer(blob_model(), blob_scenario(), config(), run_dir=tmp_path).fit()
    recorder = Recorder()
    again = Trainer(blob_model(), blob_scenario(), config(), run_dir=tmp_path, logger=recorder).fit(resume=True)
    assert torch.equal(first.matrix, again.matrix) and recorder.tasks == []


def test_checkpoints_go_to_a_new_folder_and_replace_no_other_run_s(tmp_path):
    folder = tmp_path / "runs" / "new"
    Trainer(blob_model(), blob_scenario(), config(iterations=1), run_dir=str(folder)).fit()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(InputError, match=r"new holds a checkpoint: fit\(resume=True\) goes on from it"):
        Trainer(blob_model(), blob_scenario(), config(iterations=1), run_dir=folder).fit()
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="cannot write .*file/run: Not a directory"):
        Trainer(blob_model(), blob_scenario(), config(), run_dir=tmp_path / "file" / "run").fit()


def test_best_model_is_kept(monkeypatch):
    """The model of the first best check, with both its networks; a later check that only equals it changes nothing."""
    scenario = blob_scenario(1)
    scripted, states = iter([50.0, 80.0, 60.0, 80.0]), []

    def accuracy(model, split, *args):
        if split is not trainer.scenario.tasks[0].validation:
            return 0.0
        states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return next(scripted)

    monkeypatch.setattr(trainer_module, "accuracy", accuracy)
    trainer = Trainer(
        blob_model(1), scenario, config(iterations=20, batch_size=200, keep="best", validate_every=5, epochs=None)
    )
    monkeypatch.setattr(TrainingConfig, "epoch_length", lambda self, samples: 1000)
    trainer.fit()
    assert len(states) == 4
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, states[1][name]), name
    assert not torch.equal(states[1]["net.0.weight"], states[3]["net.0.weight"])


def test_validation_is_checked_every_so_often_at_epochs_ends_and_at_the_end():
    recorder = Recorder()
    Trainer(
        blob_model(1), blob_scenario(1), config(iterations=32, keep="best", validate_every=10), logger=recorder
    ).fit()
    checked = [i for _, i, values in recorder.rows if "validation_accuracy" in values]
    assert checked == [7, 10, 14, 20, 21, 28, 30, 32]  # 200 samples in batches of 32: an epoch is 7 iterations


def test_plateau_lowers_the_learning_rate():
    recorder = Recorder()
    Trainer(
        blob_model(1), blob_scenario(1), config(epochs=40, iterations=None, schedule="plateau"), logger=recorder
    ).fit()
    rates = [values["lr"] for _, _, values in recorder.rows]
    assert rates[0] == 1e-2 and rates[-1] <= 1e-3 * 1.001
    ratios = {round(b / a, 4) for a, b in pairwise(rates) if a != b}
    assert ratios == {round(math.sqrt(0.1), 4)}


def test_accuracy_by_hand():
    model, scenario = blob_model().eval(), blob_scenario()
    split = scenario.tasks[1].test
    expected = 100 * (model(split.inputs, 1).argmax(-1) == split.labels).double().mean().item()
    assert evaluation.accuracy(model, split, 1, 7) == pytest.approx(expected)
    empty = TensorSplit(torch.empty(0, 8), torch.empty(0, dtype=torch.int64))
    assert math.isnan(evaluation.accuracy(model, empty, 1, 7))


@pytest.mark.parametrize("gradient", ["factored", "dense"])
def test_either_gradient_trains_the_same(gradient):
    """The 2-norm's drift is smooth: rounding stays rounding."""
    exact = Trainer(smooth_model(), blob_scenario(2), config(gradient="auto")).fit()
    other = Trainer(smooth_model(), blob_scenario(2), config(gradient=gradient)).fit()
    assert (exact.matrix - other.matrix).abs().max() <= 1


def smooth_model():
    model = blob_model(2, drift_norm=2)
    model.net[3].p = 0.0
    return model


def test_logged_loss_holds_the_drift():
    recorder = Recorder()
    Trainer(blob_model(2, beta=3.0, lam=0.5), blob_scenario(2), config(), logger=recorder).fit()
    for task, _, values in recorder.rows:
        drift = 3.0 * values["output_drift"] + 0.5 * values["weight_drift"] if task else 0.0  # of two tasks
        assert values["loss"] == pytest.approx(values["cross_entropy"] + drift, rel=1e-5)
        assert values["weight_drift"] > 0  # measured in the first task too
        assert (values["output_drift"] > 0) == (task > 0)


def test_bf16_trains_and_keeps_the_masters_in_float32():
    recorder = Recorder()
    trainer = Trainer(blob_model(1), blob_scenario(1), config(iterations=80, precision="bf16"), logger=recorder)
    seen = []
    trainer.model.net[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    result = trainer.fit()
    assert torch.bfloat16 in seen
    assert result.matrix[0, 0] > 90
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("keep", ["last", "best"])
def test_graph_gives_the_eager_numbers(keep):
    settings = {"keep": keep, "iterations": 60}
    eager = Trainer(smooth_model(), blob_scenario(2), config(cuda_graph=False, **settings), device="cuda")
    recorder = Recorder()
    graphed = Trainer(smooth_model(), blob_scenario(2), config(**settings), device="cuda", logger=recorder)
    eager.fit()
    graphed.fit()
    assert not [text for text in recorder.said if "without a CUDA graph" in text]
    for (name, a), b in zip(eager.model.named_parameters(), graphed.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)


def test_official_evaluation_is_one_batch():
    model, scenario = blob_model(fidelity="official").eval(), blob_scenario()
    split = scenario.tasks[0].test
    whole = 100 * (model(split.inputs, 0).argmax(-1) == split.labels).double().mean().item()
    assert evaluation.accuracy(model, split, 0, 3) == pytest.approx(whole)


def test_entropy_accuracy_by_hand():
    trainer = Trainer(blob_model(), blob_scenario(), config(iterations=100))
    trainer.fit()
    model = trainer.model.eval()
    found = evaluation.entropy_accuracy(model, trainer.scenario, 9)
    for number, task in enumerate(trainer.scenario.tasks):
        prediction = hmf.predict(model, task.test.inputs)
        right = prediction.task == number
        assert found.task[number] == pytest.approx(100 * right.double().mean().item())
        both = right & (prediction.label == task.test.labels)
        assert found.label[number] == pytest.approx(100 * both.double().mean().item())


def test_datasets_train_too():
    dataset = torch.utils.data.TensorDataset(torch.randn(50, 8), torch.randint(2, (50,)))
    scenario = hmf.data.from_datasets([(dataset, dataset, dataset)], in_memory=False)
    result = Trainer(blob_model(1), scenario, config()).fit()
    assert not result.matrix.isnan().any()


def test_what_a_trainer_can_t_use():
    with pytest.raises(InputError, match="a HyperMask model and a Scenario, not Linear and list"):
        Trainer(nn.Linear(8, 2), [], config())
    with pytest.raises(InputError, match="the scenario has 3 tasks, the model only 2"):
        Trainer(blob_model(2), blob_scenario(3), config())
    empty = TensorSplit(torch.empty(0, 8), torch.empty(0, dtype=torch.int64))
    task = blob_scenario(1).tasks[0]
    scenario = Scenario("blobs", (TaskData("t", task.train, empty, task.test),), (8,), 2)
    with pytest.raises(InputError, match="need validation data"):
        Trainer(blob_model(1), scenario, config(keep="best"))


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (nn.Linear(8, 1), r"has shape \(2, 1\): scenario blobs has 2 classes per task and needs \(2, 2 or more\)"),
        (nn.Sequential(nn.Linear(8, 4), nn.Unflatten(1, (2, 2))), r"has shape \(2, 2, 2\)"),
        (nn.Linear(9, 2), r"expects input \(..., 9\), not \(2, 8\)"),
    ],
)
def test_a_network_that_does_not_fit_is_refused_before_training(net, message):
    model = hmf.HyperMask(net, 3, hypernetwork=hmf.HypernetConfig(embedding=4, hidden=(4,)))
    with pytest.raises(InputError, match=message):
        Trainer(model, blob_scenario(), config())
    assert model.training


def test_a_model_in_evaluation_mode_is_trained_in_training_mode():
    """As `load_run` leaves it: the numbers are those of one that was in training mode."""
    results = [Trainer(model, blob_scenario(), config()).fit() for model in (blob_model(), blob_model().eval())]
    assert torch.equal(results[0].matrix, results[1].matrix)


@pytest.mark.parametrize("fidelity", ["default", "official"])
def test_looking_at_a_network_changes_nothing(fidelity):
    model = blob_model(fidelity=fidelity)
    before = copy.deepcopy(model.state_dict())
    Trainer(model, blob_scenario(), config())
    assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_loss_falls_on_convolutions():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 2))
    model = hmf.HyperMask(net, 1, 50, hmf.HypernetConfig(8, (8,), chunk_size=100))
    inputs = torch.randn(64, 1, 8, 8)
    split = TensorSplit(inputs, (inputs.mean((1, 2, 3)) > 0).long())
    recorder = Recorder()
    scenario = Scenario("sign", (TaskData("sign", split, split, split),), (1, 8, 8), 2)
    result = Trainer(model, scenario, config(iterations=100), logger=recorder).fit()
    assert recorder.rows[-1][2]["loss"] < 0.5 * recorder.rows[0][2]["loss"]
    assert result.matrix[0, 0] > 90


# -- tied parameters --------------------------------------------------------------------------------------------------


def tied_model():
    torch.manual_seed(1)
    return hmf.HyperMask(TiedLayers(), 2, 20, hmf.HypernetConfig(8, (12,)), heads="head")


@pytest.mark.parametrize("keep", ["last", "best"])
def test_tied_parameters_are_kept_once_and_resumed(tmp_path, keep):
    """From within a task, and from between two."""
    settings, scenario = config(keep=keep, validate_every=10), blob_scenario(2)
    whole = Trainer(tied_model(), scenario, settings, run_dir=tmp_path / "whole").fit()
    for number, at in enumerate([(0, 20), (1, 1)]):
        run_dir = tmp_path / str(number)
        with pytest.raises(InterruptedError):
            Trainer(tied_model(), scenario, settings, run_dir=run_dir, logger=Recorder(at)).fit()
        tensors = trainer_module.checkpoint.load(run_dir).tensors
        assert "model.net.first.weight" in tensors and "model.net.second.weight" not in tensors
        model = tied_model()
        resumed = Trainer(model, scenario, settings, run_dir=run_dir).fit(resume=True)
        assert torch.equal(resumed.matrix, whole.matrix)
        assert model.net.first._parameters["weight"] is model.net.second._parameters["weight"]


def test_tasks_removed_or_frozen_beyond_the_scenario_are_in_the_checkpoint(tmp_path):
    model = blob_model(4)
    model.remove_task(2)
    model.freeze_task(3)
    Trainer(model, blob_scenario(2), config(iterations=5), run_dir=tmp_path).fit()
    again = blob_model(4)
    Trainer(again, blob_scenario(2), config(iterations=5), run_dir=tmp_path).fit(resume=True)
    assert again.tasks == (0, 1, 3) and again.frozen == (3,)
