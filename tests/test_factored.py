"""FactoredGradient: a tensor that is its product to whoever asks, and does what it can on the factors."""

import copy
import io
import warnings

import numpy as np
import pytest
import torch

from hypermask_fast import InputError, factored
from hypermask_fast.factored import FactoredGradient, Factors, SteppedGradient

SHAPE = (70, 9)


@pytest.fixture(autouse=True)
def silent(monkeypatch):
    """As if the product had been spoken of already."""
    monkeypatch.setattr(factored, "_said", {"product"})


def factors_of(rows=3, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = (rows, SHAPE[0]), (rows,), (rows, SHAPE[1])
    return Factors(*(torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes))


def pair(rows=3, seed=0, dtype=torch.float64):
    """A factored gradient and the same as an ordinary tensor."""
    factors = factors_of(rows, seed, dtype)
    return FactoredGradient.of(factors), factors.product()


SUMMAND, OTHER = torch.linspace(-1, 1, SHAPE[0] * SHAPE[1], dtype=torch.float64).view(SHAPE), factors_of(2, 7)
ON_FACTORS = {
    "detach": lambda g: g.detach(),
    "clone": lambda g: g.clone(),
    "times a number": lambda g: g * 3,
    "a number times it": lambda g: 0.5 * g,
    "times a scalar tensor": lambda g: g * torch.tensor(0.3),
    "a scalar tensor times it": lambda g: torch.tensor(0.3, dtype=torch.float64) * g,
    "divided by a number": lambda g: g / 4,
    "divided by a scalar tensor": lambda g: g / torch.tensor(4.0),
    "negated": lambda g: -g,
    "multiplied in place": lambda g: g.mul_(torch.tensor(0.1)),
    "divided in place": lambda g: g.div_(3),
    "zeroed": lambda g: g.zero_(),
    "norm": lambda g: g.norm(),
    "vector_norm": lambda g: torch.linalg.vector_norm(g, 2.0),
    "foreach_norm": lambda g: torch._foreach_norm([g, SUMMAND], 2)[0],
    "foreach_mul_": lambda g: torch._foreach_mul_([g], 0.5) or g,
    "foreach_zero_": lambda g: torch._foreach_zero_([g]) or g,
    "plus another": lambda g: g + (FactoredGradient.of(OTHER) if isinstance(g, FactoredGradient) else OTHER.product()),
    "minus another": lambda g: g - (FactoredGradient.of(OTHER) if isinstance(g, FactoredGradient) else OTHER.product()),
    "itself added": lambda g: g.add_(g, alpha=0.5),
    "added to a tensor": lambda g: SUMMAND.clone().add_(g, alpha=-2),
    "subtracted from a tensor": lambda g: SUMMAND - g,
    "copied into a tensor": lambda g: torch.full(SHAPE, 7.0, dtype=torch.float64).copy_(g),
    "zeros like it": lambda g: torch.zeros_like(g),
    "new_zeros": lambda g: g.new_zeros(3),
}
ON_THE_PRODUCT = {
    "a tensor added": lambda g: g + SUMMAND,
    "a tensor added in place": lambda g: g.add_(SUMMAND),
    "clamped": lambda g: g.clamp_(-0.1, 0.1),
    "largest entry": lambda g: torch.linalg.vector_norm(g, float("inf")),
    "norm by columns": lambda g: g.norm(dim=0),
    "a slice": lambda g: g[3:5],
    "a slice set": lambda g: (g[3:5].fill_(2), g)[1],
    "times a tensor": lambda g: g * SUMMAND,
    "a tensor divided by it": lambda g: SUMMAND / g,
    "copied from a tensor": lambda g: g.copy_(SUMMAND),
    "finite": lambda g: torch.isfinite(g).all(),
    "in float32": lambda g: g.float(),
    "flattened, in place": lambda g: (g.view(-1).mul_(2), g)[1],
    "stacked": lambda g: torch.stack([g, SUMMAND]),
    "matrix product": lambda g: g @ torch.ones(9, 2, dtype=torch.float64),
    "equal": lambda g: (g == g).all(),
    "foreach_add_": lambda g: torch._foreach_add_([g], 1.0) or g,
}


def plain(x):
    return x.dense() if isinstance(x, FactoredGradient) else x


@pytest.mark.parametrize("name", ON_FACTORS)
def test_what_is_done_on_the_factors(name, monkeypatch):
    gradient, product = pair()
    with monkeypatch.context() as patch:
        patch.setattr(factored, "_on_products", lambda func, *rest: pytest.fail(f"{func} is done on the product"))
        result = ON_FACTORS[name](gradient)
    expected = ON_FACTORS[name](product)
    torch.testing.assert_close(plain(result), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient.dense(), product, rtol=1e-12, atol=1e-12)  # changed, or not, as it was


@pytest.mark.parametrize("name", ON_THE_PRODUCT)
def test_anything_else_is_done_on_the_product(name):
    gradient, product = pair()
    result, expected = ON_THE_PRODUCT[name](gradient), ON_THE_PRODUCT[name](product)
    torch.testing.assert_close(plain(result), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient.dense(), product, rtol=1e-12, atol=1e-12)
    assert gradient.factors is None


def test_aliases_change_together_and_clones_do_not():
    gradient, product = pair()
    alias, clone = gradient.detach(), gradient.clone()
    alias.mul_(2)
    torch.testing.assert_close(gradient.dense(), 2 * product)
    torch.testing.assert_close(clone.dense(), product)
    alias.add_(SUMMAND)
    torch.testing.assert_close(gradient.dense(), 2 * product + SUMMAND)
    torch.testing.assert_close(clone.dense(), product)


def test_a_sum_with_the_same_hidden_vectors_has_no_more_rows():
    a, b = factors_of(3), factors_of(3, seed=1)
    b = b._replace(hidden=a.hidden.clone())
    total = FactoredGradient.of(a).add_(FactoredGradient.of(b), alpha=0.5)
    assert len(total.factors.rows) == 3
    torch.testing.assert_close(total.dense(), a.product() + 0.5 * b.product())


def test_a_sum_of_more_rows_than_columns_is_the_product():
    total, expected = FactoredGradient.of(factors_of(4)), factors_of(4).product()
    for seed in (1, 2, 3):
        total += FactoredGradient.of(factors_of(4, seed))
        expected += factors_of(4, seed).product()
    assert total.factors is None
    torch.testing.assert_close(total.dense(), expected)


@pytest.mark.parametrize("where", ["rows", "scales", "hidden"])
@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e38])
def test_a_scaler_sees_what_is_not_finite(where, value):
    """1e38: the product overflows though the factors are finite."""
    found, inverse = torch.zeros(1), torch.tensor([2.0])
    good, product = pair(dtype=torch.float32)
    torch._amp_foreach_non_finite_check_and_unscale_([good, torch.ones(3)], found, inverse)
    assert found == 0 and good.factors is not None
    torch.testing.assert_close(good.dense(), 2 * product)
    bad = factors_of(dtype=torch.float32)
    getattr(bad, where).view(-1)[1] = value
    bad = bad._replace(rows=bad.rows * 100)
    torch._amp_foreach_non_finite_check_and_unscale_([FactoredGradient.of(bad)], found, inverse)
    assert found == 1


