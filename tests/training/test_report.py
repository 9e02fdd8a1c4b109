import csv
import json
import os
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from hypermask_fast import InputError
from hypermask_fast.training import report
from hypermask_fast.training.config import load_preset
from hypermask_fast.training.files import write_atomic
from hypermask_fast.training.tables import text_table
from hypermask_fast.training.trainer import Result

CONFIG = load_preset("split-digits")


def a_result(tasks: int = 3, learned: int | None = None, **timing) -> Result:
    matrix = torch.rand(tasks, tasks, generator=torch.Generator().manual_seed(tasks), dtype=torch.float64) * 100
    matrix[tasks if learned is None else learned :] = float("nan")
    return Result(matrix, torch.full((tasks,), 12.5, dtype=torch.float64), **timing)


def test_metrics_hold_the_numbers_exactly_and_null_for_what_is_not_measured(tmp_path):
    result = a_result(3, learned=2)
    report.write_metrics(tmp_path, CONFIG, result)
    stored = json.loads((tmp_path / "metrics.json").read_text())
    assert stored["matrix"][:2] == result.matrix[:2].tolist()
    assert stored["matrix"][2] == [None] * 3
    assert stored["summary"]["tasks_learned"] == 2
    assert (stored["title"], stored["seed"], stored["fidelity"]) == (CONFIG.title, 0, "default")


def test_metrics_do_not_depend_on_how_long_it_took(tmp_path):
    files = []
    for i, timing in enumerate([{"seconds": 1.0, "steps": 5}, {"seconds": 2.0, "steps": 5, "peak_memory": 7}]):
        run_dir = tmp_path / str(i)
        run_dir.mkdir()
        report.write_reports(run_dir, CONFIG, a_result(**timing), "cpu")
        files.append((run_dir / "metrics.json").read_bytes())
    assert files[0] == files[1]


def test_timing(tmp_path):
    report.write_timing(tmp_path, a_result(seconds=4.0, steps=10, peak_memory=123), torch.device("cpu"))
    stored = json.loads((tmp_path / "timing.json").read_text())
    assert (stored["seconds"], stored["steps"], stored["steps_per_second"]) == (4.0, 10, 2.5)
    assert stored["peak_memory_bytes"] == 123
    assert stored["device"].startswith("cpu")
    assert stored["versions"]["torch"] == torch.__version__
    report.write_timing(tmp_path, a_result(), "cpu")
    assert json.loads((tmp_path / "timing.json").read_text())["steps_per_second"] is None


def test_table_reads_back_exactly(tmp_path):
    result = a_result(3, learned=2)
    report.write_matrix_table(tmp_path, result)
    with (tmp_path / "accuracy_matrix.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["after_task"] for row in rows] == ["untrained", "0", "1"]
    assert [float(rows[2][f"task_{j}"]) for j in range(3)] == result.matrix[1].tolist()
    assert float(rows[0]["task_1"]) == 12.5


@pytest.mark.parametrize("tasks", [1, 5, 40])
def test_picture_shows_every_number_large_enough_to_read(tmp_path, tasks):
    result = a_result(tasks)
    report.write_matrix_picture(tmp_path, result, "a title")
    with Image.open(tmp_path / "accuracy_matrix.png") as image:
        pixels = np.asarray(image.convert("RGB"))[::5, ::5]
        assert min(image.size) >= 40 * tasks, "pixels per cell"
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20, "not a blank picture"
    axes = report.matrix_figure(result, "a title").axes[0]
    digits = ".1f" if tasks <= 10 else ".0f"
    assert [text.get_text() for text in axes.texts] == [format(v, digits) for v in result.matrix.flatten().tolist()]


def test_picture_of_a_run_under_way(tmp_path):
    axes = report.matrix_figure(a_result(5, learned=2), "").axes[0]
    assert len(axes.texts) == 2 * 5
    report.write_matrix_picture(tmp_path, a_result(5, learned=0), "nothing learned")
    assert (tmp_path / "accuracy_matrix.png").stat().st_size > 0


def test_text_matrix():
    result = Result(
        torch.tensor([[90.0, 20.0], [80.0, 95.5]], dtype=torch.float64), torch.tensor([10.0, 11.0]).double()
    )
    lines = report.text_matrix(result).splitlines()
    assert lines[0].split() == ["after", "task", "0", "1"]
    assert lines[1].split() == ["none", "10.00", "11.00"]
    assert lines[3].split() == ["1", "80.00", "95.50"]
    assert "forgetting           10.00 points" in lines
    assert max(map(len, report.text_matrix(a_result(40)).splitlines())) <= 10 + 4 * 40


def test_tables_align_and_cut_nothing(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    rows = [("name", "n", "text"), ("[red]a[/red]", "10.5", "x" * 300), ("b :smile:", "7", "")]
    assert text_table(rows, "<><", gap=2).splitlines() == [
        "name             n  text",
        "[red]a[/red]  10.5  " + "x" * 300,
        "b :smile:        7",
    ]


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "metrics.json"
    write_atomic(path, "old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(InputError, match=r"cannot write .*metrics\.json: disk full"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_no_global_plotting_state(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)  # another test's import
    report.write_matrix_picture(tmp_path, a_result(2), "t")
    assert "matplotlib.pyplot" not in sys.modules
