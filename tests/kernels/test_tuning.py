import inspect
import json

import pytest
import torch
from comparing import DEVICE, assert_close, exact_threshold, randn

from hypermask_fast.errors import InputError
from hypermask_fast.kernels import masked_linear, settings, tune_masked_linear, tuning
from hypermask_fast.kernels.conv2d_shape import Conv2dShape
from hypermask_fast.kernels.tiles import Tiles
from hypermask_fast.ops import reference

PRODUCT = 5, 20, 40, torch.float32, torch.device(DEVICE)  # rows, outputs, inputs
TUNABLE = [name for name, function in vars(settings).items() if hasattr(function, "key")]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HYPERMASK_CACHE_DIR", str(tmp_path))
    tuning._measured.cache_clear()
    yield tmp_path / "tuning.json"
    tuning._measured.cache_clear()


def inputs():
    x, weight, logits = (randn(*s, dtype=torch.float32) for s in ((5, 40), (20, 40), (20, 40)))
    return x, weight, logits, exact_threshold(logits)


def test_the_fastest_is_kept_and_used(own_cache, monkeypatch):
    times = {16: 3.0, 32: 1.0, 64: 2.0}
    tried, launched = [], []

    def timer(run):
        run()
        return times[tried[-1].block_m]

    best = tuning.tune(settings.masked_product, PRODUCT, tried.append, [Tiles(m, 16, 16) for m in times], timer)
    assert best == Tiles(32, 16, 16)
    assert list(json.loads(own_cache.read_text())) == [settings.masked_product.key(*PRODUCT)]
    launch = Tiles.launch
    monkeypatch.setattr(Tiles, "launch", lambda self, dtype: launched.append(self) or launch(self, dtype))
    arguments = inputs()
    y = masked_linear(*arguments)
    assert launched == [best]
    assert_close("y", y, reference.masked_linear(*(t.double() for t in arguments)))


@pytest.mark.parametrize("name", TUNABLE)
def test_all_settings_are_looked_up(name):
    """For the device, dtype and sizes they were measured at, those of a batch up to the next power of two."""
    function, best = getattr(settings, name), Tiles(16, 32, 16, 2, 1)
    shape = Conv2dShape((3, 2), (1, 1), (1, 0), (1, 1), 1)
    *sizes, _, _ = inspect.signature(function).parameters
    arguments = [shape if size == "shape" else 70 for size in sizes]
    where = torch.float16, torch.device(DEVICE)
    tuning.tune(function, (*arguments, *where), lambda tiles: None, [best], lambda run: 1.0)
    assert function(*arguments, *where) == best
    for place, size in enumerate(sizes):
        other = list(arguments)
        other[place] = Conv2dShape((3, 2), (1, 1), (1, 0), (1, 1), 2) if size == "shape" else 80
        assert (function(*other, *where) == best) == (size in ("rows", "pixels"))
    assert function(*arguments, torch.float32, where[1]) != best


def test_everything_that_gives_tiles_is_tunable():
    functions = [f for f in vars(settings).values() if inspect.isfunction(f) and f.__module__ == settings.__name__]
    assert {f.__name__ for f in functions if inspect.signature(f).return_annotation is Tiles} == set(TUNABLE)


def test_candidates_begin_with_the_heuristic():
    base = settings.masked_product(8, 64, 64, torch.float16, torch.device(DEVICE))
    found = tuning.candidates(base)
    assert found[0] == base and len(found) == len(set(found)) > 10


def test_nothing_that_runs():
    with pytest.raises(InputError, match="none of the settings"):
        tuning.tune(settings.masked_product, PRODUCT, print, [])


@pytest.mark.parametrize("broken", ["[1]", "{", '{"key": {"colour": 1}}'])
def test_tuning_again_replaces_a_broken_file(own_cache, monkeypatch, broken):
    own_cache.write_text(broken)
    with pytest.raises(InputError, match="delete it or tune again"):
        masked_linear(*inputs())
    monkeypatch.setattr(tuning, "candidates", lambda base: [base, Tiles(16, 16, 16)])
    monkeypatch.setattr(tuning.tune, "__defaults__", (None, lambda run: run() is None))
    best = tune_masked_linear(*inputs())
    assert settings.masked_product(*PRODUCT) == best
    other = (9, *PRODUCT[1:])
    tuning.tune(settings.masked_product, other, lambda tiles: None, [Tiles(64, 16, 16)], lambda run: 1.0)
    assert len(json.loads(own_cache.read_text())) == 2  # what was measured before stays
