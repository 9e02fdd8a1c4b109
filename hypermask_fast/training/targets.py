"""Target networks of the presets: an MLP, CIFAR's ResNet-20 and the network of Zenke et al."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import own_code
from ..errors import InputError
from ..model import HyperMask
from ..settings import WIDEST, Range, Text, Widths, check_fields

ZENKE_SMALLEST = 12  # two times (valid 3x3 convolution, halving) leaves one pixel of 12 x 12


@dataclass(frozen=True)
class TargetConfig:
    """The network that is masked.

    Attributes:
        name: its kind: mlp, resnet20 (CIFAR's ResNet of 20 layers) or zenkenet (the network of Zenke et al.); or a
            function of one's own that returns it, `file.py:function` or `module:function`; `--network` sets it.
        hidden: an mlp's widths of its hidden layers; none for a linear classifier.
        width: a resnet20's channels in its first stage, 16 or more; 16 k, with 2 and 4 times as many in the others.
        fingerprint: of the file of a function of one's own, as it was when the run began; `train` writes it.
    """

    name: Annotated[str, Text(longest=4096)]
    hidden: Annotated[tuple[int, ...], Widths()] = (400, 400)
    width: Annotated[int, Range(1, WIDEST, unit="channels")] = 32
    fingerprint: Annotated[str | None, Text()] = None


class MLP(nn.Sequential):
    """x -> flatten -> (Linear, ReLU) per hidden width -> Linear.

    Args:
        inputs: numbers per sample, whatever their shape.
        hidden: widths of the hidden layers, none or more.
        classes: outputs.

    Shapes: x (batch, ...) with `inputs` numbers per sample -> logits (batch, classes).
    """

    def __init__(self, inputs: int, hidden: Sequence[int], classes: int) -> None:
        layers: list[nn.Module] = [nn.Flatten()]
        for width in hidden:
            layers += [nn.Linear(inputs, width), nn.ReLU()]
            inputs = width
        super().__init__(*layers, nn.Linear(inputs, classes))


class ResidualBlock(nn.Module):
    """y = relu(bn(conv(relu(bn(conv(x))))) + shortcut(x)), 3x3 convolutions with bias, the first one with `stride`.

    The shortcut has no parameters (option A): every stride-th pixel, and zeros for the channels that x lacks, half of
    them before and half after its own.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.missing = outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, inputs, h, w) -> (batch, outputs, ceil(h / stride), ceil(w / stride))."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.shortcut(x))

    def shortcut(self, x: Tensor) -> Tensor:
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.missing:
            before = self.missing // 2
            x = F.pad(x, (0, 0, 0, 0, before, self.missing - before))
        return x


class ResNet20(nn.Module):
    """CIFAR's ResNet of 20 layers: a 3x3 convolution to 16 channels, three stages of three blocks, mean, Linear.

    The stages have width, 2 width and 4 width channels at full, half and quarter resolution. Convolutions have a
    bias and shortcuts no parameters: with width 32 (k = 2) and 10 classes that makes 1,067,530 weights and biases
    outside of batch norm, the 1.07 M of the published experiments.

    Args:
        in_channels: of the image.
        classes: outputs.
        width: channels of the first stage, 16 k; at least 16.

    Shapes: x (batch, in_channels, h, w) -> logits (batch, classes).

    Raises:
        InputError: width below 16.

    Source: He et al. 2016, section 4.2, widened as in Zagoruyko and Komodakis 2016.
    """

    STEM = 16

    def __init__(self, in_channels: int, classes: int, width: int = 32) -> None:
        super().__init__()
        if width < self.STEM:
            raise InputError(f"a ResNet-20's width must be at least {self.STEM}, not {width}")
        self.conv = nn.Conv2d(in_channels, self.STEM, 3, padding=1)
        self.bn = nn.BatchNorm2d(self.STEM)
        blocks, inputs = [], self.STEM
        for stage, outputs in enumerate((width, 2 * width, 4 * width)):
            for block in range(3):
                blocks.append(ResidualBlock(inputs, outputs, stride=2 if stage > 0 and block == 0 else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x)))
        return self.fc(self.blocks(x).mean(dim=(2, 3)))


