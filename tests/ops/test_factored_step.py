"""output_residuals, hidden_gradient and factored_adam: hypernet_adam's pass in two, by factors that the forward pass
keeps."""

import pytest
import torch
from support.backends import CPU, NATIVE, on
from support.comparing import NAN
from support.dense import SHAPES, dense_problem
from support.refusals import assert_refused, changed, each_change, whoever_is_asked
from support.tolerances import assert_close

from hypermask_fast import InputError, ops
from hypermask_fast.ops import reference

SIZES = [(shape, tasks) for shape in SHAPES for tasks in (0, 1, 4, 9)]
SIZES += [((101, 25), 4), ((3000, 100), 9), ((515, 64), 39)]
# from beta1 on
SETTINGS = {
    "plain": (0.9, 0.999, 1e-8, 0.0, False, False),
    "decay": (0.9, 0.999, 1e-8, 0.1, False, False),
    "AdamW": (0.8, 0.99, 1e-6, 0.1, True, False),
    "maximize": (0.9, 0.999, 1e-8, 0.1, False, True),
}
ONE = torch.tensor(1.0)


def double(tensors):
    return [t.double() for t in tensors]


def problem(rows, width, tasks):
    """factors, scales, hidden; weight and its moments."""
    weight, _, hidden, targets, moments = dense_problem(rows, width, tasks)
    factors, scales = torch.cat([targets, torch.randn(1, rows)]), 0.1 * torch.randn(tasks + 1)
    return [factors, scales, hidden], [weight, *moments[:2]]


def test_definitions_by_hand():
    hidden, weight, bias = torch.tensor([[1.0, 2], [0, 1]]), torch.tensor([[1.0, 0], [1, 1], [0, 2]]), torch.ones(3)
    residuals, drift = reference.output_residuals(hidden, weight, bias, torch.tensor([[2.0, 3, 4]]))
    assert residuals.tolist() == [[0, 1, 1], [1, 2, 3]] and drift == 2
    factors, scales = torch.tensor([[1.0, 2, 3], [0, 1, 0]]), torch.tensor([1.0, -2])
    grad_hidden, grad_bias = reference.hidden_gradient(factors, scales, weight)
    assert grad_hidden.tolist() == [[3, 8], [-2, -2]] and grad_bias.tolist() == [1, 0, 3]


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_step_is_torch_adams_on_the_product(settings):
    rest, state = problem(31, 7, 3)
    rest, state = double(rest), [t.double() for t in state]
    step, lr = torch.zeros((), dtype=torch.float64), torch.tensor(1e-2, dtype=torch.float64)
    layer = state[0].clone().requires_grad_()
    beta1, beta2, eps, decay, decoupled, maximize = SETTINGS[settings]
    theirs = torch.optim.Adam(
        [layer], 1e-2, (beta1, beta2), eps, decay, maximize=maximize, decoupled_weight_decay=decoupled
    )
    state[1].zero_(), state[2].zero_()
    for _ in range(5):
        layer.grad = (rest[1][:, None] * rest[0]).t() @ rest[2]
        theirs.step()
        step += 1
        reference.factored_adam(*rest, *state, step, lr, beta1, beta2, eps, decay, decoupled, maximize)
    torch.testing.assert_close(state[0], layer.detach(), rtol=1e-12, atol=1e-14)


@on(*NATIVE, "cuda")
@pytest.mark.parametrize(("shape", "tasks"), SIZES)
def test_output_residuals_matches_the_definition(backend, shape, tasks):
    weight, bias, hidden, targets, _ = dense_problem(*shape, tasks)
    args = hidden, weight, bias, targets
    results = backend.output_residuals(*(x.to(backend.device) for x in args))
    expected = reference.output_residuals(*double(args))
    for name, x, y in zip(("residuals", "drift"), results, expected, strict=True):
        assert_close(x, y, backend.kind("dense"), name)


@on(*NATIVE, "cuda")
@pytest.mark.parametrize(("shape", "tasks"), [((1000, 100), 9), ((997, 25), 4), ((63, 7), 1), ((63, 7), 0)])
def test_output_residuals_are_the_drifts_to_the_bit(backend, shape, tasks):
    """So that a task begins with a drift of exactly 0; and the current task's are its logits."""
    weight, bias, hidden, _, _ = (x.to(backend.device) for x in (*dense_problem(*shape, tasks)[:4], ONE))
    logits = [backend.hypernet_logits(row[None, None], weight, bias, shape[0])[0] for row in hidden]
    targets = torch.stack(logits)[:tasks].contiguous()
    residuals, drift = backend.output_residuals(hidden, weight, bias, targets)
    assert drift == 0 and not residuals[:-1].any() and torch.equal(residuals[-1], logits[-1])


@on(*NATIVE, "cuda")
@pytest.mark.parametrize(("shape", "tasks"), SIZES)
def test_hidden_gradient_matches_the_definition(backend, shape, tasks):
    (factors, scales, _), (weight, *_) = problem(*shape, tasks)
    args = factors, scales, weight
    results = backend.hidden_gradient(*(x.to(backend.device) for x in args))
    for name, x, y in zip(("hidden", "bias"), results, reference.hidden_gradient(*double(args)), strict=True):
        assert_close(x, y, backend.kind("dense"), name)


