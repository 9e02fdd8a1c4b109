"""torch.func's transforms and forward-mode differentiation, over a model and over its regulariser.

Each is compared with what backward gives for the same function, or with single calls.
"""

import pytest
import torch
from support.tolerances import assert_close
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

import hypermask_fast as hmf
from hypermask_fast import InputError

HYPERNETWORKS = {
    "dense": hmf.HypernetConfig(6, (8,)),
    "chunks": hmf.HypernetConfig(6, (8,), 10),
    "chunks of tensors": hmf.HypernetConfig(6, (8,), 10, by_tensor=True),
}
X = torch.randn(4, 5, generator=torch.Generator().manual_seed(3))
TASKS = torch.tensor([0, 2, 1, 1])


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3)

    def forward(self, x):
        return self.head(self.norm(self.first(x)).tanh())


class Loss(nn.Module):
    """What a step of task 1 minimises."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        mask = self.model.mask(1)
        return self.model(x, mask).square().sum() + self.model.regularizer(mask)


@pytest.fixture(params=HYPERNETWORKS)
def model(request):
    torch.manual_seed(0)
    made = hmf.HyperMask(Net(), 3, 30, HYPERNETWORKS[request.param], beta=0.5, lam=0.02, heads="head", per_task="norm")
    made.eval().begin_task(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.01
    return made


def values(module):
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


@pytest.mark.parametrize("optimised", [False, True])
def test_derivatives_by_all_parameters(model, optimised):
    """In reverse and forward mode, without gradients being recorded too, and while an optimiser takes factors."""
    loss = Loss(model)
    loss(X).backward()
    expected = {name: p.grad.clone() for name, p in loss.named_parameters() if p.grad is not None}
    optimizer = hmf.optim.Adam(model) if optimised else None
    model.train(optimised)
    model.net.eval()
    at = values(loss)
    of = lambda parameters: functional_call(loss, parameters, (X,))  # noqa: E731
    found = grad(of)(at)
    for name, value in expected.items():
        assert_close(found[name], value, "network", name)
    along = {name: torch.ones_like(value) for name, value in at.items()}
    slope = sum(value.sum() for value in expected.values())
    assert_close(jvp(of, (at,), (along,))[1], slope, "along all")
    for recorded in (True, False):
        with forward_ad.dual_level(), torch.set_grad_enabled(recorded):
            dual = of({name: forward_ad.make_dual(value, along[name]) for name, value in at.items()})
            assert_close(forward_ad.unpack_dual(dual).tangent, slope, "along all")
    del optimizer


def test_derivatives_by_the_inputs(model):
    call = lambda x: model(x, 1)  # noqa: E731
    expected = torch.autograd.functional.jacobian(call, X)
    for jacobian in (jacrev(call)(X), jacfwd(call)(X)):
        assert_close(jacobian, expected, "network")
    curved = lambda x: call(x).square().sum()  # noqa: E731
    assert_close(hessian(curved)(X), torch.autograd.functional.hessian(curved, X), "network")


@pytest.mark.parametrize("recorded", [True, False])
def test_samples_one_by_one(model, recorded):
    """Also with a task of each sample's own, and after passes that have kept W * m."""
    with torch.set_grad_enabled(recorded):
        for _ in range(2):
            expected, mixed = model(X, 1), model(X, TASKS)
        assert_close(vmap(lambda x: model(x[None], 1)[0])(X), expected, "network")
        assert_close(vmap(lambda x, task: model(x[None], task)[0])(X, TASKS), mixed, "network")


def test_gradients_of_each_sample(model):
    at = values(model)
    of = lambda parameters, x: functional_call(model, parameters, (x[None], 1)).square().sum()  # noqa: E731
    found = vmap(grad(of), (None, 0))(at, X)
    for row, x in enumerate(X):
        model.zero_grad()
        model(x[None], 1).square().sum().backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                assert_close(found[name][row], parameter.grad, "network", name)


def test_a_backend_by_name_is_refused(model):
    with hmf.use_backend("cpu"), pytest.raises(InputError, match="only the reference can"):
        jacfwd(lambda x: model(x, 1))(X)
    with hmf.use_backend("reference"):
        jacfwd(lambda x: model(x, 1))(X)


def test_the_output_layer_has_to_be_known():
    model = hmf.HyperMask(Net(), 2).eval()
    with pytest.raises(InputError, match="run one batch outside of torch.func's transforms before, or name it"):
        vmap(lambda x: model(x[None], 1)[0])(X)
    expected = model(X, 1)
    assert_close(vmap(lambda x: model(x[None], 1)[0])(X), expected, "network")
