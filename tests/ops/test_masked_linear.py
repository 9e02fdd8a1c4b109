import pytest
import torch
from comparing import DEVICE, DTYPES, assert_close, assert_matches, exact_threshold, randn

from hypermask_fast.errors import InputError
from hypermask_fast.kernels import masked_linear
from hypermask_fast.kernels.masked_linear import launch_product, launch_weight_gradient
from hypermask_fast.kernels.tiles import Tiles
from hypermask_fast.ops import reference

SHAPES = [  # batch, in, out
    ((1,), 1, 1),
    ((7,), 300, 65),  # a split reduction
    ((130,), 33, 70),  # several tiles of everything
    ((2, 3), 17, 5),
    ((), 5, 3),
    ((0,), 5, 3),
    ((3,), 0, 4),
    ((3,), 4, 0),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "inputs", "outputs"), SHAPES)
def test_matches_reference(batch, inputs, outputs, dtype):
    x, bias = randn(*batch, inputs, dtype=dtype), randn(outputs, dtype=dtype)
    weight, logits = randn(outputs, inputs, dtype=dtype), randn(outputs, inputs, dtype=dtype)
    threshold = exact_threshold(logits)
    assert_matches(
        lambda x, w, a, b: masked_linear(x, w, a, threshold, b),
        lambda x, w, a, b: reference.masked_linear(x, w, a, threshold.double(), b),
        (x, weight, logits, bias),
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_inputs_without_bias(dtype):
    x = randn(20, 9, dtype=dtype).t()
    weight, logits = randn(14, 40, dtype=dtype)[::2, ::2], randn(20, 7, dtype=dtype).t()
    threshold = exact_threshold(logits)
    assert_matches(
        lambda x, w, a: masked_linear(x, w, a, threshold),
        lambda x, w, a: reference.masked_linear(x, w, a, threshold.double()),
        (x, weight, logits),
        dtype,
    )


def test_small_logits_keep_their_precision():
    """tanh of tiny logits is their own value: the textbook formula in exponentials would return noise."""
    logits = torch.tensor([[1e-6, -1e-3, 0.0, 0.2499, -0.2501, 9.0, -30.0, 200.0]], device=DEVICE)
    x = torch.eye(8, device=DEVICE)
    weight, threshold = torch.ones_like(logits), torch.zeros((), device=DEVICE)
    y = masked_linear(x, weight, logits, threshold)
    torch.testing.assert_close(y[:, 0].double(), logits[0].double().tanh().abs(), rtol=1e-6, atol=0, check_device=False)


def test_nan_logits_are_kept_and_show():
    logits = torch.tensor([[0.1, float("nan")], [0.1, 2.0]], device=DEVICE)
    y = masked_linear(torch.ones(1, 2, device=DEVICE), torch.ones_like(logits), logits, torch.tensor(1.0).to(DEVICE))
    assert y[0, 0].isnan() and not y[0, 1].isnan()


@pytest.mark.parametrize("splits", [1, 3])
def test_tiles_that_do_not_divide(splits):
    tiles = Tiles(16, 32, 16, splits=splits)
    x, w, a = (randn(*s, dtype=torch.float32) for s in ((45, 50), (35, 50), (35, 50)))
    threshold, bias = exact_threshold(a), randn(35, dtype=torch.float32)
    expected = reference.masked_linear(x.double(), w.double(), a.double(), threshold.double(), bias.double())
    assert_close("y", launch_product(x, w, a, threshold, bias, tiles), expected)


def test_only_the_wanted_gradient_is_made():
    x, w, a = (randn(*s, dtype=torch.float32) for s in ((4, 6), (5, 6), (5, 6)))
    dw, da = launch_weight_gradient(randn(4, 5, dtype=torch.float32), x, w, a, exact_threshold(a), False, True)
    assert dw.numel() == 0 and da.shape == a.shape and not da.isnan().any()


def test_weight_and_logits_of_other_dtypes():
    """As under autocast: products in x's dtype, weight and logits as stored, their gradients too."""
    x, w, a = randn(6, 20, dtype=torch.float16), randn(9, 20, dtype=torch.float32), randn(9, 20, dtype=torch.float32)
    threshold = exact_threshold(a)
    y = assert_matches(
        lambda x, w, a: masked_linear(x, w, a, threshold),
        lambda x, w, a: reference.masked_linear(x, w, a, threshold.double()),
        (x, w, a),
        torch.float16,
    )
    assert y.dtype == torch.float16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 4)}, "x must be"),
        ({"logits": torch.ones(3, 4)}, "logits must have the weight's shape"),
        ({"threshold": torch.ones(2)}, "threshold must be one entry"),
        ({"bias": torch.ones(4)}, "bias must be"),
        ({"weight": torch.ones(5)}, "weight must be"),
        ({"x": torch.ones(2, 5).double()}, "float64"),
        ({"weight": torch.ones(3, 5).int()}, "int32"),
        ({"logits": torch.ones(3, 5, device="meta")}, "use one device"),
    ],
)
def test_bad_input(change, message):
    good = {
        "x": torch.ones(2, 5), "weight": torch.ones(3, 5), "logits": torch.ones(3, 5),
        "threshold": torch.ones(()), "bias": torch.ones(3),
    }  # fmt: skip
    given = {name: t if t.is_meta else t.to(DEVICE) for name, t in (good | change).items()}
    with pytest.raises(InputError, match=message):
        masked_linear(**given)
