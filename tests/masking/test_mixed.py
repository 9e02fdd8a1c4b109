"""A batch of several tasks: refused where rows are no samples of their own; batch norm with one sample of a task."""

import pytest
import torch
from support.modules import Recurrent, perceptron
from support.networks import blob_model
from support.tolerances import assert_close
from torch import Tensor, nn

import hypermask_fast as hmf
from hypermask_fast import InputError
from hypermask_fast.masking.task_batch import serves

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
SMALL = hmf.HypernetConfig(embedding=6, hidden=(8,))
TASKS = torch.tensor([2, 0, 1, 0])


def model_of(net: nn.Module, **settings) -> hmf.HyperMask:
    torch.manual_seed(0)
    return hmf.HyperMask(net, 3, 30, SMALL, **settings).eval()


class SequenceFirst(nn.Module):
    """An LSTM over the first dimension; every position gives an output."""

    def __init__(self, reverse: bool = False) -> None:
        super().__init__()
        self.layer, self.head, self.reverse = nn.LSTM(16, 8), nn.Linear(8, 3), reverse

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x.flip(0) if self.reverse else x)[0]
        return self.head(y.flip(0) if self.reverse else y)


class Attends(nn.Module):
    """Attention over the first dimension, by linear layers that see every row by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).transpose(0, 1) for layer in (self.q, self.k, self.v))
        return ((q @ k.transpose(1, 2)).softmax(-1) @ v).transpose(0, 1)


class Centred(nn.Module):
    """Takes the mean of a batch from every sample."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x - x.mean(0, keepdim=True))


