"""Sphinx: `make docs` builds docs/ as a website, with warnings as errors."""

import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import hypermask_fast

project = "hypermask_fast"
author = copyright = "the hypermask_fast developers"
version = release = hypermask_fast.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"{project} {version}"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
myst_heading_anchors = 3
default_role = "code"
autodoc_member_order = "bysource"
autodoc_mock_imports = ["avalanche"]  # the adapter's classes are documented without it
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_use_ivar = True

_CODE = re.compile(r"(``?[^`]+``?)")
_ITEM = re.compile(r"\s*- ")


def _as_plain_text(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are plain text with code in backticks: |a| and W * m mean nothing more in them, a list may follow its
    sentence at once, and what is indented below "...:" and an empty line is a program."""
    plain: list[str] = []
    program = False
    for line in lines:
        before = plain[-1] if plain else ""
        sentence = next((each for each in reversed(plain) if each.strip()), "")
        deeper = _indent(line) > _indent(sentence)
        if line.strip() and not program and not before.strip() and sentence.endswith(":") and deeper:
            plain[len(plain) - 1 - plain[::-1].index(sentence)] = f"{sentence}:"
            program, around = True, _indent(sentence)
        elif program and line.strip() and _indent(line) <= around:
            program = False
        if program:
            plain.append(line)
            continue
        if _ITEM.match(line) and before.strip() and not _ITEM.match(before) and _indent(before) <= _indent(line):
            plain.append("")
        parts = _CODE.split(line)
        plain.append("".join(p if i % 2 else re.sub(r"(\*|\||_\b)", r"\\\1", p) for i, p in enumerate(parts)))
    if what in ("attribute", "property") and plain:
        plain[0] = plain[0].replace(": ", "; ")  # napoleon takes what is before a colon for its type
    lines[:] = plain


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", _as_plain_text, priority=400)  # before napoleon reads them
