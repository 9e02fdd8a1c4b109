"""Adam on factored gradients: the numbers of torch.optim.Adam, and refusals where it can't give them."""

import copy
import gc
import pickle
import warnings

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


@pytest.mark.parametrize("settings", [{}, {"step_in_backward": True}], ids=str)
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
    if not settings:  # otherwise R is 0 in the loss until backward
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


@pytest.mark.parametrize("settings", [{}, {"step_in_backward": True}], ids=str)
def test_float32_stays_by_torch_adam(settings):
    theirs, own = (small_model(2, beta=0.5, lam=0.02, drift_norm=2) for _ in range(2))
    expected, _ = train(theirs, plain, 30, tasks=2)
    losses, _ = train(own, ours(**settings), 30, tasks=2)
    if not settings:  # otherwise R is 0 in the loss until backward
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
    """step_in_backward: the same training; the drift's value is there after backward."""
    exact, lazy = (small_model(2, beta=5.0, drift_norm=2) for _ in range(2))
    train(exact, ours(), 5, tasks=2)
    train(lazy, ours(step_in_backward=True), 5, tasks=2)
    for a, b in zip(exact.parameters(), lazy.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    optimizer = hmf.optim.Adam(lazy, step_in_backward=True)
    optimizer.zero_grad()
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
def test_gradients_can_be_accumulated_and_clipped(dtype, bound):
    theirs, own = (small_model(2, beta=0.5, lam=0.02, drift_norm=2).to(dtype) for _ in range(2))
    start = [p.detach().clone() for p in own.parameters()]
    expected = accumulate_and_clip(theirs, plain, X.to(dtype))
    found = accumulate_and_clip(own, ours(), X.to(dtype))
    for before, a, b in zip(start, found, expected, strict=True):
        assert (a - b).norm() <= bound * b.norm()
        assert not torch.equal(a, before)


def refused_unchanged(model, match, do):
    """`do` raises InputError and leaves the model's entries as they are."""
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=match) as caught:
        do()
    assert "\n" not in str(caught.value)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def in_backward(model):
    optimizer = hmf.optim.Adam(model, step_in_backward=True)
    optimizer.zero_grad()
    return optimizer


def test_a_second_backward_is_refused_where_the_first_has_stepped():
    model = small_model(1)
    optimizer = in_backward(model)
    F.cross_entropy(model(X, 0), Y).backward()
    loss = F.cross_entropy(model(X, 0), Y)
    refused_unchanged(model, "a second backward pass before optimizer.step", loss.backward)
    optimizer.step()
    optimizer.zero_grad()
    del loss
    gc.collect()  # what was refused, and its graph
    F.cross_entropy(model(X, 0), Y).backward()


def test_two_masks_in_one_loss_are_refused_before_the_first_steps():
    model = small_model(2)
    optimizer = in_backward(model)
    loss = F.cross_entropy(model(X, 1), Y) + model.regularizer(1)
    refused_unchanged(model, "or a second mask with gradient", loss.backward)
    del loss
    gc.collect()
    kept, other = model.mask(1), model.mask(1)
    del other  # gone with its graph
    kept.logits.sum().backward()
    optimizer.step()


def test_a_skipped_step_is_refused_where_backward_has_stepped():
    model = small_model(1)
    optimizer = in_backward(model)
    F.cross_entropy(model(X, 0), Y).backward()
    refused_unchanged(model, "skipping a step, .* needs step_in_backward=False", optimizer.zero_grad)
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("armed", [True, False])
def test_step_in_backward_waits_for_zero_grad(armed):
    """An optimiser that nobody uses any more steps nothing."""
    model = small_model(1)
    optimizer = hmf.optim.Adam(model, step_in_backward=True)
    loss = F.cross_entropy(model(X, 0), Y)
    if armed:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss = F.cross_entropy(model(X, 0), Y)
    refused_unchanged(model, "needs optimizer.zero_grad\\(\\) before each backward pass", loss.backward)


