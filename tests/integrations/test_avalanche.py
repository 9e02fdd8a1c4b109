"""HyperMask as a model and a strategy of Avalanche: `make test-integrations` has an environment for it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.datasets import idx_bytes
from torch import nn
from torch.utils.data import DataLoader

import hypermask_fast as hmf
from hypermask_fast import InputError

pytest.importorskip("avalanche", reason="avalanche-lib is not installed: make test-integrations")

from avalanche.benchmarks import (
    benchmark_from_datasets,
    class_incremental_benchmark,
    split_online_stream,
    with_task_labels,
)
from avalanche.benchmarks.utils.utils import concat_datasets
from avalanche.core import SupervisedPlugin
from avalanche.models import IncrementalClassifier, MTSimpleMLP
from avalanche.training.plugins import ReplayPlugin
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
    mask = hmf.HyperMask.mask
    monkeypatch.setattr(hmf.HyperMask, "mask", lambda self, *a, **k: made.append(a) or mask(self, *a, **k))
    training.train(stream.train_stream[0], eval_streams=[])
    assert made == [(0,)] * 4  # of 64 samples in batches of 16


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


def test_replayed_samples_pass_under_the_masks_of_their_own_tasks():
    seen, stream = Seen(), benchmark()
    training = strategy(epochs=1, plugins=[ReplayPlugin(20), seen])
    training.train(stream.train_stream, eval_streams=[])
    mixed = [step for step in seen.steps if len(step[2].unique()) > 1]
    assert mixed and mixed[-1][2].unique().tolist() == [0, 1, 2]
    for _, _, _, found, expected in seen.steps:
        torch.testing.assert_close(found, expected)


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


# -- what is refused ----------------------------------------------------------------------------------------------


def sgd_of(module):
    return torch.optim.SGD(module.parameters(), lr=1.0)


def removed_task():
    model = module()
    model.hypermask.remove_task(1)
    strategy(model).eval(benchmark().test_stream)


def without_task_labels():
    """An experience of one of Avalanche's newer benchmarks, which have none."""
    whole = benchmark(False, False).train_stream
    data = concat_datasets([experience.dataset for experience in whole])
    return class_incremental_benchmark({"train": data}, num_experiences=TASKS).train_stream[0]


def of_two_tasks():
    data = concat_datasets([experience.dataset for experience in benchmark().train_stream[:2]])
    return with_task_labels(benchmark_from_datasets(train=[data])).train_stream[0]


def labels_leave_some_out():
    stream = benchmark()
    strategy(module(1)).train(stream.train_stream[2])


