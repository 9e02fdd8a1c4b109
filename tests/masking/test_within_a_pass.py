"""What happens within a pass, or after it, that a mask could miss: refused, or under the mask."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from support.module_kinds import masked_state
from support.modules import perceptron
from support.tolerances import assert_close
from torch import Tensor, nn
from torch.func import functional_call

import hypermask_fast as hmf
from hypermask_fast import InputError

SMALL = hmf.HypernetConfig(embedding=6, hidden=(8,))
TASKS = torch.tensor([2, 0, 1, 0])


def model_of(net: nn.Module, **settings) -> hmf.HyperMask:
    torch.manual_seed(0)
    return hmf.HyperMask(net, 3, 30, SMALL, **settings).eval()


def batch(*shape: int) -> Tensor:
    return torch.randn(*(shape or (4, 16)), generator=torch.Generator().manual_seed(1))


class Inner(nn.Module):
    """Runs a layer with twice its weight, or with another weight, in one way or another."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.layer, self.head = way, nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "function":
            return self.head(F.linear(x, 2 * self.layer.weight, self.layer.bias))
        if self.way == "call":
            return self.head(functional_call(self.layer, {"weight": torch.ones(8, 16)}, (x,)))
        self.layer.weight = nn.Parameter(torch.ones(8, 16))
        return self.head(self.layer(x) if self.way == "exchange" else F.linear(x, self.layer.weight, self.layer.bias))


@pytest.mark.parametrize(
    ("way", "together"),
    [("call", False), ("exchange", False), ("exchange, read", False), ("call", True)],
)
def test_a_parameter_exchanged_within_a_pass_is_refused(way, together, monkeypatch):
    """W * m of the one before would be used in its place."""
    if together:  # as on a GPU
        monkeypatch.setattr(hmf.HyperMask, "_in_one_pass", lambda self, x, tasks=None: True)
    model = model_of(Inner(way), heads="head")
    with pytest.raises(InputError, match="layer.weight has been exchanged for another tensor within a pass"):
        model(batch(), TASKS if together else 1)


def test_what_is_computed_from_a_parameter_is_under_the_mask():
    model = model_of(Inner("function"), heads="head")
    expected = functional_call(Inner("function"), masked_state(model, 1), (batch(),))
    assert_close(model(batch(), 1), expected, "network")


@pytest.mark.parametrize("kept", [False, True])
def test_a_part_called_with_other_parameters_is_refused(kept):
    """Of the model as a whole they are masked."""
    model, x = model_of(perceptron()), batch()
    other = {"0.weight": 2 * model.net[0].weight.detach()}
    with torch.set_grad_enabled(not kept):
        for _ in range(3):
            model(x, 1)
        with model.use_task(1), pytest.raises(InputError, match="0.weight has been exchanged"):
            functional_call(model.net, other, (x,))
        whole = functional_call(model, {f"net.{name}": value for name, value in other.items()}, (x, 1))
        with model.disabled():
            plain = functional_call(model.net, other, (x,))
    with torch.no_grad():
        model.net[0].weight *= 2
    assert_close(whole, model(x, 1), "network")
    with model.disabled():
        assert_close(plain, model.net(x), "network")


