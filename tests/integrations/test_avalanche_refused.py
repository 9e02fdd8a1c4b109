"""What the Avalanche adapter refuses, and in which words."""

import pytest
import torch
from torch import nn

import hypermask_fast as hmf
from hypermask_fast import InputError

pytest.importorskip("avalanche", reason="avalanche-lib is not installed: make test-integrations")

from avalanche.benchmarks import benchmark_from_datasets, class_incremental_benchmark, with_task_labels
from avalanche.benchmarks.utils.utils import concat_datasets
from avalanche.models import IncrementalClassifier, MTSimpleMLP
from support.avalanche_runs import TASKS, WIDTH, benchmark, module, strategy

from hypermask_fast.integrations.avalanche import HyperMaskModule, HyperMaskStrategy

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:No loggers specified")


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
    "an optimizer that needs a closure": (
        lambda: HyperMaskStrategy(model=(model := module()), optimizer=torch.optim.LBFGS(model.parameters())),
        r"LBFGS needs a closure for each step, and Avalanche gives none: .* hmf.optim.Adam\(model\)",
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
    "a class that its task has not, in evaluation": (
        lambda: strategy(module(classes=(2, 1, 2))).eval(benchmark().test_stream),
        "experience 1 has class 1 in task 1, which has 1: count classes from 0 .*classes=",
    ),
    "a class that its task has not, in an experience of several": (
        lambda: strategy(module(classes=(2, 1, 2))).eval(of_two_tasks()),
        "experience 0 has class 1 in task 1, which has 1: ",
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


class Wrapped(nn.Module):
    """A network whose definition doesn't tell its outputs."""

    def __init__(self):
        super().__init__()
        self.last, self.first = nn.Linear(20, 1), nn.Linear(WIDTH, 20)

    def forward(self, x):
        return self.last(self.first(x).tanh())


def test_a_first_experience_whose_classes_are_no_outputs_changes_nothing():
    model = HyperMaskModule(hmf.HyperMask(Wrapped(), 1, 30, hmf.HypernetConfig(8, (10,))))
    training = strategy(model, epochs=1)
    state = torch.get_rng_state()
    with pytest.raises(InputError, match="experience 0 has class 1, and the network 1 outputs"):
        training.train(benchmark().train_stream[0])
    assert model.hypermask.anchor is None and model.begun == (-1, -1) and torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("classes", [None, (2,)])
def test_an_experience_whose_classes_are_no_outputs_begins_no_task(classes):
    wrong = benchmark(from_zero=False)
    model = module(1, classes=classes)
    training = strategy(model, epochs=1)
    training.train(benchmark().train_stream[0])
    moments = len(training.optimizer.state)
    with pytest.raises(InputError, match="experience 1 has class 3, and the network 2 outputs"):
        training.train(wrong.train_stream[1])
    assert model.hypermask.num_tasks == 1 and model.hypermask.anchor.task == 0
    assert len(training.optimizer.state) == moments > 0
    training.train(benchmark().train_stream[1])
    assert model.hypermask.anchor.task == 1