def test_norm_of_large_rows_that_cancel():
    """Summed in float64: nearly all of it cancels."""
    factors = factors_of(2, dtype=torch.float32)
    factors.rows[1] = factors.rows[0] * (1 + 1e-4 * torch.randn(SHAPE[0]))
    factors = Factors(factors.rows, torch.tensor([1e3, -1e3]), factors.hidden[:1].expand(2, -1).contiguous())
    exact = Factors(*(x.double() for x in factors)).product().norm()
    assert factors.norm() == pytest.approx(exact.item(), rel=1e-5)


def test_the_product_is_spoken_of_once(monkeypatch):
    monkeypatch.setattr(factored, "_said", set())
    with pytest.warns(UserWarning, match=r"output layer is made in full, 0 MB, for aten.clamp"):
        pair()[0].clamp(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pair()[0].clamp(0)
        factored._said.clear()
        pair()[0].norm(), pair()[0].mul_(2)


def test_copies_pickles_and_arrays():
    gradient, product = pair()
    assert copy.deepcopy(gradient).factors is not None
    torch.testing.assert_close(copy.deepcopy(gradient).dense(), product)
    file = io.BytesIO()
    torch.save({"grad": gradient}, file)
    file.seek(0)
    torch.testing.assert_close(torch.load(file)["grad"], product)
    assert np.allclose(gradient.numpy(), product.numpy())
    assert "3 pairs of factors" in repr(pair()[0])


def test_a_stepped_gradient_refuses_whoever_asks():
    gradient = SteppedGradient(torch.ones(SHAPE))
    for ask in (torch.Tensor.norm, lambda g: g.mul_(2), lambda g: g + 1, lambda g: torch.ones(SHAPE).copy_(g), repr):
        if ask is repr:
            assert "SteppedGradient" in repr(gradient)
            continue
        with pytest.raises(InputError, match="backward has stepped the layer already"):
            ask(gradient)
