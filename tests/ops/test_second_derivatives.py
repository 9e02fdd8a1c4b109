"""A gradient that can't be differentiated again says so; nothing of a second derivative is silently left out."""

import pytest
import torch
from support.arguments import valid
from support.comparing import DEVICE
from support.networks import blob_model
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import hypermask_fast as hmf
from hypermask_fast import InputError, ops
from hypermask_fast.ops import registry

WITHOUT_GRADIENT = {
    "mask_thresholds",
    "mask_overlap",
    "entropy_select",
    "hypernet_adam",
    "output_residuals",
    "hidden_gradient",
    "factored_adam",
}
CONSTANT = {"threshold", "thresholds", "previous", "targets", "old_hidden", "old_weight", "old_bias"}
DIFFERENTIABLE = sorted(set(ops.OPS) - WITHOUT_GRADIENT)


def called(op: str, backend: str):
    """The op as a function of its differentiable arguments, float32, and these arguments."""
    device = DEVICE if backend == "triton" else "cpu"
    torch.manual_seed(0)
    values = valid(op, device)
    chosen: dict[str, list[Tensor]] = {}
    for name, value in values.items():
        tensors = value if isinstance(value, list) else [value]
        if name in CONSTANT or not all(isinstance(t, Tensor) and t.is_floating_point() for t in tensors):
            continue
        if tensors:
            chosen[name] = [t.detach().clone() for t in tensors]

    def function(*leaves: Tensor) -> Tensor:
        waiting, given = iter(leaves), dict(values)
        for name, tensors in chosen.items():
            mine = [next(waiting) for _ in tensors]
            given[name] = mine if isinstance(values[name], list) else mine[0]
        y = getattr(ops, op)(**given, backend=backend)
        return sum((t.square().sum() for t in tree_leaves(y)), torch.zeros((), device=device))

    return function, [t for tensors in chosen.values() for t in tensors]


def second(op: str, backend: str) -> list[Tensor | None]:
    """Gradients of the squares of all gradients."""
    function, leaves = called(op, backend)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    loss = function(*leaves)
    first = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
    total = sum(g.square().sum() for g in first if g is not None)
    return [*torch.autograd.grad(total, leaves, allow_unused=True)]


@pytest.mark.parametrize("backend", ["cpu", "plain", "triton"])
@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_second_derivatives_are_right_or_refused(op, backend):
    if problem := registry.problem(backend):
        pytest.skip(problem)
    try:
        called(op, backend)[0](*called(op, backend)[1])
    except InputError as error:
        pytest.skip(str(error))
    expected = second(op, "reference")
    try:
        found = second(op, backend)
    except InputError as error:
        assert "no second derivative here: " in str(error) and "\n" not in str(error)
        return
    for a, b in zip(found, expected, strict=True):
        a, b = (torch.zeros(()) if t is None else t.detach().cpu() for t in (a, b))
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


@pytest.mark.native
@pytest.mark.parametrize("loss", ["sum", "square"])
def test_whatever_the_gradient_depends_on_is_followed(loss):
    """With a sum as the loss its gradient is a constant, and d loss / da still depends on W."""
    weight, logits = torch.randn(3, 4, requires_grad=True), torch.randn(12, requires_grad=True)
    y = ops.masked_weights([weight], logits, torch.tensor([0.1]), [0, 12], backend="cpu")[0]
    (of_logits,) = torch.autograd.grad(y.sum() if loss == "sum" else y.square().sum(), logits, create_graph=True)
    with pytest.raises(InputError, match="masked_weights has no second derivative here"):
        (of_logits.sum() + weight.sum()).backward()


@pytest.mark.native
def test_first_derivatives_are_the_same_where_a_graph_of_them_is_made():
    weight, logits, limits = torch.randn(3, 4), torch.randn(12), torch.tensor([0.1])

    def loss(w, a, backend):
        return ops.masked_weights([w], a, limits, [0, 12], backend=backend)[0].square().sum()

    gradients = {}
    for backend in ("cpu", "reference"):
        leaves = weight.clone().requires_grad_(), logits.clone().requires_grad_()
        gradients[backend] = torch.autograd.grad(loss(*leaves, backend), leaves, create_graph=True)
    for a, b in zip(*gradients.values(), strict=True):
        assert torch.allclose(a, b)


@pytest.mark.native
def test_a_checkpoint_gives_saved_tensors_once():
    weight, logits = torch.randn(3, 4, requires_grad=True), torch.randn(12, requires_grad=True)

    def op(w, a):
        return ops.masked_weights([w], a, torch.tensor([0.1]), [0, 12], backend="cpu")[0]

    kept = torch.autograd.grad(op(weight, logits).square().sum(), (weight, logits), create_graph=True)
    y = checkpoint(op, weight, logits, use_reentrant=False)
    again = torch.autograd.grad(y.square().sum(), (weight, logits), create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


@pytest.mark.native
def test_a_gradient_penalty_through_a_model():
    model, x = blob_model().eval(), torch.randn(4, 8)
    parameters = [*model.hypernet.parameters()]

    def penalty() -> Tensor:
        first = torch.autograd.grad(model(x, 1).square().sum(), parameters, create_graph=True, allow_unused=True)
        return sum((g.square().sum() for g in first if g is not None), torch.zeros(()))

    with pytest.raises(InputError, match="no second derivative here"):
        penalty().backward()
    with hmf.use_backend("reference"):
        penalty().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in parameters)


def test_the_one_pass_step_is_refused_twice():
    model, x = blob_model(), torch.randn(4, 8)
    optimizer = hmf.optim.Adam(model, lr=1e-3)
    embedding = model.hypernet.embeddings[0]
    (first,) = torch.autograd.grad(model(x, 0).square().sum(), embedding, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        first.sum().backward()
    del optimizer
