"""Several runs together: what is read, how they are grouped, intervals over seeds, figures."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from support.told import refusal

from hypermask_fast import InputError
from hypermask_fast.training import study, study_pictures
from hypermask_fast.training.config import RunConfig, load_preset
from hypermask_fast.training.study import estimate, grouped, paired, read_run, read_runs

ROOT = Path(__file__).parents[2]
KEPT = sorted((ROOT / "bench" / "results" / "split-mnist-default").glob("seed-*"))


def a_run(folder: Path, matrix=None, preset: str = "split-digits", **settings) -> Path:
    """A folder like a finished run's."""
    folder.mkdir()
    config = load_preset(preset).with_values({"data.tasks": 3, **settings})
    (folder / "config.toml").write_text(config.to_toml())
    tasks = config.data.tasks
    if matrix is None:
        generator = np.random.default_rng(config.seed)
        matrix = 90 + 10 * generator.random((tasks, tasks))
    values = [[None if math.isnan(v) else v for v in row] for row in np.asarray(matrix, dtype=float).tolist()]
    content = {"title": "", "seed": config.seed, "matrix": values, "baseline": [50.0] * len(values)}
    (folder / "metrics.json").write_text(json.dumps(content))
    return folder


def runs_of(tmp_path: Path, *settings: dict) -> list[Path]:
    return [a_run(tmp_path / str(i), **each) for i, each in enumerate(settings)]


# -- intervals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "quantile"),  # of Student's t at 0.975, from printed tables
    [(2, 12.706), (3, 4.303), (5, 2.776), (10, 2.262), (31, 2.042), (121, 1.980)],
)
def test_intervals_are_student_s(count, quantile):
    values = np.arange(count, dtype=float)
    found = estimate(values)
    assert found.count == count and found.mean == pytest.approx((count - 1) / 2)
    assert found.std == pytest.approx(math.sqrt(count * (count + 1) / 12))
    assert found.half_width == pytest.approx(quantile * found.std / math.sqrt(count), rel=4e-4)
    assert found.high - found.mean == pytest.approx(found.mean - found.low)


def test_nineteen_of_twenty_intervals_hold_the_mean():
    generator = np.random.default_rng(0)
    found = [estimate(values) for values in generator.normal(7, 2, (2000, 5))]
    assert np.mean([each.low <= 7 <= each.high for each in found]) == pytest.approx(0.95, abs=0.015)


def test_one_value_has_no_interval():
    found = estimate([3.0])
    assert (found.mean, found.std, found.low, found.high, found.count) == (3, None, None, None, 1)
    assert study.estimate_text(found) == "3.00" and math.isnan(found.half_width)


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [float("inf")], [[1.0]], 3.0])
def test_no_estimate_of_what_are_no_numbers(values):
    with pytest.raises(InputError, match="an estimate needs one or more finite numbers, not"):
        estimate(values)


# -- groups -----------------------------------------------------------------------------------------------------------


def test_runs_are_grouped_by_what_decides_their_numbers(tmp_path):
    settings = [
        {"seed": 1},
        {"seed": 1, "method.beta": 1.0},
        {"seed": 0, "title": "another name", "training.log_every": 7, "training.inspect": True},
        {"seed": 2, "data.dir": "/elsewhere"},
        {"seed": 0, "method.beta": 1.0},
    ]
    groups = grouped(read_runs(runs_of(tmp_path, *settings)))
    assert [group.seeds for group in groups] == [[0, 1, 2], [0, 1]]
    assert [group.label for group in groups] == ["method.beta=0.01", "method.beta=1.0"]
    assert "seeds 0 to 2" in groups[0].title and "beta 1" in groups[1].title
    assert grouped(groups[0].runs)[0].label == ""


