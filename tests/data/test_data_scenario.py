"""Scenarios of tensors and of Datasets."""

import pytest
import torch
from torch.utils.data import Dataset, Subset, TensorDataset

from hypermask_fast.data import (
    DatasetSplit,
    HorizontalFlip,
    Scale,
    Scenario,
    TaskData,
    TensorSplit,
    from_datasets,
    split_by_class,
)
from hypermask_fast.data.scenario import PARTS, task_label
from hypermask_fast.errors import InputError


def raw(n=200, classes=6, seed=0):
    """Images whose pixels all equal their place in the data set, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    return torch.arange(n, dtype=torch.uint8).view(-1, 1, 1, 1).repeat(1, 1, 2, 3), labels


def place(split):
    """The places of a split's samples in the data set they came from."""
    return split.inputs[:, 0, 0, 0].tolist()


GROUPS = [(4, 1), (0, 5), (2, 3)]


def scenario(validation=7, **kwargs):
    return split_by_class(*raw(), *raw(100, seed=1), GROUPS, validation, **kwargs)


def test_split_by_class_maps_classes_and_keeps_order():
    _, labels = raw()
    _, test_labels = raw(100, seed=1)
    made = scenario()
    assert (made.num_classes, made.input_shape, len(made.tasks)) == (2, (1, 2, 3), 3)
    assert [task.name for task in made.tasks] == ["4,1", "0,5", "2,3"]
    for task, group in zip(made.tasks, GROUPS, strict=True):
        members = [i for i, c in enumerate(labels.tolist()) if c in group]
        assert place(task.validation) == members[:7] and place(task.train) == members[7:]
        assert place(task.test) == [i for i, c in enumerate(test_labels.tolist()) if c in group]
        for split, source in ((task.train, labels), (task.validation, labels), (task.test, test_labels)):
            assert [group[y] for y in split.labels.tolist()] == source[place(split)].tolist()


def test_only_training_batches_are_augmented():
    augment = HorizontalFlip()
    made = scenario(augment=augment)
    assert [s.augment for s in made.tasks[0].splits] == [augment, None, None]


def test_input_shape_is_the_models():
    assert scenario(prepare=lambda x: x.flatten(1).float()).input_shape == (6,)


def test_validation_may_be_empty():
    task = scenario(validation=0).tasks[0]
    assert len(task.validation) == 0 and list(task.validation.chunks(5)) == []
    assert len(task.train) == len(scenario(7).tasks[0].train) + 7


def test_validation_leaves_something_to_train_on():
    smallest = min(len(task.train) for task in scenario(0).tasks)
    assert min(len(task.train) for task in scenario(smallest - 1).tasks) == 1
    with pytest.raises(InputError, match=rf"validation {smallest} leaves task \d no training samples"):
        scenario(smallest)
    for wrong in (-1, 1.5, True):
        with pytest.raises(InputError, match="validation must be a whole number"):
            scenario(wrong)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([], "one or more groups"),
        ([(), ()], "one or more groups"),
        ([(0, 1), (2,)], r"sizes \[1, 2\]"),
        ([(0, 1), (1, 2)], "class 1 is in class_groups twice"),
        ([(0, 0)], "class 0 is in class_groups twice"),
        ([(0, 6)], "class 6 has no training samples"),
    ],
)
def test_groups_refused(groups, message):
    with pytest.raises(InputError, match=message):
        split_by_class(*raw(), *raw(100, seed=1), groups)


def test_groups_of_several_sizes():
    groups = [(4, 1, 3), (0,), (2, 5)]
    made = split_by_class(*raw(), *raw(100, seed=1), groups, 3, unequal=True)
    assert made.classes == (3, 1, 2) and made.num_classes == 3
    for task, group in zip(made.tasks, groups, strict=True):
        for split, (_, labels) in ((task.train, raw()), (task.test, raw(100, seed=1))):
            assert [group[y] for y in split.labels.tolist()] == labels[place(split)].tolist()
    moved = made.to("cpu")
    assert moved.classes == made.classes
    with pytest.raises(InputError, match="of one size \\(unequal=True: or of several\\)"):
        split_by_class(*raw(), *raw(100, seed=1), groups)
    with pytest.raises(InputError, match=r"sizes \[0, 2\]"):
        split_by_class(*raw(), *raw(100, seed=1), [(), (0, 1)], unequal=True)


