"""Small networks of the kinds that people bring, with random weights: what `bench.networks` checks."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hypermask_fast.extras import needed_for
from hypermask_fast.training.targets import TargetConfig, build_target

Inputs = tuple[tuple, dict[str, Any]]


@dataclass(frozen=True)
class Entry:
    """A network and what it takes.

    Attributes:
        build: makes it; inputs: a number of samples -> arguments and keyword arguments.
        quick: whether its whole row takes a few seconds.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]
    quick: bool = False


def images(channels: int, side: int) -> Callable[[int], Inputs]:
    return lambda count: ((torch.randn(count, channels, side, side),), {})


def words(vocabulary: int = 40, length: int = 7) -> Callable[[int], Inputs]:
    return lambda count: ((torch.randint(1, vocabulary, (count, length)),), {})


def padded_words(count: int) -> Inputs:
    """As a tokeniser gives them: ids and an attention mask by name, every other sample shorter."""
    mask = torch.ones(count, 7, dtype=torch.int64)
    mask[::2, 5:] = 0
    return (), {"input_ids": torch.randint(1, 40, (count, 7)), "attention_mask": mask}


def translated_words(count: int) -> Inputs:
    return (), {**padded_words(count)[1], "decoder_input_ids": torch.randint(1, 40, (count, 5))}


# -- convolutional ----------------------------------------------------------------------------------------------------


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.downsample = None
        if stride > 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet18(nn.Module):
    """He et al., arXiv 1512.03385, at an eighth of its width."""

    def __init__(self, classes: int = 5, width: int = 8) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
        self.maxpool, self.avgpool = nn.MaxPool2d(3, 2, 1), nn.AdaptiveAvgPool2d(1)
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        self.layers = nn.Sequential(
            *(
                BasicBlock(widths[stage - (block == 0)], widths[stage], 1 + (stage > 1 and block == 0))
                for stage in range(1, 5)
                for block in range(2)
            )
        )
        self.fc = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(self.maxpool(F.relu(self.bn1(self.conv1(x)))))
        return self.fc(self.avgpool(x).flatten(1))


class InvertedResidual(nn.Module):
    """MobileNet v2's block, whose middle convolution is depthwise; Sandler et al., arXiv 1801.04381."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = inputs * expansion
        self.residual = stride == 1 and inputs == outputs
        self.layers = nn.Sequential(
            *(nn.Conv2d(inputs, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU6()),
            *(nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False), nn.BatchNorm2d(inner), nn.ReLU6()),
            *(nn.Conv2d(inner, outputs, 1, bias=False), nn.BatchNorm2d(outputs)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.residual else self.layers(x)


def mobilenet() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6()),
        *(InvertedResidual(8, 8, 1, 2), InvertedResidual(8, 12, 2, 4), InvertedResidual(12, 12, 1, 4)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(12, 5)),
    )


class ChannelsLast(nn.LayerNorm):
    """Over the channels of (batch, channels, height, width)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """Liu et al., arXiv 2201.03545, with its layer scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(width, width, 7, padding=3, groups=width), ChannelsLast(width)
        self.expand, self.contract = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.layer_scale = nn.Parameter(torch.full((width, 1, 1), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x)).permute(0, 2, 3, 1)
        return x + self.layer_scale * self.contract(F.gelu(self.expand(y))).permute(0, 3, 1, 2)


def convnext() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 4, 4), ChannelsLast(8), ConvNeXtBlock(8)),
        *(ChannelsLast(8), nn.Conv2d(8, 16, 2, 2), ConvNeXtBlock(16)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(16), nn.Linear(16, 5)),
    )


class UNet(nn.Module):
    """Ronneberger et al., arXiv 1505.04597: down by pooling, up by transposed convolutions, a class for each pixel."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.down1, self.down2, self.bottom = self.double(3, 6), self.double(6, 12), self.double(12, 24)
        self.up2, self.up1 = nn.ConvTranspose2d(24, 12, 2, 2), nn.ConvTranspose2d(12, 6, 2, 2)
        self.join2, self.join1 = self.double(24, 12), self.double(12, 6)
        self.head = nn.Conv2d(6, classes, 1)

    @staticmethod
    def double(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(
            *(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()),
            *(nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()),
        )

    def forward(self, x: Tensor) -> Tensor:
        one = self.down1(x)
        two = self.down2(F.max_pool2d(one, 2))
        y = self.up2(self.bottom(F.max_pool2d(two, 2)))
        y = self.up1(self.join2(torch.cat([y, two], 1)))
        return self.head(self.join1(torch.cat([y, one], 1)))


# -- sequences --------------------------------------------------------------------------------------------------------


class ViT(nn.Module):
    """Dosovitskiy et al., arXiv 2010.11929, as torchvision has it: a class token, positions, nn.MultiheadAttention."""

    def __init__(self, classes: int = 5, width: int = 16) -> None:
        super().__init__()
        self.conv_proj = nn.Conv2d(3, width, 4, 4)
        self.class_token = nn.Parameter(torch.randn(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, 17, width) / 10)
        layer = nn.TransformerEncoderLayer(width, 4, 32, 0.0, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_proj(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], 1)
        return self.head(self.encoder(x + self.position)[:, 0])


class LSTMClassifier(nn.Module):
    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 8, padding_idx=0)
        self.lstm = nn.LSTM(8, 12, 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(24, classes)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(ids))[0].mean(1))


