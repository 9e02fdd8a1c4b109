"""Runs that leave the finite numbers: they end at once, say why, and keep the checkpoint that was good."""

import re
from dataclasses import replace

import pytest
import torch
from support.networks import blob_model, blob_scenario

from hypermask_fast import InputError
from hypermask_fast.data import Scenario
from hypermask_fast.training import checkpoint
from hypermask_fast.training.config import TrainingConfig
from hypermask_fast.training.step import TaskWork
from hypermask_fast.training.trainer import Trainer


def trainer(run_dir=None, scenario=None, model=None, **settings) -> Trainer:
    settings = {"iterations": 40, "batch_size": 32, "lr": 1e-2, "log_every": 100, "checkpoint_every": 3} | settings
    return Trainer(
        model or blob_model(), scenario or blob_scenario(), TrainingConfig(**settings), seed=4, run_dir=run_dir
    )


def with_inputs(task: int, change) -> Scenario:
    """The blobs, with the training inputs of one task changed in place."""
    scenario = blob_scenario()
    tasks = list(scenario.tasks)
    inputs = tasks[task].train.inputs.clone()
    change(inputs)
    tasks[task] = replace(tasks[task], train=replace(tasks[task].train, inputs=inputs))
    return replace(scenario, tasks=tuple(tasks))


def message(training: Trainer, resume: bool = False) -> str:
    with pytest.raises(InputError) as caught:
        training.fit(resume)
    text = str(caught.value)
    assert "\n" not in text
    return text


def break_the_weights(monkeypatch, at_step: int) -> None:
    """After that step of the process the weights are NaN, its loss not yet."""
    step, done = TaskWork.step, []

    def broken(self, *args):
        values = step(self, *args)
        done.append(1)
        if len(done) == at_step:
            with torch.no_grad():
                next(self.model.parameters()).fill_(float("nan"))
        return values

    monkeypatch.setattr(TaskWork, "step", broken)


def assert_finite_checkpoint(run_dir, task: int, iteration: int) -> None:
    tensors, state, _ = checkpoint.load(run_dir)
    assert (state["task"], state["iteration"]) == (task, iteration)
    weights = [tensor for name, tensor in tensors.items() if name.startswith(("model.", "optimizer."))]
    assert all(tensor.isfinite().all() for tensor in weights if tensor.is_floating_point())


@pytest.mark.parametrize("looks", [True, False], ids=["as on the CPU", "as on a GPU, at intervals"])
@pytest.mark.parametrize("at_step", [9, 10, 11, 40 + 6, 2 * 40 + 39])
def test_the_good_checkpoint_is_kept(tmp_path, monkeypatch, at_step, looks):
    if not looks:
        monkeypatch.setattr(Trainer, "_seen_to_diverge", lambda self, loss: False)
    with monkeypatch.context() as patch:
        break_the_weights(patch, at_step)
        told = message(trainer(tmp_path))
    task, iteration = divmod(at_step - 1, 40)
    kept = iteration // 3 * 3  # of the step before the weights broke
    due = (iteration + 1) % 3 == 0 or iteration + 1 == 40
    assert_finite_checkpoint(tmp_path, task, kept)
    where = f"task {task} (blobs {task})"
    assert told.endswith(f"; the checkpoint of {where}, iteration {kept} is kept")
    if due:  # seen before they are saved, whatever the loss was
        assert told.startswith(f"the weights are not finite after {where}, iteration {iteration + 1}")
    elif looks:
        assert told.startswith(f"the loss is nan at {where}, iteration {iteration + 2} (finite until ")
    whole = trainer()
    whole.fit()
    resumed = trainer(tmp_path)
    resumed.fit(resume=True)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name


@pytest.mark.parametrize("at_step", [40, 120])
def test_weights_that_break_in_a_task_s_last_step_are_not_a_result(tmp_path, monkeypatch, at_step):
    break_the_weights(monkeypatch, at_step)
    reported = []
    training = trainer(tmp_path)
    training.on_task_end = lambda result: reported.append(1)
    assert f"after task {at_step // 40 - 1} (blobs {at_step // 40 - 1}), iteration 40" in message(training)
    assert_finite_checkpoint(tmp_path, at_step // 40 - 1, 39)
    assert len(reported) == at_step // 40 - 1


def test_without_a_folder_no_checkpoint_is_spoken_of(monkeypatch):
    break_the_weights(monkeypatch, 5)
    assert message(trainer()).endswith("lower training.lr")


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("task", [0, 1])
def test_inputs_that_are_not_finite_are_named(tmp_path, value, task):
    def spoil(inputs):
        inputs[17, 3] = inputs[30, 0] = value

    told = message(trainer(tmp_path, with_inputs(task, spoil), evaluation_batch=7))
    assert re.match(rf"the loss is nan at task {task} \(blobs {task}\), iteration \d+", told)
    assert "sample 17 of the task's training data is not finite: mend the data" in told


def test_inputs_out_of_all_proportion_are_named():
    told = message(trainer(scenario=with_inputs(0, lambda inputs: inputs.mul_(1e38).clamp_(-3e38, 3e38))))
    assert "the loss is nan at task 0 (blobs 0), iteration 1: " in told
    assert re.search(r"training data reach [23]e\+38, out of all proportion: scale them", told)


@pytest.mark.parametrize("settings", [{"beta": 1e300}, {"lam": 1e300}])
def test_drifts_out_of_all_proportion_are_named(tmp_path, settings):
    told = message(trainer(tmp_path, model=blob_model(**settings)))
    (name, value), *_ = settings.items()
    assert "at task 1 (blobs 1), iteration " in told
    assert f"{name} {value:g}" in told and "out of all proportion (cross entropy 0." in told
    assert told.endswith("; the checkpoint of task 1 (blobs 1), iteration 0 is kept")


@pytest.mark.parametrize(("lr", "reason"), [(1e30, "training.lr 1e+30 is out of all proportion, "), (1e38, "1e+38")])
def test_a_learning_rate_out_of_all_proportion_is_named(tmp_path, lr, reason):
    told = message(trainer(tmp_path, lr=lr))
    assert reason in told
    assert not checkpoint.exists(tmp_path) or assert_finite_checkpoint(tmp_path, 0, 3) is None
