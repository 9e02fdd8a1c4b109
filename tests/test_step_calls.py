"""How much PyTorch is asked for in a training step of a small model: what it costs beside the arithmetic."""

import pytest
import torch
import torch.nn.functional as F
from support.backends import native_problem
from torch.utils._python_dispatch import TorchDispatchMode

import hypermask_fast as hmf
from hypermask_fast.regularizers import DriftConfig, Drifts
from hypermask_fast.training.step import TaskWork

pytestmark = pytest.mark.skipif(bool(native_problem()), reason=native_problem())


class Calls(TorchDispatchMode):
    """The names of the operators that are called, views and the like included; scalars: of those that give one."""

    def __init__(self, scalars=False):
        super().__init__()
        self.names, self.scalars = [], scalars

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not self.scalars or (isinstance(result, torch.Tensor) and result.dim() == 0):
            self.names.append(str(func))
        return result


def calls_of_a_step(**settings):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2))
    model = hmf.HyperMask(net, 5, 30, hmf.HypernetConfig(16, (5, 5)))
    optimizer, x, y = hmf.optim.Adam(model, **settings), torch.randn(4, 8), torch.tensor([0, 1, 0, 1])

    def step():
        mask = model.mask(4)
        loss = F.cross_entropy(model(x, mask), y) + model.regularizer(mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    step()  # makes the optimiser's state
    with Calls() as calls:
        step()
    return calls.names


@pytest.mark.parametrize("settings", [{}, {"step_in_backward": True}], ids=str)
def test_the_trunk_and_adam_are_a_call_each(settings):
    names = calls_of_a_step(**settings)
    for once in ("trunk", "trunk_backward", "fused_adam"):
        assert names.count(f"hypermask_native.{once}.default") == 1
    assert not [
        name for name in names if name.startswith(("aten._fused_adam", "aten._foreach", "aten.elu", "aten.stack"))
    ]
    assert not [name for name in names if name.startswith("profiler")]


def test_who_profiles_a_step_sees_it():
    model = hmf.HyperMask(torch.nn.Linear(4, 2), 1, 0, hmf.HypernetConfig(4, (3,)))
    optimizer = hmf.optim.Adam(model)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        optimizer.step()
    assert "Optimizer.step#Adam.step" in [event.key for event in seen.key_averages()]


@pytest.mark.parametrize("strengths", [(0.3, 0.7), (1e40, 0.0), (0.0, 1e300)], ids=str)
@pytest.mark.parametrize("task", [0, 3])
def test_a_loss_is_added_up_in_two_operations(strengths, task):
    """The same sum as of its parts, and their gradients; strengths that float32 does not have as well."""
    config = DriftConfig(*strengths)

    def parts():
        return [torch.tensor(value, requires_grad=True) for value in (0.5, 3.0, 2.0)]

    mine, expected = parts(), parts()
    with Calls() as calls:
        loss = config.added_to(mine[0], Drifts(*mine[1:]), task)
    slopes = config.slopes(mine[0], Drifts(*mine[1:]), task)
    total = expected[0] + config.loss(Drifts(*expected[1:]), task)
    torch.testing.assert_close(loss, total, rtol=1e-6, atol=0)
    gradients = torch.autograd.grad(loss, mine), torch.autograd.grad(total, expected)
    for slope, a, b in zip(slopes, *gradients, strict=True):
        assert torch.equal(a, b) and torch.equal(slope, a)
    assert len(calls.names) == (2 if task == 0 or max(strengths) < 1e38 else 4)


@pytest.mark.parametrize("task", [0, 3])
def test_a_steps_scalars_are_the_reported_loss_alone(task):
    """The trainer's step adds up the loss once, behind the backward pass, and scales no gradients: each operation on a
    scalar is a launch in a captured step."""
    model = hmf.HyperMask(torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Linear(6, 2)), 4, 30)
    model.begin_task(task)
    optimizer, ranks = hmf.optim.Adam(model, step_in_backward=True), model.layout.ramp_ranks([30])
    samples = torch.utils.data.TensorDataset(torch.randn(10, 8), torch.arange(10) % 2)
    split = hmf.data.from_datasets([(samples, samples, samples)]).tasks[0].train
    work = TaskWork(model, task, split, torch.arange(10)[None], ranks, optimizer, "float32")
    x, y = split.batch(torch.arange(10))
    work.step(x, y, ranks[0])
    with Calls(scalars=True) as calls:
        work.step(x, y, ranks[0])
    arithmetic = [name for name in calls.names if name.startswith(("aten.mul", "aten.add", "aten.ones_like"))]
    assert arithmetic == ["aten.add.Tensor"] * 2
