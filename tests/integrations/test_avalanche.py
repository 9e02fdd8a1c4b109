"""HyperMask as a model and a strategy of Avalanche: `make test-integrations` has an environment for it."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

import hypermask_fast as hmf
from hypermask_fast import InputError

pytest.importorskip("avalanche", reason="avalanche-lib is not installed: make test-integrations")

from avalanche.benchmarks import (
    benchmark_from_datasets,
    split_online_stream,
    task_incremental_benchmark,
    with_task_labels,
)
from avalanche.core import SupervisedPlugin
from avalanche.training.plugins import EWCPlugin, ReplayPlugin
from avalanche.training.supervised import Naive
from support.avalanche_runs import TASKS, WIDTH, accuracies, benchmark, module, strategy

from hypermask_fast.integrations.avalanche import HyperMaskModule, HyperMaskStrategy

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:No loggers specified")


class Seen(SupervisedPlugin):
    """What passes by: per training step the inputs, task labels and outputs."""

    def __init__(self):
        super().__init__()
        self.steps = []

    def after_forward(self, strategy, **kwargs):
        with torch.no_grad():
            again = strategy.model(strategy.mb_x, strategy.mb_task_id)
        self.steps.append((strategy.mb_x, strategy.mb_y, strategy.mb_task_id, strategy.mb_output.detach(), again))


def trained(stream, training, whole=True):
    """The strategy's accuracies on the test stream after each experience of the training stream."""
    return [
        accuracies(
            [training.train(one, eval_streams=[]), training.eval(stream.test_stream[: TASKS if whole else t + 1])][1]
        )
        for t, one in enumerate(stream.train_stream)
    ]