def test_a_tasks_labels_are_its_own_classes():
    split = TensorSplit(torch.zeros(4, 1), torch.tensor([0, 1, 2, 0]))
    assert Scenario(
        "s", (TaskData("a", split, split, split, num_classes=3), TaskData("b", split, split, split)), (1,), 5
    ).classes == (3, 5)
    with pytest.raises(InputError, match=r"task 0 \(a\), training set: labels must be 0 .. 1, found 2"):
        Scenario("s", (TaskData("a", split, split, split, num_classes=2),), (1,), 5)
    for wrong in (6, 0, 2.0):
        with pytest.raises(InputError, match=r"num_classes of task 0 \(a\) must be a whole number, 1 .. 5"):
            Scenario("s", (TaskData("a", split, split, split, num_classes=wrong),), (1,), 5)


@pytest.mark.parametrize("part", ["train", "validation", "test"])
def test_labels_that_are_read_later_are_checked_as_they_are_read(part):
    """A label beyond the classes of its task would count as a sample that is never told right."""
    fits, wrong = relabelled([0, 1, 0]), relabelled([0, 1, 2])
    for own in (None, 3):
        splits = {each: DatasetSplit(fits, num_classes=own) for each in ("train", "validation", "test")}
        splits[part] = DatasetSplit(wrong, num_classes=own)
        made = Scenario("s", [TaskData("a", **splits, num_classes=2)], (1, 2, 3), 4)
        with pytest.raises(InputError, match="labels must be 0 .. 1, found 2"):
            list(getattr(made.to("cpu").tasks[0], part).chunks(2))
    stricter = Scenario("s", (TaskData("a", *[DatasetSplit(wrong, num_classes=2)] * 3),), (1, 2, 3), 4)
    with pytest.raises(InputError, match="labels must be 0 .. 1, found 2"):
        list(stricter.tasks[0].train.chunks(2))


@pytest.mark.parametrize("in_memory", [True, False])
def test_datasets_of_several_sizes(in_memory):
    datasets = [(GOOD, None, GOOD), (relabelled([0, 1, 2]), None, relabelled([2, 0]))]
    made = from_datasets(datasets, num_classes=[2, 3], in_memory=in_memory)
    assert made.classes == (2, 3) and made.num_classes == 3
    with pytest.raises(InputError, match="num_classes must be one number, or one per task: 2, not 1"):
        from_datasets(datasets, num_classes=[3], in_memory=in_memory)
    with pytest.raises(InputError, match="num_classes of task 1 must be a whole number"):
        from_datasets(datasets, num_classes=[2, 0], in_memory=in_memory)
    with pytest.raises(InputError, match=r"labels must be 0 .. 1, found 2"):
        late = from_datasets(datasets, num_classes=[2, 2], in_memory=in_memory)
        list(late.tasks[1].train.chunks(3))


def test_a_class_without_test_samples_is_refused():
    x, y = raw()
    with pytest.raises(InputError, match="class 1 has no test samples"):
        split_by_class(x, y, x[y != 1], y[y != 1], GROUPS)


