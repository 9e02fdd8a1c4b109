"""python -m bench.study: figures of kept runs."""

from pathlib import Path

import pytest

from bench import study

KEPT = sorted((Path(__file__).parents[2] / "bench" / "results" / "split-mnist-default").glob("seed-*"))


def test_figures_of_kept_runs(tmp_path, capsys):
    assert study.main([*map(str, KEPT), "--to", str(tmp_path / "new")]) == 0
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"learning.png", "mean-matrix.png", "study.txt"}
    text = (tmp_path / "new" / "study.txt").read_text(encoding="utf-8")
    assert text.startswith("python -m bench.study ") and "99.56 \N{PLUS-MINUS SIGN} 0.07" in text
    assert capsys.readouterr().out.strip() in text


def test_what_is_wrong_is_said_in_one_line_and_nothing_is_written(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        study.main([str(KEPT[0]), str(KEPT[0]), "--to", str(tmp_path / "new")])
    assert caught.value.code == 2 and "is given twice" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
