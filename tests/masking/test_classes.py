"""Tasks with different numbers of classes on one output layer."""

import copy
import io
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hypermask_fast as hmf
from hypermask_fast import InputError
from hypermask_fast.masking.task_batch import TaskBatch, serves

CLASSES = [2, 3, 5]


def net_of(width=5, bias=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, width, bias))


def model_of(net=None, classes=CLASSES, **settings):
    torch.manual_seed(1)
    return hmf.HyperMask(net_of() if net is None else net, len(classes), 30, classes=classes, **settings).eval()


def batch(n=6):
    return torch.randn(n, 8, generator=torch.Generator().manual_seed(2))


def check(y, task, model, x):
    """Within the task's classes the network's output, beyond them the lowest number."""
    classes = model.classes[task]
    assert (y[..., classes:] == torch.finfo(y.dtype).min).all() and y.isfinite().all()
    model._classes.counts, counts = (y.shape[-1],) * len(model.classes), model._classes.counts
    torch.testing.assert_close(y[..., :classes], model(x, task)[..., :classes])
    model._classes.counts = counts


def test_every_entry_point(monkeypatch):
    model, x = model_of(), batch()
    for task in range(3):
        for y in (model(x, task), model(x, task=task), model(x, torch.tensor(task)), model(x, model.mask(task))):
            check(y, task, model, x)
        check(model.forward_all_tasks(x)[task], task, model, x)
        check(model.forward_all_tasks(x, masks=model.all_masks())[task], task, model, x)
        check(model.export(task)(x), task, model, x)
        with model.use_task(task):
            check(model.net(x), task, model, x)
    tasks = torch.tensor([2, 0, 1, 1, 2, 0])
    mixed = model(x, tasks)
    torch.testing.assert_close(mixed, torch.cat([model(x[i : i + 1], t) for i, t in enumerate(tasks.tolist())]))
    with model.disabled():
        assert (model.net(x) > -1e6).all()
    monkeypatch.setattr("hypermask_fast.mask_making.values_at_hand", lambda tensor: False)
    for task in range(3):
        check(model(x, torch.tensor(task)), task, model, x)


def test_rows_of_several_tasks_in_one_pass():
    """As on a GPU."""
    model, x = model_of(), batch()
    tasks = torch.tensor([2, 0, 1, 1, 2, 0])
    assert serves(model.net, x)
    torch.testing.assert_close(model._forward_rows(x, tasks), model(x, tasks))
    masks, repeated = model.all_masks(), x.expand(3, *x.shape).flatten(0, 1)
    with model._scope.use(TaskBatch.every(masks, x, repeated)):
        together = model.net(repeated).view(3, *x.shape[:1], 5)
    torch.testing.assert_close(together, model.forward_all_tasks(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_losses_and_entropies_stay_right(dtype):
    model = model_of(net_of().to(dtype))
    x = batch().to(dtype)
    logits = model.forward_all_tasks(x)
    narrow = [logits[task][:, :classes] for task, classes in enumerate(CLASSES)]
    entropies = torch.stack([torch.distributions.Categorical(logits=part.double()).entropy() for part in narrow])
    shares = entropies / torch.tensor(CLASSES).double().log()[:, None]  # of the largest entropy that each can have
    assert torch.equal(model.infer_task(x), shares.argmin(0)) and not torch.equal(shares.argmin(0), entropies.argmin(0))
    for task, part in enumerate(narrow):
        y = torch.zeros(6, dtype=torch.int64)
        torch.testing.assert_close(F.cross_entropy(model(x, task), y), F.cross_entropy(part, y))
    found = hmf.predict(model, x)
    assert all(label < CLASSES[task] for task, label in zip(found.task, found.label, strict=True))
    assert torch.equal(found.absolute(CLASSES), torch.tensor([0, 2, 5])[found.task] + found.label)


def test_gradients_are_those_of_the_tasks_classes():
    model, x = model_of(), batch()
    y = torch.tensor([0, 1] * 3)
    weights = model.weights()
    found = torch.autograd.grad(F.cross_entropy(model(x, 0), y), weights)
    model._classes.counts = (5, 5, 5)
    expected = torch.autograd.grad(F.cross_entropy(model(x, 0)[:, :2], y), weights)
    torch.testing.assert_close(found, expected)
    assert (found[-1][2:] == 0).all()


def test_added_tasks():
    model = model_of()
    assert model.add_task(classes=4) == 3 and model.add_task(like=0) == 4
    assert model.classes == (2, 3, 5, 4, 2)
    check(model(batch(), 3), 3, model, batch())
    for wrong, message in (
        ({}, "how many classes"),
        ({"classes": 0}, "whole number"),
        ({"classes": True}, "whole number"),
    ):
        with pytest.raises(InputError, match=message):
            model.add_task(**wrong)
    assert model.num_tasks == 5 and len(model.net[1].running_mean) == 5
    with pytest.raises(InputError, match="this model's tasks use all outputs"):
        hmf.HyperMask(net_of(), 2).add_task(classes=3)


def test_an_added_task_of_more_classes_than_outputs():
    model = model_of()
    model.add_task(classes=6)
    with pytest.raises(InputError, match="the network has 5 outputs, and a task of 6 classes"):
        model(batch(), 0)


@pytest.mark.parametrize("classes", [[2, 3], [2, 3, 4, 5], [2, 3, 0], [2, 3, 1.5], "235", 3, [2, 3, True]])
def test_wrong_classes_leave_the_network_as_it_was(classes):
    net = net_of()
    with pytest.raises(InputError, match="classes must be one"):
        hmf.HyperMask(net, 3, classes=classes)
    assert type(net[0]) is nn.Linear


@dataclass
class Output:
    logits: Tensor
    hidden: Tensor


class Returns(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.fc = nn.Linear(8, 5)
        self.how = how

    def forward(self, x):
        return self.how(self.fc(x))


@pytest.mark.parametrize("how", [lambda y: {"logits": y, "hidden": 2 * y}, lambda y: Output(y, 2 * y)])
def test_logits_by_name(how):
    model = model_of(Returns(how), heads="fc")
    output = model(batch(), 0)
    logits, hidden = (
        (output["logits"], output["hidden"]) if isinstance(output, dict) else (output.logits, output.hidden)
    )
    assert (logits[:, 2:] == torch.finfo(torch.float32).min).all() and (hidden > -1e6).all()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (lambda y: (y, y), "needs a network that returns its logits"),
        (lambda y: y.argmax(-1), r"needs logits \(batch, classes\).*not torch.int64"),
        (lambda y: y[:, None].expand(-1, 7, -1), r"not torch.float32 of \(6, 7, 5\)"),
    ],
)
def test_outputs_that_are_no_logits_are_refused(how, message):
    with pytest.raises(InputError, match=message):
        model_of(Returns(how), heads="fc")(batch(), 0)


def test_images_of_logits():
    net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 1))
    model = model_of(net)
    x = torch.randn(3, 2, 6, 6)
    y = model(x, 1)
    assert (y[:, 3:] == torch.finfo(y.dtype).min).all() and (y[:, :3] > -1e6).all()
    torch.testing.assert_close(model.export(1)(x), y)
    torch.testing.assert_close(model(x, torch.tensor([0, 1, 2]))[1:2], y[1:2])


