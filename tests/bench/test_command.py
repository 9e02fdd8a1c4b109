"""`python -m bench` as a command: what it refuses, what a run leaves, and how results are read."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pandas.testing import assert_frame_equal

import bench.__main__
from bench import machine, registry, results
from bench import table as table_module
from bench.case import OURS
from bench.plots import of_one_run, plot
from bench.steps import ANY_LOOP
from bench.table import growth, table

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


def test_quick_run(tmp_path):
    pytest.importorskip("hypnettorch")
    file, copy = tmp_path / "results.csv", tmp_path / "rows.json"
    names = ["permuted-mnist-chunked/task2", "thresholds"]
    command = [sys.executable, "-m", "bench", *names, "--quick", "--device", "cpu", "--threads", "1"]
    command += ["--malloc", "tuned", "--without", "torch.compile", "--csv", str(file), "--json", str(copy)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = results.read(file)
    steps = rows[rows.experiment == "permuted-mnist-chunked"]
    contenders = (OURS, ANY_LOOP, "hypnettorch", "batched torch", "plain network")
    assert set(zip(steps.contender, steps.task_index, strict=True)) == {(contender, 2) for contender in contenders}
    assert set(rows.contender[rows.case == "thresholds"]) > {OURS, "torch.kthvalue"}
    assert (rows.median_ms > 0).all() and (rows.malloc_setting == machine.malloc_setting("tuned")).all()
    assert (rows.peak_memory.notna() == rows.task_index.notna()).all()
    assert len(json.loads(copy.read_text())) == len(rows)
    assert "permuted-mnist-chunked/task2" in done.stdout and "torch.kthvalue" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["no-such-benchmark"], "there are split-mnist, permuted-mnist"),
        (["thresholds", "--without", "torch.sorted"], "there are ours, torch.sort"),
        (["thresholds", "--json", "{}/none/rows.json"], "none/rows.json: No such file or directory"),
        (["thresholds", "--csv", "{}"], ": Is a directory"),
        (["thresholds", "--csv", __file__], "is no results file of this version"),
        (["--turns", "0"], "argument --turns: must be 1 or more, not 0"),
        (["--device", "cuda"], "PyTorch sees no GPU"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_measured(monkeypatch, capsys, tmp_path, words, message):
    monkeypatch.setattr(bench.__main__, "Runner", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    try:
        code = bench.__main__.main([word.format(tmp_path) for word in words])
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_cases_come_in_the_order_of_the_names():
    """What is wanted most goes first, so that a run that is cut off has it."""
    names = ["thresholds", "permuted-mnist/task9", "permuted-mnist"]
    found = [case.name for case in registry.select(names, CPU, False)]
    assert found == ["thresholds", "permuted-mnist/task9", "permuted-mnist/task0", "permuted-mnist/task4"]


_WITHOUT_PACKAGES = """
import sys
for name in ("hypnettorch", "tomli_w", "sklearn", "PIL", "tqdm", "tensorboard", "matplotlib", "pandas"):
    sys.modules[name] = None
