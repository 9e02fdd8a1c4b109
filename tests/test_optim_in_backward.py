"""Adam that steps within the backward pass: what it refuses, and what gradients are dense beside it."""

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from support.optimising import X, Y, ours, plain, refused_unchanged, small_model

import hypermask_fast as hmf


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
