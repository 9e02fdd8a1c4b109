"""Whose bias is the output layer's, and what a pass checks of the network first."""

import pytest
import torch
from support.networks import TiedHead
from torch import nn
from torch.utils.checkpoint import checkpoint

import hypermask_fast as hmf
from hypermask_fast import InputError


class HeadFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.head, self.body = nn.Linear(8, 3), nn.Linear(4, 8)

    def forward(self, x):
        return self.head(self.body(x).relu())


class TwoHeads(HeadFirst):
    def __init__(self):
        super().__init__()
        self.other = nn.Linear(8, 2)

    def forward(self, x):
        hidden = self.body(x).relu()
        return {"a": self.head(hidden).softmax(-1), "b": self.other(hidden)}


class Hidden(HeadFirst):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=True)


def encoder():
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


def used_as_they_are(model):
    return [segment.name for segment in model.layout.segments if not segment.selected]


@pytest.mark.parametrize(
    ("net", "x", "names"),
    [
        (HeadFirst, torch.randn(5, 4), ["head.bias"]),
        (TwoHeads, torch.randn(5, 4), ["head.bias", "other.bias"]),
        (TiedHead, torch.arange(5)[:, None], ["head.bias"]),
        (encoder, torch.randn(5, 3, 4), ["layers.1.linear2.bias"]),  # residual branches before it are none
    ],
)
@pytest.mark.parametrize("gradients", [True, False])
def test_output_layers_are_found_by_the_first_pass(net, x, names, gradients):
    model = hmf.HyperMask(net(), 2, 40)
    with torch.set_grad_enabled(gradients):
        model(x, 1)
    assert used_as_they_are(model) == names


def test_output_layers_can_be_named():
    assert used_as_they_are(hmf.HyperMask(TwoHeads(), 2, heads=["head", "oth*"])) == ["head.bias", "other.bias"]
    with pytest.raises(InputError, match="heads pattern 'tail' matches no layer; there are head, body"):
        hmf.HyperMask(HeadFirst(), 2, heads="tail")


def test_where_it_can_t_be_seen_it_has_to_be_named():
    x = torch.randn(5, 4, requires_grad=True)
    with pytest.raises(InputError, match="name it at construction, heads='...'"):
        hmf.HyperMask(Hidden(), 2)(x, 0)
    hmf.HyperMask(Hidden(), 2, heads="head")(x, 0)


def test_a_mask_made_before_is_refused_once():
    model, x = hmf.HyperMask(HeadFirst(), 2, 40), torch.randn(5, 4)
    mask = model.mask(1)
    with pytest.raises(InputError, match=r"the output layer's bias is head\.bias, as this first pass shows"):
        model(x, mask)
    torch.testing.assert_close(model(x, model.mask(1)), model(x, 1))


@pytest.mark.parametrize("way", ["replaced", "weight_norm", "removed"])
def test_a_layer_exchanged_after_construction_is_refused(way):
    model, x = hmf.HyperMask(HeadFirst(), 2, 40), torch.randn(5, 4)
    model(x, 0)
    if way == "replaced":
        model.net.head = nn.Linear(8, 3)
    elif way == "weight_norm":
        nn.utils.parametrizations.weight_norm(model.net.head)
    else:
        model.net.head.weight = None
    for call in (
        lambda: model(x, 0),
        lambda: model.forward_all_tasks(x),
        lambda: model(x, torch.tensor([0, 1, 0, 1, 0])),
    ):
        with pytest.raises(InputError, match="has been replaced since the model was made"):
            call()


class Idle(HeadFirst):
    """Has a layer that it does not use."""

    def __init__(self):
        super().__init__()
        self.idle = nn.Linear(4, 4)


def test_what_the_first_pass_did_not_read_is_said_once(recwarn):
    model, x = hmf.HyperMask(Idle(), 2), torch.randn(5, 4)
    with pytest.warns(UserWarning, match=r"did not use these masked parameters: idle\.weight, idle\.bias"):
        model(x, 0)
    recwarn.clear()
    model(x, 1)
    assert not recwarn.list


class Clamps(HeadFirst):
    """Changes its parameters as it runs, also those that have no gradient."""

    def __init__(self):
        super().__init__()
        self.steps = nn.Parameter(torch.zeros((), dtype=torch.int64), requires_grad=False)

    def forward(self, x):
        self.body.weight.data.clamp_(-0.01, 0.01)
        self.steps.data += 1
        return super().forward(x)


def test_finding_the_output_layer_leaves_the_parameters_as_they_were():
    model = hmf.HyperMask(Clamps(), 2, 40)
    before = {name: value.clone() for name, value in model.net.state_dict().items()}
    assert model.output_layers((torch.randn(5, 4),), {}) == ["head"]
    for name, value in model.net.state_dict().items():
        assert torch.equal(value, before[name]), name
