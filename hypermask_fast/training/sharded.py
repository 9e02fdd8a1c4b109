"""A checkpoint's tensors where several processes write or read them: each its own slices, side by side."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import InputError
from ..files import writing
from ..processes import local
from ..ranks import Ranks
from .manifest import DTYPES, REPLICATED, SCRATCH, Manifest, Sharded, check_slices, free, replace, scratch
from .slices import Layout, Region, entire, extent, meet
from .tensor_files import MANIFEST, REMEDY, Written, check_size, opened, settle, sync, write


def layout(name: str, tensor: Tensor) -> Layout | None:
    """How a tensor is cut over processes; None where every process has all of it.

    Raises:
        InputError: it is cut in a way that a checkpoint can't say.
    """
    try:
        found = Layout.of(tensor)
    except InputError as error:
        raise InputError(f"{name} can't be saved: {error}") from error
    return None if found is None or found.dim is None or not tensor.numel() else found


def whole(tensor: Tensor) -> Tensor:
    """A tensor that is not cut, as an ordinary one."""
    return local(tensor) if tensor.numel() else torch.empty(tensor.shape, dtype=tensor.dtype)


def spread_over(tensors: Iterable[Tensor]) -> Ranks:
    """The processes among which DTensors are spread; this one alone where there is none.

    Raises:
        InputError: they are spread over some of the processes only, or over several sets of them.
    """
    meshes = {mesh for tensor in tensors if (mesh := getattr(tensor, "device_mesh", None)) is not None}
    if not meshes:
        return Ranks()
    if any(mesh.size() != dist.get_world_size() for mesh in meshes):
        raise InputError("a checkpoint's tensors are sharded over some of the processes: shard them over all")
    return Ranks.of()


# -- writing ----------------------------------------------------------------------------------------------------------


def save(
    run_dir: Path,
    target: str,
    tensors: dict[str, Tensor],
    layouts: dict[str, Layout],
    state: dict[str, Any],
    ranks: Ranks,
) -> None:
    """Every process writes its part of a folder that is not the checkpoint's yet; then the first one makes it so.

    Args:
        target: the folder's name in the run's.
        layouts: of those tensors that are cut; others: see `checkpoint.save`.

    Raises:
        InputError: a process can't write; the checkpoint before is still there.
    """
    partial = run_dir / SCRATCH / target
    with ranks.together():
        if ranks.first:
            with writing(run_dir / target):
                scratch(run_dir)
                partial.mkdir()
    files: dict[str, Written] = {}
    slices: dict[str, tuple[int, int]] = {}
    with ranks.together():
        if ranks.first:
            with writing(run_dir / target / REPLICATED):
                rest = {name: whole(tensor) for name, tensor in tensors.items() if name not in layouts}
                files[REPLICATED] = write(rest, partial / REPLICATED)
                sync(partial / REPLICATED)
        mine = {name: local(tensors[name]) for name, layout in layouts.items() if layout.first_replica}
        if mine := {name: part for name, part in mine.items() if part.numel()}:
            file = f"rank-{dist.get_rank():04d}.safetensors"
            slices = {name: _ends(name, layouts[name], tensors[name]) for name in mine}
            with writing(run_dir / target / file):
                files[file] = write(mine, partial / file)
                sync(partial / file)
    told = ranks.told([files, slices])
    with ranks.together():
        if ranks.first:
            with writing(run_dir / target):
                new = _manifest(target, tensors, layouts, state, told)
                for file, written in new.files.items():
                    _check_seen(run_dir, file, written)
                free(run_dir, target)
                settle(partial, run_dir / target)
                replace(run_dir, new)


def _ends(name: str, layout: Layout, tensor: Tensor) -> tuple[int, int]:
    """From where to where this process's slice goes. Raises InputError where it is another one than torch.chunk's."""
    expected = tuple(stop - start for start, stop in layout.region(tensor.shape))
    part = local(tensor)
    if tuple(part.shape) != expected or tensor.dtype not in DTYPES.values():
        raise InputError(f"{name} can't be saved: its slice here is {part.dtype} {tuple(part.shape)}, not {expected}")
    assert layout.dim is not None, "it is cut"
    return layout.ends(tensor.shape[layout.dim])


def _manifest(
    target: str, tensors: dict[str, Tensor], layouts: dict[str, Layout], state: dict[str, Any], told: list[Any]
) -> Manifest:
    """Of what all processes have told that they have written: their files, and the slices in the one that has any."""
    files = {f"{target}/{name}": Written(*written) for files, _ in told for name, written in files.items()}
    sharded: dict[str, Sharded] = {}
    for name, layout in layouts.items():
        assert layout.dim is not None, "it is cut"
        ends: dict[str, tuple[int, int]] = {}
        for names, slices in told:
            if name in slices:
                (file,) = (file for file in names if file != REPLICATED)
                ends[f"{target}/{file}"] = (slices[name][0], slices[name][1])
        sharded[name] = Sharded(tensors[name].dtype, tuple(tensors[name].shape), layout.dim, ends)
    new = Manifest(state, target, files, sharded)
    try:
        check_slices(new)
    except ValueError as error:
        raise InputError(f"{target} can't be saved: {error}") from error
    return new


def _check_seen(run_dir: Path, file: str, written: Written) -> None:
    """Raises InputError where a file that another process has written can't be seen here."""
    try:
        check_size(run_dir / SCRATCH, file, written)
    except InputError as error:
        name = Path(file).name
        raise InputError(
            f"cannot save {run_dir / file}: {name} as written is not seen by the first process: the run's folder must "
            "be on a file system that all processes share"
        ) from error