def test_scenario_refuses_empty():
    with pytest.raises(InputError, match="no tasks"):
        Scenario("none", (), (1,), 2)
    some = TensorSplit(torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64))
    none = TensorSplit(torch.zeros(0, 1), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(InputError, match="test samples"):
        Scenario("half", (TaskData("a", some, none, none),), (1,), 1)
    ones = TensorSplit(torch.zeros(2, 1), torch.ones(2, dtype=torch.int64))
    with pytest.raises(InputError, match=r"task 0 \(a\), validation set: labels must be 0 .. 0, found 1"):
        Scenario("labels", (TaskData("a", some, ones, some),), (1,), 1)


def test_what_is_no_data_is_named():
    """In a scenario made by hand, such as a user's function returns."""
    x, y = torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64)
    some = TensorSplit(x, y)
    assert len(TaskData("a", some, None, some).validation) == 0, "none held out, as for from_datasets"
    for place, part in enumerate(PARTS):
        for wrong, kind in (((x, y), "tuple"), (x, "Tensor"), (GOOD, "TensorDataset")):
            splits = [some, some, some]
            splits[place] = wrong
            with pytest.raises(InputError, match=rf"the {part} data of task 'a' must be a split, .*, not {kind}$"):
                TaskData("a", *splits)
    with pytest.raises(InputError, match="the test data of task 'a' must be a split, .*, not NoneType"):
        TaskData("a", some, some, None)
    with pytest.raises(InputError, match="task 1 of s must be a TaskData, not tuple"):
        Scenario("s", (TaskData("a", some, None, some), (some, some, some)), (1,), 1)
    with pytest.raises(InputError, match="uint8 or float32, not ndarray, which is no tensor"):
        TensorSplit(x.numpy(), y)
    with pytest.raises(InputError, match=r"labels must be \(n,\) int64, not list, which is no tensor"):
        TensorSplit(x, [0, 0])


def test_to_keeps_sharing():
    x, y = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)
    shared = TensorSplit(x, y)
    tasks = tuple(TaskData(str(t), TensorSplit(x, y), shared, shared) for t in range(3))
    moved = Scenario("shared", tasks, (3,), 1).to("meta")
    assert moved.tasks[0].train.device.type == "meta" and moved.num_classes == 1
    assert len({id(s.inputs) for task in moved.tasks for s in task.splits}) == 1
    assert len({id(s.labels) for task in moved.tasks for s in task.splits}) == 1


def triples(dtype=torch.float32, validation=True):
    """Three tasks of two classes as Datasets, and the same as a scenario in memory."""
    made = scenario()
    out = []
    for task in made.tasks:
        parts = []
        for split in task.splits:
            x = split.inputs if dtype == torch.uint8 else split.inputs.to(dtype) / 255
            parts.append(TensorDataset(x, split.labels))
        out.append((parts[0], parts[1] if validation else None, parts[2]))
    return out, made


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("workers", [0, 1])
def test_datasets_in_memory_or_not_give_the_same(dtype, workers):
    datasets, made = triples(dtype)
    datasets = datasets if workers == 0 else datasets[:1]  # starting workers is slow
    memory = from_datasets(datasets)
    lazy = from_datasets(datasets, in_memory=False, num_workers=workers)
    assert isinstance(memory.tasks[0].train, TensorSplit) and memory.tasks[0].train.inputs.dtype == dtype
    assert isinstance(lazy.tasks[0].train, DatasetSplit) and lazy.tasks[0].train.num_workers == workers
    for other in (memory, lazy):
        assert (other.num_classes, other.input_shape) == (2, (1, 2, 3))
        for a, b in zip(made.tasks[: len(datasets)], other.tasks, strict=True):
            for split, copy in zip(a.splits, b.splits, strict=True):
                for (x1, y1), (x2, y2) in zip(split.chunks(9), copy.chunks(9), strict=True):
                    assert torch.equal(x1, x2) and torch.equal(y1, y2)


def test_datasets_without_validation():
    datasets, _ = triples(validation=False)
    for in_memory in (True, False):
        made = from_datasets(datasets, in_memory=in_memory)
        assert all(len(task.validation) == 0 for task in made.tasks)
        assert list(made.to("cpu").tasks[0].validation.chunks(3)) == []


def test_augment_of_datasets():
    datasets, _ = triples(torch.uint8)
    made = from_datasets(datasets, augment=HorizontalFlip())
    assert isinstance(made.tasks[1].train.augment, HorizontalFlip) and made.tasks[1].test.augment is None
    with pytest.raises(InputError, match="in_memory=True"):
        from_datasets(datasets, augment=HorizontalFlip(), in_memory=False)


