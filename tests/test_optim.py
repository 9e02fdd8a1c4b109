"""Adam on factored gradients: the numbers of torch.optim.Adam, and refusals where it can't give them."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

import hypermask_fast as hmf
from hypermask_fast import InputError


def small_model(tasks, **settings):
    """Without batch norm, which gives a bias before it a gradient of nothing but rounding, and without dropout."""
    torch.manual_seed(1)
    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
    config = hmf.HypernetConfig(embedding=8, hidden=(12,))
    return hmf.HyperMask(net, tasks, 20, config, **({"beta": 0.01, "lam": 1e-3} | settings))


X, Y = torch.randn(32, 8, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 2


def train(model, make_optimizer, steps, tasks=3):
    """Losses of some steps in each task, as a user writes them."""
    losses = []
    for task in range(tasks):
        optimizer = make_optimizer(model)
        for _ in range(steps):
            mask = model.mask(task)
            loss = F.cross_entropy(model(X, mask), Y) + model.regularizer(mask)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    return torch.stack(losses), optimizer


def plain(model):
    return torch.optim.Adam(model.parameters(), lr=1e-2)


def ours(**settings):
    return lambda model: hmf.optim.Adam(model, 1e-2, **settings)


@pytest.mark.parametrize("settings", [{}, {"gradient": "dense"}, {"gradient": "factored"}], ids=str)
@pytest.mark.parametrize("fidelity", ["default", "official"])
def test_float64_numbers_are_torch_adams(settings, fidelity):
    # The 1-norm's gradient jumps where a weight comes back to where it was; rounding then decides, and shows.
    theirs, own = (small_model(3, beta=0.5, lam=0.02, drift_norm=2, fidelity=fidelity).double() for _ in range(2))
    global X
    X, before = X.double(), X
    try:
        expected, their_optimizer = train(theirs, plain, 20)
        losses, optimizer = train(own, ours(**settings), 20)
    finally:
        X = before
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-9)
    for (name, a), b in zip(own.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8, msg=name)
    moments = [
        {name: o.state[p]["exp_avg_sq"] for name, p in m.named_parameters() if p in o.state}
        for o, m in ((optimizer, own), (their_optimizer, theirs))
    ]
    assert moments[0].keys() == moments[1].keys()
    for name in moments[0]:
        torch.testing.assert_close(moments[0][name], moments[1][name], rtol=1e-4, atol=1e-14)


@pytest.mark.parametrize("gradient", ["factored", "dense"])
def test_float32_stays_by_torch_adam(gradient):
    theirs, own = (small_model(2, beta=0.5, lam=0.02, drift_norm=2) for _ in range(2))
    expected, _ = train(theirs, plain, 30, tasks=2)
    losses, _ = train(own, ours(gradient=gradient), 30, tasks=2)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
    for (name, a), b in zip(own.named_parameters(), theirs.parameters(), strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm(), name


@pytest.mark.parametrize("task", [0, 1])
def test_a_loss_of_the_logits_alone(task):
    """A sum hands its gradient back expanded: no memory of its own behind most of its entries."""
    theirs, own = small_model(2), small_model(2)
    optimizers = plain(theirs), hmf.optim.Adam(own, 1e-2)
    for model, optimizer in zip((theirs, own), optimizers, strict=True):
        model.mask(task).logits.sum().backward()
        optimizer.step()
    for (name, a), b in zip(own.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


def test_drift_is_exactly_zero_as_a_task_begins():
    """Rounding in its place would be a full step of Adam for every earlier embedding."""
    for chunk_size in (None, 50):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(64, 50), torch.nn.ReLU(), torch.nn.Linear(50, 2))
        model = hmf.HyperMask(net, 6, 30, hmf.HypernetConfig(24, (50, 50), chunk_size))
        optimizer = hmf.optim.Adam(model)
        before = [embedding.clone() for embedding in model.hypernet.embeddings]
        x = torch.randn(16, 64)
        mask = model.mask(5)
        (F.cross_entropy(model(x, mask), Y[:16]) + model.regularizer(mask)).backward()
        assert model.drifts(5 if chunk_size else mask).output == 0
        optimizer.step()
        moved = [not torch.equal(a, b) for a, b in zip(before, model.hypernet.embeddings, strict=True)]
        assert moved == [False] * 5 + [True]


def test_loss_without_the_drift_until_backward():
    """exact_loss=False: the same training; the drift's value is there after backward."""
    exact, lazy = (small_model(2, beta=5.0, drift_norm=2) for _ in range(2))
    train(exact, ours(), 5, tasks=2)
    train(lazy, ours(exact_loss=False), 5, tasks=2)
    for a, b in zip(exact.parameters(), lazy.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    optimizer = hmf.optim.Adam(lazy, exact_loss=False)
    mask = lazy.mask(1)
    drifts = lazy.drifts(mask)
    assert drifts.output.item() == 0
    expected = (lazy.hypernet([0])[0] - lazy.anchor.targets[0][0]).square().sum().item()
    loss = F.cross_entropy(lazy(X, mask), Y) + lazy.drift.loss(drifts, 1)
    loss.backward()
    optimizer.step()
    assert drifts.output.item() == pytest.approx(expected, rel=1e-4) and expected > 0


def test_state_dict_goes_to_torch_adam_and_back():
    model = small_model(1)
    _, optimizer = train(model, ours(), 3, tasks=1)
    state = copy.deepcopy(optimizer.state_dict())
    theirs = plain(model)
    theirs.load_state_dict(state)
    again = hmf.optim.Adam(model)
    again.load_state_dict(theirs.state_dict())
    weight = model.hypernet.output.weight
    assert torch.equal(again.state[weight]["exp_avg"], optimizer.state[weight]["exp_avg"])
    assert again.state[weight]["step"] == 3


def accumulate_and_clip(model, make_optimizer, x, steps=10):
    """Parameters after steps of two batches each, whose gradients are added up and clipped, in two tasks."""
    for task in range(2):
        optimizer = make_optimizer(model)
        for _ in range(steps):
            optimizer.zero_grad()
            for rows in (slice(0, 20), slice(20, 32)):
                mask = model.mask(task)
                (F.cross_entropy(model(x[rows], mask), Y[rows]) + model.regularizer(mask)).backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            assert norm > 0.1  # so that it clips
            optimizer.step()
    return list(model.parameters())


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 5e-6)], ids=str)
def test_dense_gradient_can_be_accumulated_and_clipped(dtype, bound):
    theirs, own = (small_model(2, beta=0.5, lam=0.02, drift_norm=2).to(dtype) for _ in range(2))
    start = [p.detach().clone() for p in own.parameters()]
    expected = accumulate_and_clip(theirs, plain, X.to(dtype))
    found = accumulate_and_clip(own, ours(gradient="dense"), X.to(dtype))
    for before, a, b in zip(start, found, expected, strict=True):
        assert (a - b).norm() <= bound * b.norm()
        assert not torch.equal(a, before)


