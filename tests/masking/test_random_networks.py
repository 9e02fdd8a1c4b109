"""Networks drawn at random agree with `functional_call` of W * m: forward, every gradient, export, and their head."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.module_kinds import masked_state
from support.tolerances import assert_close
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import hypermask_fast as hmf

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
WIDTH, LENGTH, BATCH, WORDS = 8, 5, 3, 11


class Read(nn.Module):
    """A Linear whose weight is read, or transposed and copied, in place of a call of it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.fc, self.how = nn.Linear(WIDTH, WIDTH), how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "linear":
            return F.linear(x, self.fc.weight, self.fc.bias)
        return x @ self.fc.weight.t().contiguous() + self.fc.bias


class OverChannels(nn.Module):
    """A layer that takes (batch, channels, length)."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.transpose(1, 2)).transpose(1, 2)


class Recurrent(nn.Module):
    def __init__(self, kind: type, both: bool) -> None:
        super().__init__()
        width = WIDTH // 2 if both else WIDTH
        self.layer = kind(WIDTH, width, batch_first=True, bidirectional=both)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class Attention(nn.Module):
    def __init__(self, separate: bool) -> None:
        super().__init__()
        given = {"kdim": 2 * WIDTH, "vdim": 2 * WIDTH, "add_bias_kv": True} if separate else {}
        self.layer, self.separate = nn.MultiheadAttention(WIDTH, 2, batch_first=True, **given), separate

    def forward(self, x: Tensor) -> Tensor:
        keys = torch.cat([x, -x], -1) if self.separate else x
        return self.layer(x, keys, keys)[0]


class Around(nn.Module):
    """A residual connection, or a part that the backward pass computes again."""

    def __init__(self, how: str, *layers: nn.Module) -> None:
        super().__init__()
        self.how, self.layers = how, nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "residual":
            return x + self.layers(x)
        if self.how == "checkpoint" and torch.is_grad_enabled():
            return checkpoint(self.layers, x, use_reentrant=False)
        return self.layers(x)


class Network(nn.Module):
    """An embedding, a drawn body and a head, defined in a drawn order; the head may share the embedding's weight."""

    def __init__(self, body: nn.Module, head_first: bool, tied: bool, end: str) -> None:
        super().__init__()
        classes = WORDS if tied else 4
        if head_first:
            self.head = nn.Linear(WIDTH, classes)
        self.embedding, self.body, self.end = nn.Embedding(WORDS, WIDTH), body, end
        if not head_first:
            self.head = nn.Linear(WIDTH, classes)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        y = self.head(self.body(self.embedding(ids)))
        return {"logits": y, "softmax": y.softmax(-1), "pooled": y.mean(1)}[self.end]


PARTS = st.one_of(
    st.builds(lambda bias: nn.Linear(WIDTH, WIDTH, bias=bias), st.booleans()),
    st.builds(Read, st.sampled_from(["linear", "product"])),
    st.builds(
        lambda kind, groups: OverChannels(kind(WIDTH, WIDTH, 3, padding=1, groups=groups)),
        st.sampled_from([nn.Conv1d, nn.ConvTranspose1d]),
        st.sampled_from([1, WIDTH]),
    ),
    st.builds(Recurrent, st.sampled_from([nn.LSTM, nn.GRU, nn.RNN]), st.booleans()),
    st.builds(Attention, st.booleans()),
    st.builds(lambda: nn.LayerNorm(WIDTH)),
    st.builds(lambda: nn.RMSNorm(WIDTH)),
    st.builds(lambda track: OverChannels(nn.BatchNorm1d(WIDTH, track_running_stats=track)), st.booleans()),
    st.builds(lambda: OverChannels(nn.GroupNorm(2, WIDTH))),
    st.sampled_from([nn.ReLU, nn.Tanh, nn.GELU]).map(lambda kind: kind()),
    st.builds(lambda: nn.TransformerEncoderLayer(WIDTH, 2, 12, 0.0, batch_first=True)),
    st.builds(lambda: nn.Linear(WIDTH, WIDTH).requires_grad_(False)),
)
BODIES = st.recursive(
    PARTS,
    lambda inner: st.builds(
        lambda how, layers: Around(how, *layers),
        st.sampled_from(["residual", "nested", "checkpoint"]),
        st.lists(inner, min_size=1, max_size=3),
    ),
    max_leaves=5,
)


def tie_some(net: nn.Module, again: bool) -> None:
    """The first two square Linear layers share their weight, or are one layer in two places."""
    places = [
        (parent, name)
        for parent in net.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear and child.weight.shape == (WIDTH, WIDTH)
    ]
    if len(places) < 2:
        return
    (one, first), (other, second) = places[:2]
    if again:
        setattr(other, second, getattr(one, first))
    else:
        getattr(other, second).weight = getattr(one, first).weight


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    body=BODIES,
    head_first=st.booleans(),
    tied=st.booleans(),
    end=st.sampled_from(["logits", "softmax", "pooled"]),
    tie=st.sampled_from(["no", "weight", "layer"]),
    train=st.booleans(),
    rule=st.sampled_from([{}, {"exclude": "embedding.*"}, {"include": ["*weight*"]}, {"exclude": nn.LSTM}]),
    sparsity=st.sampled_from([0, 40, 90]),
)
def test_a_drawn_network(body, head_first, tied, end, tie, train, rule, sparsity):
    torch.manual_seed(0)
    net = Network(copy.deepcopy(body), head_first, tied, end)
    if tie != "no":
        tie_some(net.body, tie == "layer")
    plain, fresh, ids = copy.deepcopy(net), copy.deepcopy(net), torch.randint(WORDS, (BATCH, LENGTH))
    for module in plain.modules():
        if isinstance(module, Around) and module.how == "checkpoint":
            module.how = "nested"  # computed again after functional_call, it would see the unmasked parameters
    if rule == {"exclude": nn.LSTM} and not any(isinstance(module, nn.LSTM) for module in net.modules()):
        rule = {}
    if rule == {"exclude": "embedding.*"} and tied:
        rule = {}
    model = hmf.HyperMask(net, 2, sparsity, hmf.HypernetConfig(3, (4,)), **rule)
    model.train(train), plain.train(train)
    model._check_network((ids,), {})  # finds the output layer
    unselected = [segment.name for segment in model.layout.segments if not segment.selected]
    assert unselected == ([] if "include" in rule else ["head.bias"])
    found, expected = model(ids, 1), functional_call(plain, masked_state(model, 1), (ids,))
    assert_close(found, expected, "network")
    parameters = [p for p in (*model.weights(), *model.hypernet.parameters()) if p.requires_grad]
    gradients = [
        torch.autograd.grad(y.square().sum(), parameters, allow_unused=True, materialize_grads=True)
        for y in (found, expected)
    ]
    flat = [torch.cat([gradient.flatten() for gradient in of_all]) for of_all in gradients]
    assert_close(flat[0], flat[1], "network", "gradient")
    with torch.no_grad():
        exported = model.eval().export(1)
        assert_close(exported(ids), model(ids, 1), "network", "export")
        fresh.eval().load_state_dict(exported.state_dict())
        assert_close(fresh(ids), model(ids, 1), "network", "state_dict")
