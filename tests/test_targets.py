import pytest
import torch

from hypermask_fast import HyperMask, HypernetConfig, InputError, MaskLayout
from hypermask_fast.training.config import TargetConfig
from hypermask_fast.training.targets import MLP, ResidualBlock, ResNet20, ZenkeNet, build_target


def test_sizes_are_the_published_ones():
    assert MaskLayout.of(MLP(784, (400, 400), 2)).size == 475_202
    assert MaskLayout.of(MLP(1024, (1000, 1000), 10)).size == 2_036_010
    assert MaskLayout.of(ResNet20(3, 10)).size == 1_067_530
    assert MaskLayout.of(ZenkeNet(3, 10, 32)).size == 1_250_858


def test_mlp_flattens_any_input():
    net = MLP(12, (5,), 3)
    x = torch.randn(4, 3, 2, 2)
    assert torch.equal(net(x), net(x.reshape(4, 12)))
    assert MLP(12, (), 3)(x).shape == (4, 3)


@pytest.mark.parametrize("size", [32, 64, 9])
def test_resnet_runs_at_any_image_size(size):
    assert ResNet20(3, 5, width=16)(torch.randn(2, 3, size, size)).shape == (2, 5)


def test_resnet_has_twenty_layers():
    layers = [m for m in ResNet20(3, 10).modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    assert len(layers) == 20


def test_resnet_halves_the_image_twice():
    assert ResNet20(3, 10).blocks(torch.zeros(1, 16, 32, 32)).shape == (1, 128, 8, 8)


def test_shortcut_pads_channels_on_both_sides_and_subsamples():
    block = ResidualBlock(2, 5, stride=2)
    x = torch.arange(2 * 3 * 4.0).reshape(1, 2, 3, 4) + 1
    shortcut = block.shortcut(x)
    assert shortcut.shape == (1, 5, 2, 2) == block(x).shape
    assert torch.equal(shortcut[:, 1:3], x[:, :, ::2, ::2])
    assert shortcut[:, [0, 3, 4]].count_nonzero() == 0


def test_residual_block_adds_its_shortcut():
    block = ResidualBlock(3, 3, stride=1)
    torch.nn.init.zeros_(block.bn2.weight)  # the residual branch is then 0
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(block(x), x.relu())


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (12, 12), (13, 30)])
def test_zenkenet_takes_the_image_sizes_it_says(size):
    assert ZenkeNet(1, 4, size)(torch.randn(2, 1, *size)).shape == (2, 4)


def test_zenkenet_drops_out_in_training_only():
    net, x = ZenkeNet(1, 4, 12), torch.randn(2, 1, 12, 12)
    assert not torch.equal(net(x), net(x))
    net.eval()
    assert torch.equal(net(x), net(x))


@pytest.mark.parametrize("name", ["mlp", "resnet20", "zenkenet"])
def test_every_target_can_be_masked_and_exported(name):
    torch.manual_seed(0)
    net = build_target(TargetConfig(name, hidden=(6,), width=16), (1, 12, 12), 3)
    model = HyperMask(net, 2, 40.0, HypernetConfig(4, (3,))).eval()
    assert not model.layout.segments[-1].selected, "the output layer's bias comes last"
    x = torch.randn(2, 1, 12, 12)
    torch.testing.assert_close(model.export(1)(x), model(x, task=1))


@pytest.mark.parametrize(
    ("config", "shape", "classes", "message"),
    [
        (TargetConfig("vgg"), (3, 32, 32), 10, "unknown target network 'vgg'; there are mlp, resnet20, zenkenet"),
        (TargetConfig("resnet20"), (64,), 10, "takes images .* not inputs of shape .64,."),
        (TargetConfig("zenkenet"), (3, 11, 32), 10, "at least 12 x 12, not 11 x 32"),
        (TargetConfig("resnet20", width=8), (3, 32, 32), 10, "width must be at least 16, not 8"),
        (TargetConfig("mlp", hidden=(10, 0)), (64,), 10, r"positive widths, not \[10, 0\]"),
        (TargetConfig("mlp"), (), 10, "one or more positive sizes"),
        (TargetConfig("mlp"), (64,), 0, "at least 1 class"),
    ],
)
def test_impossible_targets_are_refused(config, shape, classes, message):
    with pytest.raises(InputError, match=message):
        build_target(config, shape, classes)
