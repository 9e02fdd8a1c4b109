"""Hypernetworks that fit: sizes, budgets, chunks that follow the tensors, and what is too large."""

import copy
import math
import warnings
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from support.networks import blob_model
from torch import nn

import hypermask_fast as hmf
from hypermask_fast import HypernetConfig, InputError, sizing
from hypermask_fast.ops import reference


def layout_of(*widths):
    return hmf.MaskLayout.of(nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(widths))))


LAYOUT = layout_of(30, 20, 7)  # 767 entries in tensors of 600, 20, 140 and 7


def counted(config, layout=LAYOUT):
    net = config.build(layout.size, 2, [segment.size for segment in layout.segments])
    return sum(p.numel() for name, p in net.named_parameters() if not name.startswith("embeddings"))


@pytest.mark.parametrize("hidden", [(10,), (5, 100)])
@pytest.mark.parametrize("chunk_size", [None, 1, 7, 50, 600, 5000])
@pytest.mark.parametrize("by_tensor", [False, True])
def test_the_formula_counts_the_parameters(chunk_size, by_tensor, hidden):
    config = HypernetConfig(9, hidden, chunk_size, 3, by_tensor and chunk_size is not None)
    assert config.num_parameters(LAYOUT) == counted(config)


@pytest.mark.parametrize("by_tensor", [False, True])
def test_auto_takes_the_largest_that_fits(by_tensor):
    settings = {"embedding": 9, "hidden": (5, 10), "chunk_embedding": 3, "by_tensor": by_tensor}
    dense = HypernetConfig(9, (5, 10), None, 3)
    whole = 16 * counted(dense)
    assert HypernetConfig.auto(LAYOUT, whole, **settings) == dense
    before = 10**9
    for budget in range(whole - 1, 0, -997):
        sizes = [
            c
            for c in range(1, 601)
            if 16 * HypernetConfig(9, (5, 10), c, 3, by_tensor).num_parameters(LAYOUT) <= budget
        ]
        if not sizes:
            with pytest.raises(
                InputError, match=r"no hypernetwork of hidden widths \(5, 10\) trains within .*chunk_size="
            ):
                HypernetConfig.auto(LAYOUT, budget, **settings)
            continue
        found = HypernetConfig.auto(LAYOUT, budget, **settings)
        assert found.by_tensor == by_tensor and 16 * counted(found) <= budget
        assert found.chunk_size == max(sizes) or (not by_tensor and found.chunk_size >= 600)
        assert found.chunk_size <= before
        before = found.chunk_size


def test_auto_follows_the_tensors_and_trains_within_its_budget():
    budget = 16 * 4000
    config = HypernetConfig.auto(LAYOUT, budget, hidden=(10,))
    assert config.by_tensor and config.chunk_size
    net = config.build(LAYOUT.size, 1, [s.size for s in LAYOUT.segments])
    optimizer = torch.optim.Adam(net.parameters())
    net([0]).sum().backward()
    optimizer.step()
    taken = sum(p.nbytes + p.grad.nbytes for p in net.parameters())
    taken += sum(t.nbytes for state in optimizer.state.values() for name, t in state.items() if name != "step")
    assert budget / 2 < taken <= budget + 16 * net.embeddings[0].numel()


@pytest.mark.parametrize("budget", [0, -1, 1.5, True, "1 GB"])
def test_a_budget_is_a_number_of_bytes(budget):
    with pytest.raises(InputError, match="budget_bytes must be a whole number, 1 or more"):
        HypernetConfig.auto(LAYOUT, budget)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"by_tensor": True}, "it needs a chunk_size"),
        ({"by_tensor": 1, "chunk_size": 3}, "must be true or false, not 1"),
    ],
)
def test_bad_by_tensor(settings, message):
    with pytest.raises(InputError, match=message):
        HypernetConfig(**settings)
    with pytest.raises(InputError, match="needs to know their sizes"):
        HypernetConfig(chunk_size=3, by_tensor=True).build(10, 1)


# -- too large --------------------------------------------------------------------------------------------------------


def test_larger_than_the_memory_is_refused_before_anything_is_made(monkeypatch):
    monkeypatch.setattr(sizing, "total_memory", lambda device: 200_000)
    made = []
    monkeypatch.setattr(HypernetConfig, "build", lambda *args: made.append(args))
    net = nn.Sequential(nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 7))
    with pytest.raises(InputError) as caught:
        hmf.HyperMask(net, 2)
    entries = 4 * counted_dense(LAYOUT)
    words = f"the hypernetwork takes {entries / 1000:.3g} kB ({3 * entries / 1000:.3g} kB with Adam's moments)"
    assert str(caught.value).startswith(f"{words}, more than the 200 kB of cpu: try HypernetConfig(chunk_size=")
    assert not made and type(net[0]) is nn.Linear
    chunk = int(str(caught.value).partition("chunk_size=")[2].rstrip(")"))
    monkeypatch.undo()
    monkeypatch.setattr(sizing, "total_memory", lambda device: 200_000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hmf.HyperMask(net, 2, hypernetwork=HypernetConfig(chunk_size=chunk))  # what it says to try


def counted_dense(layout):
    return 48 * 100 + 100 + layout.size * 101


def test_a_training_step_that_will_not_fit_is_warned_of(monkeypatch):
    monkeypatch.setattr(sizing, "total_memory", lambda device: 500_000)
    with pytest.warns(UserWarning, match=r"training the hypernetwork takes 988 kB with Adam's moments, more than"):
        hmf.HyperMask(nn.Sequential(nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 7)), 2)


