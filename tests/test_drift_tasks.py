"""The output drift over a few drawn tasks: on average that over all, in every mode of training."""

from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from support.backends import native_problem
from support.networks import blob_model, blob_scenario
from support.tolerances import assert_close
from torch import nn

import hypermask_fast as hmf
from hypermask_fast import HypernetConfig, InputError, regularizers
from hypermask_fast.training.config import TrainingConfig
from hypermask_fast.training.interrupt import Stopped
from hypermask_fast.training.trainer import Trainer

TASK = 4
HYPERNETS = {
    "dense": HypernetConfig(5, (6,)),
    "chunked": HypernetConfig(5, (6,), chunk_size=7, chunk_embedding=3),
    "by tensor": HypernetConfig(5, (6,), chunk_size=7, chunk_embedding=3, by_tensor=True),
}
OPTIMIZERS = {"none": None, "default": False, "step_in_backward": True}


def moved_model(kind="dense", fidelity="default", tasks=TASK + 1, dtype=torch.float64):
    """A model within its last task, whose earlier tasks have drifted."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).to(dtype)
    model = hmf.HyperMask(net, tasks, 20, HYPERNETS[kind], beta=0.5, lam=0.1, fidelity=fidelity)
    model.begin_task(tasks - 1)
    with torch.no_grad():
        for parameter in model.hypernet.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.train()


def loss_and_gradients(model, optimizer, tasks):
    """R, the regulariser, and the gradients of one training pass; of a layer that is stepped already its weights."""
    x, y = torch.ones(2, 4, dtype=torch.float64), torch.tensor([0, 2])
    task = model.num_tasks - 1
    mask = model.mask(task, drift_tasks=tasks)
    drifts = model.drifts(mask)
    loss = F.cross_entropy(model(x, mask), y) + model.drift.loss(drifts, task)
    model.zero_grad() if optimizer is None else optimizer.zero_grad()
    loss.backward()
    layer = model.hypernet.output.weight
    kept = [(name, p) for name, p in model.named_parameters() if p is not layer or not stepped(layer)]
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone().double() for name, p in kept}
    found["R"] = drifts.output.detach().clone()
    found["regulariser"] = model.drift.loss(drifts, task).detach()
    return {name: value + torch.zeros(value.shape, dtype=torch.float64) for name, value in found.items()}


def stepped(layer):
    return type(layer.grad).__name__ == "SteppedGradient"


@pytest.mark.parametrize("fidelity", ["default", "official"])
@pytest.mark.parametrize("way", OPTIMIZERS)
@pytest.mark.parametrize("kind", HYPERNETS)
@pytest.mark.parametrize("tasks", [1, 3])
def test_the_mean_over_all_draws_is_the_drift_over_all_tasks(kind, way, fidelity, tasks, monkeypatch):
    found = []
    subsets = [None, *combinations(range(TASK), tasks)]
    for subset in subsets:
        model = moved_model(kind, fidelity)
        in_backward = OPTIMIZERS[way]
        optimizer = None if in_backward is None else hmf.optim.Adam(model, step_in_backward=in_backward)
        drawn = None if subset is None else torch.tensor(subset)
        monkeypatch.setattr(regularizers, "draw", lambda *_, drawn=drawn: drawn)
        found.append(loss_and_gradients(model, optimizer, tasks))
    whole, *others = found
    assert whole["R"] > 0.01
    for name, value in whole.items():
        mean = torch.stack([other[name] for other in others]).mean(0)
        assert_close(mean, value, "statistics", name)


@pytest.mark.parametrize("way", OPTIMIZERS)
def test_a_regulariser_that_draws_is_on_average_that_of_all(way):
    """By the generator itself, and as the regulariser is called in a loop of one's own."""
    model = moved_model()
    optimizer = None if way == "none" else hmf.optim.Adam(model, lr=0.0, step_in_backward=OPTIMIZERS[way])
    if way == "none":
        values = [model.regularizer(TASK, tasks=1) for _ in range(400)]
        assert len({value.item() for value in values}) == TASK
        mean = torch.stack(values).mean()
    else:
        values = []
        for _ in range(400):
            values.append(loss_and_gradients(model, optimizer, 1)["regulariser"])
            optimizer.step()
        mean = torch.stack(values).mean()
    whole = model.eval().regularizer(TASK)
    deviation = torch.stack(values).std() / 20
    assert abs(mean - whole) < 5 * deviation


def test_draws_are_uniform_and_in_order():
    hypernet = moved_model().hypernet
    counts = dict.fromkeys(combinations(range(TASK), 2), 0)
    for _ in range(1200):
        counts[tuple(regularizers.draw(hypernet, TASK, 2).tolist())] += 1
    assert all(140 < count < 260 for count in counts.values()), counts


