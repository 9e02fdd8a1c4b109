"""What passes the gate, and by how much a result is wrong."""

import pytest
import torch

from bench import gate
from bench.op_run import uniform


def errors_of(tensor, changed):
    verdict = gate.compare({"a": gate.sketch("a", tensor)}, {"a": gate.sketch("a", changed)}, lambda name: 1e-3)
    return verdict.worst * 1e-3


def test_sketch_measures_an_error_wherever_it_sits():
    tensor = uniform(300_001)
    assert errors_of(tensor, tensor) == 0
    spread = tensor * (1 + 1e-2 * uniform(300_001, seed=3).sign())
    assert 0.005 < errors_of(tensor, spread) < 0.02
    single = tensor.clone()
    single[-1] += 0.05 * tensor.norm()
    assert 0.02 < errors_of(tensor, single) < 0.1
    swapped = tensor.clone()
    swapped[[0, 200_000]] = tensor[[200_000, 0]]
    assert errors_of(tensor, swapped) > 1e-4


@pytest.mark.parametrize("wrong", [{}, {"a": torch.zeros(3)}, {"a": torch.full((4,), float("nan"))}])
def test_gate_refuses_what_is_missing_misshapen_or_not_a_number(wrong):
    expected = gate.sketches({"a": torch.ones(4)})
    verdict = gate.compare(expected, gate.sketches(wrong), lambda name: 1e-3)
    assert not verdict.ok and "a" in verdict.reason
    assert not gate.compare({}, {}, lambda name: 1e-3).ok


def test_a_tolerance_of_0_is_for_what_is_exact():
    counts, others = (gate.sketches({"a": torch.tensor(values)}) for values in ([3, 4], [3, 5]))
    assert gate.compare(counts, counts, lambda name: 0.0).ok
    assert "a is off" in gate.compare(counts, others, lambda name: 0.0).reason
