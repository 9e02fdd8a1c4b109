"""What people do in a training loop: the numbers of torch.optim.Adam on the dense gradient, or a refusal."""

import copy
import dataclasses
import functools
import warnings

import pytest
import torch
import torch.nn.functional as F
from support.modules import HeadFirst
from support.tolerances import assert_close
from torch.utils.checkpoint import checkpoint

import hypermask_fast as hmf
from bench import loops
from bench.loops import DEFAULT, DENSE, FEATURES, IN_BACKWARD

# |a - b| / |b| of any parameter after 60 steps: Adam makes full steps of small gradients. In float32 an entry at a
# mask's threshold may fall either way; how far that leads shows in the dense gradient's own distance from float64.
FLOAT32, FLOAT64, ROOM = 3e-4, 1e-6, 3


@functools.cache
def yardstick(name, dtype):
    return loops.run(FEATURES[name], DENSE, dtype)


def bound(name, dtype):
    if dtype == torch.float64:
        return FLOAT64
    own = loops.difference(yardstick(name, torch.float32), yardstick(name, torch.float64))
    return max(FLOAT32, ROOM * own)


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the gradient of the hypernetwork's output layer is made in full")
        warnings.filterwarnings("ignore", "Detected call of")
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", FEATURES)
def test_the_default_gives_the_dense_gradients_numbers(name, dtype):
    found = loops.run(FEATURES[name], DEFAULT, dtype)
    assert loops.difference(found, yardstick(name, dtype)) < bound(name, dtype)
    start = loops.small_model(dtype).parameters()
    assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(found, start, strict=False))


@pytest.mark.parametrize("name", FEATURES)
def test_step_in_backward_gives_them_too_or_refuses(name):
    feature = FEATURES[name]
    if feature.waits:
        with pytest.raises(hmf.InputError) as caught:
            loops.run(feature, IN_BACKWARD)
        assert "\n" not in str(caught.value)
    else:
        found = loops.run(feature, IN_BACKWARD)
        assert loops.difference(found, yardstick(name, torch.float32)) < bound(name, torch.float32)


CHUNKED = ["torch's clip_grad_norm_", "GradScaler, an overflow in every third step", "accumulation of two batches",
           "weight_decay", "the output layer frozen", "LambdaLR, a task added on the way"]  # fmt: skip


@pytest.mark.parametrize("optimiser", [DEFAULT, IN_BACKWARD])
@pytest.mark.parametrize("name", CHUNKED)
def test_a_chunked_hypernetwork_in_the_same_loops(name, optimiser):
    """Its gradient is dense, so there is nothing to refuse."""
    expected = loops.run(FEATURES[name], DENSE, chunk_size=50)
    assert loops.difference(loops.run(FEATURES[name], optimiser, chunk_size=50), expected) < FLOAT32


def test_the_table_has_a_line_for_each(capsys, monkeypatch):
    chosen = {name: FEATURES[name] for name in ("nothing in between", "torch's clip_grad_norm_")}
    monkeypatch.setattr(loops, "FEATURES", chosen)
    loops.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and lines[2].count("equal") == 2
    assert "| equal, " in lines[3] and lines[3].endswith("| refused: [1] |")
    assert not lines[4] and lines[5].startswith("1. the output layer's gradient is gone")


X = torch.randn(32, 8, generator=torch.Generator().manual_seed(3))
Y = (X[:, 0] > 0).long()
each_optimiser = pytest.mark.parametrize("optimiser", [DENSE, DEFAULT])


def gradients(model):
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


def of_one_backward(task):
    model = loops.small_model()
    model.begin_task(task)
    mask = model.mask(task)
    (F.cross_entropy(model(X, mask), Y) + model.regularizer(mask)).backward()
    return gradients(model)


@pytest.mark.parametrize("task", [0, 1])
@each_optimiser
def test_loss_and_regulariser_in_backward_passes_of_their_own(optimiser, task):
    """In the first task the regulariser has nothing to pass back, and shares no graph with the loss."""
    model = loops.small_model()
    _optimizer = loops.make_optimiser(optimiser, model, {})
    model.begin_task(task)
    mask = model.mask(task)
    F.cross_entropy(model(X, mask), Y).backward(retain_graph=task > 0)
    model.regularizer(mask).backward()
    for found, expected in zip(gradients(model), of_one_backward(task), strict=True):
        assert_close(found, expected, "network")


@each_optimiser
def test_a_regulariser_alone(optimiser):
    for lam, trained in ((0.02, True), (0.0, False)):
        model = loops.small_model()
        _optimizer = loops.make_optimiser(optimiser, model, {})
        model.drift = dataclasses.replace(model.drift, lam=lam)
        model.hypernet.requires_grad_(trained)
        for task in (0, 1):
            model.regularizer(task).backward()
            with torch.no_grad():
                assert not model.regularizer(task).requires_grad


@pytest.mark.parametrize("by_mask", [True, False], ids=["mask", "id"])
@pytest.mark.parametrize("task", [0, 1])
@each_optimiser
def test_torch_checkpoint_around_the_model(optimiser, task, by_mask):
    model = loops.small_model()
    _optimizer = loops.make_optimiser(optimiser, model, {})
    model.begin_task(task)
    mask = model.mask(task) if by_mask else task
    loss = F.cross_entropy(checkpoint(model, X, mask, use_reentrant=False), Y)
    (loss + model.regularizer(mask)).backward()
    for found, expected in zip(gradients(model), of_one_backward(task), strict=True):
        assert_close(found, expected, "network")


def test_torch_checkpoint_around_mixed_tasks_and_the_first_pass():
    first = hmf.HyperMask(HeadFirst(), 2, 20)
    x, tasks, found = torch.randn(4, 16), torch.tensor([0, 1, 1, 0]), []
    for run in (functools.partial(checkpoint, use_reentrant=False), lambda model, *inputs: model(*inputs)):
        model = copy.deepcopy(first)
        run(model, x, tasks).square().sum().backward()
        found.append(gradients(model))
    for ours, expected in zip(*found, strict=True):
        assert_close(ours, expected, "network")
