"""Layers and models on the fused path: the numbers and gradients of mask first, and of the float64 reference."""

import pytest
import torch
import torch.nn.functional as F
from support import internals, memory
from support.comparing import DEVICE, DTYPES, assert_matches, exact_threshold, randn
from support.tolerances import assert_close
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import hypermask_fast as hmf
from hypermask_fast import mask_making
from hypermask_fast.masking.task_batch import serves
from hypermask_fast.ops import reference, registry


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty gives NaN; and every test has its own seed."""
    if problem := registry.problem("triton"):
        pytest.skip(problem)
    torch.manual_seed(0)
    with memory.poisoned():
        yield


class Convnet(nn.Module):
    """What a target network may hold: every kind of padding, groups, a skip, batch norm, an excluded layer, tokens."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.same = nn.Conv2d(4, 4, (3, 2), padding="same", dilation=2)
        self.circular = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")
        self.grouped = nn.Conv2d(4, 6, 3, stride=(2, 1), groups=2)
        self.pointwise = nn.Conv2d(6, 5, 1, stride=2)
        self.tokens = nn.Linear(5, 7)
        self.shared = nn.Linear(7, 7)
        self.last = nn.Linear(7, 3)

    def forward(self, x):
        x = F.relu(self.norm(self.first(x)))
        x = self.circular(F.relu(x + self.same(x)))
        x = self.pointwise(F.relu(self.grouped(x)))
        x = self.tokens(x.flatten(2).transpose(1, 2))  # (batch, pixels, channels), not contiguous
        return self.last(F.relu(self.shared(x)).mean(1))


def mlp():
    return nn.Sequential(nn.Linear(9, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 6), nn.ReLU(), nn.Linear(6, 4))


NETWORKS = {"mlp": (mlp, (9,), {}), "convnet": (Convnet, (2, 6, 5), {"exclude": ["shared.*"]})}


def made(name, tasks=3, dtype=torch.float32):
    """A model whose batch norm has seen other data for each task, in evaluation mode, and a strided batch."""
    build, shape, settings = NETWORKS[name]
    config = hmf.HypernetConfig(embedding=6, hidden=(8,))
    found = hmf.HyperMask(build(), tasks, 30, config, **settings).to(DEVICE)
    with torch.no_grad():
        for task in range(tasks):
            found((task + 1.0) * torch.randn(16, *shape, device=DEVICE) + task, task)
    return found.eval().to(dtype), torch.randn(*shape, 7, device=DEVICE).to(dtype).movedim(-1, 0)


def gradients(found, y):
    return torch.autograd.grad(y.float().square().sum(), list(found.parameters()), allow_unused=True)


def assert_same(found, y, expected):
    assert_close(y, expected, "triton", "output")
    names = [name for name, _ in found.named_parameters()]
    for name, ours, theirs in zip(names, gradients(found, y), gradients(found, expected), strict=True):
        if theirs is None:  # a task that nobody has
            assert ours is None or not ours.any(), name
        else:
            assert_close(ours, theirs, "triton", name)


# -- one layer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lead", [(6,), (2, 3), (0,), ()])
def test_a_layer_on_its_own_runs_fused_linear(lead, dtype):
    layer = hmf.MaskedLinear(5, 4).to(DEVICE, dtype)
    logits, bias_logits = randn(4, 5, dtype=dtype), randn(4, dtype=dtype)
    threshold, bias_threshold = exact_threshold(logits), exact_threshold(bias_logits)
    x = randn(*lead, 10, dtype=dtype)[..., ::2]

    def ours(x, a, b):
        with hmf.use_backend("triton"):
            return layer(x, hmf.LayerMask(a, threshold, b, bias_threshold))

    def wanted(x, a, b):
        bias = layer.bias.to(x.dtype) * reference.semi_binary_mask(b, bias_threshold.double())
        return reference.masked_linear(x, layer.weight.to(x.dtype), a, threshold.double(), bias)

    assert_matches(ours, wanted, (x, logits, bias_logits), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [2, 0])
