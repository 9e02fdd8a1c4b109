"""The hypernetwork's trunk: a call of the extension each way, whose numbers are the layers'."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from support.backends import EXTENSION
from support.tolerances import assert_close
from torch.library import opcheck

import hypermask_fast as hmf
from hypermask_fast import trunk

pytestmark = pytest.mark.native


def drawn(tasks=5, widths=(128, 25, 25), dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(widths[0], generator=generator, dtype=dtype) for _ in range(tasks)]
    layers = [
        (torch.randn(b, a, generator=generator, dtype=dtype) / a**0.5, torch.randn(b, generator=generator, dtype=dtype))
        for a, b in pairwise(widths)
    ]
    for tensor in (*rows, *(t for layer in layers for t in layer)):
        tensor.requires_grad_()
    return rows, layers


def flat(rows, layers):
    return [*rows, *(tensor for layer in layers for tensor in layer)]


def definition(rows, layers):
    hidden = torch.stack(rows)
    for weight, bias in layers:
        hidden = F.elu(F.linear(hidden, weight, bias))
    return hidden


def in_double(rows, layers):
    def double(tensor):
        return tensor.detach().double().requires_grad_()

    return [double(row) for row in rows], [(double(weight), double(bias)) for weight, bias in layers]


@pytest.mark.parametrize("widths", [(128, 25, 25), (24, 100, 100), (7, 5), (3, 2, 17, 3)], ids=str)
@pytest.mark.parametrize("tasks", [1, 5, 64])
def test_values_and_gradients(tasks, widths):
    given, exact = drawn(tasks, widths), in_double(*drawn(tasks, widths))
    grad = torch.randn(tasks, widths[-1], generator=torch.Generator().manual_seed(1))
    found, expected = trunk.trunk(*given), definition(*exact)
    assert "_Trunk" in found.grad_fn.name()
    assert_close(found, expected, "sum", "outputs")
    gradients = torch.autograd.grad(found, flat(*given), grad)
    exact_ones = torch.autograd.grad(expected, flat(*exact), grad.double())
    assert_close(torch.stack(gradients[:tasks]), torch.stack(exact_ones[:tasks]), "sum", "embeddings")
    for a, b in zip(gradients[tasks:], exact_ones[tasks:], strict=True):
        assert_close(a, b, "sum", "gradient")


def test_a_task_is_the_same_bits_alone_and_from_any_number_of_threads():
    rows, layers = drawn(5)
    together, threads = trunk.trunk(rows, layers), torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for number, row in enumerate(rows):
                assert torch.equal(trunk.trunk([row], layers)[0], together[number])
    finally:
        torch.set_num_threads(threads)


def test_not_finite():
    rows, layers = drawn(3, (4, 2))
    with torch.no_grad():
        rows[0][1], rows[1][2] = float("nan"), float("inf")
        found = trunk.trunk(rows, layers)
    assert torch.equal(found.isnan(), definition(rows, layers).isnan()) and found[2].isfinite().all()


def test_differentiated_twice():
    given, exact = drawn(3, (7, 5, 4)), in_double(*drawn(3, (7, 5, 4)))

    def twice(make, rows, layers):
        once = torch.autograd.grad(make(rows, layers).square().sum(), flat(rows, layers), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in once), flat(rows, layers))

    for a, b in zip(twice(trunk.trunk, *given), twice(definition, *exact), strict=True):
        assert_close(a, b, "network", "second gradient")


@pytest.mark.parametrize("what", ["float64", "many rows", "by name", "strides"])
def test_who_is_served_otherwise(what):
    rows, layers = drawn(
        65 if what == "many rows" else 3, (8, 5), torch.float64 if what == "float64" else torch.float32
    )
    if what == "strides":
        layers[0] = (layers[0][0].detach().t().contiguous().t().requires_grad_(), layers[0][1])
    with hmf.use_backend("reference" if what == "by name" else "auto"):
        found = trunk.trunk(rows, layers)
    assert "_Trunk" not in found.grad_fn.name()
    assert_close(found, definition(*in_double(rows, layers)), "sum")


def test_a_steps_output_layer_is_one_node_with_the_trunk():
    """The output layer's node is given the embeddings and the trunk's parameters themselves."""
    model = hmf.HyperMask(torch.nn.Linear(6, 2), 3, 30, hmf.HypernetConfig(4, (5,)))
    model.begin_task(2)
    for settings in ({}, {"step_in_backward": True}):
        optimizer = hmf.optim.Adam(model, **settings)
        optimizer.zero_grad()
        node = model.mask(2).logits.grad_fn
        leaves = [function.variable for function, _ in node.next_functions if hasattr(function, "variable")]
        expected = [*model.hypernet.embeddings, *model.hypernet.trunk.parameters(), *model.hypernet.output.parameters()]
        assert {*map(id, leaves)} == {*map(id, expected)}


def test_opcheck():
    rows, layers = drawn(2, (3, 4))
    rows, layers = [r.detach() for r in rows], [t.detach() for layer in layers for t in layer]
    kept = EXTENSION.trunk(rows, layers)
    opcheck(EXTENSION.trunk.default, (rows, layers))
    opcheck(EXTENSION.trunk_backward.default, (torch.randn(2, 4), kept, rows, layers))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda rows, layers: ([], layers), "there must be an embedding"),
        (lambda rows, layers: (rows, layers[:1]), "layers must be weights and biases in turn"),
        (lambda rows, layers: ([rows[0], rows[1][:2]], layers), r"embeddings must have shape \(3\), not \(2\)"),
        (lambda rows, layers: (rows, [layers[0][:, :2].contiguous(), layers[1]]), r"a weight must have shape \(4, 3\)"),
        (lambda rows, layers: (rows, [layers[0].double(), layers[1]]), "a weight must be float32"),
    ],
)
def test_what_does_not_fit_is_refused(change, told):
    rows, layers = drawn(2, (3, 4))
    with pytest.raises(RuntimeError, match=f"trunk: {told}"):
        EXTENSION.trunk(*change([r.detach() for r in rows], [t.detach() for layer in layers for t in layer]))