def test_a_second_backward_is_refused():
    model = small_model(1)
    optimizer = hmf.optim.Adam(model)
    F.cross_entropy(model(X, 0), Y).backward()
    before = model.hypernet.output.weight.clone()
    with pytest.raises(InputError, match="a second backward pass before optimizer.step"):
        F.cross_entropy(model(X, 0), Y).backward()
    assert torch.equal(model.hypernet.output.weight, before)
    optimizer.step()
    F.cross_entropy(model(X, 0), Y).backward()


def test_a_dense_gradient_in_a_factored_step_is_refused():
    model = small_model(2)
    optimizer = hmf.optim.Adam(model)
    F.cross_entropy(model(X, torch.arange(32) % 2), Y).backward()
    with pytest.raises(InputError, match="has got a dense gradient"):
        optimizer.step()


def test_a_backward_pass_in_evaluation_mode_changes_nothing():
    """A saliency map, say, while the optimiser lives."""
    model = small_model(2).eval()
    optimizer = hmf.optim.Adam(model)
    before = copy.deepcopy(model.state_dict())
    x = X.clone().requires_grad_()
    model(x, 1).sum().backward()
    assert x.grad.abs().sum() > 0
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with pytest.raises(InputError, match="in training mode"):
        optimizer.step()
    optimizer.zero_grad()
    optimizer.step()