class ZenkeNet(nn.Sequential):
    """Two times (3x3 conv, ReLU, 3x3 conv without padding, ReLU, max pool 2, dropout 1/4), then Linear 512, ReLU,
    dropout 1/2, Linear; 32 channels in the first pair of convolutions, 64 in the second.

    Args:
        in_channels: of the image.
        classes: outputs.
        image_size: (height, width), or one number for a square image; at least 12 each.

    Shapes: x (batch, in_channels, height, width) -> logits (batch, classes).

    Raises:
        InputError: an image too small for the two poolings.

    Source: Zenke, Poole and Ganguli 2017, appendix (the network for CIFAR-10/100).
    """

    def __init__(self, in_channels: int, classes: int, image_size: int | tuple[int, int]) -> None:
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        if min(height, width) < ZENKE_SMALLEST:
            raise InputError(
                f"zenkenet needs images of at least {ZENKE_SMALLEST} x {ZENKE_SMALLEST}, not {height} x {width}"
            )
        pooled = [((size - 2) // 2 - 2) // 2 for size in (height, width)]
        super().__init__(
            *self._stage(in_channels, 32),
            *self._stage(32, 64),
            nn.Flatten(),
            nn.Linear(64 * prod(pooled), 512),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(512, classes),
        )

    @staticmethod
    def _stage(inputs: int, outputs: int) -> list[nn.Module]:
        return [
            nn.Conv2d(inputs, outputs, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Dropout(0.25),
        ]


def _mlp(config: TargetConfig, shape: tuple[int, ...], classes: int) -> nn.Module:
    return MLP(prod(shape), config.hidden, classes)


def _resnet20(config: TargetConfig, shape: tuple[int, ...], classes: int) -> nn.Module:
    return ResNet20(_image(config, shape)[0], classes, config.width)


def _zenkenet(config: TargetConfig, shape: tuple[int, ...], classes: int) -> nn.Module:
    channels, height, width = _image(config, shape)
    return ZenkeNet(channels, classes, (height, width))


TARGETS = {"mlp": _mlp, "resnet20": _resnet20, "zenkenet": _zenkenet}


def build_target(config: TargetConfig, input_shape: Sequence[int], num_classes: int) -> nn.Module:
    """The plain target network that `config` names; where it names a function of the user's own, what that returns.

    Args:
        config: name, and the widths that its kind of network has.
        input_shape: of one sample, without the batch: (numbers,) or (channels, height, width).
        num_classes: outputs of the one head that all tasks share.

    Raises:
        InputError: an unknown name, an input shape the network cannot take, or a width or number below 1.
    """
    shape = tuple(input_shape)
    check_name(config)
    if not shape or min(shape) < 1:
        raise InputError(f"an input shape lists one or more positive sizes, not {shape}")
    if num_classes < 1:
        raise InputError(f"a target network needs at least 1 class, not {num_classes}")
    check_fields(config, "target")
    if own_code.is_own(config.name):
        return _own(config, shape, num_classes)
    return TARGETS[config.name](config, shape, num_classes)


def check_name(config: TargetConfig) -> None:
    """Raises InputError unless `config` names a network of `TARGETS`, or has the form of a function of one's own."""
    if config.name not in TARGETS and not own_code.is_own(config.name):
        raise InputError(f"unknown target network {config.name!r}; there are {', '.join(TARGETS)}")


def _own(config: TargetConfig, shape: tuple[int, ...], classes: int) -> nn.Module:
    """The network that a function of the user's makes, once it has shown that it takes the inputs and has the outputs.

    The function gets, of these arguments, those that it names: input_shape, num_classes, hidden, width.
    """
    usual = TargetConfig(config.name)
    changed = [name for name in ("hidden", "width") if getattr(config, name) != getattr(usual, name)]
    arguments = {"input_shape": shape, "num_classes": classes, "hidden": config.hidden, "width": config.width}
    net = own_code.call(config.name, "network", arguments, changed)
    told = f"network {own_code.short(config.name)}"
    if not isinstance(net, nn.Module):
        raise InputError(f"{told} must return a torch.nn.Module, not {_kind(net)}")
    if any(isinstance(module, HyperMask) for module in net.modules()):
        raise InputError(f"{told} must return the network that is to be masked, without the HyperMask around it")
    modes = [(module, module.training) for module in net.modules()]
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        outputs = own_code.guarded(config.name, "network", lambda: net.eval()(torch.zeros(2, *shape)))
    for module, training in modes:
        module.training = training
    if not isinstance(outputs, Tensor) or outputs.shape != (2, classes):
        raise InputError(
            f"{told} must give outputs of shape (2, {classes}) for inputs of shape {(2, *shape)}, not {_kind(outputs)}"
        )
    return net


def _kind(value: object) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _image(config: TargetConfig, shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) != 3:
        raise InputError(
            f"target {config.name} takes images (channels, height, width), not inputs of shape {shape}; "
            "mlp takes any shape"
        )
    return shape
