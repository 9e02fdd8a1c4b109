"""hypermask-fast compare: runs found and refused, the table, the JSON, the pictures."""

import json
import re
import shutil

import numpy as np
import pytest
from training.test_study import a_run

from hypermask_fast import cli
from hypermask_fast.training import comparison, study, study_pictures

PICTURES = {"matrices.png", "accuracy.png", "differences.png"}


@pytest.fixture
def runs(tmp_path):
    """Two settings with seeds 0 to 2, below one folder; the second is 2 points better on every task."""
    for beta, more in ((0.01, 0.0), (0.1, 2.0)):
        for seed in range(3):
            (tmp_path / "runs" / f"beta-{beta}").mkdir(parents=True, exist_ok=True)
            matrix = 60 + 10 * np.random.default_rng(seed).random((3, 3)) + more
            a_run(tmp_path / "runs" / f"beta-{beta}" / f"seed-{seed}", matrix, seed=seed, **{"method.beta": beta})
    return tmp_path / "runs"


@pytest.fixture
def refused(capsys):
    def run_refused(*words: object) -> str:
        assert cli.main(["compare", *map(str, words)]) == 2
        line = capsys.readouterr().err
        assert line.startswith("hypermask-fast: error: ") and line.count("\n") == 1
        return line

    return run_refused


def test_the_table_has_means_intervals_and_paired_differences(runs, capsys):
    assert cli.main(["compare", str(runs)]) == 0
    shown = capsys.readouterr().out
    groups = study.grouped(study.read_runs(comparison.find_runs(runs)))
    found = groups[0].estimate("average_accuracy")
    assert re.search(
        rf"^method.beta=0.01 +average accuracy \(%\) +3 +{found.mean:.2f} +{found.std:.2f} +{found.low:.2f} to "
        rf"{found.high:.2f}$",
        shown,
        re.M,
    )
    assert re.search(r"^method.beta=0.1 +average accuracy \(points\) +3 +\+2.00 +0.00 +\+2.00 to \+2.00$", shown, re.M)
    assert "differences are taken seed by seed" in shown


def test_json_and_pictures(runs, tmp_path, capsys):
    assert cli.main(["compare", str(runs), "--to", str(tmp_path / "to")]) == 0
    assert {path.name for path in (tmp_path / "to").iterdir()} == {"comparison.json"} | PICTURES
    content = json.loads((tmp_path / "to" / "comparison.json").read_text())
    assert content["scenario"] == "split-digits" and content["tasks"] == 3 and content["level"] == 0.95
    first, second = content["groups"]
    assert (first["label"], first["seeds"]) == ("method.beta=0.01", [0, 1, 2])
    values = first["metrics"]["average_accuracy"]
    assert values["mean"] == pytest.approx(np.mean(values["values"]))
    assert values["std"] == pytest.approx(np.std(values["values"], ddof=1))
    assert np.array(second["mean_matrix"]) == pytest.approx(np.array(first["mean_matrix"]) + 2)
    difference = next(each for each in content["differences"] if each["metric"] == "average_accuracy")
    assert difference["second"] == "method.beta=0.1" and difference["values"] == pytest.approx([2, 2, 2])
    matrix = json.loads((runs / "beta-0.01" / "seed-1" / "metrics.json").read_text())["matrix"]
    assert first["average_so_far"][1] == pytest.approx([matrix[0][0], np.mean(matrix[1][:2]), np.mean(matrix[2])])
    assert {f"wrote {tmp_path / 'to' / name}" for name in PICTURES} <= set(capsys.readouterr().out.splitlines())


def test_one_group_has_no_differences(runs, tmp_path, capsys):
    assert cli.main(["compare", str(runs / "beta-0.1"), "--to", str(tmp_path / "to")]) == 0
    assert {path.name for path in (tmp_path / "to").iterdir()} == {"comparison.json", "matrices.png", "accuracy.png"}
    assert "difference" not in capsys.readouterr().out


def test_one_run_has_a_mean_and_no_interval(runs, capsys):
    assert cli.main(["compare", str(runs / "beta-0.1" / "seed-0")]) == 0
    assert re.search(r"average accuracy \(%\) +1 +[\d.]+ +- +-$", capsys.readouterr().out, re.M)


