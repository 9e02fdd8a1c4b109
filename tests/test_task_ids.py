"""Ids of tasks, and numbers of things, as users have them: from NumPy, as tensors; and what is none."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import hypermask_fast as hmf
from hypermask_fast import InputError
from hypermask_fast.packing import Packed


@pytest.fixture
def model():
    net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    made = hmf.HyperMask(net, num_tasks=4, sparsity=20, hypernetwork=hmf.HypernetConfig(4, (5,))).eval()
    made(torch.zeros(2, 8), task=0)
    return made


SEVERAL = {
    "pack": lambda model, tasks: model.pack(tasks),
    "all_masks": lambda model, tasks: model.all_masks(tasks),
    "inspect": lambda model, tasks: hmf.analysis.inspect(model, tasks),
}
ONE = {
    "mask": lambda model, task: model.mask(task),
    "model": lambda model, task: model(torch.zeros(2, 8), task),
    "export": lambda model, task: model.export(task),
    "use_task": lambda model, task: model.use_task(task).__enter__(),
    "regularizer": lambda model, task: model.regularizer(task),
    "drifts": lambda model, task: model.drifts(task),
    "begin_task": lambda model, task: model.begin_task(task),
    "freeze_task": lambda model, task: model.freeze_task(task),
    "remove_task": lambda model, task: model.remove_task(task),
    "add_task": lambda model, task: model.add_task(like=task),
}


@pytest.mark.parametrize("call", SEVERAL)
@pytest.mark.parametrize(
    "tasks",
    [[2, 0], (2, 0), iter([2, 0]), range(2, -1, -2), np.array([2, 0]), torch.tensor([2, 0]), [torch.tensor(2), 0]],
    ids=lambda tasks: type(tasks).__name__,
)
def test_several(model, call, tasks):
    tasks = iter([2, 0]) if not hasattr(tasks, "__len__") else tasks
    found = SEVERAL[call](model, tasks).tasks
    assert tuple(found) == (2, 0) and all(type(task) is int for task in found)


def test_packed_ids_of_numpy_are_saved(model, tmp_path):
    model.pack(np.array([3])).save(tmp_path / "tasks")
    assert Packed.load(tmp_path / "tasks").tasks == (3,)


@pytest.mark.parametrize("call", SEVERAL)
@pytest.mark.parametrize(
    ("tasks", "said"),
    [
        (1, r"tasks are ids, such as \[0, 1\], not 1"),
        (np.int64(1), "tasks are ids"),
        (torch.tensor(1), "tasks are ids"),
        (np.array(1), "tasks are ids"),
        (torch.tensor([[0, 1]]), "a task is an integer"),
        ("01", "a task is an integer from 0 to 3, not '0'"),
        ([1.0], "a task is an integer"),
        ([[0]], "a task is an integer"),
        (np.array([0.5]), "a task is an integer"),
        (torch.tensor([True]), "a task is an integer"),
        ([-1], "task -1 does not exist"),
        ([0, 4], "task 4 does not exist"),
    ],
    ids=str,
)
def test_several_that_are_none(model, call, tasks, said):
    with pytest.raises(InputError, match=said):
        SEVERAL[call](model, tasks)


@pytest.mark.parametrize("call", ONE)
def test_one(model, call):
    for task in (1, np.int64(2), torch.tensor(3)):
        ONE[call](model, task)
    assert all(type(task) is int for task in (*model.frozen, *model.hypernet.removed))


@pytest.mark.parametrize("call", ONE)
@pytest.mark.parametrize("task", [True, 1.0, "1", [1], np.array([0, 1]), torch.zeros(100, 100), -1, 4], ids=repr)
def test_one_that_is_none(model, call, task):
    before = model.state_dict()
    with pytest.raises(InputError) as caught:
        ONE[call](model, task)
    assert len(str(caught.value)) < 160 and "\n" not in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("masks", [[0, 1], 1, "01", torch.tensor([0, 1])], ids=repr)
def test_masks_that_are_none(model, masks):
    x = torch.zeros(2, 8)
    for call in (lambda: hmf.predict(model, x, masks), lambda: model.forward_all_tasks(x, masks=masks)):
        with pytest.raises(InputError, match=r"masks are those of model.all_masks\(\), or"):
            call()
    with pytest.raises(InputError, match=r"masks are those of .*, not TaskMask"):
        hmf.predict(model, x, model.mask(0))


def test_numbers_of_numpy_are_numbers(tmp_path):
    whole: Any = np.int64
    config = hmf.HypernetConfig(4, (5,))
    model = hmf.HyperMask(nn.Linear(8, 2), whole(2), hypernetwork=config, classes=list(whole([2, 1])))
    assert model.add_task(classes=whole(2)) == 2 and model.classes == (2, 1, 2)
    model.regularizer(whole(1), tasks=whole(1))
    model.save_pretrained(tmp_path)
    assert hmf.HyperMask.from_pretrained(tmp_path, nn.Linear(8, 2)).classes == (2, 1, 2)
    found = hmf.predict(model.eval(), torch.zeros(3, 8), method="gradient+entropy", k=whole(2))
    assert torch.equal(found.absolute(whole(2)), found.absolute([2, 2, 2]))


@pytest.mark.parametrize("name", ["include", "exclude", "per_task", "heads"])
def test_what_is_no_rule_is_refused(name):
    for rule in (5, True, [5], 1.5):
        settings: dict[str, Any] = {name: rule}
        with pytest.raises(InputError, match=f"^{name} takes "):
            hmf.HyperMask(nn.Sequential(nn.Linear(2, 2)), 1, **settings)