def test_where_moments_in_bfloat16_would_fit_the_warning_says_so(monkeypatch):
    """8 bytes in place of 12 for each of 82 thousand parameters."""
    monkeypatch.setattr(sizing, "total_memory", lambda device: 700_000)
    with pytest.warns(UserWarning, match=r"takes 988 kB .*: keep moments in bfloat16 .*, or try HypernetConfig"):
        hmf.HyperMask(nn.Sequential(nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 7)), 2)


def test_of_a_gpu_and_the_machine_the_smaller_one_counts(monkeypatch):
    monkeypatch.setattr(sizing, "total_memory", lambda device: 200_000 if device.type == "cuda" else 10**12)
    with pytest.raises(InputError, match="more than the 200 kB of cuda"):
        HypernetConfig().check_memory(LAYOUT, torch.device("cuda"))
    HypernetConfig().check_memory(LAYOUT, torch.device("cpu"))
    HypernetConfig().check_memory(LAYOUT, torch.device("meta"))


def test_the_memory_of_this_machine():
    assert 2**28 < sizing.total_memory(torch.device("cpu")) < 2**50
    assert sizing.total_memory(torch.device("mps")) == math.inf


# -- chunks that follow the tensors -----------------------------------------------------------------------------------

SIZES = [(5, 7, 2), (10,), (3, 3), (1, 20, 4, 4), (6, 6, 6)]


def build(sizes, chunk_size, tasks=3):
    torch.manual_seed(0)
    return HypernetConfig(4, (6, 5), chunk_size, 3, by_tensor=True).build(sum(sizes), tasks, sizes).double()


@pytest.mark.parametrize("chunk_size", [1, 3, 6, 100])
@pytest.mark.parametrize("sizes", SIZES)
def test_every_tensor_begins_a_chunk(sizes, chunk_size):
    """The formula, chunk by chunk; each tensor's logits are those of its own chunks."""
    net = build(sizes, chunk_size)
    rows = min(chunk_size, max(sizes))
    chunks = iter(net.chunk_embeddings)
    tensors = []
    for entries in sizes:
        pieces = []
        for _ in range(-(-entries // rows)):
            h = torch.cat([next(chunks), net.embeddings[1]])
            for layer in net.trunk:
                h = F.elu(layer.weight @ h + layer.bias)
            pieces.append(net.output.weight @ h + net.output.bias)
        tensors.append(torch.cat(pieces)[:entries])
    assert next(chunks, None) is None
    torch.testing.assert_close(net([1])[0], torch.cat(tensors))
    torch.testing.assert_close(net(torch.tensor([1, 0]))[0], torch.cat(tensors))


@pytest.mark.parametrize("chunk_size", [1, 3, 6, 100])
@pytest.mark.parametrize("sizes", SIZES)
def test_what_is_cut_off_does_not_count(sizes, chunk_size):
    """The drift, and every gradient of it, against autograd over the logits in float64."""
    net = build(sizes, chunk_size)
    targets = net.drift_targets(2)
    logits = net([0, 1]).detach()
    assert net.output_drift(net.earlier_hidden(2), targets) == 0
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    found, expected = net.output_drift(net.earlier_hidden(2), targets), (net([0, 1]) - logits).square().sum()
    torch.testing.assert_close(found, expected)
    for a, b in zip(
        *(torch.autograd.grad(drift, list(net.parameters()), allow_unused=True) for drift in (found, expected)),
        strict=True,
    ):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b)  # an embedding of no earlier task


def test_gradients_of_logits():
    net = build((5, 7, 2), 3)
    hidden = net.hidden([0, 2]).detach().requires_grad_()
    leaves = [hidden, net.output.weight, net.output.bias]
    weights = torch.randn(2, 14, dtype=torch.float64)
    whole = reference.hypernet_logits(*leaves, 3 * 6)
    by_hand = torch.cat([whole[:, :5], whole[:, 6:13], whole[:, 15:17]], 1)
    found = torch.autograd.grad((net.logits(hidden) * weights).sum(), leaves)
    torch.testing.assert_close(found, torch.autograd.grad((by_hand * weights).sum(), leaves))


def test_a_model_of_such_chunks():
    config = HypernetConfig(6, (10,), 30, 4, by_tensor=True)
    model = blob_model(3, beta=0.5, lam=0.25, hypernetwork=config)
    assert model.hypernet.tensors == tuple(s.size for s in model.layout.segments)
    x = torch.randn(6, 8)
    model.eval()
    torch.testing.assert_close(model(x, torch.tensor([2, 0, 1, 1, 2, 0]))[:1], model(x[:1], 2))
    torch.testing.assert_close(model.export(1)(x), model(x, 1))
    torch.testing.assert_close(copy.deepcopy(model)(x, 1), model(x, 1))
    optimizer = hmf.optim.Adam(model.train())
    for _ in range(2):
        mask = model.mask(1)
        loss = model(x, mask).square().sum() + model.regularizer(mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.isfinite() and model.eval().double()(x.double(), 1).dtype == torch.float64
    assert not any("chunks_of" in name for name in model.state_dict())
