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
    if path is not None and not isinstance(path, (str, os.PathLike)):
        raise InputError(f"path is that of the file to write, not {path!r}")
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise InputError(f"kwargs are inputs by name, such as {{'mask': mask}}, not {type(kwargs).__name__}")
    if format in ("module", "safetensors"):
        return
    leaves = [leaf for leaf in tree_leaves((inputs, kwargs)) if isinstance(leaf, Tensor)]
    if not leaves:
        raise InputError(f"format={format!r} runs the network once: give inputs=(x,), an example of what it takes")
    if dynamic and _rows(leaves) == 1:
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
        dynamic: whether the first dimension of every input, such as the batch, may have another size than in the
            example, as far as the network's own code leaves it open.
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
    with _named(net, kwargs):
        shapes = None
        if dynamic:
            each = tree_map(_open, inputs), tree_map(_open, kwargs)
            shapes = inspect.signature(net.forward).bind(*each[0], **each[1]).arguments
        program = torch.export.export(net, inputs, kwargs, dynamic_shapes=shapes, strict=False)
    count = _rows((inputs, kwargs))
    if dynamic and count is not None and (name := _fixed(program, count)):
        raise InputError(
            f"{type(net).__name__} makes a constant of {name}'s first dimension, {count}, which should be the batch "
            "(len(x) does so, where x.shape[0] leaves it open): put the batch first, give an example of another batch "
            "size if this is none, or dynamic=False writes a file for this size alone"
        )
    return program


def _open(leaf: Any) -> Any:
    """What torch.export is told of an input: its first dimension may have any size that the network takes."""
    return {0: torch.export.Dim.AUTO} if isinstance(leaf, Tensor) and leaf.dim() > 0 else None


def _rows(inputs: Any) -> int | None:
    """The first dimension of the first tensor that has one: the batch's size in the example."""
    return next((leaf.shape[0] for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.dim() > 0), None)


@contextmanager
def _named(net: nn.Module, kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Within the block each of `kwargs` is a parameter of `net.forward`: PyTorch takes no sizes for a **kwargs."""
    forward, before = net.forward, vars(net).get("forward")
    signature = inspect.signature(forward)
    known = {name: p for name, p in signature.parameters.items() if p.kind is not p.VAR_KEYWORD}
    more = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in kwargs if name not in known]
    if not more or len(known) == len(signature.parameters):
        yield
        return

    def named(*inputs: Any, **kwargs: Any) -> Any:
        return forward(*inputs, **kwargs)

    named.__signature__ = signature.replace(parameters=[*known.values(), *more])
    net.forward = named
    try:
        yield
    finally:
        del net.forward
        if before is not None:
            net.forward = before


def _fixed(program: torch.export.ExportedProgram, count: int) -> str | None:
    """The name of an input that had `count` rows and may have no other number; None where there is none."""
    from torch.fx.experimental.symbolic_shapes import free_symbols  # imports SymPy, which takes a sixth of all imports

    names = set(program.graph_signature.user_inputs)
    for node in program.graph.nodes:
        value = node.meta.get("val") if node.op == "placeholder" and node.name in names else None
        size = value.shape[0] if isinstance(value, Tensor) and value.dim() > 0 else None
        if size is not None and not free_symbols(size) and int(size) == count:
            return node.name
    return None


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