@on(*NATIVE, "cuda")
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize(("shape", "tasks"), SIZES)
def test_factored_adam_matches_the_definition(backend, shape, tasks, settings):
    rest, state = problem(*shape, tasks)
    tail = torch.tensor(3.0), torch.tensor(1e-3)
    expected = double(state)
    reference.factored_adam(*double(rest), *expected, *double(tail), *SETTINGS[settings])
    stepped = [x.to(backend.device, copy=True) for x in state]
    tensors = [x.to(backend.device) for x in rest], [x.to(backend.device) for x in tail]
    assert backend.factored_adam(*tensors[0], *stepped, *tensors[1], *SETTINGS[settings]) is None
    for name, x, y in zip(("weight", "weight_m", "weight_v"), stepped, expected, strict=True):
        assert_close(x, y, backend.kind("dense"), name)


@on(*NATIVE, "cuda")
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize(("shape", "tasks"), [((1000, 100), 9), ((997, 25), 4), ((333, 128), 1), ((63, 7), 0)])
def test_both_modes_give_the_same_numbers_to_the_bit(backend, shape, tasks, settings):
    """One pass, or two with the factors kept: the same arithmetic, row by row."""
    weight, bias, hidden, targets, moments = dense_problem(*shape, tasks)
    grad_logits, drift_weight = torch.randn(shape[0]), torch.tensor(0.02)
    put = lambda *tensors: [t.to(backend.device, copy=True) for t in tensors]  # noqa: E731
    step, lr = put(torch.tensor(3.0), torch.tensor(1e-3))
    rest, state = put(hidden, grad_logits, targets, drift_weight), put(weight, bias, *moments)
    grad_hidden, drift = backend.hypernet_adam(*rest, *state, step, lr, *SETTINGS[settings])
    weight, bias, weight_m, weight_v = put(weight, bias, *moments[:2])
    factors, same_drift = backend.output_residuals(rest[0], weight, bias, rest[2])
    factors[-1] = rest[1]
    scales = torch.ones(tasks + 1, device=backend.device)
    scales[:-1] = 2 * rest[3]
    same_grad, _ = backend.hidden_gradient(factors, scales, weight)
    backend.factored_adam(factors, scales, rest[0], weight, weight_m, weight_v, step, lr, *SETTINGS[settings])
    pairs = [(drift, same_drift), (grad_hidden, same_grad), (state[0], weight), (state[2], weight_m)]
    for one, two in [*pairs, (state[3], weight_v)]:
        assert torch.equal(one, two)


@on(*NATIVE, "cuda")
def test_a_step_without_factors_is_one_on_a_zero_gradient(backend):
    rest, state = problem(40, 12, 0)
    nothing = [x[:0].contiguous().to(backend.device) for x in rest]
    nothing[0] = torch.empty(0, 40, device=backend.device)
    expected, stepped = double(state), [x.to(backend.device, copy=True) for x in state]
    none = [torch.zeros(1, 40), torch.zeros(1), torch.zeros(1, 12)]
    reference.factored_adam(*double(none), *expected, ONE.double(), ONE.double())
    backend.factored_adam(*nothing, *stepped, ONE.to(backend.device), ONE.to(backend.device))
    for x, y in zip(stepped, expected, strict=True):
        assert_close(x, y, backend.kind("dense"), "stepped")


@on(*NATIVE, "cuda")
def test_factored_adam_shows_nan_where_it_belongs(backend):
    rest, state = problem(100, 12, 2)
    rest[0][2, 37] = NAN
    stepped, rest = ([x.to(backend.device) for x in tensors] for tensors in (state, rest))
    grad_hidden, grad_bias = backend.hidden_gradient(*rest[:2], stepped[0])
    assert grad_hidden[2].isnan().all() and grad_hidden[:2].isfinite().all()
    assert grad_bias.isnan().nonzero().flatten().tolist() == [37]
    backend.factored_adam(*rest, *stepped, ONE.to(backend.device), ONE.to(backend.device))
    for x in stepped:
        assert x[37].isnan().all() and torch.isfinite(x).sum() == x.numel() - x[37].numel()


@on(*CPU)
def test_results_do_not_depend_on_the_number_of_threads(backend):
    rest, state = problem(5000, 33, 4)
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(backend.hidden_gradient(*rest[:2], state[0]))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))


does_not_fit = each_change(
    ({"hidden": torch.ones(3, 5)}, "hidden must have shape (3, 6), not (3, 5)"),
    ({"factors": torch.ones(3, 49)}, "factors must be (K, N) and weight (N, H), not (3, 49) and (50, 6)"),
    ({"scales": torch.ones(2)}, "scales must have shape (3,), not (2,)"),
    ({"weight_m": torch.ones(50, 5)}, "weight_m must have shape (50, 6), not (50, 5)"),
    ({"weight_v": torch.ones(50, 6).double()}, "weight_v must be torch.float32, as weight, not torch.float64"),
    ({"lr": torch.ones(2)}, "lr must have one entry, not 2"),
)


@whoever_is_asked
@does_not_fit
def test_factored_adam_refuses_what_does_not_fit(asked, change, message):
    assert_refused("factored_adam", asked, change, message)
    given = changed("factored_adam", change)
    before = {name: tensor.clone() for name, tensor in given.items()}
    with pytest.raises(InputError):
        ops.factored_adam(**given, backend=asked)
    assert all(torch.equal(tensor, before[name]) for name, tensor in given.items())


@whoever_is_asked
@each_change(
    ({"targets": torch.ones(3, 50)}, "targets must have shape (2, 50), not (3, 50)"),
    ({"hidden": torch.ones(0, 6)}, "hidden must be (t + 1, H) and weight (N, H), not (0, 6) and (50, 6)"),
)
def test_output_residuals_refuses_what_does_not_fit(asked, change, message):
    assert_refused("output_residuals", asked, change, message)


@whoever_is_asked
def test_hidden_gradient_refuses_what_does_not_fit(asked):
    assert_refused("hidden_gradient", asked, {"scales": torch.ones(4)}, "scales must have shape (3,), not (4,)")
