"""The table that `python -m bench.dispatch` writes is the one that the dispatcher reads."""

from concurrent.futures import Executor, Future

import pytest
import torch

from bench import dispatch as table
from bench import machine
from bench.case import Unavailable
from hypermask_fast import ops
from hypermask_fast.ops import paths as dispatch
from hypermask_fast.ops import registry as backends
from hypermask_fast.ops.plain import mask_first

CPU = torch.device("cpu")
SMALL = [
    table.Shape("masked_linear", (3, 5), (4, 5), (), True, torch.float32),
    table.Shape("masked_conv2d", (2, 3, 7, 7), (4, 3, 3, 3), (2, 1), False, torch.float32),
    table.Shape("chunk_masked_linear", (3, 9), (4, 9), (), True, torch.float32),
]


def test_the_grid_asks_for_each_shape_once():
    shapes = list(table.grid())
    assert len(shapes) == len(set(shapes)) > 200
    assert {shape.op for shape in shapes} <= set(dispatch.LAYERS)


@pytest.mark.parametrize("shape", SMALL, ids=lambda shape: shape.op)
def test_both_paths_are_run_and_compared(shape, monkeypatch):
    with pytest.raises(Unavailable, match="no backend runs"):
        table.measure(shape, CPU)
    monkeypatch.setattr(backends, "fused_backends", lambda op, *args: ["reference"])
    backend, *times = table.measure(shape, CPU, seconds=1e-4)
    assert backend == "reference" and min(times) > 0
    right = getattr(mask_first, shape.op)
    monkeypatch.setattr(mask_first, shape.op, lambda *args: right(*args) * 1.01)
    with pytest.raises(Unavailable, match="WRONG: reference"):
        table.measure(shape, CPU)


def test_the_fastest_backend_that_is_right_is_noted(monkeypatch, capsys):
    shape = SMALL[0]
    right = ops.masked_linear
    wrong = {"wrong": 1.01, "broken": torch.ones(3), "slow": 1.0, "fast": 1.0}  # 4 outputs times 3 factors: an error
    monkeypatch.setattr(backends, "fused_backends", lambda op, *args: list(wrong))
    monkeypatch.setattr(ops, "masked_linear", lambda *args, backend: right(*args) * wrong[backend])
    names = iter(["slow", "fast", "mask first"] * 5)
    time = {"slow": 7.0, "fast": 3.0, "mask first": 5.0}
    monkeypatch.setattr(table, "_microseconds", lambda run, device, seconds: time[next(names)])
    assert table.measure(shape, CPU) == ("fast", 3.0, 5.0)
    said = capsys.readouterr().err
    assert "WRONG: wrong differs" in said and "WRONG: broken fails: RuntimeError: The size of tensor" in said
    monkeypatch.setattr(machine, "device_lost", lambda: True)
    with pytest.raises(RuntimeError, match="The size of tensor"):
        table.measure(shape, CPU)


def test_rows_are_counted_as_the_dispatcher_counts_them(monkeypatch):
    monkeypatch.setattr(dispatch, "on_gpu", lambda x: True)
    seen = []
    monkeypatch.setattr(dispatch, "decide", lambda *args: seen.append(args))
    for shape in SMALL:
        dispatch.choose(shape.op, table.inputs(shape, 0, CPU), {})
        op, rows, outputs, reduced, dtype, _, gradient, _, taps = seen[-1]
        bound = 1 << (shape.sizes[0] - 1).bit_length()  # choose rounds up
        assert (op, rows, outputs, reduced) == (shape.op, bound, *shape.sizes[1:])
        assert (dtype, gradient, taps) == ("float32", shape.gradient, 9 if shape.geometry else 1)


def test_what_is_written_decides(tmp_path, capsys, monkeypatch):
    def timer(shape):
        if shape.geometry:
            raise ValueError("not today\nat all")
        return ("triton", 1.0, 9.0) if shape.gradient else ("cuda", 9.0, 1.0)

    found = list(table.entries(SMALL, timer))
    assert "is left out: ValueError: not today\n" in capsys.readouterr().err
    path = tmp_path / dispatch.file_name("NVIDIA H100 80GB HBM3")
    assert path.name == "nvidia-h100-80gb-hbm3.json"
    table.write(path, "NVIDIA H100 80GB HBM3", found)
    read = dispatch.tables(tmp_path)["NVIDIA H100 80GB HBM3"]
    assert list(read.entries) == found
    monkeypatch.setattr(dispatch, "gpu_name", lambda device: read.gpu)
    monkeypatch.setenv("HYPERMASK_TABLES", str(tmp_path))
    choice = dispatch.decide("masked_linear", 4, 4, 5, "float32", 4, True, 0)
    assert (choice.path, choice.order) == ("fused", ("triton", "cuda"))


def test_shapes_are_compiled_some_at_a_time_before_they_are_measured(monkeypatch):
    class Pool(Executor):
        def submit(self, function, shape):
            submitted.append(shape)
            done = Future()
            done.set_exception(RuntimeError("no such kernel"))
            return done

    submitted, seen = [], []
    monkeypatch.setattr(table, "_AHEAD", 2)
    for shape in table.compiled(SMALL, Pool()):
        seen.append(shape)
        assert submitted == SMALL[: 2 if len(seen) <= 2 else 3]
    assert seen == SMALL


def test_without_a_gpu_nothing_is_written(capsys, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert table.main(["--out", str(tmp_path / "t.json")]) == 2
    assert "PyTorch sees none" in capsys.readouterr().err and not list(tmp_path.iterdir())