def test_of_a_removed_task_nothing_is_drawn():
    model = moved_model()
    model.remove_task(1)
    rows = {row for _ in range(100) for row in regularizers.draw(model.hypernet, TASK, 2).tolist()}
    assert rows == {0, 1, 2}
    assert model.regularizer(TASK, tasks=2).isfinite()


def trained(steps, way, **how):
    model = moved_model(dtype=torch.float32)
    in_backward = OPTIMIZERS[way]
    optimizer = torch.optim.Adam(model.parameters()) if in_backward is None else None
    optimizer = optimizer or hmf.optim.Adam(model, step_in_backward=in_backward)
    for _ in range(steps):
        mask = model.mask(TASK, **how)
        loss = model(torch.randn(3, 4), mask).square().mean() + model.regularizer(mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.state_dict()


@pytest.mark.parametrize("way", OPTIMIZERS)
@pytest.mark.parametrize("tasks", [TASK, TASK + 3])
def test_as_many_as_there_are_is_the_same_to_the_bit(way, tasks):
    expected, found = trained(5, way), trained(5, way, drift_tasks=tasks)
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name


@pytest.mark.parametrize("way", OPTIMIZERS)
def test_a_step_of_drawn_tasks_is_torch_adams(way):
    expected, found = trained(5, "none", drift_tasks=2), trained(5, way, drift_tasks=2)
    for name, value in expected.items():
        assert_close(found[name], value, "network", name)


@pytest.mark.skipif(bool(native_problem()), reason="rows of PyTorch's own products depend on their number")
@pytest.mark.parametrize("tasks", [3, 20])
@pytest.mark.parametrize("way", ["default", "step_in_backward"])
def test_the_drift_of_drawn_tasks_is_exactly_0_as_a_task_begins(way, tasks):
    """Of many tasks and of few: Adam makes full steps of however small a gradient."""
    model = moved_model(tasks=40, dtype=torch.float32)
    model.begin_task(39)
    optimizer = hmf.optim.Adam(model, step_in_backward=OPTIMIZERS[way])
    before = [e.detach().clone() for e in model.hypernet.embeddings]
    mask = model.mask(39, drift_tasks=tasks)
    optimizer.zero_grad()
    model.regularizer(mask).backward()
    optimizer.step()
    assert model.drifts(mask).output == 0
    for old, new in zip(before[:-1], model.hypernet.embeddings, strict=False):
        assert torch.equal(old, new)


# Resuming


@pytest.mark.parametrize("gradient", ["dense", "factored"])
def test_a_resumed_run_draws_what_the_whole_one_would_have(tmp_path, gradient):
    settings = TrainingConfig(iterations=8, batch_size=16, gradient=gradient, drift_tasks=2, checkpoint_every=3)

    def trainer(**how):
        return Trainer(blob_model(4), blob_scenario(4), settings, run_dir=tmp_path, **how)

    whole = Trainer(blob_model(4), blob_scenario(4), settings)
    whole.fit()
    steps = iter(range(1000))
    with pytest.raises(Stopped):
        trainer(stop=lambda: next(steps) >= 28).fit()  # within the last task
    resumed = trainer()
    resumed.fit(resume=True)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


# Bad input


@pytest.mark.parametrize("tasks", [0, -1, 1.5, True, "2"])
def test_what_is_no_number_of_tasks_is_refused(tasks):
    model, said = moved_model(), "a positive number of tasks, or None for all, not "
    state = torch.get_rng_state()
    for call in (
        lambda: model.regularizer(TASK, tasks=tasks),
        lambda: model.drifts(TASK, tasks),
        lambda: model.mask(TASK, drift_tasks=tasks),
    ):
        with pytest.raises(InputError, match=said):
            call()
    with pytest.raises(InputError, match="training.drift_tasks"):
        TrainingConfig(iterations=1, drift_tasks=tasks)
    assert torch.equal(state, torch.get_rng_state())


def test_another_number_than_the_mask_was_made_with_is_refused():
    model = moved_model()
    optimizer = hmf.optim.Adam(model)
    mask = model.mask(TASK)
    said = r"the output drift of 2 tasks was asked for, and this mask has been made with that of 4: model.mask\(4, "
    with pytest.raises(InputError, match=said):
        model.regularizer(mask, tasks=2)
    assert model.regularizer(mask, tasks=TASK) == model.regularizer(mask)
    mask = model.mask(TASK, drift_tasks=2)
    assert model.regularizer(mask, tasks=2) == model.regularizer(mask)
    del optimizer
