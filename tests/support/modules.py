"""Networks and modules of every kind that can have masked parameters; `module_kinds` has the models around them."""

from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint


def sequence(batch: int = 4, length: int = 7, width: int = 16) -> tuple[Tensor]:
    return (torch.randn(batch, length, width),)


def words(batch: int = 4, length: int = 9) -> tuple[Tensor]:
    return (torch.randint(20, (batch, length)),)


def pictures() -> tuple[Tensor]:
    return (torch.randn(4, 3, 12, 12),)


class Attention(nn.Module):
    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True, **settings)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        keys = x if keys is None else keys
        return self.head(self.attention(x, keys, keys)[0])


class Recurrent(nn.Module):
    def __init__(self, kind: type, **settings: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8, padding_idx=0)
        self.layer = kind(8, 12, 2, batch_first=True, bidirectional=True, **settings)
        self.head = nn.LazyLinear(3)
        self(torch.zeros(1, 2, dtype=torch.int64))  # materialises the head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embedding(x))[0][:, -1])


class Cell(nn.Module):
    def __init__(self, kind: type) -> None:
        super().__init__()
        self.cell, self.head = kind(16, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


class Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Bilinear(16, 16, 5)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return self.layer(x, other)


class HeadFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head, self.body = nn.Linear(8, 3), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).relu())


Two = namedtuple("Two", "a b")


@dataclass
class Fields:
    a: Tensor
    b: Tensor


class TwoHeads(nn.Module):
    """Returns what `made` makes of the two heads' results."""

    def __init__(self, made: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.body, self.b, self.made = nn.Linear(8, 3), nn.Linear(16, 8), nn.Linear(8, 2), made

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Any:
        h = self.body(x if scale is None else x * scale).relu()
        return self.made(self.a(h).softmax(-1), self.b(h))


class Functional(nn.Module):
    """Reads a layer's weight in place of calling the layer, and has a Parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.scale, self.out = nn.Linear(16, 8), nn.Parameter(torch.randn(8)), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.linear(x, self.fc.weight, self.fc.bias).relu() * self.scale)


class Listed(nn.Module):
    """Parameters in a list and in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.ParameterList([torch.randn(16, 16) / 4 for _ in range(2)])
        self.named = nn.ParameterDict({"shift": torch.randn(16)})
        self.out = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out((x @ self.steps[0] + self.named["shift"]).relu() @ self.steps[1])


class Checkpointed(nn.Module):
    """Parts of it (or all) are computed again in the backward pass."""

    def __init__(self, reentrant: bool | None, everything: bool = False) -> None:
        super().__init__()
        self.stem, self.out = nn.Linear(16, 16), nn.Linear(16, 2)
        self.block = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
        self.reentrant, self.everything = reentrant, everything

    def whole(self, x: Tensor) -> Tensor:
        return self.out(self.block(self.stem(x)))

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return self.whole(x)
        if self.everything:
            return checkpoint(self.whole, x, use_reentrant=self.reentrant)
        return self.out(checkpoint(self.block, self.stem(x), use_reentrant=self.reentrant))


class Transposed(nn.Linear):
    """A subclass with a forward pass of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight @ x.transpose(-1, -2)).transpose(-1, -2) + self.bias


class Doubled(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(16, 16), nn.Linear(16, 16), nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(self.a(self.norm(x)).relu())


class Cast(nn.Module):
    """A layer in bfloat16 and one in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 8).to(torch.bfloat16), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x.bfloat16()).float())


class AttentionPool(nn.Module):
    """As CLIP's: the projections' weights are handed to a function, the layers are never called."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.c_proj = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        bias = torch.cat([self.q_proj.bias, self.k_proj.bias, self.v_proj.bias])
        y, _ = F.multi_head_attention_forward(
            query=x.mean(0, keepdim=True), key=x, value=x, embed_dim_to_check=16, num_heads=4, in_proj_weight=None,
            in_proj_bias=bias, bias_k=None, bias_v=None, add_zero_attn=False, dropout_p=0.0,
            out_proj_weight=self.c_proj.weight, out_proj_bias=self.c_proj.bias, use_separate_proj_weight=True,
            training=self.training, q_proj_weight=self.q_proj.weight, k_proj_weight=self.k_proj.weight,
            v_proj_weight=self.v_proj.weight,
        )  # fmt: skip
        return y[0]


def encoder_layer() -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.0)


def perceptron(first: nn.Module | None = None) -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 8) if first is None else first, nn.ReLU(), nn.Linear(8, 2))


def after_convolution(norm: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.Flatten(), nn.Linear(400, 2))


def pruned() -> nn.Linear:
    layer = nn.Linear(16, 8)
    prune.random_unstructured(layer, "weight", 0.5)
    return layer


def with_extra() -> nn.Linear:
    layer = nn.Linear(16, 8)
    layer.extra = nn.Parameter(torch.randn(3))
    return layer


def transformer() -> nn.Transformer:
    return nn.Transformer(16, 4, 1, 1, 32, dropout=0.0, batch_first=True)


def as_pair(a: Tensor, b: Tensor) -> tuple:
    return a, b


def as_dict(a: Tensor, b: Tensor) -> dict:
    return OrderedDict(a=a, b=b)