def test_numbers_of_a_group(tmp_path):
    first, second = (
        np.array([[90, 1, 2], [80, 95, 3], [70, 85, 99.0]]),
        np.array([[80, 1, 2], [80, 85, 3], [60, 75, 89.0]]),
    )
    paths = [a_run(tmp_path / "b", second, seed=5), a_run(tmp_path / "a", first, seed=2)]
    (group,) = grouped(read_runs(paths))
    assert group.seeds == [2, 5]
    np.testing.assert_array_equal(group.just_learned, [[90, 95, 99], [80, 85, 89]])
    np.testing.assert_array_equal(group.at_the_end, [[70, 85, 99], [60, 75, 89]])
    np.testing.assert_array_equal(group.mean_matrix, (first + second) / 2)
    np.testing.assert_allclose(group.values("forgetting"), [15, 15])
    assert group.estimate("average_accuracy").mean == pytest.approx((254 / 3 + 224 / 3) / 2)
    table = study.metrics_table([group])
    assert "79.67 ± 63.53" in table and "95 %" in table and "Student's t" in table
    with pytest.raises(InputError, match="no metric 'speed': there are average_accuracy, "):
        group.values("speed")


def test_paired_differences(tmp_path):
    matrices = {seed: np.full((3, 3), 90.0 + seed) for seed in range(4)}
    paths = [a_run(tmp_path / f"a{seed}", matrices[seed], seed=seed) for seed in (0, 1, 2)]
    paths += [a_run(tmp_path / f"b{seed}", matrices[seed] - seed, seed=seed, fidelity="official") for seed in (3, 2, 1)]
    first, second = grouped(read_runs(paths))
    found = paired(first, second, "average_accuracy")
    assert found.seeds == (1, 2) and found.differences == pytest.approx([-1, -2])
    assert found.estimate.mean == pytest.approx(-1.5)
    assert paired(second, first, "average_accuracy").differences == pytest.approx([1, 2])
    only = grouped(read_runs(paths[:1]))[0], grouped(read_runs(paths[3:4]))[0]
    with pytest.raises(InputError, match="no seed in common: seed 0, seed 3"):
        paired(*only, "average_accuracy")


def test_kept_runs_of_the_published_experiment():
    """Against the numbers that README says of the same runs."""
    assert len(KEPT) == 5
    (group,) = grouped(read_runs(KEPT))
    assert [round(value, 2) for value in group.values("average_accuracy")] == [99.49, 99.54, 99.54, 99.63, 99.58]
    assert [round(value, 2) for value in group.mean_matrix[4]] == [99.87, 98.95, 99.85, 99.90, 99.21]


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_folders_that_hold_no_finished_run(tmp_path):
    assert refusal(lambda: read_runs([])) == "no run to read: give the folder of one or more"
    assert "give a list of runs' folders" in refusal(lambda: read_runs(str(tmp_path)))
    assert "holds no run" in refusal(lambda: read_run(tmp_path / "nothing"))
    (run,) = runs_of(tmp_path, {})
    assert "is given twice" in refusal(lambda: read_runs([run, tmp_path / "." / "0"]))
    content = (run / "metrics.json").read_text()
    values = json.loads(content)
    damaged = ["", "{}", "[]", "null", content[:-9], json.dumps(values | {"matrix": [[1.0], [1.0, 2.0]]})]
    damaged += [json.dumps(values | {"matrix": "x"}), json.dumps(values | {"baseline": [1.0]})]
    damaged += [json.dumps(values | {"matrix": [[None] * 3, [1.0] * 3, [1.0] * 3]})]
    of_learned = [[None if (i, j) == (2, 0) else 50.0 for j in range(3)] for i in range(3)]
    for wrong in (-1.0, 101.0, float("inf"), 1e308):
        damaged.append(json.dumps(values | {"matrix": [[50.0, 50.0, wrong], *values["matrix"][1:]]}))
        damaged.append(json.dumps(values | {"baseline": [wrong, 50.0, 50.0]}))
    damaged += [json.dumps(values | {"matrix": of_learned}), "[" * 100_000]
    for text in damaged:
        (run / "metrics.json").write_text(text)
        assert "metrics.json is damaged or no run's: " in refusal(lambda: read_run(run)), text
    (run / "metrics.json").write_text(json.dumps(values | {"matrix": [[None] * 3] * 3}))
    assert "has not learned its first task yet" in refusal(lambda: read_run(run))
    (run / "metrics.json").unlink()
    assert "has not learned its first task yet (no metrics.json)" in refusal(lambda: read_run(run))