REFUSED = {
    "no HyperMask": (lambda: HyperMaskModule(nn.Linear(2, 2)), "HyperMaskModule takes a model, .*, not Linear"),
    "a network of many heads": (
        lambda: HyperMaskModule(hmf.HyperMask(MTSimpleMLP(WIDTH), 2)),
        r"Avalanche changes the network \(MTSimpleMLP\) from task to task: .* plain network with one head",
    ),
    "a head that grows": (
        lambda: HyperMaskModule(hmf.HyperMask(nn.Sequential(nn.Linear(2, 2), IncrementalClassifier(2)), 2)),
        r"Avalanche changes 1 \(IncrementalClassifier\) from task to task",
    ),
    "a model that is not wrapped": (
        lambda: HyperMaskStrategy(model=module().hypermask, optimizer=None),
        r"model=HyperMaskModule\(model\)",
    ),
    "another model": (
        lambda: HyperMaskStrategy(model=nn.Linear(2, 2), optimizer=None),
        "takes a HyperMaskModule, not Linear",
    ),
    "an optimizer of another model": (
        lambda: HyperMaskStrategy(model=module(), optimizer=sgd_of(nn.Linear(2, 2))),
        r"trains Parameters that are not this model's: make it hmf.optim.Adam\(model\)",
    ),
    "no optimizer": (
        lambda: HyperMaskStrategy(model=module(), optimizer=torch.optim.SGD),
        r"optimizer must be one of this model, such as hmf.optim.Adam\(model\), not <class",
    ),
    "no such method": (lambda: strategy(task_inference="guess"), "task_inference must be one of entropy, .*'guess'"),
    "a method that is not fitted": (
        lambda: strategy(module(outputs=6), task_inference="fecam").eval(benchmark(False, False).test_stream),
        "method fecam needs training data first",
    ),
    "a label in evaluation that has no task": (
        lambda: strategy(module(1)).eval(benchmark().test_stream),
        r"no task for task label 1: this model has tasks 0; HyperMask\(net, num_tasks=...\)",
    ),
    "labels that leave some out": (labels_leave_some_out, "label 2: .* tasks 0, and the next label in training is 1"),
    "a label of a removed task": (removed_task, "task 1 was removed: this model has tasks 0, 2"),
    "a label in a batch that has no task": (
        lambda: module()(torch.randn(2, WIDTH), torch.tensor([0, 5])),
        "task 5 does not exist: this model has tasks 0 to 2",
    ),
    "no task labels": (
        lambda: strategy().train(without_task_labels()),
        "experience 0 has no task labels: give the benchmark task labels .*entropy",
    ),
    "the same task label for all": (
        lambda: strategy(module(outputs=6)).train(benchmark(False, False).train_stream),
        "experience 1 has task label 0, which experience 0 had",
    ),
    "several tasks in one experience": (
        lambda: strategy().train(of_two_tasks()),
        "experience 0 has task labels 0, 1: .* one per experience",
    ),
    "classes that are no outputs": (
        lambda: strategy().train(benchmark(from_zero=False).train_stream),
        "experience 1 has class 3, and the network 2 outputs: .*class_ids_from_zero_in_each_exp=True",
    ),
    "classes that are no outputs, in evaluation": (
        lambda: strategy().eval(benchmark(from_zero=False).test_stream),
        "experience 1 has class 3, and the network 2 outputs",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_be_honoured_is_refused_in_one_line(name):
    use, message = REFUSED[name]
    with pytest.raises(InputError, match=message) as caught:
        use()
    assert "\n" not in str(caught.value)


# -- the page and the example ---------------------------------------------------------------------------------------


SMALL_MNIST = """
import avalanche.benchmarks, torch
from torch.utils.data import TensorDataset

def small(n, return_task_id=False, **settings):
    parts = []
    for count in (200, 100):
        y = torch.arange(count) % 10
        x = torch.randn(count, 1, 28, 28)
        x[torch.arange(count), 0, 2 * y] += 3
        parts.append(TensorDataset(x, y))
        parts[-1].targets = y.tolist()
    return avalanche.benchmarks.nc_benchmark(*parts, n, task_labels=return_task_id, **settings)

avalanche.benchmarks.SplitMNIST = small
"""


def test_the_blocks_of_the_page_run(tmp_path):
    blocks = re.findall(
        r"^```python\n(.*?)^```$", (ROOT / "docs/avalanche.md").read_text(encoding="utf-8"), re.M | re.S
    )
    assert len(blocks) == 2
    (tmp_path / "page.py").write_text("\n".join([SMALL_MNIST, *blocks]), encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-W", "ignore", "page.py"]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^\{'Top1_Acc", done.stdout, re.M)) == 10


def test_the_example_compares_four_strategies(tmp_path):
    rng = np.random.default_rng(0)
    for part, count in (("train", 400), ("t10k", 100)):
        labels = np.arange(count, dtype=np.uint8) % 10
        images = rng.integers(0, 30, (count, 28, 28), dtype=np.uint8)
        images[np.arange(count), 2 * labels + 4] += 200  # a bright row for each digit
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(idx_bytes(images))
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    words = [sys.executable, "-W", "ignore", str(ROOT / "examples/with_avalanche.py"), "--iterations", "12"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words += ["--data-dir", str(tmp_path)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    _, header, *rows = done.stdout[done.stdout.index("accuracy in percent") :].splitlines()
    assert header.split()[-2:] == ["average", "forgetting"]
    table = {row[:14].strip(): [float(word) for word in row[14:].split()] for row in rows}
    assert list(table) == ["HyperMask", "EWC", "replay of 200", "naive"]
    assert all(len(numbers) == 7 for numbers in table.values())
    assert table["HyperMask"][5] > 80
