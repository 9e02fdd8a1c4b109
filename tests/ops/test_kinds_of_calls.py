"""What is remembered of a kind of call serves only calls of this kind: any other call in between is as if it were the
first one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import internals
from support.arguments import valid
from torch import Tensor

import hypermask_fast as hmf
from hypermask_fast import ops
from hypermask_fast.ops import registry

CONSTANT = {"threshold", "thresholds", "previous", "targets", "old_hidden", "old_weight", "old_bias"}
STEPPING = {"hypernet_adam", "factored_adam"}  # which change their arguments: see test_hypernet_adam
WITHOUT_GRADIENT = {"mask_thresholds", "mask_overlap", "entropy_select", "output_residuals", "hidden_gradient"}
EVERY = sorted(set(ops.OPS) - STEPPING)
DIFFERENTIABLE = sorted(set(EVERY) - WITHOUT_GRADIENT)
Change = Callable[[Tensor], Tensor]


def mapped(change: Change, values: dict[str, Any], names: set[str] | None = None) -> dict[str, Any]:
    """`change` of every tensor of floats, of the arguments of these names or of all."""

    def of(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(of(v) for v in value) if not hasattr(value, "_fields") else value
        return change(value) if isinstance(value, Tensor) and value.is_floating_point() else value

    return {name: of(value) if names is None or name in names else value for name, value in values.items()}


def leaves(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    return [t for v in values for t in leaves(v)] if isinstance(values, list | tuple) else []


def strided(tensor: Tensor) -> Tensor:
    """The same numbers with gaps between them."""
    if tensor.dim() == 0:
        return tensor
    return torch.stack([tensor, tensor + 1], dim=-1)[..., 0]


def asking(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


def gradients(op: Callable[..., Any], values: dict[str, Any]) -> tuple[list[Tensor], list[Tensor | None]]:
    """Results, and the gradients of their squares with respect to whatever asks for one and may have one."""
    results = leaves(op(**values))
    asked = [t for name, value in values.items() if name not in CONSTANT for t in leaves(value) if t.requires_grad]
    recorded = [y for y in results if y.requires_grad]
    if not recorded:
        return results, [None] * len(asked)
    total = sum((y.square().sum() for y in recorded), torch.zeros((), dtype=recorded[0].dtype))
    return results, [*torch.autograd.grad(total, asked, allow_unused=True)]


def assert_same(found: Any, wanted: Any) -> None:
    for a, b in zip(found, wanted, strict=True):
        if b is None or a is None:  # nobody's gradient is a gradient of 0
            assert (a is None or not a.any()) and (b is None or not b.any())
        else:
            torch.testing.assert_close(a.to(b.dtype), b, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", EVERY)
def test_every_kind_of_call_beside_the_others(name):
    """Contiguous or not, asking for gradients or not, within no_grad or inference_mode, in another dtype, of a class of
    its own: each twice, in turn, against the definition."""
    op, values = ops.OPS[name], valid(name)
    graded = mapped(asking, values, set(values) - CONSTANT)
    kinds = {
        "plain": values,
        "graded": graded,
        "thresholds too": mapped(asking, values),
        "strided": mapped(strided, values),
        "strided and graded": mapped(lambda t: strided(asking(t)), values),
        "double": mapped(lambda t: asking(t.double()), values),
        "expanded": mapped(lambda t: t[..., :1].expand(t.shape) if t.dim() else t, values),
    }
    for kind in [*kinds, *kinds]:
        wanted = gradients(op.definition, kinds[kind])
        for guard in (torch.no_grad, torch.inference_mode):
            with guard():
                results = leaves(op(**kinds[kind]))
            assert not any(y.requires_grad for y in results)
            assert_same(results, wanted[0])
        found = gradients(op, kinds[kind])
        for a, b in zip(found, wanted, strict=True):
            assert_same(a, b)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_threshold_that_asks_for_a_gradient_records_nothing(name):
    values = mapped(asking, valid(name), {"threshold", "thresholds"})
    for _ in range(2):
        assert not any(y.requires_grad for y in leaves(ops.OPS[name](**values)))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_autocast_is_a_kind_of_its_own(name, monkeypatch):
    """Within it every op gives what it gives there without a call before."""
    op, values = ops.OPS[name], valid(name)
    with torch.autocast("cpu", torch.bfloat16):
        internals.nothing_was_chosen(monkeypatch)
        wanted = leaves(op(**values))
        internals.nothing_was_chosen(monkeypatch)
    op(**values)
    op(**values)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            for a, b in zip(leaves(op(**values)), wanted, strict=True):
                assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_gradient_that_is_asked_for_later_is_there(name):
    """One tensor after the other asks for a gradient, in place, and no longer."""
    op, values = ops.OPS[name], mapped(lambda t: t.clone(), valid(name))
    tensors = [t for key, value in values.items() if key not in CONSTANT for t in leaves(value)]
    for tensor in [t for t in tensors if t.is_floating_point()]:
        op(**values)
        tensor.requires_grad_()
        found, wanted = gradients(op, values), gradients(op.definition, values)
        assert_same(found[1], wanted[1])
        assert (found[1][0] is None) == (wanted[1][0] is None)
        tensor.requires_grad_(False)
        assert not any(y.requires_grad for y in leaves(op(**values)))


@pytest.mark.parametrize("name", ["semi_binary_mask", "masked_linear", "hypernet_logits"])
def test_within_transforms_nothing_is_remembered(name):
    """Tensors of vmap and of torch.func.grad pass for ordinary ones of the shape and dtype of those called before."""
    op, values = ops.OPS[name], valid(name)
    first = next(iter(values))
    call = lambda x: op(**{**values, first: x})  # noqa: E731
    batch = torch.stack([values[first], values[first] + 1])
    call(batch[0])
    definition = lambda x: op.definition(**{**values, first: x})  # noqa: E731
    with hmf.use_backend("reference"):
        call(batch[0])
        torch.testing.assert_close(torch.func.vmap(call)(batch), torch.func.vmap(definition)(batch))
        wanted = torch.func.grad(lambda x: definition(x).square().sum())(batch[0])
        torch.testing.assert_close(torch.func.grad(lambda x: call(x).square().sum())(batch[0]), wanted)
    asked = []
    kind = op._kind
    torch.func.vmap(lambda x: (asked.append(kind(tuple({**values, first: x}.values()), None)), x)[1])(batch)
    assert asked == [None] and kind(tuple(values.values()), None) is not None


@pytest.mark.parametrize("name", ["entropy_select", "masked_linear", "masked_weights", "chunk_masked_linear"])
def test_a_kind_of_call_is_judged_once(name, monkeypatch):
    """Also where the definition serves it; another kind is judged for itself."""
    internals.nothing_was_chosen(monkeypatch)
    op, values, judged = ops.OPS[name], valid(name), []
    rule = op.rule
    monkeypatch.setattr(op, "rule", lambda *args: judged.append(name) or rule(*args))
    for _ in range(3):
        op(**values)
    assert len(judged) == 1
    op(**mapped(asking, values))
    assert len(judged) == 2
    with registry.use_backend("reference"):
        op(**values)
        op(**values)
    assert len(judged) == 3
