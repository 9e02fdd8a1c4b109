"""Which parameters are masked, and where they lie."""

import pytest
import torch
from support.networks import small_convnet
from torch import nn

import hypermask_fast as hmf
from hypermask_fast import InputError, MaskLayout


def test_order_shapes_and_offsets():
    layout = MaskLayout.of(small_convnet())
    assert layout.names == ("0.weight", "3.weight", "3.bias", "5.weight", "5.bias")  # normalisation left out
    assert layout.offsets == (0, 72, 180, 186, 456, 461)
    assert layout.size == 461
    assert [s.selected for s in layout.segments] == [True, True, True, True, False]
    views = layout.views(torch.arange(461))
    assert [tuple(v.shape) for v in views] == [s.shape for s in layout.segments]
    assert torch.equal(layout.flatten(views), torch.arange(461))
    assert layout.ranks(50).tolist() == [36, 54, 3, 135, 0]  # ceil(n - 1) / 2; the output layer's bias is kept whole


def test_published_size_of_split_mnist():
    net = nn.Sequential(nn.Linear(784, 400), nn.ReLU(), nn.Linear(400, 400), nn.ReLU(), nn.Linear(400, 2))
    assert MaskLayout.of(net).size == 475_202


def test_output_layer_without_bias_is_masked_like_any_other():
    layout = MaskLayout.of(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, bias=False)))
    assert all(segment.selected for segment in layout.segments)


def test_include_and_exclude():
    net = small_convnet()
    assert MaskLayout.of(net, include=["*.weight"]).names == ("0.weight", "3.weight", "5.weight")
    headless = MaskLayout.of(net, exclude=["5.*"])
    assert headless.names == ("0.weight", "3.weight", "3.bias")
    assert all(segment.selected for segment in headless.segments)  # 3.bias is not the output layer's
    with pytest.raises(InputError, match=r"'conv\*' matches none of .*0.weight"):
        MaskLayout.of(net, include=["conv*"])
    with pytest.raises(InputError, match="nothing to mask"):
        MaskLayout.of(net, exclude=["*"])
    assert MaskLayout.of(net, include="5.*").names == ("5.weight", "5.bias")  # one pattern, not its letters


def test_what_can_t_be_a_target_network():
    with pytest.raises(InputError, match=r"must be an nn\.Module, not None"):
        hmf.HyperMask(None, 2)
    net = small_convnet()
    model = hmf.HyperMask(net, 2)
    for taken in (net, model):  # a second model would take the first one's layers away
        with pytest.raises(InputError, match="a HyperMask model's already"):
            hmf.HyperMask(taken, 2)
    hmf.HyperMask(model.export(0), 2)


def test_nothing_to_mask():
    with pytest.raises(InputError, match="nothing to mask"):
        MaskLayout.of(nn.Sequential(nn.BatchNorm1d(3), nn.ReLU()))
    with pytest.raises(InputError, match="nothing to mask"):
        hmf.HyperMask(nn.ReLU(), 2)


def test_shared_parameter_is_one_segment():
    first = nn.Linear(4, 4)
    second = nn.Linear(4, 4)
    second.weight = first.weight
    net = nn.Sequential(first, nn.ReLU(), second)
    model = hmf.HyperMask(net, 2, 50)
    assert model.layout.names == ("0.weight", "0.bias", "2.bias")
    mask = model.mask(1).masks()
    x = torch.randn(3, 4)
    hidden = (x @ (first.weight * mask["0.weight"]).T + first.bias * mask["0.bias"]).relu()
    torch.testing.assert_close(model(x, 1), hidden @ (first.weight * mask["0.weight"]).T + second.bias)


def test_ramp_ranks_are_ranks():
    layout = MaskLayout.of(small_convnet())
    sparsities = [30 * (i + 1) / 700 for i in range(700)] + [0.0, 100.0]
    expected = torch.stack([layout.ranks(sparsity) for sparsity in sparsities])
    assert torch.equal(layout.ramp_ranks(sparsities), expected)
