"""Every setting with its limits, default, unit and meaning, in words; all of it read from the dataclasses."""

import dataclasses
import re
import textwrap
from typing import Any, NamedTuple

from ..data import SCENARIOS
from ..data.folders import IMAGES
from ..errors import InputError
from ..settings import OneOf, default, kinds, meanings
from .config import RunConfig, meant, setting_names, tables
from .targets import TARGETS

_NAMES = {"data.scenario": (IMAGES, *SCENARIOS), "target.name": TARGETS}
_WIDTH = 100
_KEY = re.compile(r"(\w+) = ")


class Setting(NamedTuple):
    """What there is to know of a setting.

    Attributes:
        kind: its type and limits in words, and its unit.
        value: its default as TOML, "(required)" or "(not set)".
        meaning: a phrase.
    """

    key: str
    kind: str
    value: str
    meaning: str


def settings(key: str = "") -> list[Setting]:
    """Every setting, those of one table, or one, in the order of the dataclasses.

    Raises:
        InputError: there is none of that name; the message says the nearest.
    """
    known = setting_names()
    if key and key not in known:
        raise InputError(f"unknown setting {key!r}{meant(key)}; `hypermask-fast settings` lists all")
    return [
        _setting(name) for name in known if name not in tables() and f"{name}.".startswith(f"{key}." if key else "")
    ]


def listing(key: str = "") -> str:
    """`settings(key)` as text, table by table: a line with default and limits for each, and its meaning below."""
    lines, shown = [], ""
    for setting in settings(key):
        table = setting.key.rpartition(".")[0]
        if table != shown and table in tables() and key in ("", table):
            lines += [f"[{table}]  {_sentence(meanings(RunConfig)[table])}", ""]
            shown = table
        lines += [
            f"{setting.key} {setting.value}   ({setting.kind})",
            *_wrapped(_sentence(setting.meaning), "    "),
            "",
        ]
    return "\n".join(lines).rstrip()


def commented_toml(config: RunConfig) -> str:
    """`config.to_toml()` with the meaning of every setting above it, and those that are not set as comments."""
    lines, table, unset = [], "", _unset(config)
    for line in [*config.to_toml().split("\n"), "[]"]:
        if line.startswith("["):
            for key in unset.pop(table, []):
                lines += [*_comment(key), f"# {key.rpartition('.')[2]} ="]
            table = line.strip("[]")
            if not table:
                break
            lines += ["", *_wrapped(_sentence(meanings(RunConfig)[table]), "# ")]
        elif found := _KEY.match(line):
            lines += _comment(f"{table}.{found[1]}" if table else found[1])
        if line:
            lines.append(line)
    return "\n".join(lines) + "\n"


def _setting(key: str) -> Setting:
    table, _, name = key.rpartition(".")
    owner = tables()[table] if table else RunConfig
    (field,) = (field for field in dataclasses.fields(owner) if field.name == name)
    kind, value = kinds(owner)[name], default(field)
    words = _NAMES.get(key) or (kind.limits.words if isinstance(kind.limits, OneOf) else ())
    text = ", ".join(f'"{word}"' for word in words) or kind.text
    if kind.unit and kind.unit != "percent":
        text += f"; unit: {kind.unit}"
    shown = "(required)" if value is dataclasses.MISSING else "(not set)" if value is None else f"= {_toml(value)}"
    return Setting(key, text, shown, meanings(owner)[name])


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return str(list(value))
    return f'"{value}"' if isinstance(value, str) else str(value)


def _unset(config: RunConfig) -> dict[str, list[str]]:
    """Table -> its settings that are None, which TOML leaves out."""
    found = {name: dataclasses.asdict(getattr(config, name)) for name in tables()}
    return {table: [f"{table}.{name}" for name in values if values[name] is None] for table, values in found.items()}


def _comment(key: str) -> list[str]:
    setting = _setting(key)
    return _wrapped(f"{_sentence(setting.meaning)} ({setting.kind})", "# ")


def _sentence(phrase: str) -> str:
    return phrase[0].upper() + phrase[1:]


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
