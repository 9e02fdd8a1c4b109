"""The table that `python -m bench.paths` writes is the one that the choice of paths reads."""

from concurrent.futures import Executor, Future

import pytest
import torch

from bench import machine
from bench import paths as table
from bench.case import Unavailable
from bench.op_cases import Convolution
from hypermask_fast.ops import OPS, paths

CPU = torch.device("cpu")
SMALL = [
    table.linear(3, 5, 4, True, torch.float32),
    table.conv2d(Convolution("", 3, 4, 7, 3, 2, batch=2), False, torch.float32),
    table.chunk_linear(3, 9, 4, True, torch.float32),
]


def test_the_grid_asks_for_each_shape_once():
    shapes = list(table.grid())
    assert len(shapes) == len(set(shapes)) > 200
    assert all(OPS[shape.op].layer for shape in shapes)


def scaled(monkeypatch, factors):
    """Backends by name whose results are those of the reference times a factor, 1 where none is given."""

    def by_backend(op, backend):
        return lambda *args: OPS[op](*args, backend="reference") * factors.get(backend, 1.0)

    monkeypatch.setattr(table, "by_backend", by_backend)


@pytest.mark.parametrize("shape", SMALL, ids=lambda shape: shape.op)
def test_both_paths_are_run_and_compared(shape, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # in its interpreter Triton serves the CPU's tensors
    with pytest.raises(Unavailable, match="no backend runs"):
        table.measure(shape, CPU)
    monkeypatch.setattr(table, "fused_backends", lambda shape, args: ["reference"])
    backend, *times = table.measure(shape, CPU, seconds=1e-4)
    assert backend == "reference" and min(times) > 0
    scaled(monkeypatch, {"plain": 1.01})
    with pytest.raises(Unavailable, match="WRONG: reference"):
        table.measure(shape, CPU)


def test_the_fastest_backend_that_is_right_is_noted(monkeypatch, capsys):
    shape = SMALL[0]
    wrong = {"wrong": 1.01, "broken": torch.ones(3), "slow": 1.0, "fast": 1.0}  # 4 outputs times 3 factors: an error
    monkeypatch.setattr(table, "fused_backends", lambda shape, args: list(wrong))
    scaled(monkeypatch, wrong)
    names = iter(["slow", "fast", "mask first"] * 5)
    time = {"slow": 7.0, "fast": 3.0, "mask first": 5.0}
    monkeypatch.setattr(table, "microseconds", lambda run, device, seconds: time[next(names)])
    assert table.measure(shape, CPU) == ("fast", 3.0, 5.0)
    said = capsys.readouterr().err
    assert "WRONG: wrong differs" in said and "WRONG: broken fails: RuntimeError: The size of tensor" in said
    monkeypatch.setattr(machine, "device_lost", lambda: True)
    with pytest.raises(RuntimeError, match="The size of tensor"):
        table.measure(shape, CPU)


def test_rows_are_counted_as_the_choice_of_paths_counts_them(monkeypatch):
    monkeypatch.setattr(paths, "on_gpu", lambda x: True)
    seen = []
    monkeypatch.setattr(paths, "decide", lambda *args: seen.append(args))
    for shape in SMALL:
        OPS[shape.op].layer.choose(shape.op, shape.case.inputs(shape.direction, CPU, shape.dtype))
        op, rows, outputs, reduced, dtype, _, gradient, _, taps, *_ = seen[-1]
        bound = 1 << (shape.measured[0] - 1).bit_length()  # choose rounds up
        assert (op, rows, outputs, reduced) == (shape.op, bound, *shape.measured[1:3])
        assert (dtype, gradient, taps) == ("float32", shape.gradient, 9 if "conv2d" in shape.op else 1)
        assert taps == shape.measured[3]


def test_what_is_written_decides(tmp_path, capsys, monkeypatch):
    def timer(shape):
        if "conv2d" in shape.op:
            raise ValueError("not today\nat all")
        return ("triton", 1.0, 9.0) if shape.gradient else ("cuda", 9.0, 1.0)

    found = list(table.entries(SMALL, timer))
    assert "is left out: ValueError: not today\n" in capsys.readouterr().err
    path = tmp_path / paths.file_name("NVIDIA H100 80GB HBM3")
    assert path.name == "nvidia-h100-80gb-hbm3.json"
    table.write(path, "NVIDIA H100 80GB HBM3", found)
    read = paths.tables(tmp_path)["NVIDIA H100 80GB HBM3"]
    assert list(read.entries) == found
    monkeypatch.setattr(paths, "gpu_name", lambda device: read.gpu)
    monkeypatch.setenv("HYPERMASK_TABLES", str(tmp_path))
    choice = paths.decide("masked_linear", 4, 4, 5, "float32", 4, True, 0)
    assert (choice.path, choice.order) == ("fused", ("triton", "cuda"))


def test_shapes_are_compiled_some_at_a_time_before_they_are_measured(monkeypatch):
    class Pool(Executor):
        def submit(self, function, shape):
            submitted.append(shape)
            done = Future()
            done.set_exception(RuntimeError("no such kernel"))
            return done

    submitted, seen = [], []
    assert table.FIRST[0] <= 12 < table.AHEAD[0] and table.FIRST[1] <= 10  # of the 30 seconds that bench/gpu.sh has
    monkeypatch.setattr(table, "FIRST", (1, 1))
    monkeypatch.setattr(table, "AHEAD", (2, 1))
    for shape in table.compiled(SMALL, Pool()):
        seen.append(shape)
        assert submitted == SMALL[: 1 if len(seen) <= 1 else 3]
    assert seen == SMALL


def test_without_a_gpu_nothing_is_written(capsys, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert table.main(["--out", str(tmp_path / "t.json")]) == 2
    assert "PyTorch sees none" in capsys.readouterr().err and not list(tmp_path.iterdir())