def test_runs_that_do_not_go_together(tmp_path):
    part = np.full((3, 3), 90.0)
    part[2] = np.nan
    paths = {
        "good": a_run(tmp_path / "good"),
        "more": a_run(tmp_path / "more", **{"data.tasks": 4}),
        "other": a_run(tmp_path / "other", preset="split-mnist"),
        "again": a_run(tmp_path / "again", **{"training.log_every": 3}),
        "part": a_run(tmp_path / "part", part),
    }
    messages = {
        "more": "runs of different numbers of tasks can't be compared: 3 in ",
        "other": "runs of different scenarios can't be compared: split-digits in ",
        "again": "are the same run: all settings and seed 0",
        "part": "has learned 2 of its 3 tasks",
    }
    for name, message in messages.items():
        assert message in refusal(lambda name=name: grouped(read_runs([paths["good"], paths[name]]))), name
    assert refusal(lambda: grouped([])) == "no run to compare: give one or more"
    assert refusal(lambda: study_pictures.learning_figure([])) == "no runs to draw"
    apart = [*grouped([read_run(paths["good"])]), *grouped([read_run(paths["more"])])]
    message = refusal(lambda: study_pictures.learning_figure(apart))
    assert message == "runs of split-digits of 3 tasks and split-digits of 4 tasks don't go into one figure"
    one = grouped([read_run(a_run(tmp_path / "one", [[90.0]], **{"data.tasks": 1}))])[0]
    assert "forgetting needs more tasks" in refusal(lambda: one.values("forgetting"))


# -- figures ----------------------------------------------------------------------------------------------------------


def groups_of(tmp_path: Path, seeds: int, tasks: int, count: int) -> list[study.Group]:
    folders = [
        a_run(
            tmp_path / f"{g}-{seed}",
            99 - np.random.default_rng(seed).random((tasks, tasks)),
            seed=seed,
            **{"data.tasks": tasks, "method.beta": 0.1 * (g + 1), "title": "a title that goes on for quite a while"},
        )
        for g in range(count)
        for seed in range(seeds)
    ]
    return grouped(read_runs(folders))


@pytest.mark.parametrize(("seeds", "tasks", "count"), [(5, 5, 1), (1, 3, 1), (2, 5, 3), (3, 1, 1)])
def test_figures_show_all_their_text(tmp_path, seeds, tasks, count):
    groups = groups_of(tmp_path, seeds, tasks, count)
    for figure in (study_pictures.learning_figure(groups), study_pictures.mean_matrix_figure(groups[0])):
        FigureCanvasAgg(figure).draw()
        texts = [t for t in figure.findobj(lambda a: hasattr(a, "get_text") and a.get_text()) if t.get_visible()]
        for text in texts:
            box, whole = text.get_window_extent(), figure.bbox
            assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= whole.x1 + 1 and box.y1 <= whole.y1 + 1, text.get_text()
        words = " ".join(text.get_text().replace("\n", " ").replace("\N{NO-BREAK SPACE}", " ") for text in texts)
        assert "accuracy (%)" in words and (f"interval over {seeds} seeds" in words) == (seeds > 1)


def test_the_learning_figure_draws_means_and_intervals(tmp_path):
    (group,) = groups_of(tmp_path, 4, 3, 1)
    (axes,) = study_pictures.learning_figure([group]).axes
    for container, values in zip(axes.containers, (group.just_learned, group.at_the_end), strict=True):
        line, _, (bars,) = container
        np.testing.assert_allclose(line.get_ydata(orig=False), values.mean(0))
        spans = [(segment[0, 1], segment[1, 1]) for segment in bars.get_segments()]
        expected = [(estimate(of_task).low, estimate(of_task).high) for of_task in values.T]
        np.testing.assert_allclose(spans, expected)
    assert [text.get_text() for text in axes.get_xticklabels()][1] == "1\ndigits 2, 3"


def test_the_mean_matrix_figure_draws_the_mean(tmp_path):
    (group,) = groups_of(tmp_path, 4, 3, 1)
    axes, bar = study_pictures.mean_matrix_figure(group).axes
    np.testing.assert_allclose(axes.images[0].get_array(), group.mean_matrix)
    assert bar.get_ylabel() == "accuracy (%), mean of 4 runs"
    assert RunConfig.load(group.runs[0].folder / "config.toml") == group.config