def test_a_mixed_batch_has_a_dense_gradient():
    theirs, own = small_model(2), small_model(2)
    tasks = torch.arange(32) % 2
    for model, optimizer in ((theirs, plain(theirs)), (own, ours()(own))):
        F.cross_entropy(model(X, tasks), Y).backward()
        optimizer.step()
    for (name, a), b in zip(own.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


def test_a_backward_pass_in_evaluation_mode_changes_nothing():
    """A saliency map, say, while the optimiser lives."""
    model = small_model(2).eval()
    optimizer = hmf.optim.Adam(model)
    before = copy.deepcopy(model.state_dict())
    x = X.clone().requires_grad_()
    model(x, 1).sum().backward()
    assert x.grad.abs().sum() > 0
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    optimizer.zero_grad()
    optimizer.step()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_another_optimiser_takes_over_when_it_is_gone():
    model = small_model(1)
    optimizer = hmf.optim.Adam(model)
    del optimizer
    F.cross_entropy(model(X, 0), Y).backward()
    assert model.hypernet.output.weight.grad is not None


@pytest.mark.parametrize("newer", [{}, {"step_in_backward": True}], ids=str)
def test_an_older_optimiser_steps_no_part_of_the_model(newer):
    model = small_model(2)
    older = hmf.optim.Adam(model)
    optimizer = hmf.optim.Adam(model, **newer)
    optimizer.zero_grad()
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
        optimizer.zero_grad()
        F.cross_entropy(model(X, model.mask(0)), Y).backward()
        optimizer.step()
        assert torch.equal(model.hypernet.output.weight, before) == (float(lr) == 0)
    assert made == [1e-2, 0.0]


@pytest.mark.parametrize("settings", [{}, {"step_in_backward": True}], ids=str)
def test_a_chunked_layers_gradient_is_dense(settings):
    torch.manual_seed(0)
    net = torch.nn.Linear(8, 2)
    model = hmf.HyperMask(net, 2, hypernetwork=hmf.HypernetConfig(4, (6,), chunk_size=5))
    optimizer = hmf.optim.Adam(model, **settings)
    F.cross_entropy(model(X, 0), Y).backward()
    assert type(model.hypernet.output.weight.grad) is torch.Tensor
    before = model.hypernet.output.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model.hypernet.output.weight, before)


def test_a_copy_has_no_optimiser_of_the_original():
    """The copy's masks come from its own output layer; it can be copied, pickled and trained."""
    model = small_model(2)
    optimizer = hmf.optim.Adam(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        model.hypernet.output.bias.add_(1)
    torch.testing.assert_close(copied.mask(0).logits + 1, model.mask(0).logits)
    assert pickle.loads(pickle.dumps(model)).num_tasks == 2
    F.cross_entropy(copied(X, 0), Y).backward()
    assert type(copied.hypernet.output.weight.grad) is torch.Tensor
    optimizer.step()


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


def test_a_copied_optimiser_steps_the_copied_model():
    model = small_model(2)
    optimizer = hmf.optim.Adam(model, 1e-2)
    train(model, lambda _: optimizer, 2, tasks=1)
    before = copy.deepcopy(model.state_dict())
    for again in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        theirs = again._model
        assert theirs is not model and again.state_dict().keys() == optimizer.state_dict().keys()
        loss = F.cross_entropy(theirs(X, theirs.mask(0)), Y)
        again.zero_grad()
        loss.backward()
        again.step()
        assert theirs.hypernet.output.weight.grad.factors is not None
        assert not torch.equal(theirs.hypernet.output.weight, model.hypernet.output.weight)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_task_is_entered_where_a_new_optimiser_would_have_it():
    """So that state_dicts, which count parameters, fit; and the number of groups stays."""
    model = small_model(2)
    optimizer = torch.optim.Adam(model.named_parameters())
    model.add_task(optimizer)
    (group,) = optimizer.param_groups
    names, parameters = zip(*model.named_parameters(), strict=True)
    assert group["param_names"] == list(names)
    assert all(a is b for a, b in zip(group["params"], parameters, strict=True))
    rest = torch.optim.Adam(model.net.parameters())
    model.add_task(rest)
    assert len(rest.param_groups) == 2 and rest.param_groups[1]["params"] == [model.hypernet.embeddings[3]]


def test_a_copy_of_the_layers_gradient_is_its_own():
    model = small_model(1)
    hmf.optim.Adam(model), (held := hmf.optim.Adam(model))
    F.cross_entropy(model(X, 0), Y).backward()
    kept = model.hypernet.output.weight.grad.clone()
    F.cross_entropy(model(X, 0), Y).backward()
    torch.testing.assert_close(model.hypernet.output.weight.grad.dense(), 2 * kept.dense())
    assert held.param_groups


@pytest.mark.parametrize("what", ["given", "later", "by add_param_group"])
def test_float16_is_refused(what):
    model = small_model(1)
    if what == "given":
        with pytest.raises(InputError, match="eps is 0 in float16"):
            hmf.optim.Adam(model.half())
        return
    optimizer = hmf.optim.Adam(model)
    if what == "later":
        model.half()
        model.hypernet.output.weight.grad = torch.ones_like(model.hypernet.output.weight)
        refused_unchanged(model, "eps is 0 in float16", optimizer.step)
    else:
        with pytest.raises(InputError, match="eps is 0 in float16"):
            optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2).half())]})