class Translator(nn.Module):
    """nn.Transformer with embeddings and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 16)
        self.transformer = nn.Transformer(16, 4, 1, 1, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 40)

    def forward(self, ids: Tensor, shifted: Tensor) -> Tensor:
        length = shifted.shape[1]
        later = torch.ones(length, length, dtype=torch.bool, device=ids.device).triu(1)
        return self.head(
            self.transformer(self.embedding(ids), self.embedding(shifted), tgt_mask=later, tgt_is_causal=True)
        )


def pairs(count: int) -> Inputs:
    return (torch.randint(40, (count, 7)), torch.randint(40, (count, 5))), {}


# -- Hugging Face's ---------------------------------------------------------------------------------------------------


def hugging_face(kind: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    """A network of `transformers` with random weights and no dropout, so that two passes can be compared."""

    def build() -> nn.Module:
        with needed_for("Hugging Face's networks", "test"):
            transformers = importlib.import_module("transformers")
            of_kind, of_config = getattr(transformers, kind), getattr(transformers, config)
        return of_kind(of_config(**settings))

    return build


_SMALL = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
_BERT = {**_SMALL, "intermediate_size": 32, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_NO_CACHE = {"use_cache": False}  # of keys and values, which PyTorch can't export
_GPT = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 16, "pad_token_id": 0, **_NO_CACHE}
_T5 = {
    "vocab_size": 40,
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    **_NO_CACHE,
}
_QUIET = {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2}

ZOO = {
    "MLP (preset)": Entry(lambda: build_target(TargetConfig("mlp", (16, 16)), (1, 8, 8), 4), images(1, 8), True),
    "ResNet-20 (preset)": Entry(lambda: build_target(TargetConfig("resnet20"), (3, 16, 16), 4), images(3, 16)),
    "Zenke's network (preset)": Entry(lambda: build_target(TargetConfig("zenkenet"), (3, 16, 16), 4), images(3, 16)),
    "ResNet-18": Entry(ResNet18, images(3, 32)),
    "MobileNet v2": Entry(mobilenet, images(3, 16)),
    "ConvNeXt": Entry(convnext, images(3, 16)),
    "U-Net": Entry(UNet, images(3, 8)),
    "ViT": Entry(ViT, images(3, 16)),
    "LSTM classifier": Entry(LSTMClassifier, words(), True),
    "nn.Transformer": Entry(Translator, pairs),
    "BERT": Entry(
        hugging_face("BertForSequenceClassification", "BertConfig", num_labels=3, **_BERT), padded_words, True
    ),
    "ViT (Hugging Face)": Entry(
        hugging_face("ViTForImageClassification", "ViTConfig", image_size=16, patch_size=4, **_BERT), images(3, 16)
    ),
    "GPT-2 (tied)": Entry(hugging_face("GPT2LMHeadModel", "GPT2Config", **_GPT, **_QUIET), padded_words),
    "Llama": Entry(
        hugging_face(
            "LlamaForCausalLM", "LlamaConfig", intermediate_size=32, num_key_value_heads=2, **_SMALL, **_NO_CACHE
        ),
        padded_words,
    ),
    "T5 (tied)": Entry(
        hugging_face("T5ForConditionalGeneration", "T5Config", decoder_start_token_id=0, **_T5), translated_words
    ),
}