class Yields(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.head = way, nn.Linear(16, 3)

    def forward(self, x: Tensor):
        pieces = (self.head(row) for row in x)
        weight, bias = (lambda: self.head.weight), self.head.bias
        return {
            "dict": {"pieces": pieces},
            "map": map(self.head, x),
            "generator": pieces,
            "function": lambda: F.linear(x, weight(), bias),
            "method": self.rows,
            "partial": functools.partial(self.rows, x),
        }[self.way]

    def rows(self, x: Tensor) -> Tensor:
        return F.linear(x, self.head.weight, self.head.bias)


@pytest.mark.parametrize("way", ["function", "method", "partial"])
def test_functions_as_outputs_are_refused(way):
    with pytest.raises(InputError, match="would run after the pass, unmasked"):
        model_of(Yields(way), heads="head")(batch(), 1)


class Copies(Inner):
    """Reads a copy of its layer, which belongs to no model."""

    def forward(self, x: Tensor) -> Tensor:
        copied = copy.deepcopy(self.layer)
        return self.head(copied(x) if self.way == "call" else F.linear(x, copied.weight, copied.bias))


@pytest.mark.parametrize("way", ["call", "read"])
def test_a_layer_copied_within_a_pass_is_refused(way):
    model = model_of(Copies(way), heads="head")
    with pytest.raises(InputError, match="is copied or pickled within a pass"):
        model(batch(), 1)
    with model.use_task(1):
        assert type(model.export(1).layer) is nn.Linear


@pytest.mark.parametrize("way", ["generator", "dict", "map"])
def test_outputs_that_are_computed_later_are_refused(way):
    model, x = model_of(Yields(way), heads="head"), batch()
    with pytest.raises(InputError, match="would run after the pass, unmasked"):
        model(x, 1)
    with model.use_task(1):
        found = model.net(x)
        rows = torch.stack([*(found["pieces"] if way == "dict" else found)])
    assert_close(rows, F.linear(x, masked_state(model, 1)["head.weight"], model.net.head.bias), "network")


def test_a_nested_tensor_takes_one_task():
    model = model_of(perceptron())
    rows = [batch(3, 16), batch(2, 16)]
    nested = torch.nested.nested_tensor(rows, layout=torch.jagged)
    for ours, row in zip(model(nested, 1).unbind(), rows, strict=True):
        assert_close(ours, model(row, 1), "network")
    with pytest.raises(InputError, match="it needs one task per batch"):
        model(nested, torch.tensor([0, 1]))


def test_tied_parameters_stay_tied_when_a_state_is_assigned():
    class Tied(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 3))
            self[1].weight = self[0].weight

    model = model_of(Tied())
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    with model.disabled():
        assert model.net[1].weight is model.net[0].weight
    torch.optim.SGD(model.parameters(), 0.1).zero_grad()
    model(batch(), 1).square().sum().backward()
    assert sum(name.startswith("net.") for name, _ in model.named_parameters()) == 5


class Parts(nn.Module):
    """A network whose parts are called by its other methods too."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.conv, self.rnn = nn.Embedding(9, 8), nn.Conv1d(8, 8, 1), nn.GRU(8, 8, batch_first=True)
        self.attention, self.hidden, self.head = nn.MultiheadAttention(8, 2), nn.Linear(8, 8), nn.Linear(8, 3)

    def encode(self, x: Tensor) -> Tensor:
        hidden = self.conv(self.table(x).transpose(1, 2)).transpose(1, 2)
        hidden = self.rnn(hidden)[0]
        return self.hidden(self.attention(hidden, hidden, hidden)[0])

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encode(x).mean(1))


def test_a_part_called_outside_of_a_pass_is_refused():
    """Also by a method of the network that is reached through the model."""
    model, x = model_of(Parts(), exclude="head.*"), torch.arange(8).view(2, 4) % 9
    hidden = torch.randn(2, 4, 8)
    calls = [
        lambda: model.encode(x),
        lambda: model.table(x),
        lambda: model.net.conv(hidden.transpose(1, 2)),
        lambda: model.net.rnn(hidden),
        lambda: model.net.attention(hidden, hidden, hidden),
        lambda: model.net.hidden(hidden),
    ]
    for call in calls:
        with pytest.raises(InputError, match="is masked and is called outside of a forward pass"):
            call()
    assert model.head(hidden).shape == (2, 4, 3)  # it is not masked
    with model.use_task(1):
        within = model.encode(x)
    y = model.head(within.mean(1))
    assert_close(y, model(x, 1), "network")
    with model.disabled():
        assert not torch.equal(model.encode(x), within)
    assert model.net.table.weight is dict(model.net.named_parameters())["table.weight"]
    state = {**masked_state(model, 1), **{n: p for n, p in model.net.named_parameters() if n.startswith("head")}}
    assert_close(y, functional_call(Parts(), state, (x,)), "network")
    assert type(model.unconvert().table) is nn.Embedding and model.num_tasks == 3
