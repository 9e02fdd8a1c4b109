import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from hypermask_fast import InputError
from hypermask_fast.files import write_atomic
from hypermask_fast.text import text_table
from hypermask_fast.training import describe, report
from hypermask_fast.training.config import load_preset
from hypermask_fast.training.result import Result

ROOT = Path(__file__).parents[2]
CONFIG = load_preset("split-digits")
ABOUT = describe.about(CONFIG)


def a_result(tasks: int = 3, learned: int | None = None, **timing) -> Result:
    matrix = torch.rand(tasks, tasks, generator=torch.Generator().manual_seed(tasks), dtype=torch.float64) * 100
    matrix[tasks if learned is None else learned :] = float("nan")
    return Result(matrix, torch.full((tasks,), 12.5, dtype=torch.float64), **timing)


def test_metrics_hold_the_numbers_exactly_and_null_for_what_is_not_measured(tmp_path):
    result = a_result(3, learned=2)
    report.write_metrics(tmp_path, ABOUT, result)
    stored = json.loads((tmp_path / "metrics.json").read_text())
    assert stored["matrix"][:2] == result.matrix[:2].tolist()
    assert stored["matrix"][2] == [None] * 3
    assert stored["summary"]["tasks_learned"] == 2
    assert (stored["title"], stored["seed"], stored["fidelity"]) == (describe.title(CONFIG), 0, "default")


def test_metrics_do_not_depend_on_how_long_it_took(tmp_path):
    files = []
    for i, timing in enumerate([{"seconds": 1.0, "steps": 5}, {"seconds": 2.0, "steps": 5, "peak_memory": 7}]):
        run_dir = tmp_path / str(i)
        run_dir.mkdir()
        report.write_reports(run_dir, ABOUT, a_result(**timing), "cpu")
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


CAPTION = (
    f"{describe.title(CONFIG)}\n{describe.details(CONFIG.with_values({'hypernet.chunk_size': 1000, 'seed': 2**62}))}"
)


def boxes(tasks: int, caption: str) -> dict[str, list]:
    """Where the texts of a picture lie, in pixels, by their role; and its axes and the picture itself."""
    figure = report.matrix_figure(a_result(tasks), caption)
    FigureCanvasAgg(figure).draw()
    axes, bar = figure.axes
    texts = {
        "numbers": axes.texts,
        "ticks": [*axes.get_xticklabels(), *axes.get_yticklabels(), *bar.get_yticklabels()],
        "labels": [axes.xaxis.label, axes.yaxis.label, bar.yaxis.label],
        "caption": figure.texts,
    }
    found = {role: [text.get_window_extent() for text in of_role] for role, of_role in texts.items()}
    return found | {"axes": [axes.bbox, bar.bbox], "figure": [figure.bbox]}


@pytest.mark.parametrize(
    ("tasks", "caption"),
    [*((tasks, CAPTION) for tasks in (1, 2, 5, 8, 9, 10, 11, 20, 40)), (2, "word " * 100), (9, "$"), (11, "")],
)
def test_pictures_of_any_size_show_all_their_text_side_by_side(tasks, caption):
    found = boxes(tasks, caption)
    (whole,) = found.pop("figure")
    for role, of_role in found.items():
        for box in of_role:
            assert min(box.x0, box.y0) >= 0 and box.x1 <= whole.x1 and box.y1 <= whole.y1, (role, box)
    outside = [box for role in ("ticks", "labels", "caption", "axes") for box in found[role]]
    for box in outside:
        assert not [other for other in outside if other is not box and other.overlaps(box)], box
    cell = found["axes"][0].width / tasks
    assert max(box.width for box in found["numbers"]) < 0.9 * cell
    assert max(box.height for box in found["numbers"]) < 0.9 * cell
    assert max(box.height for box in found["ticks"]) < cell
    if caption == CAPTION:  # the picture is the matrix, not its caption
        assert found["caption"][0].height < 0.3 * whole.height
        assert found["axes"][0].width > 0.6 * whole.width


def test_a_picture_says_what_was_run(tmp_path, monkeypatch):
    captions, figure = [], report.matrix_figure
    monkeypatch.setattr(report, "matrix_figure", lambda *words: captions.append(words[1]) or figure(*words))
    changed = CONFIG.with_values({"data.tasks": 3, "seed": 77, "training.lr": 0.125, "fidelity": "official"})
    report.write_reports(tmp_path, describe.about(changed), a_result(3), "cpu")
    for told in ("3 tasks", "seed 77", "lr 0.125", "official fidelity"):
        assert told in captions[0]


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


_DRAWING = """
import os, sys
from pathlib import Path
import torch
from hypermask_fast.training import describe, report
from hypermask_fast.training.result import Result
report.check_packages()
report.write_matrix_picture(Path(sys.argv[1]), Result(torch.eye(2).double(), torch.zeros(2).double()), "t")
import matplotlib
print(os.environ["MPLBACKEND"], matplotlib.get_backend(auto_select=False))
"""


@pytest.mark.parametrize(
    ("asked", "then"),
    [
        (
            "module://matplotlib_inline.backend_inline",
            None,
        ),  # as a notebook's shell has it, with or without the package
        ("no such backend", "None"),
        ("qtagg", "qtagg"),  # no display here, and perhaps no Qt
        ("svg", "svg"),
    ],
)
def test_pictures_do_not_depend_on_the_environment_s_backend(tmp_path, asked, then):
    """In a process of its own, whose matplotlib is imported for the picture; MPLBACKEND holds for others as before."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", _DRAWING, str(tmp_path)],
        env=os.environ | {"MPLBACKEND": asked},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "accuracy_matrix.png") as image:
        assert image.format == "PNG"
    if then is not None:
        assert done.stdout == f"{asked} {then}\n"


@pytest.mark.parametrize("failing", ["import", "draw", "write"])
def test_a_picture_that_fails_is_a_warning(tmp_path, monkeypatch, failing):
    def fail(*_, **__):
        raise ValueError("no picture today\nand more")

    owner, name = {
        "import": (report, "figure_class"),
        "draw": (FigureCanvasAgg, "print_png"),
        "write": (report, "write_atomic"),
    }[failing]
    monkeypatch.setattr(owner, name, fail)
    report.check_packages()
    with pytest.warns(UserWarning, match=r"^.*accuracy_matrix.png could not be drawn: ValueError: no picture today$"):
        report.write_matrix_picture(tmp_path, a_result(2), "t")


@pytest.mark.parametrize("title", ["$", r"a $\nothing$ b", "_^{}", "100 % \u4e2d"])
def test_titles_are_text_and_no_formulas(tmp_path, title, recwarn):
    report.write_matrix_picture(tmp_path, a_result(2), title)
    assert not [warning for warning in recwarn if "could not be drawn" in str(warning.message)]
    assert (tmp_path / "accuracy_matrix.png").exists()


def test_text_matrix():
    result = Result(
        torch.tensor([[90.0, 20.0], [80.0, 95.5]], dtype=torch.float64), torch.tensor([10.0, 11.0]).double()
    )
    lines = str(result).splitlines()
    assert lines[0].split() == ["after", "task", "0", "1"]
    assert lines[1].split() == ["none", "10.00", "11.00"]
    assert lines[3].split() == ["1", "80.00", "95.50"]
    assert "forgetting           10.00 points" in lines
    assert max(map(len, str(a_result(40)).splitlines())) <= 10 + 4 * 40


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