def test_another_optimiser_takes_over_when_it_is_gone():
    model = small_model(1)
    optimizer = hmf.optim.Adam(model)
    del optimizer
    F.cross_entropy(model(X, 0), Y).backward()
    assert model.hypernet.output.weight.grad is not None


@pytest.mark.parametrize("newer", [{}, {"gradient": "dense"}], ids=str)
def test_an_older_optimiser_steps_no_part_of_the_model(newer):
    model = small_model(2)
    older = hmf.optim.Adam(model)
    optimizer = hmf.optim.Adam(model, **newer)
    F.cross_entropy(model(X, model.mask(0)), Y).backward()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match="a newer hmf.optim.Adam has taken over"):
        older.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    optimizer.step()


def test_a_changed_learning_rate_counts_at_once(monkeypatch):
    """And one that stays is made a tensor once: on a GPU each time is a wait."""
    made, new_tensor = [], torch.Tensor.new_tensor
    monkeypatch.setattr(torch.Tensor, "new_tensor", lambda *args: made.append(args[1]) or new_tensor(*args))
    model = small_model(1)
    optimizer = hmf.optim.Adam(model)
    for lr in (1e-2, 1e-2, 0.0, 0.0, torch.tensor(0.0)):
        optimizer.param_groups[0]["lr"] = lr
        before = model.hypernet.output.weight.detach().clone()
        F.cross_entropy(model(X, model.mask(0)), Y).backward()
        optimizer.step()
        assert torch.equal(model.hypernet.output.weight, before) == (float(lr) == 0)
    assert made == [1e-2, 0.0]


def test_chunked_takes_dense_gradients():
    torch.manual_seed(0)
    net = torch.nn.Linear(8, 2)
    model = hmf.HyperMask(net, 2, hypernetwork=hmf.HypernetConfig(4, (6,), chunk_size=5))
    with pytest.raises(InputError, match="chunked hypernetwork has no factored gradient"):
        hmf.optim.Adam(model, gradient="factored")
    hmf.optim.Adam(model)
    F.cross_entropy(model(X, 0), Y).backward()
    assert model.hypernet.output.weight.grad is not None


def test_unknown_gradient():
    with pytest.raises(InputError, match="gradient must be one of auto, factored, dense, not 'sparse'"):
        hmf.optim.Adam(small_model(1), gradient="sparse")


def test_a_copy_has_no_optimiser_of_the_original():
    """The copy's masks come from its own output layer; it can be copied, pickled and trained."""
    model = small_model(2)
    optimizer = hmf.optim.Adam(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        model.hypernet.output.bias.add_(1)
    torch.testing.assert_close(copied.mask(0).logits + 1, model.mask(0).logits)
    assert optimizer.factored and pickle.loads(pickle.dumps(model)).num_tasks == 2


def test_what_adam_takes_is_the_model():
    with pytest.raises(InputError, match="the HyperMask model itself, .* not generator"):
        hmf.optim.Adam(small_model(2).parameters())


def test_a_task_that_the_optimiser_was_not_told_of_is_not_trained_in_silence():
    model = small_model(1)
    optimizer = hmf.optim.Adam(model)
    task = model.add_task()
    before = copy.deepcopy(model.state_dict())
    loss = F.cross_entropy(model(X, model.mask(task)), Y)
    with pytest.raises(InputError, match=r"would not train task 1, which is newer: .* model.add_task\(optimizer\)"):
        loss.backward()
    after = model.state_dict()  # it has the anchor too now, which the mask has captured
    for name, value in before.items():
        assert torch.equal(value, after[name]), name
    optimizer.add_param_group({"params": [model.hypernet.embeddings[task]]})
    F.cross_entropy(model(X, model.mask(task)), Y).backward()
    optimizer.step()
    assert not torch.equal(model.hypernet.embeddings[task], before["hypernet.embeddings.1"])