def test_no_seed_in_common(runs, tmp_path, capsys):
    shutil.rmtree(runs / "beta-0.1" / "seed-0")
    for seed in (1, 2):
        shutil.rmtree(runs / "beta-0.01" / f"seed-{seed}")
        shutil.rmtree(runs / "beta-0.1" / f"seed-{seed}") if seed == 2 else None
    assert cli.main(["compare", str(runs), "--to", str(tmp_path / "to")]) == 0
    assert "no seed in common, so no differences: method.beta=0.01; method.beta=0.1" in capsys.readouterr().out
    assert not (tmp_path / "to" / "differences.png").exists()


@pytest.mark.parametrize("groups", [1, 2, 5])
def test_the_pictures_say_what_they_show(tmp_path, groups):
    for beta in range(groups):
        for seed in (0, 1):
            a_run(tmp_path / f"{beta}-{seed}", seed=seed, **{"method.beta": float(beta)})
    found = study.grouped(study.read_runs(comparison.find_runs(tmp_path)))
    matrices = study_pictures.matrices_figure(found)
    titles = [axes.get_title() for axes in matrices.axes if axes.axison and axes.get_title()]
    assert len(titles) == groups and all("seeds 0 to 1" in title for title in titles)
    assert all("interval)" in title for title in titles), "what follows the sign"
    alone = study_pictures.matrices_figure(study.grouped(study.read_runs([tmp_path / "0-0"]))).axes[0].get_title()
    assert "interval" not in alone and "+-" not in alone, "one run has none"
    assert "".join(text.get_text() for text in matrices.axes[0].texts).count(".") == 9, "a number in every cell"
    axes = study_pictures.accuracy_figure(found).axes[0]
    assert len(axes.containers) == groups and "95" in axes.get_ylabel() and axes.get_xlabel() == "after training task"
    if groups > 1:
        axes = study_pictures.differences_figure(found).axes[0]
        assert len(axes.get_yticklabels()) == groups - 1 and "(points)" in axes.get_xlabel()


# -- what can't be compared -------------------------------------------------------------------------------------------


def test_folders_without_a_run(tmp_path, refused):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    assert "empty holds no run (no config.toml in it or below it)" in refused(tmp_path / "empty")
    assert "file is no folder" in refused(tmp_path / "file")
    assert "not-there does not exist" in refused(tmp_path / "not-there")


def test_runs_of_different_scenarios_or_tasks(tmp_path, refused):
    one, other, fewer = tmp_path / "one", tmp_path / "other", tmp_path / "fewer"
    a_run(one)
    a_run(other, preset="split-mnist")
    a_run(fewer, **{"data.tasks": 2})
    line = refused(one, other)
    assert "different scenarios can't be compared: split-digits in" in line and "split-mnist in" in line
    assert "different numbers of tasks can't be compared: 3 in" in refused(one, fewer)


def test_image_folders_of_other_content_are_other_scenarios(tmp_path, refused):
    for name, print_ in (("a", "11"), ("b", "22")):
        a_run(tmp_path / name, **{"data.scenario": "images", "data.fingerprint": f'"{print_}"'})
    assert "different scenarios can't be compared: images 11 in" in refused(tmp_path / "a", tmp_path / "b")


def test_the_same_run_twice(runs, refused):
    run = runs / "beta-0.1" / "seed-0"
    assert "is given twice" in refused(run, run)
    assert "is given twice" in refused(runs, run)
    shutil.copytree(run, runs / "copy")
    assert "are the same run" in refused(run, runs / "copy")


def test_unfinished_runs_are_refused_by_name_and_left_out_of_a_folder(runs, capsys, refused):
    matrix = np.full((3, 3), np.nan)
    matrix[0] = 50
    a_run(runs / "begun", matrix, seed=7)
    (runs / "new").mkdir()
    shutil.copy(runs / "begun" / "config.toml", runs / "new")
    assert "has learned 1 of its 3 tasks" in refused(runs / "begun")
    assert "has not learned its first task yet" in refused(runs / "new")
    assert cli.main(["compare", str(runs)]) == 0
    told = capsys.readouterr().err.splitlines()
    assert [line.partition(": left out: ")[2] for line in told] == [
        f"{runs / 'begun'} has learned 1 of its 3 tasks",
        f"the run in {runs / 'new'} has not learned its first task yet (no metrics.json)",
    ]


def test_nothing_is_written_over(runs, tmp_path, refused):
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / "accuracy.png").touch()
    assert "accuracy.png exists: choose another folder (--to)" in refused(runs, "--to", tmp_path / "to")
    assert "is a file: give a folder" in refused(runs, "--to", tmp_path / "to" / "accuracy.png")
    assert [path.name for path in (tmp_path / "to").iterdir()] == ["accuracy.png"]