class Masked(nn.Module):
    """Takes a matrix over positions beside its samples."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.0)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.layer(x, src_mask=mask)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("count", [2, 4, 5])
@pytest.mark.parametrize(
    "net", [SequenceFirst, lambda: SequenceFirst(True), Attends, Centred], ids=["lstm", "backwards", "attends", "mean"]
)
def test_rows_that_are_no_samples_are_refused(net, count, train):
    """Length and batch are the same: nothing but the values tells."""
    model, x = model_of(net()).train(train), torch.randn(count, count, 16)
    tasks = TASKS.repeat(2)[:count]
    with pytest.raises(InputError, match="no samples of their own") as caught:
        model(x, tasks)
    assert "\n" not in str(caught.value) and "batch_first" in str(caught.value)
    assert model(x, 1).shape[0] == count  # one task per batch passes
    assert all(module.training == train for module in model.net.modules())


def test_also_where_samples_would_pass_together(monkeypatch):
    monkeypatch.setattr(hmf.HyperMask, "_in_one_pass", lambda self, x, tasks=None: serves(self.net, x, tasks))
    model, x = model_of(Attends()), torch.randn(4, 4, 16)
    assert serves(model.net, x)
    with pytest.raises(InputError, match="no samples of their own"):
        model(x, TASKS)
    every = model.forward_all_tasks(x)
    for task in range(3):
        assert_close(every[task], model(x, task), "network")


def test_a_matrix_over_positions_is_not_cut_into_samples():
    model, x = model_of(Masked()), torch.randn(4, 4, 16)
    with pytest.raises(InputError, match="no samples of their own"):
        model(x, torch.zeros(4, 4), task=TASKS)
    longer = torch.randn(4, 6, 16)
    y = model(longer, torch.zeros(6, 6), task=TASKS)
    assert_close(y[0], model(longer, torch.zeros(6, 6), task=2)[0], "network")


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("half", [False, True])
def test_independent_rows_pass(half, train):
    for net, x in (
        (perceptron(), torch.randn(4, 16)),
        (Recurrent(nn.LSTM), torch.randint(20, (4, 4))),
        (nn.Sequential(nn.Linear(16, 8), nn.Dropout(0.5), nn.Linear(8, 2)), torch.randn(9, 16)),
        (nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8, track_running_stats=False)), torch.randn(8, 16)),
    ):
        if half and x.is_floating_point():
            net, x = net.to(torch.bfloat16), x.to(torch.bfloat16)
        tasks = torch.arange(len(x)).remainder(2)
        model = model_of(net)
        assert model.train(train)(x, tasks).shape[0] == len(x)


def test_the_trial_is_made_once_and_leaves_nothing_behind():
    model, calls = model_of(nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))).train(), []
    model.net[0].register_forward_hook(lambda *_: calls.append(1))
    state, seed = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    assert model._rows_are_samples((torch.randn(4, 16, generator=torch.Generator()),), {}, 4)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), seed)
    calls.clear()
    model(torch.randn(6, 16), torch.tensor([0, 1, 2, 0, 1, 2]))
    assert len(calls) == 3  # a pass for each task


def test_official_fidelity_passes_by_groups():
    model = model_of(nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)), fidelity="official")
    x, tasks = torch.randn(4, 16), torch.tensor([0, 1, 0, 1])
    assert_close(model(x, tasks)[[0, 2]], model(x[[0, 2]], 0), "network")


# -- one sample -------------------------------------------------------------------------------------------------------


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.named_buffers()}


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("tasks", [1, [0], [0, 0, 1, 2, 2]], ids=["one", "tensor", "mixed"])
def test_one_sample_of_a_task_with_batch_norm_is_refused_and_moves_nothing(tasks, named):
    net = nn.Sequential(
        nn.Conv1d(4, 8, 1), nn.BatchNorm1d(8), nn.Flatten(), nn.Linear(32, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)
    )
    model = model_of(net).train()
    before = statistics(model)
    count = len(tasks) if isinstance(tasks, list) else 1
    x, task = torch.randn(count, 4, 4), torch.tensor(tasks) if isinstance(tasks, list) else tasks
    with pytest.raises(InputError, match="two samples or more") as caught:
        model(input=x, task=task) if named else model(x, task)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in statistics(model).items())
    assert model.eval()(x, task).shape == (count, 2)


def test_one_sample_where_it_has_more_values():
    net = nn.Sequential(nn.Conv1d(4, 8, 1), nn.BatchNorm1d(8), nn.Flatten(), nn.Linear(32, 2))
    model = model_of(net).train()
    assert model(torch.randn(3, 4, 4), torch.tensor([0, 0, 1])).shape == (3, 2)
    assert model(torch.randn(1, 4, 4), 1).shape == (1, 2)


def test_batch_norm_without_statistics_likewise():
    net = nn.Sequential(nn.Linear(16, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.Linear(6, 2))
    with pytest.raises(InputError, match="two samples or more"):
        model_of(net).train()(torch.randn(1, 16), 0)


def test_another_error_of_the_network_stays_what_it_is():
    class Fails(nn.Linear):
        def forward(self, x):
            raise ValueError("the network's own")

    with pytest.raises(ValueError, match="the network's own"):
        model_of(nn.Sequential(Fails(4, 4)), heads="0").train()(torch.randn(1, 4), 0)
    assert blob_model().train()(torch.randn(2, 8), 0).shape == (2, 2)


class Counting(nn.Module):
    """Counts its passes, and keeps a mean of its inputs, in evaluation mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.body = nn.Linear(8, 3), nn.Linear(16, 8)
        self.register_buffer("passes", torch.tensor(0))
        self.register_buffer("mean", torch.zeros(16))

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        self.mean.lerp_(x.mean(0), 0.5)
        return self.head(self.body(x))


def test_trials_leave_buffers_as_they_were():
    """To find the output layer, and whether rows are samples."""
    model, x = model_of(Counting()), torch.randn(4, 16)
    model(x, 1)
    assert model.net.passes == 1
    assert_close(model.net.mean, 0.5 * x.mean(0), "network")
    model(x, torch.tensor([1, 1, 0, 0]))
    assert model.net.passes == 3


class ClampsFirst(SequenceFirst):
    """Changes its weights as it runs."""

    def forward(self, x: Tensor) -> Tensor:
        self.head.weight.data.clamp_(-0.01, 0.01)
        return super().forward(x)


def test_looking_at_the_rows_changes_no_parameter():
    model = model_of(ClampsFirst(), exclude="head.*", heads=None)
    weight = model.net.get_submodule("head").weight
    before = weight.detach().clone()
    with pytest.raises(InputError):
        model(torch.randn(4, 2, 16), TASKS)
    assert torch.equal(weight, before)
