"""Many tasks in one forward pass, on the CPU: which networks it serves, and the same numbers as task by task."""

import pytest
import torch
from support.networks import blob_model, small_convnet
from torch import nn
from torch._dynamo.utils import counters

import hypermask_fast as hmf
from hypermask_fast import InputError, ops
from hypermask_fast.masking.access import scope_of
from hypermask_fast.masking.task_batch import TaskBatch, serves
from hypermask_fast.ops.plain import mask_first


@pytest.fixture
def together(monkeypatch):
    """Several tasks pass at once, as on a GPU."""
    monkeypatch.setattr(hmf.HyperMask, "_in_one_pass", lambda self, x, tasks=None: serves(self.net, x, tasks))


def images(count=6):
    return torch.randn(count, 2, 8, 8, generator=torch.Generator().manual_seed(0))


def trained(model):
    for task in range(model.num_tasks):
        model((task + 1.0) * images(), task)  # moves each task's statistics
    return model.eval()


# -- the model --------------------------------------------------------------------------------------------------------


def both_ways(model, run, monkeypatch):
    """What `run` gives and its gradients: together, then task by task."""
    found = []
    for way in range(2):
        if way:
            monkeypatch.undo()
        y = run()
        grads = torch.autograd.grad(
            y.square().sum(), list(model.parameters()), allow_unused=True, materialize_grads=True
        )
        found.append((y, *grads))
    return zip(*found, strict=True)


@pytest.mark.parametrize("tasks", [[2, 0, 0, 2, 1, 0], [1, 1, 1, 1, 1, 1], [2, 0]])
def test_one_task_per_sample(convnet_model, tasks, together, monkeypatch):
    model = trained(convnet_model)
    x, tasks = images(len(tasks)), torch.tensor(tasks)
    for ours, theirs in both_ways(model, lambda: model(x, tasks), monkeypatch):
        torch.testing.assert_close(ours, theirs)


def test_every_task(convnet_model, together, monkeypatch):
    model = trained(convnet_model)
    for ours, theirs in both_ways(model, lambda: model.forward_all_tasks(images()), monkeypatch):
        torch.testing.assert_close(ours, theirs)


def test_masks_of_all_tasks_are_a_sequence(convnet_model):
    model = trained(convnet_model)
    masks = model.all_masks()
    assert len(masks) == 3 and [mask.task for mask in masks] == [0, 1, 2]
    assert masks[1] is masks[1]  # what it makes is made once
    assert [mask.task for mask in masks[1:]] == [1, 2]
    torch.testing.assert_close(masks[-1].logits, model.mask(2).logits)
    torch.testing.assert_close(masks[2].thresholds, model.mask(2).thresholds)
    expected = model.forward_all_tasks(images())
    assert torch.equal(model.forward_all_tasks(images(), list(masks)), expected)
    assert torch.equal(model.forward_all_tasks(images(), masks[1:]), expected[1:])


def test_tasks_that_do_not_exist(convnet_model, together):
    with pytest.raises(InputError, match="task 3 does not exist: this model has tasks 0 to 2"):
        trained(convnet_model)(images(), torch.tensor([0, 1, 2, 3, 0, 0]))


# -- which networks ---------------------------------------------------------------------------------------------------


