"""A small network around every kind of module that can have masked parameters, and the definition of its pass.

The definition is `torch.func.functional_call` of the network as it was, with W * m in place of every masked W.
"""

import copy
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, prune
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import hypermask_fast as hmf
from support.networks import TiedHead


@dataclass(frozen=True)
class Case:
    """A network, its inputs, and the settings of its model.

    Attributes:
        build: makes the network. args, kwargs: make its inputs.
        output: the tensors of what it returns, as one.
        definition: the network whose pass is the right one, where that is not the network itself (without checkpoints).
        settings: of `HyperMask`.
        copies: whether PyTorch can copy and pickle the network.
    """

    build: Callable[[], nn.Module]
    args: Callable[[], tuple]
    kwargs: Callable[[], dict[str, Any]] = dict
    definition: Callable[[], nn.Module] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    copies: bool = True


def joined(output: Any) -> Tensor:
    """All tensors of an output, one behind another."""
    return torch.cat([leaf.flatten().float() for leaf in tree_leaves(_fields(output)) if isinstance(leaf, Tensor)])


def _fields(output: Any) -> Any:
    return vars(output) if hasattr(output, "__dataclass_fields__") else output


@dataclass
class Pair:
    """A model, and the network that it should be like."""

    model: hmf.HyperMask
    plain: nn.Module
    case: Case

    @classmethod
    def of(cls, case: Case, train: bool = False) -> "Pair":
        torch.manual_seed(0)
        net = case.build()
        if case.definition is None:
            plain = copy.deepcopy(net)
        else:
            plain = case.definition()
            plain.load_state_dict(net.state_dict())
        hypernetwork = hmf.HypernetConfig(embedding=6, hidden=(8,))
        model = hmf.HyperMask(net, 3, 30, hypernetwork, **case.settings)
        model.train(train), plain.train(train)
        return cls(model, plain, case)

    def inputs(self) -> tuple[tuple, dict[str, Any]]:
        torch.manual_seed(1)
        return self.case.args(), self.case.kwargs()

    def run(self, function: Callable, *leading: Any, **named: Any) -> Tensor:
        args, kwargs = self.inputs()
        torch.manual_seed(2)
        return joined(function(*leading, *args, **kwargs, **named))

    def defined(self, task: int) -> Tensor:
        """What the pass is by definition, with gradients to the model's parameters."""
        return self.run(lambda *a, **k: functional_call(self.plain, masked_state(self.model, task), a, k))

    def found(self, task: int) -> Tensor:
        return self.run(self.model, task=task)

    def parameters(self) -> list[nn.Parameter]:
        return [*self.model.weights(), *self.model.hypernet.parameters()]

    def gradients(self, y: Tensor) -> list[Tensor]:
        """Of the sum of squares of y, by backward, as checkpointing needs it."""
        for parameter in self.model.parameters():
            parameter.grad = None
        y.square().sum().backward()
        return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.parameters()]


def masked_state(model: hmf.HyperMask, task: int) -> dict[str, Tensor]:
    """Parameter name -> W * m, with gradients, multiplied in the mask's dtype; the output layer's bias as it is."""
    masks = model.mask(task).masks()
    return {
        segment.name: (weight.to(masks[segment.name].dtype) * masks[segment.name]).to(weight.dtype)
        if segment.selected
        else weight
        for segment, weight in zip(model.layout.segments, model.weights(), strict=True)
    }


# -- networks ---------------------------------------------------------------------------------------------------------


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