import torch
from bench import __main__, paths, registry, table
assert len(registry.cases(torch.device("cuda"), False)) > 30
"""


def test_a_machine_with_torch_and_triton_alone_can_measure():
    """GPUs are often to be had without a network, on an image that is not ours."""
    pytest.importorskip("triton")
    subprocess.run([sys.executable, "-c", _WITHOUT_PACKAGES], cwd=ROOT, check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forgets a process's peak")
def test_peak_memory_leaves_out_what_was_freed_before():
    """Freed by malloc, and kept by it: `tuned` is told to keep all."""
    program = (
        "import torch; from bench import worker; cpu = torch.device('cpu'); x = torch.ones(1 << 26); del x; "
        "before = worker.peak_memory(cpu); worker.reset_peak_memory(); print(before - worker.peak_memory(cpu))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=machine.environment("tuned"), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 250e6  # of 268


def a_row(**changes):
    values = dict.fromkeys(results.columns(), "")
    values |= {"machine": "m-2-cores", "device": "M", "cores": 2, "threads": 2, "malloc": "tuned", "dtype": "float32"}
    values |= {"experiment": "e", "case": "e/task0", "task_index": 0, "contender": OURS, "date": "2026-01-01"}
    values |= {"median_ms": 1.5, "p20_ms": 1.25, "p80_ms": 2.0, "repeats": 9, "floor_ms": 0.5, "floor_ratio": 3.0}
    values |= {"bytes": 5.7e9, "flops": 12.0, "ratio": 1.0, "peak_memory": 10**9, "bandwidth": 6e10, "flop_rate": 2e11}
    return results.Row(**(values | {"gate": 0.25, "shapes": 'batch 8, "odd"', "command": "python -m bench"} | changes))


def test_csv_round_trip(tmp_path):
    file = tmp_path / "deep" / "m.csv"
    nothing = dict.fromkeys(("task_index", "peak_memory", "ratio", "gate"))
    first, second = a_row(commit="15e4567"), a_row(**nothing, case="op", experiment="op")  # no number, that commit
    results.append([first], file)
    results.append([second], file)
    read = results.read(file)
    assert_frame_equal(read, results.frame([first, second]))
    assert [results.Row(**row) for row in read.astype(object).where(read.notna(), None).to_dict("records")] == [
        first,
        second,
    ]
    assert file.read_text().count("median_ms") == 1
    file.write_text("other,columns\n")
    for use in (lambda: results.append([first], file), lambda: results.read(file)):
        with pytest.raises(ValueError, match="its columns are other, columns"):
            use()


def test_latest_table_and_plots(tmp_path):
    old, new = a_row(), a_row(date="2026-02-01", median_ms=1.25)
    for both in ([old, new], [new, old]):
        assert_frame_equal(results.latest(results.frame(both)), results.frame([new]))
    peer = {"contender": "peer", "ratio": 4.0}
    rows = [new, a_row(case="e/task4", task_index=4, median_ms=2.0), a_row(**peer)]
    rows += [a_row(**peer, case="e/task4", task_index=4), a_row(**peer, case="op", experiment="op", task_index=None)]
    text = table(results.frame(rows))
    assert "e/task4" in text and "1.25" in text.splitlines()[1]
    assert growth(results.frame(rows)).splitlines()[1].endswith("1.60")
    assert growth(results.frame(rows[-1:])) == ""
    file = tmp_path / "m.csv"
    results.append(rows, file)
    pictures = plot(file, tmp_path)
    kinds = ("step-time", "step-ratios", "op-ratios")
    assert [picture.name for picture in pictures] == [f"m-tuned-{kind}.svg" for kind in kinds]
    assert all(picture.stat().st_size > 1000 for picture in pictures)


def test_pictures_hold_what_was_measured_in_the_run_of_the_library_alone():
    """Times of two runs on a shared machine can't be compared, nor be under one commit's name."""
    ours, same = a_row(commit="new"), a_row(commit="new", contender="peer", date="2026-01-02")
    others = a_row(commit="old", contender="older"), a_row(commit="new", contender="another", command="another run")
    apart = a_row(commit="old", contender="peer", case="without the library")
    kept = of_one_run(results.frame([ours, *others, same, apart]))
    assert list(zip(kept.case, kept.contender, strict=True)) == [
        ("e/task0", OURS),
        ("e/task0", "peer"),
        ("without the library", "peer"),
    ]


def test_table_of_files_and_of_what_is_none(tmp_path, capsys):
    file = tmp_path / "m.csv"
    results.append([], file)
    assert file.read_text() == ""
    results.append([a_row()], file)
    assert table_module.main([str(file)]) == 0
    assert "e/task0" in capsys.readouterr().out
    (tmp_path / "other.csv").write_text("a,b\n")
    for name, message in (("none.csv", "none.csv: No such file or directory"), ("other.csv", "is no results file")):
        with pytest.raises(SystemExit) as ended:
            table_module.main([str(tmp_path / name)])
        assert ended.value.code == 2
        assert message in capsys.readouterr().err