class SequenceFirst(nn.Module):
    """Its layer sees (length, batch, features): rows are not samples, whatever their number."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(x.transpose(0, 1)).mean(0)


class LooksAtValues(nn.Sequential):
    def forward(self, x):
        return super().forward(x if x.sum().item() > 0 else -x)


def test_which_networks_pass_together():
    x = torch.randn(4, 4, 4)
    serve = lambda net, x=x: serves(hmf.HyperMask(net, 2).eval().net, x)  # noqa: E731
    assert serve(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)))
    assert not serve(SequenceFirst())  # though here length and batch are 4
    assert not serve(LooksAtValues(nn.Linear(4, 3)))  # not to be tried without values
    assert not serve(nn.Sequential(nn.Flatten(0, 1), nn.Linear(4, 3)))
    assert not serve(nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.BatchNorm1d(3, track_running_stats=False)))


def test_where_samples_meet_tasks_pass_one_by_one(convnet_model):
    assert not serves(convnet_model.net, images())  # batch norm in training mode
    assert serves(convnet_model.eval().net, images())
    assert serves(convnet_model.net, images(1300), tasks=3)
    assert not serves(convnet_model.net, images(1400), tasks=3)  # too many for all tasks at once
    official = hmf.HyperMask(small_convnet(), 2, fidelity="official").eval()
    assert not serves(official.net, images())
    bias_alone = hmf.HyperMask(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), 2, exclude=["0.weight"])
    assert not serves(bias_alone.net, torch.randn(2, 4))


def test_the_trial_leaves_nothing_behind(convnet_model):
    model = trained(convnet_model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    serves(model.net, images(5))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_a_layer_that_sees_other_rows_is_refused(convnet_model):
    model = trained(convnet_model)
    batch = TaskBatch.mixed(model.all_masks(), torch.tensor([0, 1]))
    with scope_of(model.net).use(batch), pytest.raises(InputError, match="Conv2d sees 6 rows where 2 samples pass"):
        model.net(images(6))


# -- masks made when needed -------------------------------------------------------------------------------------------


def test_masked_weights_are_made_once_and_at_need():
    model = blob_model(2).eval()
    mask = model.mask(1)
    assert not mask._has("effective")
    with torch.no_grad():
        quiet = model(torch.randn(4, 8), mask)
        assert mask._has("effective") and mask.effective[0] is mask.effective[0]
    assert not quiet.requires_grad
    loud = model(torch.randn(4, 8), mask)  # a pass without gradients does not take them from a later one
    loud.sum().backward()
    assert model.net[0].weight.grad is not None and model.hypernet.output.weight.grad is not None


def test_beside_a_fused_layer_the_others_mask_their_own(monkeypatch):
    """W * m of all layers is not made for those that are left."""
    model = blob_model(2).eval()
    x, expected = torch.randn(4, 8), model.mask(1)
    expected = model(x, expected)

    first = model.net[0].weight

    def first_layer_only(op, x, weight, *rest):
        return mask_first.masked_linear if weight is first else None

    monkeypatch.setattr(ops, "may_fuse", lambda x: True)
    monkeypatch.setattr(ops.Op, "fused", first_layer_only)
    mask = model.mask(1)
    for ours, theirs in zip(
        (model(x, mask), *torch.autograd.grad(model(x, mask).sum(), model.weights())),
        (expected, *torch.autograd.grad(expected.sum(), model.weights())),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)
    assert mask._has("biases") and not mask._has("effective")


# -- torch.compile ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_another_task_is_the_same_graph(convnet_model, backend):
    model = trained(convnet_model)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    counters.clear()
    for tasks in ([2, 0, 0, 2, 1, 0], [1, 1, 1, 1, 1, 1]):
        torch.testing.assert_close(compiled(images(), torch.tensor(tasks)), model(images(), torch.tensor(tasks)))
    assert counters["stats"]["unique_graphs"] == 1
    for task in (0, 2):
        torch.testing.assert_close(compiled(images(), torch.tensor(task)), model(images(), task))
    assert counters["stats"]["unique_graphs"] == 2
    unknown = compiled(images(), torch.tensor([2, 0, 5, 2, -1, 0]))  # values are not looked at
    assert unknown[[2, 4]].isnan().all() and unknown[[0, 1, 3, 5]].isfinite().all()
    assert counters["stats"]["unique_graphs"] == 2


def test_a_compiled_graph_of_the_reference(convnet_model):
    """As where no extension is built: nothing asks for a value."""
    model = trained(convnet_model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with hmf.use_backend("reference"):
        for call in ((images(), torch.tensor([2, 0, 0, 2, 1, 0])), (images(), torch.tensor(1))):
            expected = [*torch.autograd.grad(model(*call).square().sum(), model.weights())]
            found = [*torch.autograd.grad(compiled(*call).square().sum(), model.weights())]
            torch.testing.assert_close(found, expected)


def test_gradients_through_a_compiled_graph():
    model = blob_model(3).eval()
    x, tasks = torch.randn(5, 8), torch.tensor([0, 2, 2, 1, 0])
    grads = []
    for call in (torch.compile(model, fullgraph=True, backend="aot_eager"), model):
        grads.append(torch.autograd.grad(call(x, tasks).square().sum(), list(model.parameters())))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)
