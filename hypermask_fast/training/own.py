"""Data and networks of the user's own in a run's settings: how they get there, are found again and are read.

Code runs only where the user names it. `train` takes it from the command line, or from a configuration file that it is
given. A run's folder may be somebody else's: what its config.toml names is called only where the user names it again.
"""

import shlex
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from .. import own_code
from ..data import Scenario, TensorSplit, image_folders, load_scenario
from ..data.folders import IMAGES, folder_fingerprint
from ..data.scenario import PARTS
from ..errors import InputError
from .config import DataConfig, RunConfig
from .targets import TargetConfig

_OF_PRESETS = ("validation_per_class", "edition")
_OF_IMAGES = ("classes_per_task", "image_size", "colour", "normalise")
_FLAGS = {"scenario": "--scenario", "network": "--network"}


def with_own(
    config: RunConfig,
    scenario: str | None = None,
    network: str | None = None,
    images: Path | str | None = None,
) -> RunConfig:
    """The configuration with its data or its network replaced: what it said of those that were there is left out.

    Args:
        scenario, network: `file.py:function` or `module:function`.
        images: a folder, see `image_folders`, instead of a scenario.

    Raises:
        InputError: such a name that is none, or both a scenario and images.
    """
    if scenario is not None and images is not None:
        raise InputError("--scenario and --images both say what the data are: give one of them")
    named = {}
    for what, name in (("scenario", scenario), ("network", network)):
        if name is not None:
            named[what] = _absolute(what, name)
    data, target = config.data, config.target
    if scenario is not None:
        data = DataConfig(named["scenario"])
    if images is not None:
        data = DataConfig(IMAGES, str(Path(images).expanduser().resolve()))
    if network is not None:
        target = TargetConfig(named["network"])
    changed = replace(config, data=data, target=target)
    return config if changed == config else replace(changed, title="")


def tell_code(written: RunConfig, config: RunConfig, tell: Callable[[str], None]) -> None:
    """Tells what code a configuration file has run: the functions that it names and the command line does not."""
    values = ((each.data.scenario, each.target.name) for each in (written, config))
    for what, name, now in zip(("scenario", "network"), *values, strict=True):
        if own_code.is_own(name) and name == now:
            tell(f"the configuration says that the {what} is code, which runs now: {name}")


def named_again(config: RunConfig, run_dir: Path, scenario: str | None, network: str | None) -> RunConfig:
    """A run's own configuration, with the functions that the user has named again, where they are now.

    Raises:
        InputError: the run has such a function and the user has not named it, or has named another one.
    """
    values = {"scenario": config.data.scenario, "network": config.target.name}
    named = {"scenario": scenario, "network": network}
    missing = [what for what, stored in values.items() if own_code.is_own(stored) and named[what] is None]
    if missing:
        raise InputError(
            f"the {' and the '.join(missing)} of the run in {run_dir} {'is' if len(missing) == 1 else 'are'} code, "
            "which runs only where you name it: add "
            + " ".join(f"{_FLAGS[what]} {shlex.quote(values[what])}" for what in missing)
        )
    for what, given in named.items():
        if given is None:
            continue
        stored = values[what]
        values[what] = _absolute(what, given)
        if own_code.portable(values[what]) != own_code.portable(stored):
            raise InputError(
                f"{_FLAGS[what]} {given} is not the {what} of the run in {run_dir}, {own_code.short(stored)}"
            )
    data, target = replace(config.data, scenario=values["scenario"]), replace(config.target, name=values["network"])
    return replace(config, data=data, target=target)


def fingerprinted(config: RunConfig) -> RunConfig:
    """The configuration with fingerprints of the data and code of one's own, where it has none yet, and full paths.

    Raises:
        InputError: they are missing, or others than the configuration has the fingerprints of.
    """
    data, target = _fingerprints(config)
    for changed in _changed(config, data, target):
        raise InputError(
            f"{changed} since the fingerprint in the run's configuration was taken, so that its numbers would "
            "change: restore it, or start a new run in another folder (--out)"
        )
    return replace(
        config,
        data=replace(config.data, scenario=own_code.absolute(config.data.scenario), fingerprint=data),
        target=replace(config.target, name=own_code.absolute(config.target.name), fingerprint=target),
    )


def warn_of_changes(config: RunConfig) -> bool:
    """Whether data or code of one's own are others than those that the run was trained with; a warning says so."""
    found = _changed(config, *_fingerprints(config))
    for changed in found:
        warnings.warn(f"{changed} since the run began: what follows is of what it is now", stacklevel=2)
    return bool(found)


def counted(config: RunConfig, scenario: Scenario) -> RunConfig:
    """The configuration of a run with the number of its tasks, where only the data say it."""
    if config.data.tasks is not None or not (own_code.is_own(config.data.scenario) or config.data.scenario == IMAGES):
        return config
    return replace(config, data=replace(config.data, tasks=len(scenario.tasks)))


