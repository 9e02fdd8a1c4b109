"""What a run may be resumed with: settings that would have given the very numbers that it has so far."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import own_code
from ..data import SCENARIOS
from ..errors import InputError
from . import checkpoint
from .config import CONFIG, LENGTHS, RunConfig, stored_config

_ELSEWHERE = "leave it out, or start a new run in another folder (--out)"


def resumed_config(run_dir: Path, preset: RunConfig, asked: dict[str, Any]) -> RunConfig:
    """The run's own configuration, with those changes that may be asked for.

    Args:
        run_dir: the run's folder.
        preset: what the command names.
        asked: dotted settings.

    Raises:
        InputError: no run, a run of another preset, or a setting that contradicts what was computed; with the reason.
    """
    stored = stored_config(run_dir)
    expected = preset.with_values(asked)
    names = [(config.data.scenario, config.target.name) for config in (stored, expected)]
    if [own_code.portable(name) for name in names[0]] != [own_code.portable(name) for name in names[1]]:
        kinds = [" with ".join(map(own_code.short, pair)) for pair in names]
        raise InputError(f"{run_dir} holds a run of another preset, {kinds[0]}, not {kinds[1]}")
    # Code of one's own is where the command says that it is now, and its content is still compared.
    data = replace(stored.data, scenario=expected.data.scenario)
    target = replace(stored.target, name=expected.target.name)
    config = replace(stored, data=data, target=target)
    for key, value in asked.items():
        changed = config.with_values({key: value})
        if changed == config:
            continue
        if key in LENGTHS:
            _check_longer(run_dir, key, value, stored, changed)
        elif changed.digest() != config.digest():
            raise InputError(f"{key}={value} contradicts the run in {run_dir}, whose {CONFIG} decides: {_ELSEWHERE}")
        config = changed
    return config


def is_finished(run_dir: Path, config: RunConfig) -> bool:
    """Whether the run has learned its last task."""
    state = checkpoint.state(run_dir)
    return state is not None and state.get("task") == _tasks(config)


def accepted_settings(run_dir: Path, config: RunConfig) -> tuple[str, ...]:
    """Digests under which the run's checkpoint may have been saved, so that `config` gives the same numbers."""
    state, digests = checkpoint.state(run_dir), config.digests()
    if state is None or not isinstance(length := state.get("length"), dict):
        return digests
    (own,) = _length(config).items()
    shorter = length.get(own[0])
    if isinstance(shorter, int) and shorter < own[1] and not _why_not_longer(state, config):
        digests += replace(config, training=replace(config.training, **{own[0]: shorter})).digests()
    return digests


def _check_longer(run_dir: Path, key: str, value: Any, stored: RunConfig, changed: RunConfig) -> None:
    """Raises InputError unless the run may go on to the greater length of a task that is asked for."""
    (name, before), (other, after) = *_length(stored).items(), *_length(changed).items()
    asked = f"{key}={value}"
    if name != other or after < before:
        raise InputError(
            f"{asked} contradicts the run in {run_dir}, which has training.{name}={before}: more may be asked for, not "
            "fewer and no other unit"
        )
    state = checkpoint.state(run_dir)
    if state is not None and (reason := _why_not_longer(state, stored)):
        raise InputError(f"{asked} would change what the run in {run_dir} has computed: {reason}; {_ELSEWHERE}")


def _why_not_longer(state: dict[str, Any], config: RunConfig) -> str:
    """Why longer tasks would have given other numbers than a checkpoint has, "" where they would not."""
    if state.get("task") != 0:
        return "a task that was trained for less is finished"
    if config.method.ramp and config.method.sparsity > 0:
        return "method.ramp spreads the sparsity of task 0 over its iterations"
    return ""


def _length(config: RunConfig) -> dict[str, int]:
    both = {"iterations": config.training.iterations, "epochs": config.training.epochs}
    return {name: value for name, value in both.items() if value is not None}


def _tasks(config: RunConfig) -> int:
    known = SCENARIOS.get(config.data.scenario)
    return config.data.tasks or (known.tasks if known else 0)
