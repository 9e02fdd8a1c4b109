"""Measured launch settings, on request only: `tune` times candidates and keeps the fastest on disk.

Without a call of `tune` nothing here runs but one look for the file. Settings live in
$HYPERMASK_CACHE_DIR, else $XDG_CACHE_HOME/hypermask_fast, else ~/.cache/hypermask_fast, as tuning.json.
"""

import functools
import inspect
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

import torch
from triton import next_power_of_2
from triton.testing import do_bench

from ..errors import InputError
from .tiles import Tiles

_OF_A_BATCH = ("rows", "pixels")  # sizes that count in powers of two: batches of about one size share their settings


def cache_file() -> Path:
    directory = os.environ.get("HYPERMASK_CACHE_DIR")
    if directory is None:
        directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hypermask_fast"
    return Path(directory) / "tuning.json"


@functools.cache
def _measured(file: Path) -> dict[str, Tiles]:
    try:
        return {key: Tiles(**tiles) for key, tiles in json.loads(file.read_text()).items()}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{file} does not hold launch settings ({error}): delete it or tune again") from error


def tunable(heuristic: Callable[..., Tiles]) -> Callable[..., Tiles]:
    """`heuristic(*sizes, dtype, device)`, or what `tune` found for these sizes, dtype and device, if it was asked."""
    sizes = list(inspect.signature(heuristic).parameters)[:-2]

    def key(*arguments: object) -> str:
        *values, dtype, device = arguments
        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        pairs = zip(sizes, values, strict=True)
        rounded = (str(next_power_of_2(max(v, 1)) if name in _OF_A_BATCH else v) for name, v in pairs)
        return f"{heuristic.__name__}/{gpu}/{str(dtype).removeprefix('torch.')}/{'x'.join(rounded)}"

    @functools.wraps(heuristic)
    def settings(*arguments: object) -> Tiles:
        measured = _measured(cache_file())
        found = measured.get(key(*arguments)) if measured else None
        return found or heuristic(*arguments)

    settings.key = key
    return settings


def candidates(base: Tiles) -> list[Tiles]:
    """The heuristic's own settings first, then their neighbours that tensor cores can use."""
    found = [base]
    for block_m in (32, 64, 128):
        for block_k in (32, 64, 128):
            for warps, stages in ((4, 3), (4, 5), (8, 3)):
                found += [Tiles(block_m, base.block_n, block_k, warps, stages, s) for s in {1, base.splits}]
    return list(dict.fromkeys(found))


def tune(
    settings: Callable[..., Tiles],
    arguments: tuple,
    launch: Callable[[Tiles], object],
    tiles: Iterable[Tiles] | None = None,
    timer: Callable[[Callable[[], object]], float] = do_bench,
) -> Tiles:
    """Time launch(tiles) for each candidate, keep the fastest on disk and return it; later launches use it.

    Args:
        settings: one of `kernels.settings`, whose launch this is.
        arguments: what it is asked with: sizes, dtype, device.
        launch: runs the kernel with the given settings.
        tiles: what to try; None for the `candidates` around the heuristic's own.
        timer: milliseconds of a call; Triton's do_bench, or another clock.

    Returns:
        The fastest settings. Candidates that the device cannot launch (registers, shared memory) are passed over.
        A file that does not hold settings is replaced.

    Raises:
        InputError: none of the candidates could be launched.
    """
    from triton.runtime.errors import OutOfResources

    key, times = settings.key(*arguments), {}
    for candidate in candidates(settings.__wrapped__(*arguments)) if tiles is None else tiles:
        try:
            times[candidate] = timer(functools.partial(launch, candidate))
        except OutOfResources:
            continue
    if not times:
        raise InputError(f"none of the settings tried for {key} can be launched on this device")
    best = min(times, key=times.__getitem__)
    file = cache_file()
    try:
        measured = _measured(file) | {key: best}
    except InputError:
        measured = {key: best}
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_suffix(f".{os.getpid()}.tmp")
    scratch.write_text(json.dumps({k: asdict(t) for k, t in measured.items()}, indent=1, sort_keys=True))
    scratch.replace(file)  # in one step: a reader never sees half a file
    _measured.cache_clear()
    return best


def tune_masked_linear(x: torch.Tensor, weight: torch.Tensor, logits: torch.Tensor, threshold: torch.Tensor) -> Tiles:
    """Tune masked_linear's product for x (rows, in) and weight (out, in) as given; later calls use the result.

    Raises:
        InputError: CPU tensors outside the interpreter.
    """
    from . import host, settings
    from .masked_linear import launch_product

    host.check_runnable(x)
    arguments = len(x), weight.shape[0], weight.shape[1], x.dtype, x.device
    return tune(
        settings.masked_product, arguments, lambda tiles: launch_product(x, weight, logits, threshold, None, tiles)
    )
