"""A network that can't be masked, for whatever reason, is left as it was, and can be masked by the next try."""

import copy
import warnings

import pytest
import torch
from torch import nn

import hypermask_fast as hmf
from hypermask_fast import InputError
from hypermask_fast.dense import HyperNetwork
from hypermask_fast.masking.norms import TaskStatistics


class Alone(nn.Linear):
    def __init_subclass__(cls, **settings):
        raise TypeError("there is to be no subclass")


class Named(nn.Linear):
    def __init_subclass__(cls, *, tag, **settings):
        super().__init_subclass__(**settings)


class Scaled(nn.Sequential):
    """Has a parameter that is not masked, which is warned of."""

    def __init__(self, *layers):
        super().__init__(*layers)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return super().forward(x) * self.scale


def network(last=nn.Linear):
    return Scaled(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4), last(4, 2))


def no_memory(*args, **kwargs):
    raise RuntimeError("out of memory")


def assert_as_it_was(net, before):
    assert [type(module) for module in net.modules()] == [type(module) for module in before.modules()]
    for module, other in zip(net.modules(), before.modules(), strict=True):
        assert vars(module).keys() == vars(other).keys() and not module._forward_pre_hooks
        assert module._non_persistent_buffers_set == other._non_persistent_buffers_set
    for (name, tensor), (other, value) in zip(net.state_dict().items(), before.state_dict().items(), strict=True):
        assert name == other and torch.equal(tensor, value)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("last", [Alone, Named])
def test_a_class_that_allows_no_subclass(last):
    net = network(last)
    before = copy.deepcopy(net)
    with pytest.raises(InputError, match=rf"module '3' \({last.__name__}\) can't be masked: .*subclass"):
        hmf.HyperMask(net, 2)
    assert_as_it_was(net, before)


@pytest.mark.parametrize("where", ["the hypernetwork's move", "a norm", "another norm", "a warning"])
def test_what_fails_on_the_way(where, monkeypatch):
    net = network()
    before = copy.deepcopy(net)
    begin, begun = TaskStatistics.begin, []

    def begin_or_not(self, *args):
        begun.append(self)
        return no_memory() if len(begun) == (1 if where == "a norm" else 2) else begin(self, *args)

    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error" if where == "a warning" else "ignore")
        if where == "the hypernetwork's move":
            patch.setattr(HyperNetwork, "to", no_memory)
        elif "norm" in where:
            patch.setattr(TaskStatistics, "begin", begin_or_not)
        with pytest.raises((RuntimeError, UserWarning)):
            hmf.HyperMask(net, 2)
    assert_as_it_was(net, before)
    with pytest.warns(UserWarning, match="shared by all tasks"):
        hmf.HyperMask(net, 2)(torch.randn(3, 4), 1)