def read_scenario(config: RunConfig) -> Scenario:
    """The scenario of a configuration, on the CPU. A function of the user's own is called.

    The function gets, of these arguments, those that it names: data_dir (a Path, or None), seed, validation and tasks
    (each None where it is not set). PyTorch's generator is seeded with the run's seed. Of what it returns, the first
    `data.tasks` tasks are taken.

    Raises:
        InputError: unknown, its files missing or damaged, or a function that raises, returns no Scenario or one of too
            few tasks or with wrong samples, or does not take a setting that is set.
    """
    data = config.data
    if data.scenario != IMAGES:
        for name in _OF_IMAGES:
            if getattr(data, name) is not None:
                raise InputError(f"data.{name} is for images (--images), not for {own_code.short(data.scenario)}")
    if data.scenario == IMAGES or own_code.is_own(data.scenario):
        for name in _OF_PRESETS:
            if getattr(data, name) is not None:
                raise InputError(f"data.{name} is for scenarios that come with the library, not for your own data")
    if data.scenario == IMAGES:
        if data.dir is None:
            raise InputError("images need their folder: give it (--images)")
        return image_folders(
            data.dir,
            data.classes_per_task,
            image_size=data.image_size,
            colour=data.colour or "rgb",
            normalise=data.normalise or "none",
            validation=data.validation or 0,
            tasks=data.tasks,
        )
    if not own_code.is_own(data.scenario):
        return load_scenario(
            data.scenario,
            data.dir,
            seed=config.seed,
            validation=data.validation,
            validation_per_class=data.validation_per_class,
            tasks=data.tasks,
            edition=data.edition,
        )
    return _called(config)


def _called(config: RunConfig) -> Scenario:
    data, told = config.data, f"scenario {own_code.short(config.data.scenario)}"
    arguments = {
        "data_dir": None if data.dir is None else Path(data.dir),
        "seed": config.seed,
        "validation": data.validation,
        "tasks": data.tasks,
    }
    needed = [name for name in ("data_dir", "validation") if arguments[name] is not None]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        made = own_code.call(data.scenario, "scenario", arguments, needed)
        if not isinstance(made, Scenario):
            raise InputError(f"{told} must return a hypermask_fast.data.Scenario, not {type(made).__name__}")
        own_code.guarded(data.scenario, "scenario", lambda: _check_samples(made))
    if data.tasks is not None and len(made.tasks) < data.tasks:
        raise InputError(f"{told} has {len(made.tasks)} tasks: data.tasks must be at most that, not {data.tasks}")
    return replace(made, tasks=made.tasks[: data.tasks])


def _check_samples(scenario: Scenario) -> None:
    """Of each split its first sample, and what is in memory as a whole.

    Raises:
        InputError: a sample of another shape than the scenario says or with a number that is not finite, or a class
            without training or test samples.
    """
    for t, task in enumerate(scenario.tasks):
        for part, split in zip(PARTS, task.splits, strict=True):
            where = f"{scenario.label(t)}, {part} set"
            if not len(split):
                continue
            shape = tuple(split.batch(torch.tensor([0], device=split.device))[0].shape[1:])
            if shape != scenario.input_shape:
                raise InputError(f"{where}: samples have shape {shape}, not input_shape, {scenario.input_shape}")
            if not isinstance(split, TensorSplit):
                continue
            finite = split.inputs.flatten(1).isfinite().all(1) if split.inputs.is_floating_point() else None
            if finite is not None and not finite.all():
                raise InputError(f"{where}: sample {int(finite.int().argmin())} is not finite")
            counts = split.labels.bincount(minlength=scenario.classes[t])
            if part != "validation" and not counts.all():
                raise InputError(f"{where}: class {int(counts.argmin())} has no samples")


def _fingerprints(config: RunConfig) -> tuple[str | None, str | None]:
    """Of the data and of the network, as they are now; None for those that are not the user's own.

    Raises:
        InputError: one that should have a fingerprint is missing, or one has it that should not.
    """
    data, name = None, config.data.scenario
    if own_code.is_own(name):
        data = own_code.fingerprint(name, "scenario")
    elif name == IMAGES and config.data.dir is not None:
        data = folder_fingerprint(config.data.dir)
    own = own_code.is_own(config.target.name)
    target = own_code.fingerprint(config.target.name, "network") if own else None
    for key, stored, found in (("data", config.data, data), ("target", config.target, target)):
        if stored.fingerprint is not None and found is None:
            raise InputError(f"{key}.fingerprint is for images and for code of one's own: leave it out")
    return data, target


def _changed(config: RunConfig, data: str | None, target: str | None) -> list[str]:
    """ "mine.py has changed": of what, where it differs from the configuration's fingerprints."""
    found = []
    if config.data.fingerprint not in (None, data):
        images = config.data.scenario == IMAGES
        found.append(f"what is in {config.data.dir} has changed" if images else _file_changed(config.data.scenario))
    if config.target.fingerprint not in (None, target):
        found.append(_file_changed(config.target.name))
    return list(dict.fromkeys(found))


def _file_changed(name: str) -> str:
    return f"{own_code.short(name).rpartition(':')[0]} has changed"


def _absolute(what: str, name: str) -> str:
    if not own_code.is_own(name):
        raise InputError(f"{_FLAGS[what]} takes path/to/file.py:function or module:function, not {name!r}")
    return own_code.absolute(name)
