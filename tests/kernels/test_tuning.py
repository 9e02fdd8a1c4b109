import json

import pytest
import torch
from comparing import DEVICE, assert_close, exact_threshold, randn

from hypermask_fast import reference
from hypermask_fast.errors import InputError
from hypermask_fast.kernels import masked_linear, settings, tuning
from hypermask_fast.kernels.settings import Tiles


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HYPERMASK_CACHE_DIR", str(tmp_path))
    return tmp_path / "tuning.json"


def test_the_fastest_is_kept_and_used(own_cache, monkeypatch):
    x, weight, logits = (randn(*s, dtype=torch.float32) for s in ((5, 40), (20, 40), (20, 40)))
    threshold = exact_threshold(logits)
    times = {16: 3.0, 32: 1.0, 64: 2.0}
    tried = []
    key = tuning.key_of("masked_product", 5, 20, 40, x.dtype, x.device)

    def timer(run):
        run()
        return times[tried[-1].block_m]

    best = tuning.tune(key, tried.append, [Tiles(m, 16, 16) for m in times], timer)
    assert best == Tiles(32, 16, 16)
    assert list(json.loads(own_cache.read_text())) == [key]
    monkeypatch.setattr(settings, "masked_product", None)  # the heuristic is not asked again
    y = masked_linear(x, weight, logits, threshold)
    expected = reference.masked_linear(x.double(), weight.double(), logits.double(), threshold.double())
    assert_close("y", y, expected)


def test_candidates_begin_with_the_heuristic():
    base = settings.masked_product(8, 64, 64, torch.float16, torch.device(DEVICE))
    found = tuning.candidates(base)
    assert found[0] == base and len(found) == len(set(found)) > 10


def test_nothing_that_runs_and_a_broken_file(own_cache):
    with pytest.raises(InputError, match="none of the settings"):
        tuning.tune("key", print, [])
    own_cache.write_text("[1]")
    tuning._measured.cache_clear()
    with pytest.raises(InputError, match="delete it or tune again"):
        tuning.tuned("masked_product", 1, 1, 1, torch.float32, torch.device(DEVICE))
    tuning._measured.cache_clear()