# -- reading ----------------------------------------------------------------------------------------------------------


def read(
    run_dir: Path, manifest: Manifest, device: torch.device | str, layouts: Mapping[str, Layout]
) -> dict[str, Tensor]:
    """The checkpoint's tensors; see `checkpoint.load`. Of a DTensor this process's slice is read and nothing else."""
    for file, written in manifest.files.items():
        check_size(run_dir, file, written)  # so that no more is allocated below than there is on the disk
    shapes = {name: tensor.shape for name, tensor in manifest.sharded.items()}
    mine = {name: _region(shape, layouts.get(name)) for name, shape in shapes.items()}
    found = {
        name: torch.empty(extent(mine[name]), dtype=tensor.dtype, device=device)
        for name, tensor in manifest.sharded.items()
    }
    for file, written in manifest.files.items():
        slices = manifest.slices(file)
        if slices and not any(meet(region, mine[name]) for name, region in slices.items()):
            continue
        with opened(run_dir, file, written) as tensors:
            names = set(tensors.keys())
            if (names != slices.keys()) if slices else (names & mine.keys()):
                raise InputError(f"{run_dir / file} has other tensors than {MANIFEST} says{REMEDY}")
            for name in names:
                if name in slices:
                    stored, dtype = tensors.get_slice(name), manifest.sharded[name].dtype
                    if stored.get_shape() != extent(slices[name]) or DTYPES.get(stored.get_dtype()) != dtype:
                        raise InputError(f"{run_dir / file} has another slice of {name} than {MANIFEST} says{REMEDY}")
                    _copy(stored, slices[name], found[name], mine[name])
                elif name in layouts:
                    stored = tensors.get_slice(name)
                    shapes[name] = tuple(stored.get_shape())
                    part = _part(stored, _region(shapes[name], layouts[name]))
                    found[name] = torch.empty(part.shape, dtype=part.dtype, device=device).copy_(part)
                else:
                    found[name] = tensors.get_tensor(name).to(device)
    fit = {name: layout for name in shapes if (layout := layouts.get(name)) is not None and layout.fits(shapes[name])}
    return found | {name: layout.tensor(found[name], shapes[name]) for name, layout in fit.items()}


def _region(shape: Sequence[int], layout: Layout | None) -> Region:
    """What this process is to have of a tensor of that shape."""
    return layout.region(shape) if layout is not None and layout.fits(shape) else entire(shape)


def _part(stored: Any, region: Region) -> Tensor:
    """A part of a tensor in an open file, where it lies."""
    return stored[tuple(slice(start, stop) for start, stop in region)]


def _copy(stored: Any, there: Region, values: Tensor, here: Region) -> None:
    """Copies what two regions of a tensor share: from a file, which has one, to `values`, which are to be the other."""
    if not meet(there, here):
        return
    both = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(there, here, strict=True))
    target = values[tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(both, here, strict=True))]
    source = tuple((a - start, b - start) for (a, b), (start, _) in zip(both, there, strict=True))
    target.copy_(_part(stored, source))