@pytest.mark.parametrize(
    "settings", [{"stride": 2, "groups": 2}, {"padding": 1, "dilation": 2}, {"padding": "same"}, {"bias": False}]
)
def test_a_layer_on_its_own_runs_fused_conv2d(settings, batch, dtype):
    layer = hmf.MaskedConv2d(4, 6, 3, **settings).to(DEVICE, dtype)
    logits = randn(*layer.weight.shape, dtype=dtype)
    threshold = exact_threshold(logits)
    x = randn(batch, 7, 8, 4, dtype=dtype).permute(0, 3, 1, 2)  # channels last

    def ours(x, a):
        with hmf.use_backend("triton"):
            return layer(x, hmf.LayerMask(a, threshold))

    def wanted(x, a):
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)
        return reference.masked_conv2d(x, layer.weight.to(x.dtype), a, threshold.double(), bias, *geometry)

    assert_matches(ours, wanted, (x, logits), dtype)


def test_a_dtype_without_fused_kernels_is_refused():
    layer = hmf.MaskedLinear(5, 4).to(DEVICE, torch.float64)
    mask = hmf.LayerMask(randn(4, 5, dtype=torch.float64), torch.tensor(0.1, dtype=torch.float64, device=DEVICE))
    x = randn(2, 5, dtype=torch.float64)
    with (
        hmf.use_backend("triton"),
        pytest.raises(hmf.InputError, match="triton computes in float32, float16 and bfloat16, not float64"),
    ):
        layer(x, mask)
    assert layer(x, mask).dtype == torch.float64


# -- one task ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_a_model_runs_fused(name, monkeypatch):
    """No layer makes W * m, but those with padding that the kernel doesn't know; all biases are masked at once."""
    found, x = made(name)
    for task in range(2):
        mask, other = found.mask(task), found.mask(task)
        if name == "mlp":
            monkeypatch.setattr(hmf.TaskMask, "_effective", lambda self: pytest.fail("W * m was made"))
        with hmf.use_backend("triton"):
            y, empty = found(x, mask), found(x[:0], mask)
        monkeypatch.undo()
        assert_same(found, y, found(x, other))
        assert empty.shape == (0, *y.shape[1:])


def test_a_model_runs_fused_in_half_precision():
    """Fused in float16, and W * m by the mask kernel, against the same numbers in float64."""
    found, x = made("mlp", dtype=torch.float16)
    with torch.no_grad():
        mask = found.mask(1)
        with hmf.use_backend("triton"):
            y, effective = found(x, mask), mask.effective
        with hmf.use_backend("reference"):
            plain = hmf.TaskMask(1, found.layout, mask.logits, mask.thresholds, tuple(found.weights()))
            peer, peers = found(x, plain), plain.effective
        found.double()
        wide = (mask.logits.double(), mask.thresholds.double(), tuple(w.detach() for w in found.weights()))
        expected = hmf.TaskMask(1, found.layout, *wide)
        assert y.dtype == effective[0].dtype == torch.float16
        assert_close(y, found(x.double(), expected), "triton", "output", peer=peer)
        for ours, theirs, half in zip(effective, expected.effective, peers, strict=True):
            assert_close(ours, theirs, "triton", "W * m", peer=half)


# -- many tasks -------------------------------------------------------------------------------------------------------


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Values of tensors are not at hand, several tasks pass at once, and Triton is what auto takes on this device."""
    monkeypatch.setattr(mask_making, "values_at_hand", lambda tensor: False)
    monkeypatch.setattr(hmf.HyperMask, "_in_one_pass", lambda self, x, tasks=None: serves(self.net, x, tasks))
    internals.automatic(monkeypatch, "cpu", "cpu", "triton")


class NoWait(TorchDispatchMode):
    """Fails where a value of a tensor is asked for: on a GPU the host would wait for it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[1].split(".")[0]
        assert name not in {"_local_scalar_dense", "nonzero", "equal", "unique_consecutive", "_unique2"}, name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", NETWORKS)
