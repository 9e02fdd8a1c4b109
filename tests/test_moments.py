"""hmf.optim.Adam(moments="bfloat16"): in any loop, in state_dicts, and where it can't be."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from support.launching import ranks
from support.moments import X, Y, after_a_step, moments_of, small_model, train

import hypermask_fast as hmf
from hypermask_fast import InputError, ops


def adam(model, **settings):
    return hmf.optim.Adam(model, 1e-2, **({"moments": "bfloat16"} | settings))


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("in_backward", [False, True])
def test_what_is_kept_in_which_dtype(in_backward):
    model = small_model()
    optimizer = adam(model, step_in_backward=in_backward)
    train(model, optimizer, 3)
    assert [x.dtype for x in moments_of(model, optimizer)] == [torch.bfloat16] * 2
    others = [p for p in model.parameters() if p is not model.hypernet.output.weight and p in optimizer.state]
    assert others and all(optimizer.state[p]["exp_avg"].dtype == torch.float32 for p in others)


@pytest.mark.parametrize("settings", [{}, {"weight_decay": 0.1}, {"maximize": True}], ids=str)
def test_training_stays_by_that_of_float32_moments(settings):
    """Per step a moment is off by less than 2^-8 of itself; a wrong moment would be a wrong step at once."""
    models = [small_model(), small_model()]
    for model, moments in zip(models, ("float32", "bfloat16"), strict=True):
        start = model.hypernet.output.weight.detach().clone()
        train(model, adam(model, moments=moments, **settings), 8)
    a, b = (model.hypernet.output.weight for model in models)
    assert 0 < (a - b).norm() < 0.05 * (a - start).norm()


def test_step_in_backward_and_step_make_the_same_moments():
    models = [small_model(), small_model()]
    optimizers = [adam(model, step_in_backward=flag) for model, flag in zip(models, (False, True), strict=True)]
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, 1)
    for x, y in zip(*(moments_of(m, o) for m, o in zip(models, optimizers, strict=True)), strict=True):
        assert torch.equal(x, y) and x.any()


def test_an_ordinary_gradient_is_stepped_with_the_same_numbers():
    """Such as a hook or an operation leaves it, that no kernel takes."""
    models = [small_model(), small_model()]
    for model, dense in zip(models, (False, True), strict=True):
        optimizer = adam(model)
        for _ in range(3):
            optimizer.zero_grad()
            mask = model.mask(0)
            (F.cross_entropy(model(X, mask), Y) + model.regularizer(mask)).backward()
            weight = model.hypernet.output.weight
            if dense:
                weight.grad = weight.grad.dense().clone()
            optimizer.step()
        assert optimizer.state[weight]["step"] == 3 and optimizer.state[weight]["exp_avg"].dtype == torch.bfloat16
    for x, y in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)


def test_a_run_that_is_saved_goes_on_bit_for_bit():
    straight, stopped = small_model(), small_model()
    train(straight, optimizer := adam(straight), 10)
    train(stopped, first := adam(stopped), 4)
    saved = copy.deepcopy(first.state_dict())
    assert (
        saved["state"][[p is stopped.hypernet.output.weight for p in stopped.parameters()].index(True)]["exp_avg"].dtype
        == torch.bfloat16
    )
    second = adam(stopped)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second.load_state_dict(saved)
    train(stopped, second, 6)
    assert equal(straight, stopped)
    for x, y in zip(moments_of(straight, optimizer), moments_of(stopped, second), strict=True):
        assert torch.equal(x, y) and x.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))], ids=["copy", "pickle"]
)
def test_a_copy_goes_on_bit_for_bit(copied):
    model = small_model()
    optimizer = adam(model)
    train(model, optimizer, 3)
    other_model, other = copied((model, optimizer))
    train(model, optimizer, 3)
    train(other_model, other, 3)
    assert other.moments == "bfloat16" and equal(model, other_model)


@pytest.mark.parametrize(("stored", "here"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_a_state_of_the_other_dtype_is_converted_and_said_once(stored, here):
    model = small_model()
    before = adam(model, moments=stored)
    train(model, before, 3)
    after = adam(model, moments=here)
    with pytest.warns(UserWarning, match=f"kept in {stored} and are converted to {here}") as said:
        after.load_state_dict(before.state_dict())
    assert len(said) == 1
    for x, y in zip(moments_of(model, before), moments_of(model, after), strict=True):
        assert y.dtype == getattr(torch, here)
        torch.testing.assert_close(x.float(), y.float(), rtol=2**-8, atol=0)
        assert not (y.float() == 0)[x.float() > 0].any()
    assert after.state[model.hypernet.output.weight]["step"] == 3
    train(model, after, 2)


def test_torch_adam_takes_the_state_and_gives_it_back():
    model = small_model()
    own = adam(model)
    train(model, own, 3)
    theirs = torch.optim.Adam(model.parameters())
    theirs.load_state_dict(own.state_dict())
    for x, y in zip(moments_of(model, own), moments_of(model, theirs), strict=True):
        assert torch.equal(x.float(), y)
    again = adam(model)
    with pytest.warns(UserWarning, match="kept in float32"):
        again.load_state_dict(theirs.state_dict())
    for x, y in zip(moments_of(model, own), moments_of(model, again), strict=True):
        assert torch.equal(x, y)


def test_converting_keeps_finite_what_is_and_positive_what_is_divided_by():
    model = small_model()
    before = adam(model, moments="float32")
    train(model, before, 1)
    first, second = moments_of(model, before)
    first[0, 0], second[0, :2] = -3.4e38, torch.tensor([3.4e38, 1e-44])
    after = adam(model)
    with pytest.warns(UserWarning, match="converted"):
        after.load_state_dict(before.state_dict())
    first, second = moments_of(model, after)
    assert first.isfinite().all() and second.isfinite().all() and second[0, 1] > 0


def refused(match, do):
    with pytest.raises(InputError, match=match) as caught:
        do()
    assert "\n" not in str(caught.value)


def test_what_is_refused():
    model = small_model()
    refused("moments must be one of float32, bfloat16, not 'float16'", lambda: adam(model, moments="float16"))
    refused("moments='bfloat16' don't go together with amsgrad", lambda: adam(model, amsgrad=True))
    refused("this hypernetwork generates in chunks", lambda: adam(small_model(chunk_size=50)))
    refused("of a float32 output layer, this one is float64", lambda: adam(small_model().double()))


@pytest.mark.parametrize("change", ["amsgrad", "double"])
def test_what_is_changed_afterwards_is_refused_at_the_step_which_changes_nothing(change):
    model = small_model()
    optimizer = adam(model)
    train(model, optimizer, 2)
    if change == "amsgrad":
        optimizer.param_groups[0]["amsgrad"] = True
    else:
        model.double()
    before = copy.deepcopy(model.state_dict())
    refused("amsgrad" if change == "amsgrad" else "this one is float64", optimizer.step)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_adamw_takes_moments_too():
    model = small_model()
    optimizer = hmf.optim.AdamW(model, 1e-2, moments="bfloat16")
    train(model, optimizer, 3)
    assert moments_of(model, optimizer)[0].dtype == torch.bfloat16


def test_the_reference_makes_the_extensions_moments():
    """In a step from moments of 0; later ones differ by what float32 arithmetic differs."""
    found = []
    for backend in ("auto", "reference"):
        model = small_model()
        optimizer = adam(model)
        with ops.use_backend(backend):
            train(model, optimizer, 1)
        found.append(moments_of(model, optimizer))
    for x, y in zip(*found, strict=True):
        assert (x != y).double().mean() < 0.02


@pytest.mark.parametrize("how", ["replicate", "shard"])
def test_several_processes_draw_what_one_draws(how):
    """By the row of the whole layer: so in a first step few moments differ, where float32 sums do."""
    ended = ranks(2, after_a_step, how)
    assert all(rank.code == 0 for rank in ended), ended
    alone = []
    model = small_model()
    for in_backward in (False, True):
        optimizer = adam(model, step_in_backward=in_backward)
        train(model, optimizer, 1)
        alone.append(moments_of(model, optimizer))
    for rank in ended:
        stepped, loaded, stepped_in_backward, loaded_too = rank.result
        for x, y in ((stepped, loaded), (stepped_in_backward, loaded_too)):
            assert all(torch.equal(a, b) and a.dtype == b.dtype == torch.bfloat16 for a, b in zip(x, y, strict=True))
        for found, expected in ((stepped, alone[0]), (stepped_in_backward, alone[1])):
            for x, y in zip(found, expected, strict=True):
                assert (x != y).double().mean() < 0.05