def test_compiled_without_a_recompile_per_task(fresh_compiler):
    model = model_of()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for task in range(3):
            torch.testing.assert_close(compiled(batch(), torch.tensor(task)), model(batch(), task))
        tasks = torch.tensor([2, 0, 1, 1, 2, 0])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(batch(), tasks), model(batch(), tasks))


# -- export -----------------------------------------------------------------------------------------------------------


def test_exported_through_a_state_dict():
    model = model_of()
    plain = net_of()
    plain.load_state_dict(model.export(0).state_dict())
    torch.testing.assert_close(plain.eval()(batch()), model(batch(), 0))
    assert torch.equal(model.net[3].weight, net_of()[3].weight)  # the model is untouched


def test_an_exported_half_precision_network_stays_finite():
    """Where the lowest number and a product would make -inf together."""
    net = nn.Sequential(nn.Linear(8, 5)).to(torch.float16)
    with torch.no_grad():
        net[0].weight.fill_(-100)
    model = model_of(net)
    x = torch.ones(2, 8, dtype=torch.float16)
    torch.testing.assert_close(model.export(0)(x), model(x, 0), rtol=0.02, atol=1)


def test_a_head_per_task_and_its_export():
    model = model_of(per_task="3.*")
    check(model.export(0)(batch()), 0, model, batch())


def test_tasks_of_fewer_classes_than_outputs_each():
    model = model_of(net_of(7))
    for task in range(3):
        check(model.export(task)(batch()), task, model, batch())


def test_a_tied_head_keeps_its_embedding():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(5, 6)
            self.head = nn.Linear(6, 5)
            self.head.weight = self.embedding.weight

        def forward(self, x):
            return self.head(self.embedding(x).sum(1))

    model = model_of(Tied(), heads="head")
    x = torch.tensor([[4, 3], [2, 1]])
    torch.testing.assert_close(model.export(0)(x), model(x, 0))


def test_an_export_that_could_not_say_it_is_refused():
    model = model_of(net_of(bias=False))
    model(batch(), 0)
    with pytest.raises(InputError, match="is exported by that layer's bias, and the network has none"):
        model.export(0)
    torch.testing.assert_close(model.export(2)(batch()), model(batch(), 2))  # it has all of them


@pytest.mark.parametrize("how", ["copied", "pickled"])
def test_a_copy_has_its_own(how):
    model, file = model_of(), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = copy.deepcopy(model) if how == "copied" else torch.load(file, weights_only=False)
    again.add_task(classes=1)
    assert (model.classes, again.classes) == ((2, 3, 5), (2, 3, 5, 1))
    check(again(batch(), 3), 3, again, batch())
    torch.testing.assert_close(again(batch(), 0), model(batch(), 0))
    assert not again.unconvert()._forward_hooks
