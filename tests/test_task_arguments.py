"""Tasks and masks as users give them: any kind of integer and any list of them works, all else is told in one line."""

import json

import numpy as np
import pytest
import torch
from support.life import batch, model_of

from hypermask_fast import InputError, analysis, inference

ONE = {
    "forward": lambda m, task: m(batch()[0], task=task),
    "mask": lambda m, task: m.mask(task),
    "use_task": lambda m, task: m.use_task(task).__enter__(),
    "export": lambda m, task: m.export(task),
    "begin_task": lambda m, task: m.begin_task(task),
    "drifts": lambda m, task: m.drifts(task),
    "regularizer": lambda m, task: m.regularizer(task),
    "freeze_task": lambda m, task: m.freeze_task(task),
    "add_task": lambda m, task: m.add_task(like=task),
    "remove_task": lambda m, task: m.remove_task(task),
    "position": lambda m, task: m.position(task),
    "record": lambda m, task: analysis.record(m, task),
}
SEVERAL = {
    "all_masks": lambda m, tasks: m.all_masks(tasks).tasks,
    "pack": lambda m, tasks: m.pack(tasks).tasks,
    "inspect": lambda m, tasks: analysis.inspect(m, tasks).tasks,
}
MASKS = {
    "forward_all_tasks": lambda m, masks: m.forward_all_tasks(batch()[0], masks=masks),
    "predict": lambda m, masks: inference.predict(m, batch()[0], masks=masks).score.T,
}


@pytest.fixture
def model():
    model = model_of().eval()
    model(batch()[0], 0)
    return model


def refused(call, *arguments):
    with pytest.raises(InputError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("task", [np.int64(1), np.uint8(1), torch.tensor(1)], ids=["int64", "uint8", "tensor"])
@pytest.mark.parametrize("name", ONE)
def test_any_integer_is_a_task(name, task, model):
    ONE[name](model, task)
    assert all(type(task) is int for task in (*model.tasks, *model.frozen, *model.hypernet.removed))
    assert model.anchor is None or type(model.anchor.task) is int
    assert type(model.mask(np.uint8(0)).task) is int


@pytest.mark.parametrize("name", ONE)
def test_what_is_no_task_is_refused(name, model):
    for task in (True, 1.0, "1", [1], np.array([1, 0]), torch.tensor(True), torch.tensor(1.0), -1, 9):
        assert "task" in refused(ONE[name], model, task)
    if name not in ("forward", "add_task"):
        assert "task" in refused(ONE[name], model, None)


@pytest.mark.parametrize("name", SEVERAL)
def test_any_list_of_tasks(name, model):
    kinds = [[2, 0], (2, 0), range(2, -1, -2), iter([2, 0]), np.array([2, 0]), torch.tensor([2, 0]), {2: "", 0: ""}]
    for tasks in [*kinds, [torch.tensor(2), np.int64(0)]]:
        found = SEVERAL[name](model, tasks)
        assert json.dumps(found) == "[2, 0]"


@pytest.mark.parametrize("name", SEVERAL)
def test_what_is_no_list_of_tasks_is_refused(name, model):
    for tasks in (1, True, np.array(1), torch.tensor(1), model.mask(1)):
        assert refused(SEVERAL[name], model, tasks).startswith("tasks are ids, such as [0, 1], not ")
    marks = torch.tensor([True, False, True])
    for tasks in ("01", [True], [1.0], [-1], [9], [], marks, np.zeros((1, 2), int), torch.zeros(2), [None]):
        assert "task" in refused(SEVERAL[name], model, tasks)
    model.remove_task(1)
    assert refused(SEVERAL[name], model, [0, 1]).startswith("task 1 was removed")


@pytest.mark.parametrize("name", MASKS)
def test_masks_are_masks(name, model):
    both = model.all_masks([2, 0])
    expected = MASKS[name](model, both)
    for masks in (list(both), tuple(both), iter(both)):
        torch.testing.assert_close(MASKS[name](model, masks), expected)
    for masks in (1, [0, 1], torch.tensor([0, 1]), torch.tensor(1), np.array([0]), both[0], "01", {0, 1}):
        assert refused(MASKS[name], model, masks).startswith("masks are what all_masks() returns")
    assert "there are none" in refused(MASKS[name], model, [])