CASES = {
    "Linear": Case(perceptron, sequence),
    "subclass of Linear": Case(lambda: perceptron(Transposed(16, 8)), sequence),
    "extra Parameter on a Linear": Case(lambda: perceptron(with_extra()), sequence),
    "TransformerEncoderLayer": Case(encoder_layer, sequence),
    "TransformerEncoder": Case(lambda: nn.TransformerEncoder(encoder_layer(), 2), sequence),
    "Transformer": Case(transformer, lambda: sequence() * 2),
    "MultiheadAttention": Case(Attention, sequence),
    "MultiheadAttention, separate": Case(
        lambda: Attention(kdim=8, vdim=8, add_bias_kv=True), lambda: (*sequence(), *sequence(4, 5, 8))
    ),
    "attention pool": Case(AttentionPool, sequence),
    "LSTM": Case(lambda: Recurrent(nn.LSTM), words),
    "LSTM, projected": Case(lambda: Recurrent(nn.LSTM, proj_size=4), words),
    "GRU": Case(lambda: Recurrent(nn.GRU), words),
    "RNN": Case(lambda: Recurrent(nn.RNN), words),
    "LSTMCell": Case(lambda: Cell(nn.LSTMCell), sequence),
    "GRUCell": Case(lambda: Cell(nn.GRUCell), sequence),
    "RNNCell": Case(lambda: Cell(nn.RNNCell), sequence),
    "Conv1d": Case(
        lambda: nn.Sequential(
            nn.Conv1d(7, 8, 3), nn.ReLU(), nn.ConvTranspose1d(8, 4, 3), nn.Flatten(), nn.Linear(64, 3)
        ),
        sequence,
    ),
    "Conv2d": Case(
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3, padding="same", padding_mode="circular"), nn.ConvTranspose2d(8, 4, 3), nn.Flatten(),
            nn.Linear(784, 3),
        ),
        pictures,
    ),
    "Conv3d": Case(
        lambda: nn.Sequential(nn.Conv3d(1, 2, 3), nn.ConvTranspose3d(2, 2, 3)), lambda: (torch.randn(2, 1, 6, 6, 6),)
    ),
    "depthwise Conv2d": Case(
        lambda: nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), nn.Conv2d(6, 4, 1), nn.Flatten(), nn.Linear(400, 2)),
        pictures,
    ),
    "Bilinear": Case(Bilinear, lambda: sequence() * 2),
    "Embedding": Case(lambda: nn.Sequential(nn.Embedding(20, 8, max_norm=None), nn.Linear(8, 2)), words),
    "EmbeddingBag": Case(lambda: nn.Sequential(nn.EmbeddingBag(20, 8), nn.Linear(8, 2)), words),
    "head defined first": Case(HeadFirst, sequence),
    "tied": Case(TiedHead, words),
    "residual": Case(Residual, sequence),
    "weights read": Case(Functional, sequence),
    "weights read, Parameter": Case(Functional, sequence, settings={"include": ["fc.*", "scale", "out.*"]}),
    "ParameterList": Case(Listed, sequence, settings={"include": ["steps.*", "named.*", "out.*"]}),
    "BatchNorm2d": Case(lambda: after_convolution(nn.BatchNorm2d(4)), pictures),
    "subclass of BatchNorm2d": Case(lambda: after_convolution(Doubled(4)), pictures),
    "SyncBatchNorm": Case(lambda: after_convolution(nn.SyncBatchNorm(4)), pictures),
    "InstanceNorm2d": Case(
        lambda: after_convolution(nn.InstanceNorm2d(4, affine=True, track_running_stats=True)), pictures
    ),
    "GroupNorm": Case(lambda: after_convolution(nn.GroupNorm(2, 4)), pictures),
    "weight_norm": Case(lambda: perceptron(parametrizations.weight_norm(nn.Linear(16, 8))), sequence, copies=False),
    "spectral_norm": Case(
        lambda: perceptron(parametrizations.spectral_norm(nn.Linear(16, 8))), sequence, copies=False
    ),
    "prune": Case(lambda: perceptron(pruned()), sequence, definition=lambda: perceptron(pruned()), copies=False),
    "mixed dtypes": Case(Cast, sequence),
    "two heads, a tuple": Case(lambda: TwoHeads(as_pair), sequence),
    "two heads, a named tuple": Case(lambda: TwoHeads(Two), sequence),
    "two heads, a dict": Case(lambda: TwoHeads(as_dict), sequence),
    "two heads, a dataclass": Case(lambda: TwoHeads(Fields), sequence),
    "keyword inputs": Case(lambda: TwoHeads(as_dict), sequence, lambda: {"scale": torch.randn(4, 1, 1)}),
    "only keyword inputs": Case(HeadFirst, tuple, lambda: {"x": sequence()[0]}),
    **{
        f"checkpoint, {'reentrant' if reentrant else 'not reentrant'}, {'all' if everything else 'a block'}": Case(
            lambda reentrant=reentrant, everything=everything: Checkpointed(reentrant, everything),
            lambda: (sequence()[0].requires_grad_(),),
            definition=lambda: Checkpointed(None),
            settings={"heads": "out"},
        )
        for reentrant in (False, True)
        for everything in (False, True)
    },
}  # fmt: skip
