"""bench.many_tasks: contenders take turns, and what is written of them."""

import csv

import pytest

from bench import many_tasks


@pytest.fixture
def turns(monkeypatch):
    """What the workers were asked for, in order; a step takes 10 ms and one more per task, before twice as much."""
    asked = []

    class Fake:
        def __init__(self, checkout, preset, tasks, threads, drawn):
            self.name, self.drawn, self.factor = (preset, tasks), drawn, 1 if checkout == many_tasks.HERE else 2

        def step(self, task):
            asked.append((self.factor, self.drawn, task))
            return self.factor * (10.0 + min(task, self.drawn or task))

        def end(self):
            asked.append("end")

    monkeypatch.setattr(many_tasks, "Worker", Fake)
    return asked


def test_contenders_take_turns_and_every_one_has_a_row(turns, tmp_path, capsys):
    file = tmp_path / "f.csv"
    command = ["split-mnist", "--tasks", "1", "11", "--steps", "3", "--drift-tasks", "5", "--csv", str(file)]
    assert many_tasks.main([*command, "--against", str(tmp_path)]) == 0
    assert turns[:3] == [(1, None, 0), (2, None, 0), (1, 5, 0)] and turns[-3:] == ["end"] * 3
    assert len(turns) == 2 * 3 * (many_tasks.WARM_UP + 3) + 3
    with file.open() as opened:
        rows = {(row["contender"], int(row["tasks"])): row for row in csv.DictReader(opened)}
    assert {key: float(row["median_ms"]) for key, row in rows.items()} == {
        ("here", 1): 10, ("before", 1): 20, ("drawn", 1): 10, ("here", 11): 20, ("before", 11): 40, ("drawn", 11): 15,
    }  # fmt: skip
    assert rows["here", 11]["of_first"] == "2" and rows["drawn", 11]["drift_tasks"] == "5"
    assert int(rows["here", 11]["targets_bytes"]) == 4 * 475_202 * 10
    assert "2.00x" in capsys.readouterr().out