def parameters(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


# -- the model ----------------------------------------------------------------------------------------------------


def test_a_mixed_batch_is_one_call_of_the_model_with_each_sample_under_its_own_task(monkeypatch):
    model = module().eval()
    x, labels = torch.randn(7, WIDTH), torch.tensor([2, 0, 1, 1, 0, 2, 2])
    with torch.no_grad():
        expected = torch.stack([model.hypermask(x, task=t) for t in range(TASKS)])[labels, torch.arange(7)]
    calls, forward = [], hmf.HyperMask.forward
    monkeypatch.setattr(hmf.HyperMask, "forward", lambda self, *a, **k: calls.append(k) or forward(self, *a, **k))
    torch.testing.assert_close(model(x, labels), expected)
    assert len(calls) == 1


def test_one_label_serves_a_batch_and_none_gives_all_tasks_that_were_trained():
    model, training = module(), None
    training, stream, x = strategy(model, epochs=1), benchmark(), torch.randn(5, WIDTH)
    assert model(x, None) == {}
    training.train(stream.train_stream[:2])
    model.eval()
    found = model(x, None)
    assert list(found) == [0, 1]
    for label in found:
        torch.testing.assert_close(found[label], model(x, label))
        torch.testing.assert_close(found[label], model(x, torch.full((5,), label)))


def test_the_model_runs_in_strategies_of_avalanche():
    model, stream = module(1), benchmark()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    naive = Naive(model=model, optimizer=optimizer, train_mb_size=16, train_epochs=8, evaluator=strategy().evaluator)
    naive.train(stream.train_stream)
    assert model.hypermask.num_tasks == TASKS
    assert accuracies(naive.eval(stream.test_stream))[-1] > 0.9


# -- training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_backward", [False, True])
def test_the_numbers_are_those_of_a_loop_by_hand(in_backward):
    """A fresh Adam and begin_task for each task, one mask per step, the regulariser in the loss."""
    seen, stream = Seen(), benchmark()
    training = strategy(epochs=2, plugins=[seen])
    training.optimizer = hmf.optim.Adam(training.model, lr=1e-2, step_in_backward=in_backward)
    training.train(stream.train_stream, eval_streams=[])
    by_hand = module().hypermask
    batches = iter(seen.steps)
    for task in range(TASKS):
        by_hand.begin_task(task)
        optimizer = torch.optim.Adam(by_hand.parameters(), lr=1e-2)
        for _ in range(len(seen.steps) // TASKS):
            x, y, labels, _, _ = next(batches)
            assert labels.tolist() == [task] * len(x)
            mask = by_hand.mask(task)
            optimizer.zero_grad()
            (F.cross_entropy(by_hand(x, mask), y) + by_hand.regularizer(mask)).backward()
            optimizer.step()
    for name, expected in by_hand.named_parameters():
        found = dict(training.model.hypermask.named_parameters())[name]
        assert (found - expected).norm() <= 5e-5 * expected.norm(), name


def test_a_step_makes_one_mask(monkeypatch):
    training, stream, made = strategy(epochs=1), benchmark(), []
    training.train(stream.train_stream[0], eval_streams=[])
    mask = hmf.HyperMask.mask
    monkeypatch.setattr(hmf.HyperMask, "mask", lambda self, *a, **k: made.append(a) or mask(self, *a, **k))
    training.train(stream.train_stream[1], eval_streams=[])
    assert made == [(1,)] * 4  # of 64 samples in batches of 16


def test_it_learns_and_forgets_nothing():
    rows = trained(benchmark(), strategy(epochs=8))
    assert all(rows[t][t] > 0.9 for t in range(TASKS))
    assert all(rows[-1][t] > rows[t][t] - 0.1 for t in range(TASKS))


@pytest.mark.parametrize("classes", [None, (2,)])
def test_a_model_with_fewer_tasks_gets_them_as_they_come(classes):
    model = module(1, classes=classes)
    training = strategy(model, epochs=8)
    rows = trained(benchmark(), training, whole=False)
    assert model.hypermask.num_tasks == TASKS and model.hypermask.classes == (classes and (2,) * TASKS)
    assert all(rows[t][t] > 0.9 for t in range(TASKS))
    stepped = {id(p) for group in training.optimizer.param_groups for p in group["params"]}
    assert stepped == set(map(id, model.parameters()))
    assert all(
        training.optimizer.state[p] for p in (model.hypermask.hypernet.embeddings[2], *model.hypermask.net.parameters())
    )


def test_evaluation_within_training_changes_no_number():
    stream, both = benchmark(), []
    for every in (-1, 1):
        training = strategy(eval_every=every)
        training.train(stream.train_stream, eval_streams=[stream.test_stream], shuffle=False)
        both.append(parameters(training.model))
    assert all(torch.equal(both[0][name], both[1][name]) for name in both[0])


class Appends(SupervisedPlugin):
    """Puts samples of its own into a batch that Avalanche has made."""

    def __init__(self, task):
        super().__init__()
        self.task = task

    def before_forward(self, strategy, **kwargs):
        x, y, labels = strategy.mbatch
        strategy.mbatch = [torch.cat([part, part[:2]]) for part in (x, y, labels)]
        strategy.mbatch[2][-2:] = self.task


@pytest.mark.parametrize("method", [None, "entropy"])
@pytest.mark.parametrize("plugin", [lambda: ReplayPlugin(20), lambda: Appends(0)])
def test_replayed_samples_pass_under_the_masks_of_their_own_tasks(method, plugin):
    seen, stream = Seen(), benchmark(from_zero=False)
    training = strategy(module(outputs=2 * TASKS), epochs=1, plugins=[plugin(), seen], task_inference=method)
    training.train(stream.train_stream, eval_streams=[])
    mixed = [step for step in seen.steps if len(step[2].unique()) > 1]
    assert mixed and {0, 2} <= set(mixed[-1][2].tolist())
    for _, _, _, found, expected in seen.steps:
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("plugin", [lambda: ReplayPlugin(20), lambda: Appends(0), lambda: EWCPlugin(1.0)])
def test_samples_whose_tasks_are_not_told_pass_under_no_mask(plugin):
    stream = benchmark(False, False)
    training = strategy(module(outputs=2 * TASKS), epochs=1, task_inference="entropy", plugins=[plugin()])
    training.train(stream.train_stream[0], eval_streams=[])
    with pytest.raises(InputError, match="task.* are not .*: give the benchmark task labels .*, or "):
        training.train(stream.train_stream[1], eval_streams=[])
    assert training.model(torch.randn(2, WIDTH), 1).shape == (
        2,
        2 * TASKS,
    )  # the user's own passes are none of a plugin's


@pytest.mark.parametrize("boundaries", [True, False])
def test_parts_of_an_experience_are_one_task(boundaries):
    training, stream = strategy(epochs=3), benchmark()
    begun, begin = [], training.model.hypermask.begin_task
    training.model.hypermask.begin_task = lambda task: begun.append(task) or begin(task)
    for experience in stream.train_stream:
        for part in split_online_stream([experience], experience_size=8, access_task_boundaries=boundaries):
            training.train(with_task_labels(part), eval_streams=[])
    assert begun == [0, 1, 2]
    optimizer, embeddings = training.optimizer, training.model.hypermask.hypernet.embeddings
    assert optimizer.state[embeddings[2]]["step"] == 8 * 3  # 64 samples in eight parts, three epochs each
    assert not optimizer.state[embeddings[0]] or optimizer.state[embeddings[0]]["step"] == 24


def test_training_goes_on_with_the_last_task_but_with_none_before_it():
    training, stream = strategy(epochs=1), benchmark()
    training.train(stream.train_stream[0])
    training.train(stream.train_stream[1])
    anchor = training.model.hypermask.anchor.weights.clone()
    training.train(stream.train_stream[1])
    assert torch.equal(training.model.hypermask.anchor.weights, anchor)
    before = parameters(training.model)
    with pytest.raises(InputError, match="experience 0 is of task 0, and task 1 has been trained"):
        training.train(stream.train_stream[0])
    assert all(torch.equal(before[name], value) for name, value in parameters(training.model).items())


def test_the_task_that_was_trained_goes_on_with_its_own_benchmark_only():
    model, stream, other = module(), benchmark(), benchmark()
    strategy(model, epochs=1).train(stream.train_stream[0], eval_streams=[])
    training = strategy(model, epochs=1)  # another strategy, and a slice of the same stream
    training.train(stream.train_stream[:1], eval_streams=[])
    before = parameters(model)
    with pytest.raises(InputError, match="experience 0 is of another benchmark than .* task 0 began with.* from 1"):
        training.train(other.train_stream[0])
    assert all(torch.equal(before[name], value) for name, value in parameters(model).items())
    training.train(other.train_stream[1], eval_streams=[])
    assert model.hypermask.anchor.task == 1


def test_experiences_of_streams_without_a_benchmark_are_told_by_their_data():
    streams = [
        task_incremental_benchmark(benchmark_from_datasets(train=[e.dataset for e in whole]), reset_task_labels=True)
        for whole in (benchmark().train_stream, benchmark().train_stream)
    ]
    training = strategy(epochs=1)
    for _ in range(2):
        training.train(streams[0].train_stream[:1], eval_streams=[])
    with pytest.raises(InputError, match="experience 0 is of another benchmark"):
        training.train(streams[1].train_stream[:1])


def test_one_model_in_two_strategies_is_evaluated_over_all_tasks_that_were_trained():
    model, stream = module(outputs=2 * TASKS), benchmark(False, False)
    first = strategy(model, epochs=1, task_inference="entropy")
    first.train(stream.train_stream[0], eval_streams=[])
    second = strategy(model, epochs=1, task_inference="entropy")
    second.train(stream.train_stream[1], eval_streams=[])
    fresh = strategy(HyperMaskModule(model.hypermask), task_inference="entropy")
    found = [accuracies(one.eval(stream.test_stream)) for one in (first, second, fresh)]
    assert found[0] == found[1] == found[2]
    masks = model.hypermask.all_masks([0, 1])
    x = next(iter(DataLoader(stream.test_stream[2].dataset, 64)))[0]
    assert hmf.predict(model.hypermask, x, masks, method="entropy").task.max() <= 1


# -- checkpoints --------------------------------------------------------------------------------------------------


def test_a_new_process_goes_on_from_a_checkpoint_with_equal_numbers(tmp_path):
    script = ROOT / "tests/support/avalanche_runs.py"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    said = []
    for _ in range(2):
        words = [sys.executable, "-W", "ignore", str(script), str(tmp_path / "checkpoint.pkl")]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout.partition("from task ")[2].splitlines())
    assert [lines[0] for lines in said] == ["0", "2"]
    assert said[0][1:] == said[1][1:] and len(said[0]) > 10


def test_a_strategy_that_was_pickled_before_the_model_kept_what_has_begun_goes_on():
    training, stream = strategy(epochs=1), benchmark()
    training.train(stream.train_stream[:2], eval_streams=[])
    state = dict(training.__dict__)
    del state["_unpacked"]
    older = copy.deepcopy(training.model)
    for name in ("begun", "outputs", "unlabelled"):
        delattr(older, name)
    again = HyperMaskStrategy.__new__(HyperMaskStrategy)
    again.__setstate__(state | {"model": older, "_task": 1, "_begun_by": 1})
    assert older.begun == (1, 1) and older.begun_with is None and not {"_task", "_begun_by"} & set(again.__dict__)
    again.train(stream.train_stream[1], eval_streams=[])
    with pytest.raises(InputError, match="experience 0 is of task 0, and task 1"):
        again.train(stream.train_stream[0])


# -- tasks unknown ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "tasks"), [("entropy", TASKS), ("mahalanobis", 1), ("gradient", 1)])
def test_without_task_labels_experiences_are_tasks_and_evaluation_finds_them(method, tasks, monkeypatch):
    model, stream = module(tasks, outputs=2 * TASKS), benchmark(task_labels=False, from_zero=False)
    training = strategy(model, epochs=8, task_inference=method)
    chosen, predict = [], hmf.inference.predict
    spied = lambda *a, **k: chosen.append(predict(*a, **k)) or chosen[-1]  # noqa: E731
    monkeypatch.setattr(hmf.inference, "predict", spied)
    data = {}
    for task, experience in enumerate(stream.train_stream):
        training.train(experience, eval_streams=[])
        if method == "mahalanobis":
            data[task] = [(x, y) for x, y, _ in DataLoader(experience.dataset, 32)]
            hmf.inference.Mahalanobis.fit(model.hypermask, data)
        found = accuracies(training.eval(stream.test_stream))
        assert model.hypermask.num_tasks == max(tasks, task + 1)
        assert all(int(prediction.task.max()) <= task for prediction in chosen)
    assert found[-1] > 0.3
    monkeypatch.undo()
    model.eval()
    *_, (batch, _, _) = DataLoader(stream.test_stream[2].dataset, 16)
    expected = hmf.predict(model.hypermask, batch, method=method).task
    assert torch.equal(chosen[-1].task, expected)


def test_an_evaluation_after_an_interrupted_one_uses_the_masks_of_now():
    stream, model = benchmark(False, False), module(1, outputs=6)

    class Interrupts(SupervisedPlugin):
        def after_eval_iteration(self, strategy, **kwargs):
            raise KeyboardInterrupt

    training = strategy(model, epochs=1, task_inference="entropy")
    training.train(stream.train_stream[0], eval_streams=[])
    training.plugins.append(Interrupts())
    with pytest.raises(KeyboardInterrupt):
        training.eval(stream.test_stream)
    training.plugins.pop()
    training.train(stream.train_stream[1], eval_streams=[])
    given = []
    training.plugins.append(seen := SupervisedPlugin())
    seen.after_eval_forward = lambda strategy, **kwargs: given.append((strategy.mb_x, strategy.mb_output))
    training.eval(stream.test_stream)
    masks = model.hypermask.all_masks()
    assert len(masks) == 2
    for x, y in given:
        task = hmf.predict(model.hypermask, x, masks, method="entropy").task
        torch.testing.assert_close(y, model.hypermask(x, task))