class Random(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        return torch.rand(3), i % 2


def test_reading_on_demand_draws_nothing_while_it_looks():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    made = from_datasets([(Random(), None, Random())], in_memory=False)
    assert torch.equal(state, torch.get_rng_state()) and made.num_classes == 2


def relabelled(labels, shape=(2,)):
    return TensorDataset(torch.zeros(len(labels), *shape), torch.tensor(labels))


GOOD = relabelled([0, 1])


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize(
    ("datasets", "message"),
    [
        ([], "no tasks"),
        ([(GOOD, GOOD)], r"task 0 must be \(train, validation, test\)"),
        ([(GOOD, None, None)], "no test samples"),
        ([(Subset(GOOD, []), None, GOOD)], "no training samples"),
        (
            [(GOOD, None, GOOD), (relabelled([2, 3]), None, GOOD)],
            "task 0: training labels are 0, 1; every task",
        ),
        ([(GOOD, None, GOOD), (relabelled([0, 2, 1]), None, GOOD)], "needs all of 0 .. 2"),
        (
            [(relabelled([1, 2]), None, GOOD)],
            "task 0: training labels are 1, 2; every task needs all of 0 .. 2",
        ),
        ([(relabelled([-1]), None, GOOD)], "training labels are -1"),
        ([(relabelled([0.0, 1.0]), None, GOOD)], "task 0, training set: labels must be integers"),
        ([(GOOD, None, relabelled([0, 1], (3,)))], r"task 0, test set: inputs have shape \(3,\)"),
        (
            [(GOOD, None, GOOD), (relabelled([0, 1], (3,)), None, GOOD)],
            "task 1, training set: inputs have shape",
        ),
        ([(iter([]), None, GOOD)], "task 0, training set: a dataset must be map-style"),
    ],
)
def test_datasets_refused(datasets, message, in_memory):
    with pytest.raises(InputError, match=message) as caught:
        from_datasets(datasets, in_memory=in_memory)
    assert "\n" not in str(caught.value)


def test_test_labels_out_of_range():
    datasets = [(GOOD, None, relabelled([0, 2]))]
    with pytest.raises(InputError, match=r"task 0, test set: labels must be 0 .. 1, found 2"):
        from_datasets(datasets)
    late = from_datasets(datasets, in_memory=False)
    with pytest.raises(InputError, match=r"labels must be 0 .. 1, found 2"):
        list(late.tasks[0].test.chunks(2))


def test_given_num_classes_is_taken():
    for in_memory in (True, False):
        made = from_datasets([(GOOD, None, GOOD)], num_classes=5, in_memory=in_memory)
        assert made.num_classes == 5
    with pytest.raises(InputError, match=r"training set: labels must be 0 .. 0, found 1"):
        from_datasets([(GOOD, None, GOOD)], num_classes=1)
    with pytest.raises(InputError, match="num_classes must be a whole number, 1 or more, not"):
        from_datasets([(GOOD, None, GOOD)], num_classes=0)


def test_scale_is_the_default():
    assert isinstance(scenario().tasks[0].train.prepare, Scale)


def test_tasks_that_can_be_read_once_are_refused():
    """A generator would leave a scenario without tasks, once its tasks have been checked."""
    tasks = scenario().tasks
    with pytest.raises(InputError, match="tasks of mine must be a tuple of TaskData, not generator"):
        Scenario("mine", (task for task in tasks), (4,), 2)  # pyright: ignore[reportArgumentType]


def test_a_network_that_changes_its_input_changes_no_data():
    split = TensorSplit(torch.ones(4, 2), torch.zeros(4, dtype=torch.int64))
    for x, _ in split.chunks(3):
        x.mul_(2)
    x, _ = split.batch(torch.arange(4))
    x.mul_(2)
    assert torch.equal(split.inputs, torch.ones(4, 2))


def test_the_default_dtype_decides_nothing():
    task = scenario().tasks[0]
    torch.set_default_dtype(torch.float64)
    try:
        assert len(TaskData("", task.train, None, task.test).validation) == 0  # pyright: ignore[reportArgumentType]
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_tasks_name_stays_within_its_line():
    assert task_label(1, "a\nb\x1b[31m") == "task 1 (a b\\x1b[31m)"
