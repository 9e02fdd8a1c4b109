"""Threads and replicas of a network within a pass: under the mask, or refused."""

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from support.module_kinds import masked_state
from support.modules import perceptron
from torch import Tensor, nn

import hypermask_fast as hmf
from hypermask_fast import InputError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
SMALL = hmf.HypernetConfig(embedding=6, hidden=(8,))


def model_of(net: nn.Module, **settings) -> hmf.HyperMask:
    torch.manual_seed(0)
    return hmf.HyperMask(net, 3, 30, SMALL, **settings).eval()


def batch(*shape: int) -> Tensor:
    return torch.randn(*(shape or (4, 16)), generator=torch.Generator().manual_seed(1))


class InThreads(nn.Module):
    """Runs its layer on the halves of a batch in threads of a pool."""

    def __init__(self, around: Callable | None = None) -> None:
        super().__init__()
        self.layer, self.around = nn.Linear(16, 4), around

    def forward(self, x: Tensor) -> Tensor:
        call = self.layer if self.around is None else self.around
        with ThreadPoolExecutor(2) as pool:
            return torch.cat([*pool.map(call, x.chunk(2))])


def test_a_thread_inside_forward_is_refused():
    model = model_of(InThreads(), heads="layer")
    with pytest.raises(InputError, match="in a thread that has no mask while") as caught:
        model(batch(), 1)
    assert "\n" not in str(caught.value)


def test_a_thread_that_says_its_task_sees_the_mask():
    net = InThreads()
    model = model_of(net, heads="layer")

    def under_the_mask(x):
        with model.use_task(1), torch.no_grad():
            return net.layer(x)

    net.around = under_the_mask
    with torch.no_grad():
        assert torch.allclose(
            model(batch(), 1), F.linear(batch(), masked_state(model, 1)["layer.weight"], net.layer.bias)
        )


def replica(module: nn.Module) -> nn.Module:
    """What nn.DataParallel makes of a module for another GPU: its parameters are tensors of another device."""
    made = module._replicate_for_data_parallel()
    for name, parameter in module._parameters.items():
        setattr(made, name, None if parameter is None else parameter.view_as(parameter))
    for name, child in module._modules.items():
        setattr(made, name, None if child is None else replica(child))
    return made


class Replicated(nn.Module):
    """Runs replicas of a part of it, as a network does that has nn.DataParallel inside."""

    def __init__(self, body: nn.Module, made: Callable = replica) -> None:
        super().__init__()
        self.body, self.head, self.made = body, nn.Linear(16, 3), made

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([self.made(self.body)(part) for part in x.chunk(2)]))


@pytest.mark.parametrize(
    "body", [nn.Linear(16, 16), nn.Sequential(nn.Conv1d(16, 16, 1)), nn.Sequential(nn.BatchNorm1d(16))]
)
def test_replicas_inside_a_pass_are_refused(body):
    model = model_of(Replicated(copy.deepcopy(body)), heads="head")
    with pytest.raises(InputError, match="can't be replicated by nn.DataParallel") as caught:
        model(batch(4, 16, 1) if isinstance(body, nn.Sequential) else batch(), 1)
    assert "\n" not in str(caught.value)


def test_a_parameter_exchanged_for_a_tensor_within_a_pass_is_refused():
    def exchanged(body: nn.Module) -> nn.Module:
        weight = body._parameters.pop("weight")
        body.weight = weight.detach() * 2
        return body

    model = model_of(Replicated(nn.Conv1d(16, 16, 1), exchanged), heads="head")
    with pytest.raises(InputError, match="weight of MaskedConv1d has been exchanged for a tensor within a pass"):
        model(batch(4, 16, 1), 1)


def test_a_masked_layer_on_its_own_is_replicated_as_any_other():
    layer = hmf.MaskedLinear(16, 4)
    assert torch.equal(replica(layer)(batch()), layer(batch()))


def test_a_whole_model_in_data_parallel():
    model = model_of(perceptron())
    with pytest.raises(InputError, match="give it the net without the wrapper"):
        hmf.HyperMask(nn.DataParallel(nn.Linear(2, 2)), 2)
    assert torch.equal(nn.DataParallel(model)(batch(), 1), model(batch(), 1))  # no GPU: the model itself
    with pytest.raises(InputError, match="nn.DataParallel can't make replicas of a HyperMask model"):
        replica(model)
