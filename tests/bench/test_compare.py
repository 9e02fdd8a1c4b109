"""python -m bench --compare: two checkouts, the same cases, turns about, and results that must agree."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

import bench.__main__
from bench import compare, gate, pool
from bench.case import OURS, Case
from bench.runner import Plan

CPU = torch.device("cpu")
PLAN = Plan(CPU, 1, True, ("tuned",), turns=4, seconds=0.01, most=3, command="test")
CASE = Case("c", "c", None, "", (OURS, "peer"), lambda *_: None, lambda: (1.0, 1.0), lambda name: 1e-3)


class Side:
    """A worker whose turns take as long as it is told, in milliseconds."""

    def __init__(self, log, name, times, value=1.0, backend="cpu"):
        self.log, self.name, self.times, self.value, self.backend = log, name, iter(times), value, backend

    def ask(self, command, **arguments):
        if command == "turn":
            self.log.append(self.name)
            return {"ms": [next(self.times)] * 3}
        if command == "prepare":
            assert arguments == {"case": "c", "contender": OURS, "quick": True}
            values = gate.sketches({"a": torch.full((4,), self.value)})
            return {"result": {name: sketch.as_dict() for name, sketch in values.items()}}
        return {"backend": self.backend}

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


def compared(monkeypatch, there, here=None):
    """The comparison of two such sides."""
    log = []
    sides = {pool.ROOT: Side(log, compare.HERE, [2.0, 4.0, 6.0, 8.0], **(here or {}))}
    sides[Path("there")] = Side(log, compare.THERE, [4.0, 4.0, 4.0, 4.0], **there)
    monkeypatch.setattr(compare, "Process", lambda *args, root: sides[root])
    return compare.compare(PLAN, [CASE], "abc", Path("there")), log


def test_turns_alternate_and_ratios_are_of_the_same_turn(monkeypatch, capsys):
    (found,), log = compared(monkeypatch, {})
    assert log == [compare.THERE, compare.HERE, compare.HERE, compare.THERE] * 2
    assert (found.ms, found.base_ms, found.turns, found.base) == (5.0, 4.0, 4, "abc")
    assert (found.least, found.low, found.ratio, found.high, found.most) == (0.5, 0.875, 1.25, 1.625, 2.0)
    assert "ratio 1.250 (quartiles 0.875 to 1.625, all 0.500 to 2.000)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("there", "message"),
    [
        ({"value": 1.1}, "c: left out: the results differ: a is off"),
        ({"backend": "reference"}, "c: left out: other backends: cpu here, reference in BASE"),
    ],
)
def test_what_can_not_be_compared_gets_no_time(monkeypatch, capsys, there, message):
    found, log = compared(monkeypatch, there)
    assert found == [] and log == []
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--compare", "no-such-commit"], "--compare: no commit is called 'no-such-commit'"),
        (["--compare", "HEAD", "--beside", "2"], "leave out --csv and --beside"),
        (["--compare", "HEAD", "--csv", "{}/rows.csv"], "leave out --csv and --beside"),
    ],
)
def test_what_is_refused(capsys, tmp_path, words, message):
    assert bench.__main__.main(["thresholds", "--device", "cpu", *(word.format(tmp_path) for word in words)]) == 2
    assert message in capsys.readouterr().err


_WORKER = "import json, sys\nfor line in sys.stdin:\n    print(json.dumps({'file': __file__}), flush=True)\n"


def test_a_worker_is_that_of_its_checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(pool.ROOT)
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "__init__.py").touch()
    (tmp_path / "bench" / "worker.py").write_text(_WORKER)
    with pool.Process(CPU, 1, "tuned", root=tmp_path) as process:
        assert process.ask("describe")["file"] == str(tmp_path / "bench" / "worker.py")


def git(folder, *words):
    name = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    subprocess.run(["git", *name, *words], cwd=folder, check=True, capture_output=True)


def test_the_other_commit_is_checked_out_built_and_kept(tmp_path):
    git(tmp_path, "init", "-q")
    for text in ("first", "second"):
        (tmp_path / "setup.py").write_text(
            f"import pathlib, sys\npathlib.Path({text!r}).write_text(' '.join(sys.argv))\n"
        )
        git(tmp_path, "add", ".")
        git(tmp_path, "commit", "-q", "-m", text)
    commit, folder = compare.checkout("HEAD~1", tmp_path)
    assert folder == tmp_path / "build" / "compare" / commit
    assert (folder / "first").read_text() == "setup.py -q build_ext --inplace" and not (folder / "second").exists()
    assert compare.checkout(commit, tmp_path) == (commit, folder)
    (folder / "setup.py").write_text("import sys\nsys.exit('no compiler')\n")
    with pytest.raises(LookupError, match="can't be built: no compiler"):
        compare.checkout(commit, tmp_path)


def test_this_checkout_against_itself(monkeypatch, tmp_path):
    """Two real workers, in checkouts by their path."""
    monkeypatch.setattr(compare, "checkout", lambda base: (base, pool.ROOT))
    file = tmp_path / "found.json"
    words = ["thresholds", "--quick", "--device", "cpu", "--threads", "1", "--compare", "HEAD", "--json"]
    assert bench.__main__.main([*words, str(file)]) == 0
    (found,) = json.loads(file.read_text())
    assert found["base"] == "HEAD" and found["ratio"] > 0 and found["share"] == 0
