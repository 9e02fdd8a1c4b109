"""bench.parts: the ops of a step, what they are called and what they add up to."""

import csv

import pytest

from bench import parts


def test_parts_of_a_step(tmp_path, capsys):
    path = tmp_path / "parts.csv"
    for case in ("split-mnist/task2", "resnet20-k2/task2"):
        assert parts.main([case, "--quick", "--steps", "3", "--device", "cpu", "--csv", str(path)]) == 0
    with path.open(newline="") as file:
        found = list(csv.DictReader(file))
    assert {row["case"] for row in found} == {"split-mnist/task2", "resnet20-k2/task2"}
    mine = [row for row in found if row["case"] == "split-mnist/task2"]
    assert [row["calls"] for row in mine if row["part"] == "hypernet_adam"] == ["1"]
    assert mine[-1]["part"] == parts.REST
    assert sum(float(row["ms"]) for row in mine) == pytest.approx(float(mine[0]["profiled_ms"]), rel=1e-4)
    assert "ms a step" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["thresholds"], "it is an op, no step"),
        (["split-mnist", "--contender", "nobody"], "there are ours, hypnettorch"),
        (["nothing"], "no benchmark is called 'nothing'"),
    ],
)
def test_what_has_no_parts(arguments, message, capsys):
    with pytest.raises(SystemExit):
        parts.main([*arguments, "--quick", "--device", "cpu"])
    assert message in capsys.readouterr().err
