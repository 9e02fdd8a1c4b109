"""A backend asked for by argument, for one call, and by a block or the environment, for all ops that it has."""

import pytest
import torch
from support import internals
from support.arguments import valid
from support.networks import blob_model

import hypermask_fast as hmf
from hypermask_fast import InputError, ops
from hypermask_fast.ops import reference

LOGITS = torch.tensor([0.1, -0.4, 0.3, 2.0])
TASKS = torch.tensor([[[1.0, 1.0]], [[5.0, 1.0]]])  # the second is sure


@pytest.mark.native
def test_a_block_means_the_ops_that_the_backend_has():
    with hmf.use_backend("cpu"):
        assert ops.entropy_select(TASKS).item() == 1  # the cpu has none: chosen automatically
        assert hmf.explain("entropy_select", TASKS).startswith(
            "entropy_select: reference (chosen automatically: cpu has no entropy_select)"
        )
        with pytest.raises(InputError, match="backend 'cpu' can't run semi_binary_mask: cpu computes in float32"):
            ops.semi_binary_mask(LOGITS.double(), LOGITS[0].double())
        assert hmf.explain("semi_binary_mask", LOGITS, LOGITS[0]) == "semi_binary_mask: cpu (asked for)"


@pytest.mark.native
def test_an_argument_is_strict():
    for scope in ("auto", "cpu"):
        with hmf.use_backend(scope), pytest.raises(InputError, match="cpu has no entropy_select"):
            ops.entropy_select(TASKS, backend="cpu")
    assert "nothing (asked for)" in hmf.explain("entropy_select", TASKS, backend="cpu")


@pytest.mark.native
def test_the_environment_asks_like_a_block(monkeypatch):
    internals.environment_asks_for(monkeypatch, "cpu")
    assert ops.entropy_select(TASKS).item() == 1
    with pytest.raises(InputError, match="computes in float32"):
        ops.semi_binary_mask(LOGITS.double(), LOGITS[0].double())


def test_a_backend_that_is_not_there_serves_nothing(monkeypatch):
    """Nor are the ops that it would not have chosen silently."""
    internals.missing(monkeypatch, cuda="no CUDA device")
    with hmf.use_backend("cuda"), pytest.raises(InputError, match="no CUDA device"):
        ops.entropy_select(TASKS)


@pytest.mark.native
def test_a_whole_model_on_the_cpu():
    """Also where the backend has no op, and where several rows are a matrix product."""
    model, x, tasks = blob_model(3).eval(), torch.randn(6, 8), torch.tensor([0, 2, 1, 1, 0, 2])
    expected = model.forward_all_tasks(x), model(x, tasks), model.regularizer(1)
    with hmf.use_backend("cpu"):
        found = model.forward_all_tasks(x), model(x, tasks), model.regularizer(1)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_reference_alone():
    model, x = blob_model(2).eval(), torch.randn(4, 8)
    expected = model.forward_all_tasks(x)
    with hmf.use_backend("reference"):
        chosen = {name: op.choose(**valid(name)) for name, op in ops.OPS.items()}
        assert all(c.backend == "reference" and c.function is ops.OPS[name].definition for name, c in chosen.items())
        torch.testing.assert_close(model.forward_all_tasks(x), expected)
        assert torch.equal(ops.semi_binary_mask(LOGITS, LOGITS[0]), reference.semi_binary_mask(LOGITS, LOGITS[0]))
