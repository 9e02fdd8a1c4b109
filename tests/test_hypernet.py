"""Hypernetworks against their formula, and growing while training."""

import pytest
import torch
import torch.nn.functional as F

from hypermask_fast import HypernetConfig, InputError, few_rows


@pytest.mark.parametrize("tasks", [[1], [2, 0], torch.tensor([2, 0])], ids=["one", "two", "tensor"])
@pytest.mark.parametrize(("size", "chunk_size"), [(20, None), (20, 7), (20, 5), (20, 50)])
def test_formula(size, chunk_size, tasks):
    torch.manual_seed(0)
    net = HypernetConfig(4, (6, 5), chunk_size, 3).build(size, 3).double()
    logits = net(tasks)
    assert logits.shape == (len(tasks), size)
    for row, task in zip(logits, tasks, strict=True):
        pieces = []
        for chunk in getattr(net, "chunk_embeddings", [torch.empty(0, dtype=torch.float64)]):
            h = torch.cat([chunk, net.embeddings[int(task)]])  # the chunk's embedding first
            for layer in net.trunk:
                h = F.elu(layer.weight @ h + layer.bias)
            pieces.append(net.output.weight @ h + net.output.bias)
        torch.testing.assert_close(row, torch.cat(pieces)[:size])


@pytest.mark.parametrize("chunk_size", [None, 7])
def test_add_task_leaves_a_running_optimiser_alone(chunk_size):
    torch.manual_seed(0)
    net = HypernetConfig(4, (6,), chunk_size).build(20, 2)
    optimizer = torch.optim.Adam(net.parameters())
    net([0, 1]).sum().backward()
    optimizer.step()
    before = [parameter.clone() for parameter in net.parameters()]
    new = net.add_task()
    optimizer.add_param_group({"params": [new]})
    assert net.num_tasks == 3
    optimizer.zero_grad()
    net([0, 2]).square().sum().backward()
    optimizer.step()
    old = [parameter for parameter in net.parameters() if parameter is not new]
    still = [b is net.embeddings[1] for a, b in zip(before, old, strict=True) if torch.equal(a, b)]
    assert still == [True]  # all that the loss depends on has moved, by the moments it had
    assert optimizer.state[new]["step"] == 1 and optimizer.state[net.output.weight]["step"] == 2


@pytest.mark.parametrize(
    "settings",
    [{"embedding": 0}, {"hidden": ()}, {"hidden": (4, -1)}, {"chunk_size": 0}, {"chunk_embedding": 1.5}],
)
def test_bad_shapes(settings):
    with pytest.raises(InputError, match="hypernetwork"):
        HypernetConfig(**settings)


def test_bad_number_of_tasks():
    with pytest.raises(InputError, match="num_tasks must be a whole number, 1 or more, not 0"):
        HypernetConfig().build(10, 0)


def test_a_trunk_of_few_rows_is_one_node_with_the_numbers_of_its_layers():
    """Forward, backward, and differentiated twice: to the bit as layer by layer."""
    torch.manual_seed(0)
    layers = [tuple(torch.randn(*size, requires_grad=True) for size in ((b, a), (b,))) for a, b in ((7, 5), (5, 4))]
    x = torch.randn(3, 7, requires_grad=True)
    leaves, grad = [x, *(tensor for layer in layers for tensor in layer)], torch.randn(3, 4)

    def by_layers():
        hidden = x
        for weight, bias in layers:
            hidden = torch.nn.functional.elu(few_rows.linear(hidden, weight, bias))
        return hidden

    def one():
        return few_rows.mlp(x, layers)

    def gradients(make, asked):
        return torch.autograd.grad(make(), asked, grad)

    def twice(make):
        once = torch.autograd.grad(make(), leaves, grad, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in once), leaves)

    assert torch.equal(one(), by_layers())
    assert (
        "Mlp" in one().grad_fn.name() and one().grad_fn.next_functions[0][0].name() == "torch::autograd::AccumulateGrad"
    )
    for asked in (leaves, leaves[1:2]):
        assert all(map(torch.equal, gradients(one, asked), gradients(by_layers, asked)))
    assert all(map(torch.equal, twice(one), twice(by_layers)))
    x.requires_grad_(False)
    frozen, leaves = leaves[1], leaves[2:]
    frozen.requires_grad_(False)
    assert all(map(torch.equal, twice(one), twice(by_layers)))
