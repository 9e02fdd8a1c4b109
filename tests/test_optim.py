"""Adam on factored gradients: the numbers of torch.optim.Adam, and refusals where it can't give them."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from support.optimising import X, Y, ours, plain, refused_unchanged, small_model, train
from torch import nn

import hypermask_fast as hmf
from hypermask_fast import InputError


@pytest.mark.parametrize("settings", [{}, {"step_in_backward": True}], ids=str)
@pytest.mark.parametrize("fidelity", ["default", "official"])
def test_float64_numbers_are_torch_adams(settings, fidelity):
    # The 1-norm's gradient jumps where a weight comes back to where it was; rounding then decides, and shows.
    theirs, own = (small_model(3, beta=0.5, lam=0.02, drift_norm=2, fidelity=fidelity).double() for _ in range(2))
    expected, their_optimizer = train(theirs, plain, 20, x=X.double())
    losses, optimizer = train(own, ours(**settings), 20, x=X.double())
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


def test_without_the_regulariser_earlier_embeddings_stay():
    """A gradient of 0 in place of none would have them go on by their moments. And nothing is captured for drifts."""
    theirs, own = small_model(2), small_model(2)
    for model, optimizer in ((theirs, plain(theirs)), (own, hmf.optim.Adam(own, 1e-2))):
        for task in (0, 0, 0, 1, 1):
            optimizer.zero_grad()
            F.cross_entropy(model(X, model.mask(task)), Y).backward()
            assert task == 0 or model.hypernet.embeddings[0].grad is None
            optimizer.step()
        assert model.anchor is None
    for (name, a), b in zip(own.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


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


@pytest.mark.parametrize("step_in_backward", [False, True])
def test_sparse_gradients_are_refused(step_in_backward):
    net = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Flatten(), nn.Linear(8, 2))
    model, words = hmf.HyperMask(net, 2, exclude="0.*"), torch.tensor([[1, 2], [0, 1]])
    with pytest.raises(InputError, match="net.0 has sparse gradients, which Adam can't take"):
        hmf.optim.Adam(model, step_in_backward=step_in_backward)
    assert model.hypernet.stepper is None
    table = net.get_submodule("0").weight
    others = [p for p in model.parameters() if p is not table]
    optimizers = [
        hmf.optim.Adam(model, params=others, step_in_backward=step_in_backward),
        torch.optim.SparseAdam([table]),
    ]
    before = [p.clone() for p in (table, model.hypernet.output.weight)]
    for optimizer in optimizers:
        optimizer.zero_grad()
    F.cross_entropy(model(words, model.mask(0)), torch.tensor([0, 1])).backward()
    for optimizer in optimizers:
        optimizer.step()
    assert not torch.equal(table, before[0]) and not torch.equal(model.hypernet.output.weight, before[1])
    table.requires_grad_(False)
    hmf.optim.Adam(model)


def test_differentiable_is_refused():
    with pytest.raises(InputError, match="differentiable=True"):
        hmf.optim.Adam(small_model(1), differentiable=True)
    model = small_model(1)
    optimizer = hmf.optim.Adam(model)
    optimizer.param_groups[0]["differentiable"] = True
    F.cross_entropy(model(X, 0), Y).backward()
    refused_unchanged(model, "differentiable=True", optimizer.step)


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
