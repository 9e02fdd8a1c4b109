"""The same bits from any number of threads, and the same numbers from every instruction set of the CPU."""

import pytest
import torch
from support.backends import ISAS, instruction_set

pytestmark = pytest.mark.native


def large_results(cpu):
    """Results of every op at a size that is cut into many parts."""
    torch.manual_seed(3)
    size, rows, width, tasks = 150_001, 9001, 37, 5
    logits, w, g = torch.randn(size, requires_grad=True), torch.randn(size, requires_grad=True), torch.randn(size)
    offsets = [0, 100_000, size]
    thresholds = cpu.mask_thresholds(logits, offsets, torch.tensor([30_000, 20_000]))
    masked = cpu.masked_weights([w[:100_000], w[100_000:]], logits, thresholds, offsets)
    drift = cpu.weight_drift([w[:100_000], w[100_000:]], g, offsets, 1, logits, thresholds)
    both, drift_too = cpu.masked_weights_drift([w[:100_000], w[100_000:]], logits, thresholds, offsets, g, 2)
    (sum((m * m).sum() for m in (*masked, *both)) + drift + drift_too).backward()
    state = [torch.randn(rows, width), torch.randn(rows), *(torch.rand(s) for s in [(rows, width)] * 2 + [(rows,)] * 2)]
    hidden, targets = torch.randn(tasks + 1, width), torch.randn(tasks, rows)
    one = torch.tensor(1.0)
    value = cpu.output_drift(hidden[:-1, None], *state[:2], targets)
    logits_now = cpu.hypernet_logits(hidden[:1, None], *state[:2], rows)
    results = cpu.hypernet_adam(hidden, torch.randn(rows), targets, one, *state, one, one * 1e-3)
    return [thresholds, *masked, drift, drift_too, logits.grad, w.grad, value, logits_now, *results, *state]


def test_any_number_of_threads_gives_the_same_bits(cpu, isa):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = large_results(cpu)
        for threads in (2, 3, 4):
            torch.set_num_threads(threads)
            for repeat in range(3):
                for i, (x, y) in enumerate(zip(large_results(cpu), expected, strict=True)):
                    assert torch.equal(x, y), f"result {i} with {threads} threads, repeat {repeat}"
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("other", ISAS[1:])
def test_instruction_sets_agree(cpu, other):
    with instruction_set("baseline"):
        expected = large_results(cpu)
    with instruction_set(other):
        found = large_results(cpu)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5 * y.detach().abs().max().item())
