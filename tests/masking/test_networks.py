"""Every kind of module and network: its passes, gradients, exports and copies agree with W * m by functional_call."""

import copy
import pickle

import pytest
import torch
from support.module_kinds import CASES, Case, Pair
from support.tolerances import assert_all_close, assert_close

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
TASK = 1


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@each_case
def test_forward_and_every_gradient(case: Case, train: bool):
    pair = Pair.of(case, train)
    found, expected = pair.found(TASK), pair.defined(TASK)
    assert_close(found, expected, "network")
    assert_all_close(pair.gradients(found), pair.gradients(expected), "network", "gradient")


@each_case
def test_without_gradients(case: Case):
    """Where networks take fast paths of their own."""
    pair = Pair.of(case)
    with torch.no_grad():
        assert_close(pair.found(TASK), pair.defined(TASK), "network")
    with torch.inference_mode():
        assert_close(pair.found(TASK), pair.defined(TASK), "network", "inference mode")


@each_case
def test_export(case: Case):
    """The exported network, and a fresh one that its state_dict is loaded into."""
    pair = Pair.of(case)
    with torch.no_grad():
        pair.found(TASK)
        expected, plain = pair.defined(TASK), pair.model.export(TASK)
        assert {type(module) for module in plain.modules()} == {type(module) for module in pair.plain.modules()}
        assert_close(pair.run(plain), expected, "network")
        fresh = case.build().eval()
        fresh.load_state_dict(plain.state_dict())
        assert_close(pair.run(fresh), expected, "network", "state_dict")


@each_case
def test_copies(case: Case):
    pair = Pair.of(case)
    with torch.no_grad():
        expected = pair.found(TASK)
        if not case.copies:
            pytest.skip("PyTorch can't copy it either")
        assert torch.equal(pair.run(copy.deepcopy(pair.model), task=TASK), expected)
        assert torch.equal(pair.run(pickle.loads(pickle.dumps(pair.model)), task=TASK), expected)


@each_case
def test_disabled_and_back(case: Case):
    """The plain network within the block; afterwards by `unconvert`, of its own classes."""
    pair = Pair.of(case)
    with torch.no_grad():
        pair.found(TASK)
        expected = pair.run(pair.plain)
        with pair.model.disabled():
            assert_close(pair.run(pair.model.net), expected, "network")
        net = pair.model.unconvert()
        assert [type(module) for module in net.modules()] == [type(module) for module in pair.plain.modules()]
        assert_close(pair.run(net), expected, "network")


@each_case
def test_use_task(case: Case):
    pair = Pair.of(case)
    with torch.no_grad(), pair.model.use_task(TASK):
        assert_close(pair.run(pair.model.net), pair.defined(TASK), "network")