def test_fused_one_task_per_sample(name, as_on_a_gpu, monkeypatch):
    found, x = made(name)
    tasks = torch.tensor([2, 0, 0, 2, 2, 0, 2], device=DEVICE)  # nobody has task 1
    found(x, tasks)  # the first batch of several tasks waits once, to see that rows are samples
    with NoWait():
        y = found(x, tasks)
    few = found(x[:2], tasks[:2])  # fewer samples than tasks: a mask per sample
    monkeypatch.undo()
    expected = found(x, tasks)  # group by group
    assert_same(found, y, expected)
    assert_close(few, expected[:2], "triton", "two samples")


def test_fused_task_ids_are_sorted_once(as_on_a_gpu, monkeypatch):
    """For all layers, forward and backward, whether they see a row per sample or one per pixel."""
    found, x = made("convnet")
    sort, sorted_ids = torch.sort, []
    monkeypatch.setattr(torch, "sort", lambda ids, **how: sorted_ids.append(ids) or sort(ids, **how))
    y = found(x, torch.tensor([2, 0, 0, 2, 2, 0, 2], device=DEVICE))
    gradients(found, y)
    assert len(sorted_ids) == 1


@pytest.mark.parametrize("name", NETWORKS)
def test_fused_every_task(name, as_on_a_gpu, monkeypatch):
    found, x = made(name)
    found.forward_all_tasks(x)  # waits once, to see that rows are samples
    with NoWait():
        masks = found.all_masks()
        y, part = found.forward_all_tasks(x, masks), found.forward_all_tasks(x, masks[1:])
        empty = found.forward_all_tasks(x[:0], masks)
        predicted = hmf.predict(found, x, masks)
    monkeypatch.undo()
    expected = found.forward_all_tasks(x)
    assert_same(found, y, expected)
    assert_close(part, expected[1:], "triton", "a part of the tasks")
    assert empty.shape == (3, 0, *y.shape[2:])
    assert torch.equal(predicted.task, reference.entropy_select(expected))
    assert torch.equal(predicted.label, found(x, predicted.task).argmax(-1))


def test_fused_task_that_does_not_exist_gives_nan_rows(as_on_a_gpu, monkeypatch):
    """Without looking at the values its row is NaN; with HYPERMASK_DEBUG=1 they are looked at."""
    found, x = made("convnet")
    tasks = torch.tensor([2, 0, 3, 2, -1, 0, 2], device=DEVICE)
    y = found(x, tasks)
    assert y[[2, 4]].isnan().all() and y[[0, 1, 3, 5, 6]].isfinite().all()
    monkeypatch.undo()
    elsewhere = torch.empty(1, device="meta")
    assert not mask_making.values_at_hand(elsewhere)
    monkeypatch.setenv("HYPERMASK_DEBUG", "1")
    assert mask_making.values_at_hand(elsewhere)
    monkeypatch.setattr(hmf.HyperMask, "_in_one_pass", lambda self, x, tasks=None: True)
    with pytest.raises(hmf.InputError, match="task 3 does not exist"):
        found(x, tasks)


def test_fused_many_tasks_compile_without_recompilation(as_on_a_gpu):
    from torch._dynamo.utils import counters

    found, x = made("mlp")
    compiled = torch.compile(found, fullgraph=True, backend="aot_eager")
    counters.clear()
    for tasks in ([2, 0, 0, 2, 1, 0, 1], [1] * 7):
        ids = torch.tensor(tasks, device=DEVICE)
        assert_same(found, compiled(x, ids), found(x, ids))
    assert counters["stats"]["unique_graphs"] == 1


def test_a_block_on_triton_runs_a_whole_model():
    """Thresholds and the hypernetwork's output, which Triton doesn't have, are chosen automatically."""
    found, x = made("mlp")
    expected = found(x, 1)
    with hmf.use_backend("triton"):
        y, drift = found(x, task=1), found.regularizer(1)
    assert_same(found, y, expected)
    assert drift.isfinite()
