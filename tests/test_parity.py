"""Step-for-step parity with the method written with hypnettorch's hypernetwork and regulariser."""

import dataclasses
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support import internals
from support.backends import native_problem
from support.tolerances import EPS
from torch import nn

import hypermask_fast as hmf
from hypermask_fast.ops import OPS

sys.path.insert(0, str(Path(__file__).parents[1]))
hypnettorch_loop = pytest.importorskip("bench.peers.hypnettorch_loop", reason="hypnettorch is not installed")

TASKS, STEPS, SPARSITY = 3, 25, 30.0


@pytest.fixture
def default_dtype(request):
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


def make_pair(chunk_size, drift_norm, drift_masked):
    """Our model and the peer with the same initial weights."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4))
    config = hmf.HypernetConfig(embedding=6, hidden=(10, 9), chunk_size=chunk_size, chunk_embedding=5)
    # Large beta and lam: a wrong factor in either shows in the first decimals.
    settings = {"beta": 0.3, "lam": 0.02, "drift_norm": drift_norm, "drift_masked": drift_masked}
    ours = hmf.HyperMask(net, TASKS, SPARSITY, config, fidelity="official", **settings)
    peer = hypnettorch_loop.HypnettorchLoop(
        ours.weights(),
        hypnettorch_loop.mlp_forward,
        num_tasks=TASKS,
        embedding=6,
        hidden=(10, 9),
        chunk_size=chunk_size,
        chunk_embedding=5,
        sparsity=SPARSITY,
        lr=1e-2,
        **settings,
    )
    with torch.no_grad():
        for theirs, own in paired(peer, ours):
            theirs.copy_(own)
    return ours, peer


def paired(peer, ours):
    """(theirs, ours) for every Parameter of both networks."""
    hypernet = ours.hypernet
    layers = [*hypernet.trunk, hypernet.output]
    own = [parameter for layer in layers for parameter in (layer.weight, layer.bias)]
    if hasattr(hypernet, "chunk_embeddings"):
        own.append(hypernet.chunk_embeddings)
    theirs = list(peer.hypernet.unconditional_params)
    assert [tuple(p.shape) for p in theirs] == [tuple(p.shape) for p in own]
    pairs = list(zip(theirs, own, strict=True))
    pairs += zip(peer.hypernet.conditional_params, hypernet.embeddings, strict=True)
    return pairs + list(zip(peer.weights, ours.weights(), strict=True))


def our_step(model, task, x, y, sparsity, optimizer):
    mask = model.mask(task, sparsity)
    cross_entropy, drifts = F.cross_entropy(model(x, mask), y), model.drifts(mask)
    optimizer.zero_grad()
    (cross_entropy + model.drift.loss(drifts, task)).backward()
    optimizer.step()
    return (cross_entropy + model.drift.loss(drifts, task)).detach()  # step_in_backward knows R only now


def relative(a, b):
    return ((a - b).norm() / b.norm().clamp_min(1e-30)).item()


def torch_adam(model):
    return torch.optim.Adam(model.parameters(), lr=1e-2)


def our_adam(model):
    """On factored gradients where the output layer is dense."""
    return hmf.optim.Adam(model, lr=1e-2)


def our_adam_in_backward(model):
    return hmf.optim.Adam(model, lr=1e-2, step_in_backward=True)


OPTIMIZERS = [torch_adam, our_adam, our_adam_in_backward]
SERVED = {  # what of the extension a step with the dense layer calls
    torch_adam: {"hypernet_logits", "output_drift"},
    our_adam: {"output_residuals", "hidden_gradient", "factored_adam"},
    our_adam_in_backward: {"hypernet_logits", "hypernet_adam"},
}


def run_both(ours, peer, steps, check, make_optimizer):
    """The same batches through both, task after task; `check(task, step, losses)` after every step."""
    generator = torch.Generator().manual_seed(7)
    for task in range(TASKS):
        peer.begin_task(task)
        ours.begin_task(task)
        optimizer = make_optimizer(ours)
        for step in range(steps):
            x = torch.randn(16, 20, generator=generator)
            y = torch.randint(4, (16,), generator=generator)
            sparsity = SPARSITY * (step + 1) / steps if task == 0 else SPARSITY
            check(task, step, peer.step(x, y, sparsity), our_step(ours, task, x, y, sparsity, optimizer))


@pytest.mark.parametrize("default_dtype", [torch.float64], indirect=True)
@pytest.mark.parametrize("chunk_size", [None, 100], ids=["dense", "chunked"])
@pytest.mark.parametrize(("norm", "masked"), [(1, True), (2, True), (1, False)])
@pytest.mark.parametrize("make_optimizer", OPTIMIZERS)
def test_float64_step_for_step(default_dtype, chunk_size, norm, masked, make_optimizer):
    ours, peer = make_pair(chunk_size, norm, masked)
    start = [parameter.detach().clone() for _, parameter in paired(peer, ours)]

    def check(task, step, theirs, own):
        assert relative(own, theirs) < 1e-7, (task, step)
        for a, b in paired(peer, ours):
            assert relative(b, a) < 1e-7, (task, step, tuple(a.shape))

    run_both(ours, peer, STEPS, check, make_optimizer)
    for before, (_, after) in zip(start, paired(peer, ours), strict=True):
        assert relative(after, before) > 1e-3  # everything has been trained


@pytest.mark.parametrize("default_dtype", [torch.float32], indirect=True)
@pytest.mark.parametrize("chunk_size", [None, 100], ids=["dense", "chunked"])
@pytest.mark.parametrize("make_optimizer", OPTIMIZERS)
def test_float32_first_steps(default_dtype, chunk_size, make_optimizer):
    ours, peer = make_pair(chunk_size, 1, True)

    def check(task, step, theirs, own):
        if task > 0 or step > 5:  # later, rounding differences have grown through Adam
            return
        assert relative(own, theirs) < 1e-5, step
        for a, b in paired(peer, ours):
            assert relative(b, a) < 1e-5, (step, tuple(a.shape))

    run_both(ours, peer, 6, check, make_optimizer)


def spied(monkeypatch):
    """Counts the calls that the CPU extension serves, by op."""
    calls = Counter()

    def counting(op, offer):
        def call(*args):
            calls[op] += 1
            return offer.function(*args)

        return dataclasses.replace(offer, function=call)

    internals.nothing_was_chosen(monkeypatch)
    for name, op in OPS.items():
        if "cpu" in op.offers:
            monkeypatch.setitem(op.offers, "cpu", counting(name, op.offers["cpu"]))
    return calls


@pytest.mark.skipif(bool(native_problem()), reason=native_problem())
@pytest.mark.parametrize("task", [1, 2])
@pytest.mark.parametrize(("chunk_size", "make_optimizer"), [*((None, make) for make in OPTIMIZERS), (100, our_adam)])
@pytest.mark.parametrize("norm", [1, 2])
def test_float32_steps_of_later_tasks(monkeypatch, task, chunk_size, make_optimizer, norm):
    """The extension's steps against the peer's in float64, from the same values, a little away from where the task
    began: so that drifts and their gradients are far from 0."""
    ours, peer = make_pair(chunk_size, norm, True)
    peer.hypernet.double()
    peer.weights = [nn.Parameter(weight.detach().double()) for weight in peer.weights]
    peer.begin_task(task)
    ours.begin_task(task)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for theirs, own in paired(peer, ours):
            own.add_(0.05 * torch.randn(own.shape, generator=generator))
            theirs.copy_(own)
    optimizer, calls = make_optimizer(ours), spied(monkeypatch)
    for step in range(3):
        x, y = torch.randn(16, 20, generator=generator), torch.randint(4, (16,), generator=generator)
        expected, found = peer.step(x.double(), y), our_step(ours, task, x, y, SPARSITY, optimizer)
        assert relative(found, expected) < 8 * EPS, step
        for theirs, own in paired(peer, ours):  # by norm: an entry whose gradient nearly cancels steps by its rounding
            assert relative(own, theirs) < 12 * EPS, (step, tuple(own.shape))
    served = {"mask_thresholds", "masked_weights_drift"}
    if chunk_size is None:
        served |= SERVED[make_optimizer]
    assert calls == dict.fromkeys(served, 3)
