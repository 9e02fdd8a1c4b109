"""The benchmark of kept masks runs on tiny shapes, and times nothing that is wrong."""

import json
import re

import pytest
import torch

from bench import serving


def test_every_contender_of_every_case_is_timed(tmp_path, capsys):
    file = tmp_path / "serving.json"
    serving.main(["--quick", "--turns", "3", "--json", str(file)])
    found = json.loads(file.read_text())
    assert len(found["cases"]) == 3
    told = capsys.readouterr().out
    for case, rows in found["cases"].items():
        assert list(rows) == [serving.PLAIN, serving.SERVED, serving.CHECKED, serving.MADE]
        assert all(row["ms"] >= row["least_ms"] >= 0 and row["ratio"] > 0 for row in rows.values())
        assert rows[serving.PLAIN]["ratio"] == 1
        assert case in told
    assert found["command"] == "python -m bench.serving --turns 3 --quick" and "made 10 times" in found["cache"]


class Kept:
    """A model whose kept masks are stale."""

    class cache:
        limit, serving = 1, 0


def test_a_stale_mask_is_not_timed():
    def run():
        return torch.ones(2) * (1 + Kept.cache.limit)

    with pytest.raises(AssertionError, match=re.escape(f"{serving.SERVED} is wrong")):
        serving.contenders(Kept, run, lambda: None)


def test_ratios_are_to_the_plain_passes_of_the_same_turn(monkeypatch):
    clock = iter([0, 1, 1, 3, 3, 7, 7, 19])  # plain 1, ours 2; plain 4, ours 12
    monkeypatch.setattr(serving.time, "perf_counter", lambda: next(clock))
    rows = serving.timed({serving.PLAIN: lambda: None, "ours": lambda: None}, turns=2)
    assert rows["ours"] == {"ms": 7000, "least_ms": 2000, "ratio": 2.5, "ratio_of_least": 2}
