"""Parameters of which every task has a value of its own: affine ones of normalisations, heads."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from support.networks import TiedDecoder
from torch import nn
from torch.func import functional_call

import hypermask_fast as hmf
from hypermask_fast import InputError
from hypermask_fast.masking.task_batch import serves


class Net(nn.Module):
    """A transformer's parts, with every kind of normalisation that has affine parameters, and a head."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(2, 6, 3)
        self.batch = nn.BatchNorm1d(6)
        self.group = nn.GroupNorm(2, 6)
        self.instance = nn.InstanceNorm1d(6, affine=True)
        self.body = nn.Linear(6, 6)
        self.layer = nn.LayerNorm(6)
        self.rms = nn.RMSNorm(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.instance(self.group(self.batch(self.conv(x)))).mean(-1)
        return self.head(self.rms(self.layer(self.body(x)).relu()))


NORMS = ["batch.weight", "batch.bias", "group.weight", "group.bias", "instance.weight", "instance.bias"]
NORMS += ["layer.weight", "layer.bias", "rms.weight"]
CASES = {"norm": ("norm", NORMS), "head": ("head.*", ["head.weight", "head.bias"]), "both": (["norm", "head.*"], None)}


def model_of(per_task, net=None, tasks=3):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = hmf.HyperMask(Net() if net is None else net, tasks, 30, hmf.HypernetConfig(6, (8,)), per_task=per_task)
    with torch.no_grad():
        for value in model.own.parameters():
            value += 0.5 * torch.randn_like(value)
    return model.eval()


def images(n=6):
    return torch.randn(n, 2, 7, generator=torch.Generator().manual_seed(1))


def plain(model, task):
    """The network's parameters and statistics under one task, by hand."""
    mask = model.mask(task)
    state = dict(model.net.named_buffers())
    state |= {
        name: buffer[task]
        for name, buffer in model.net.named_buffers()
        if "plain_" not in name and ("running" in name or "tracked" in name)
    }
    state |= dict(zip(model.layout.names, mask.effective, strict=True))
    return state | {name.replace("/", "."): values[task] for name, values in model.own.items()}


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case):
    """Against functional_call on the plain network; gradients reach the task that ran and no other."""
    per_task, names = CASES[case]
    model = model_of(per_task)
    names = [*NORMS, *CASES["head"][1]] if names is None else names
    assert [name.replace("/", ".") for name in model.own] == names
    assert {row.name for row in model.layout.rows if row.kind == "per task"} == set(names)
    assert not set(names) & set(model.layout.names)
    reference = Net().eval()
    for task in range(3):
        y = model(images(), task)
        expected = functional_call(
            reference, {k: v for k, v in plain(model, task).items() if "plain_" not in k}, (images(),)
        )
        torch.testing.assert_close(y, expected)
        values = [value for values in model.own.values() for value in values]
        found = torch.autograd.grad(y.square().sum(), values, allow_unused=True)
        wanted = torch.autograd.grad(expected.square().sum(), values, allow_unused=True)
        for number, (a, b) in enumerate(zip(found, wanted, strict=True)):
            assert (a is None) == (b is None) == (number % 3 != task)
            if a is not None:
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("case", CASES)
def test_every_way_to_ask(case, monkeypatch):
    model = model_of(CASES[case][0])
    x, tasks = images(), torch.tensor([2, 0, 1, 1, 2, 0])
    by_hand = torch.cat([model(x[i : i + 1], task) for i, task in enumerate(tasks.tolist())])
    torch.testing.assert_close(model(x, tasks), by_hand)
    torch.testing.assert_close(model.forward_all_tasks(x), torch.stack([model(x, t) for t in range(3)]))
    torch.testing.assert_close(model.export(1)(x), model(x, 1))
    reloaded = Net()
    reloaded.load_state_dict(model.export(1).state_dict())
    torch.testing.assert_close(reloaded.eval()(x), model(x, 1))
    torch.testing.assert_close(copy.deepcopy(model)(x, 2), model(x, 2))
    again = model_of(CASES[case][0])
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.normal_()
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again(x, 2), model(x, 2))
    with model.use_task(1):
        torch.testing.assert_close(model.net(x), model(x, 1))
    assert not serves(model.net, x)  # rows of several tasks can't pass together: on a GPU they pass task by task
    expected = model(x, 2)
    (gradient,) = torch.autograd.grad(
        model(x, torch.tensor(2)).sum(),
        model.own["head/bias" if case != "norm" else "layer/bias"][0],
        allow_unused=True,
    ) or (None,)
    assert gradient is None
    monkeypatch.setattr("hypermask_fast.mask_making.values_at_hand", lambda tensor: False)
    torch.testing.assert_close(model(x, torch.tensor(2)), expected)


