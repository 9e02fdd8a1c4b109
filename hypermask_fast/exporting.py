"""Files of a plain network for who runs it without this library: safetensors, PyTorch's .pt2, ONNX."""

import importlib
import inspect
import io
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map  # noqa: PLC2701

from .errors import InputError
from .extras import needed_for
from .files import check_tensors, write_atomic

FILES = ("safetensors", "pt2", "onnx")
FORMATS = ("module", *FILES)
_LARGEST_ONNX = 2**31  # bytes, protobuf's own limit


def check(
    format: str,
    path: str | os.PathLike[str] | None,
    inputs: tuple | Tensor | None,
    kwargs: Mapping[str, Any] | None,
    dynamic: bool,
) -> None:
    """Raises InputError where `write` could not be called so."""
    if format not in FORMATS:
        raise InputError(f"format is one of {', '.join(FORMATS)}, not {format!r}")
    if (path is None) != (format == "module"):
        given = "takes no path" if format == "module" else "needs the path of the file to write"
        raise InputError(f"format={format!r} {given}")
    if format in ("module", "safetensors"):
        return
    leaves = [leaf for leaf in tree_leaves((inputs, kwargs)) if isinstance(leaf, Tensor)]
    if not leaves:
        raise InputError(f"format={format!r} runs the network once: give inputs=(x,), an example of what it takes")
    if dynamic and leaves[0].shape[:1] == (1,):
        raise InputError(
            f"format={format!r} needs an example of two samples or more to leave the batch's size open; dynamic=False "
            "is for a file that takes the example's size alone"
        )
    if format == "onnx":
        _onnx()


def write(
    net: nn.Module,
    format: str,
    path: str | os.PathLike[str],
    inputs: tuple | Tensor = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic: bool = True,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Writes a plain network in evaluation mode to a file, which appears whole or not at all.

    Args:
        net: an nn.Module; it is put into evaluation mode.
        format: "safetensors", its state_dict; "pt2", a program for torch.export.load; "onnx".
        inputs, kwargs: an example of what the network takes; not looked at for safetensors.
        dynamic: whether the first dimension of the inputs, the batch, may have another size than in the example.
        metadata: strings that the file holds beside the network.

    Raises:
        InputError: see `check`; a network that PyTorch can't export, or a file that can't be written.
    """
    check(format, path, inputs, kwargs, dynamic)
    net, path, noted = net.eval(), Path(path), dict(metadata or {})
    if format == "safetensors":
        # Tied tensors are written once under each name, so that any network of this kind loads them.
        state = net.state_dict()
        check_tensors(state)
        tensors = {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}
        write_atomic(path, save(tensors, {"format": "pt", **noted}))
        return path
    example = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs), dict(kwargs or {})
    # PyTorch would take one tensor in two places for one input.
    args, named = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, example)
    with _said_in_one_line(net, format):
        program = _program(net, args, named, dynamic)
        data = _pt2(program, noted) if format == "pt2" else _as_onnx(program, noted)
    write_atomic(path, data)
    return path


def _program(net: nn.Module, inputs: tuple, kwargs: dict[str, Any], dynamic: bool) -> torch.export.ExportedProgram:
    shapes, count = None, 0
    if dynamic:
        count = next(leaf.shape[0] for leaf in tree_leaves((inputs, kwargs)) if isinstance(leaf, Tensor))

        def sizes(leaf: Any) -> Any:
            batch = isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == count
            return {0: torch.export.Dim.AUTO} if batch else None

        signature = inspect.signature(net.forward)
        shapes = signature.bind(*tree_map(sizes, inputs), **tree_map(sizes, kwargs)).arguments
        for name, parameter in signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD and name in shapes:
                raise InputError(
                    f"{type(net).__name__}.forward takes {', '.join(shapes[name])} in **{name}, and PyTorch leaves the "
                    "batch's size open for inputs that forward names: dynamic=False writes a file for one size alone"
                )
    program = torch.export.export(net, inputs, kwargs, dynamic_shapes=shapes, strict=False)
    if dynamic and _is_of_one_size(program, count):
        raise InputError(
            f"{type(net).__name__} makes a constant of {count}, the size of the first dimension, which is taken to be "
            "the batch (such as by len(x), where x.shape[0] leaves it open): dynamic=False writes a file for it alone"
        )
    return program


def _is_of_one_size(program: torch.export.ExportedProgram, count: int) -> bool:
    """Whether an input that had `count` rows may have no other number."""
    from torch.fx.experimental.symbolic_shapes import free_symbols  # imports SymPy, which takes a sixth of all imports

    names = set(program.graph_signature.user_inputs)
    values = [node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder" and node.name in names]
    rows = [value.shape[0] for value in values if isinstance(value, Tensor) and value.dim() > 0]
    return any(not free_symbols(size) and int(size) == count for size in rows)


def _pt2(program: torch.export.ExportedProgram, metadata: dict[str, str]) -> bytes:
    file = io.BytesIO()
    torch.export.save(program, file, extra_files=metadata)
    return file.getvalue()


def _as_onnx(program: torch.export.ExportedProgram, metadata: dict[str, str]) -> bytes:
    if sum(t.nbytes for t in program.state_dict.values()) >= _LARGEST_ONNX:
        raise InputError("an ONNX file holds 2 GiB at most, and the network has more: use format='pt2'")
    with _quiet("torch.onnx"):
        made = torch.onnx.export(program, dynamo=True, verbose=False)
    assert made is not None, "without a path it returns the program"
    model: Any = made.model_proto
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=value)
    return model.SerializeToString()


def _onnx() -> None:
    with needed_for("exporting to ONNX", "onnx"):
        for name in ("onnx", "onnxscript"):
            importlib.import_module(name)


@contextmanager
def _quiet(logger: str) -> Iterator[None]:
    """What is missing that this network has no use for is not told."""
    log = logging.getLogger(logger)
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


@contextmanager
def _said_in_one_line(net: nn.Module, format: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(f"PyTorch can't export {type(net).__name__} as {format}: {reason}") from error
