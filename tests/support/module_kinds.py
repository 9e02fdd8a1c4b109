"""A small network around every kind of module that can have masked parameters, and the definition of its pass.

The definition is `torch.func.functional_call` of the network as it was, with W * m in place of every masked W.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations
from torch.utils._pytree import tree_leaves

import hypermask_fast as hmf
from support.modules import (
    Attention,
    AttentionPool,
    Bilinear,
    Cast,
    Cell,
    Checkpointed,
    Doubled,
    Fields,
    Functional,
    HeadFirst,
    Listed,
    Recurrent,
    Residual,
    Transposed,
    Two,
    TwoHeads,
    after_convolution,
    as_dict,
    as_pair,
    encoder_layer,
    perceptron,
    pictures,
    pruned,
    sequence,
    transformer,
    with_extra,
    words,
)
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