def test_training_moves_the_tasks_own_and_no_others():
    model = model_of(["norm", "head.*"]).train()
    optimizer = hmf.optim.Adam(model, 1e-2)
    before = copy.deepcopy(model.own.state_dict())
    for _ in range(2):
        mask = model.mask(1)
        loss = F.cross_entropy(model(images(), mask), torch.tensor([0, 1, 2] * 2)) + model.regularizer(mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    moved = {name for name, value in model.own.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if name.endswith(".1")}


def test_the_weight_drift_does_not_count_them():
    model = model_of(["norm", "head.*"])
    model.begin_task(1)
    with torch.no_grad():
        for value in model.own.parameters():
            value += 1
    assert model.drifts(1).weight == 0
    assert model.layout.size == sum(p.numel() for p in (*model.net.conv.parameters(), *model.net.body.parameters()))


def test_the_plain_parameters_take_no_part():
    model = model_of("head.*")
    y = model(images(), 0)
    with torch.no_grad():
        model.net.head.weight.fill_(torch.nan)
    assert torch.equal(model(images(), 0), y)


@pytest.mark.parametrize("rule", ["embedding.*", "decoder.*"])
def test_tied_ones_stay_tied(rule):
    """By whichever of its names: every task has one value, which both modules read; its gradient is from both."""
    model = model_of(rule, TiedDecoder())
    (name,) = model.own
    x = torch.tensor([1, 5, 8])
    model(x, 0)  # finds that the output layer has no bias
    assert all(segment.selected for segment in model.layout.segments)
    for task in range(3):
        value = model.own[name][task]
        weight, bias = (w for n, w in zip(model.layout.names, model.mask(task).effective, strict=True))
        expected = F.linear(model.net.norm(F.linear(F.embedding(x, value), weight, bias)), value)
        y = model(x, task)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), value)[0] for out in (y, expected)))
    exported = model.export(2)
    assert exported.decoder.weight is exported.embedding.weight
    torch.testing.assert_close(exported(x), model(x, 2))
    net = model.unconvert()
    assert net.decoder.weight is net.embedding.weight


def test_a_pattern_that_matches_nothing():
    with pytest.raises(InputError, match="per_task pattern 'haed.\\*' matches none of the network's parameters"):
        hmf.HyperMask(Net(), 2, per_task=["haed.*"])
    with pytest.raises(InputError, match="per_task='norm', but no normalisation"):
        hmf.HyperMask(nn.Linear(2, 2), 2, per_task="norm")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    net = nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 3)).to(dtype)
    model = hmf.HyperMask(net, 2, 30, per_task=["norm", "2.*"]).eval()
    assert {value.dtype for value in model.own.parameters()} == {dtype}
    x = torch.randn(4, 8).to(dtype)
    y = model(x, torch.tensor([0, 1, 0, 1]))
    assert y.dtype == dtype and y.isfinite().all()
    assert model.own["2/bias"][model.add_task(like=1)].dtype == dtype


def test_compiled_without_a_recompile_per_task(fresh_compiler):
    model = hmf.HyperMask(
        nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 3)), 3, 30, per_task="norm"
    ).eval()
    with torch.no_grad():
        for value in model.own.parameters():
            value.normal_()
    x = torch.randn(4, 8)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for task in range(3):
            torch.testing.assert_close(compiled(x, torch.tensor(task)), model(x, task))
