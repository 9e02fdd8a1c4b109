"""How processes join in one run: what they must have in common is compared, then the model is spread over them.

Package, settings, networks, data and kind of device are compared by digests, so that a rank on which something else
lies is named rather than averaged with the others.
"""

from collections.abc import Iterator
from functools import cache
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from .. import __version__, distributed
from ..chunked import ChunkedHyperNetwork
from ..data import Scenario, Split, TensorSplit
from ..errors import InputError
from ..masking.norms import BatchNorm
from ..model import HyperMask
from ..model_state import network_state
from .checkpoint import model_settings
from .tables import TrainingConfig
from .world import World

_PACKAGE = Path(__file__).parents[1]
_KINDS = (".py", ".so", ".pyd", ".json")  # what of the package decides numbers
_SAMPLES = 16  # of each split that are looked at, evenly spaced
_READ = 2  # of one that reads its samples from files
_STEPS = 64  # per unit: inputs are compared as coarsely as this, since last bits may be a processor's own


def join(world: World, model: HyperMask, scenario: Scenario, config: TrainingConfig, others: object = None) -> None:
    """Compares the processes of a run and makes the model one that they train together.

    Args:
        world: the processes; of one alone nothing is done.
        model: on its device. Where it is shared among processes already, it stays as it is.
        scenario: its labels and some of its samples are compared.
        config: how it is trained; others: what else decides that. Their `repr` is compared.

    Raises:
        InputError: fewer samples in a batch than processes; on all ranks where some have something else than the first
            one, naming these.
    """
    if not world.several:
        return
    if config.batch_size < world.size:
        raise InputError(
            f"training.batch_size {config.batch_size} is smaller than the number of processes, {world.size}: each "
            "of them needs a sample of every batch"
        )
    with world.waiting(lambda: "the run's beginning"):
        world.check_same(
            {
                "version or sources of hypermask_fast": package_digest(),
                "kind of device": next(model.parameters()).device.type.encode(),
                "settings": repr((config, others)).encode(),
                "networks": _networks(model),
                "data": _data(scenario),
            }
        )
        if model.hypernet.processes is None:
            _spread(world, model, config)


def _spread(world: World, model: HyperMask, config: TrainingConfig) -> None:
    slices = not config.inspect and _has_slices(model, world.size)  # one rank inspects, so all need the whole model
    if config.shard == "hypernetwork" or (config.shard == "auto" and slices):
        distributed.shard(model)
    else:
        distributed.replicate(model)
    norms = any(isinstance(module, BatchNorm) for module in model.net.modules())
    if norms and config.batch_norm == "synchronised":
        distributed.synchronise_batch_norm(model)


def _has_slices(model: HyperMask, ranks: int) -> bool:
    """Whether the slices that torch.chunk cuts give every rank rows of the output layer, or chunks."""
    hypernet = model.hypernet
    rows = len(hypernet.chunk_embeddings if isinstance(hypernet, ChunkedHyperNetwork) else hypernet.output.weight)
    return -(-rows // ranks) * (ranks - 1) < rows


@cache
def package_digest() -> bytes:
    """Of this package's sources and of its compiled extension, as they are installed here."""
    digest = sha256(__version__.encode())
    for folder in (_PACKAGE, _PACKAGE / "kernels"):  # the latter is a link in a checkout
        for path in sorted(folder.rglob("*")):
            if path.suffix in _KINDS and path.is_file():
                digest.update(f"{path.relative_to(folder).as_posix()} {path.stat().st_size}\n".encode())
                digest.update(path.read_bytes())
    return digest.digest()


def _networks(model: HyperMask) -> bytes:
    """Settings, and the names, shapes and dtypes of its tensors."""
    tensors = [(name, tuple(value.shape), value.dtype) for name, value in network_state(model).items()]
    return repr((model_settings(model), model.drift, model.hypernetwork, model.num_tasks, tensors)).encode()


def _data(scenario: Scenario) -> bytes:
    digest = sha256(repr((scenario.name, scenario.input_shape, scenario.classes)).encode())
    for task in scenario.tasks:
        digest.update(task.name.encode())
        for split in task.splits:
            digest.update(str(len(split)).encode())
            for part in _of_split(split):
                digest.update(part.cpu().contiguous().numpy().tobytes())
    return digest.digest()


def _of_split(split: Split) -> Iterator[Tensor]:
    if not len(split):
        return
    if isinstance(split, TensorSplit):
        x, _ = split.batch(_some_of(len(split), _SAMPLES).to(split.device))
        yield split.labels
        yield (x.double() * _STEPS).round().nan_to_num().long()
    else:  # whose inputs may be random, by whatever generators
        with torch.random.fork_rng([]):
            x, labels = split.batch(_some_of(len(split), _READ))
        yield labels
        yield torch.tensor(x.shape)


def _some_of(samples: int, count: int) -> Tensor:
    return torch.linspace(0, samples - 1, min(count, samples)).round().long()