def test_bfloat16_is_torch_adams():
    theirs, own = small_model(1).bfloat16(), small_model(1).bfloat16()
    for model, optimizer in ((theirs, torch.optim.Adam(theirs.parameters(), 1e-2, fused=True)), (own, ours()(own))):
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(X.bfloat16(), model.mask(0)), Y).backward()
            optimizer.step()
    for (name, a), b in zip(own.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=2e-3, msg=name)


def test_hooks_around_step_are_called_once():
    model, called = small_model(1), []
    torch.optim.Adam(model.parameters())  # PyTorch wraps a class's step at its first instance
    optimizer = hmf.optim.Adam(model)
    optimizer.register_step_pre_hook(lambda *args: called.append("before"))
    optimizer.register_step_post_hook(lambda *args: called.append("after"))
    F.cross_entropy(model(X, 0), Y).backward()
    optimizer.step()
    assert called == ["before", "after"]


def test_adamw_is_torchs():
    theirs, own = small_model(1), small_model(1)
    for model, optimizer in ((theirs, torch.optim.AdamW(theirs.parameters(), 1e-2)), (own, hmf.optim.AdamW(own, 1e-2))):
        assert optimizer.param_groups[0]["weight_decay"] == 1e-2
        train(model, lambda _, o=optimizer: o, 5, tasks=1)
    for (name, a), b in zip(own.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


def test_differentiable_is_refused():
    with pytest.raises(InputError, match="differentiable=True"):
        hmf.optim.Adam(small_model(1), differentiable=True)
    model = small_model(1)
    optimizer = hmf.optim.Adam(model)
    optimizer.param_groups[0]["differentiable"] = True
    F.cross_entropy(model(X, 0), Y).backward()
    refused_unchanged(model, "differentiable=True", optimizer.step)


def test_one_model_in_a_module():
    model = small_model(1)
    wrapped = torch.nn.Sequential(model, torch.nn.Linear(2, 2))
    assert len(hmf.optim.Adam(wrapped).param_groups[0]["params"]) == len(list(wrapped.parameters()))
    with pytest.raises(InputError, match="one HyperMask model in it; Sequential has 0"):
        hmf.optim.Adam(torch.nn.Sequential())


def test_groups_as_torch_takes_them():
    """And a layer that is in none of them is left alone."""
    model = small_model(1)
    optimizer = hmf.optim.Adam(model, 1e-2, params=[{"params": model.net.parameters(), "lr": 1e-3}])
    before = model.hypernet.output.weight.detach().clone()
    F.cross_entropy(model(X, 0), Y).backward()
    optimizer.step()
    assert torch.equal(model.hypernet.output.weight, before) and optimizer.param_groups[0]["lr"] == 1e-3
    assert type(model.hypernet.output.weight.grad) is torch.Tensor


def test_an_earlier_task_in_training_mode_leaves_the_anchor():
    model = small_model(3)
    optimizer = hmf.optim.Adam(model)
    model.begin_task(2)
    anchor = model.anchor
    model(X, 0).sum().backward()
    assert model.anchor is anchor and optimizer.param_groups


@pytest.mark.parametrize("settings", [{}, {"step_in_backward": True}], ids=str)
def test_a_model_moves_between_two_steps(settings):
    """nn.Module takes gradients along."""
    model = small_model(2)
    optimizer = hmf.optim.Adam(model, 1e-2, **settings)
    optimizer.zero_grad()
    F.cross_entropy(model(X, model.mask(0)), Y).backward()
    optimizer.step()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the gradient of the hypernetwork's output layer is made in full")
        model.double()
    assert model.hypernet.output.weight.dtype == torch.float64
    grad = model.hypernet.output.weight.grad
    assert (
        (grad is None)
        if settings
        else (grad.dtype == torch.float64 and grad.shape == model.hypernet.output.weight.shape)
    )
