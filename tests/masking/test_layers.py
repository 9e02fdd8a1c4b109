"""Masked layers on their own, and batch norm with statistics per task."""

import pytest
import torch
import torch.nn.functional as F
from support.networks import small_convnet
from torch import nn

import hypermask_fast as hmf
from hypermask_fast import InputError, LayerMask, MaskedConv2d, MaskedLinear


@pytest.mark.parametrize(
    ("ours", "plain", "x"),
    [
        (MaskedLinear(5, 3), nn.Linear(5, 3), torch.randn(2, 4, 5)),
        (MaskedConv2d(2, 4, 3, 2, 1, groups=2), nn.Conv2d(2, 4, 3, 2, 1, groups=2), torch.randn(2, 2, 7, 6)),
        (
            MaskedConv2d(2, 4, 3, padding=1, padding_mode="circular"),
            nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"),
            torch.randn(2, 2, 7, 6),
        ),
    ],
)
def test_drop_in(ours, plain, x):
    """Same constructor, same names; without a mask the plain layer, with one the plain layer of masked weights."""
    ours.load_state_dict(plain.state_dict())
    assert torch.equal(ours(x), plain(x))
    assert torch.equal(ours(input=x), plain(input=x))
    logits, bias_logits = torch.randn_like(plain.weight), torch.randn_like(plain.bias)
    masked = ours(x, LayerMask(logits, torch.tensor(0.5), bias_logits, torch.tensor(0.2)))
    with torch.no_grad():
        plain.weight *= logits.tanh().abs() * (logits.abs() >= 0.5)
        half = plain(x)
        plain.bias *= bias_logits.tanh().abs() * (bias_logits.abs() >= 0.2)
    torch.testing.assert_close(masked, plain(x))
    torch.testing.assert_close(ours(x, LayerMask(logits, torch.tensor(0.5))).detach(), half)


def test_wrong_shape_and_dtype():
    linear, conv = MaskedLinear(5, 3), MaskedConv2d(2, 4, 3)
    with pytest.raises(InputError, match=r"expects input \(\.\.\., 5\), not \(2, 4\)"):
        linear(torch.randn(2, 4))
    with pytest.raises(InputError, match=r"weights of torch.float32: its input must be too, not torch.float64"):
        linear(torch.randn(2, 5, dtype=torch.float64))
    with pytest.raises(InputError, match=r"expects input \(batch, 2, height, width\), not \(1, 3, 8, 8\)"):
        conv(torch.randn(1, 3, 8, 8))
    with pytest.raises(InputError, match=r"mask logits must have the weight's shape \(3, 5\), not \(5, 3\)"):
        linear(torch.randn(2, 5), LayerMask(torch.randn(5, 3), torch.tensor(0.0)))
    threshold, logits = torch.tensor(0.0), torch.randn(3, 5)
    with pytest.raises(InputError, match="takes a LayerMask.*, not Tensor"):
        linear(torch.randn(2, 5), logits)
    with pytest.raises(InputError, match="go together, one is missing"):
        linear(torch.randn(2, 5), LayerMask(logits, threshold, torch.randn(3)))
    with pytest.raises(InputError, match=r"bias_logits must have the bias's shape \(3,\), not \(5,\)"):
        linear(torch.randn(2, 5), LayerMask(logits, threshold, torch.randn(5), threshold))


def test_autocast_may_mix_dtypes():
    with torch.autocast("cpu", torch.bfloat16):
        assert MaskedLinear(5, 3)(torch.randn(2, 5)).dtype == torch.bfloat16


def test_running_statistics_are_per_task(convnet_model):
    plain = small_convnet().train()
    plain.load_state_dict(convnet_model.net.state_dict() | plain.state_dict(), strict=False)
    norm = convnet_model.net[1]
    for task, scale in ((0, 1.0), (2, 5.0), (2, 5.0)):
        convnet_model(scale * torch.randn(8, 2, 8, 8), task)
    assert norm.num_batches_tracked.tolist() == [1, 0, 2]
    assert torch.equal(norm.running_var[1], torch.ones(4))
    # Another task's statistics, or the batch's own, would give another result.
    x = torch.randn(8, 2, 8, 8)
    convnet_model.eval()
    weight = convnet_model.mask(2).effective[0]
    expected = F.batch_norm(F.conv2d(x, weight, padding=1), norm.running_mean[2], norm.running_var[2])
    with convnet_model.use_task(2):
        torch.testing.assert_close(norm(convnet_model.net[0](x)), expected)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_statistics_follow_torch(momentum):
    """Two batches of one task move its statistics as nn.BatchNorm2d would; a task tensor does what an int does."""
    torch.manual_seed(0)
    by_int, by_tensor = (hmf.HyperMask(nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3)), 2) for _ in range(2))
    by_tensor.load_state_dict(by_int.state_dict())
    plain = nn.BatchNorm2d(3, momentum=momentum)
    for model in (by_int, by_tensor):
        model.net[1].momentum = momentum
    for _ in range(2):
        x = torch.randn(4, 1, 5, 5)
        expected = plain(F.conv2d(x, *by_int.mask(1).effective))
        torch.testing.assert_close(by_int(x, 1), expected)
        torch.testing.assert_close(by_tensor(x, torch.tensor(1)), expected)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(by_int.net[1], name)[1], getattr(plain, name))
        torch.testing.assert_close(getattr(by_tensor.net[1], name), getattr(by_int.net[1], name))


def test_official_fidelity_uses_the_batch():
    torch.manual_seed(0)
    model = hmf.HyperMask(small_convnet(), 2, fidelity="official").eval()
    x = torch.randn(4, 2, 8, 8)
    assert not torch.allclose(model(x, 0)[:2], model(x[:2], 0))  # depends on who else is in the batch
    assert model.net[1].num_batches_tracked.sum() == 0
