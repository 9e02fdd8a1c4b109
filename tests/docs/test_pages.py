"""Code in README and docs does what it says, typed one block after the other; commands and links are ones.

A page may begin with code that prepares what its blocks use, in a comment `<!-- python ... -->`. A block that can't run
here has a comment before it, `<!-- not run: the reason -->`.
"""

import importlib
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from support.launching import output_of_script

import hypermask_fast as hmf
from hypermask_fast import cli, commands

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(
    r"(?P<comment><!-- not run: .+? -->\n\n?)?"
    r"(?:^```python\n(?P<shown>.*?)^```$|^<!-- python\n(?P<hidden>.*?)^-->$)",
    re.M | re.S,
)
COMMAND = re.compile(r"^ {4}hypermask-fast (.*)$", re.M)
LINK = re.compile(r"\]\(([^)\s]+)\)")
NAMED_FILE = re.compile(r"`(?:[^`\n]* )?((?:bench|tests|examples|csrc|hypermask_fast)/[\w./-]+)[^`\n]*`")


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path) -> list[str]:
    """Those to be run, in order."""
    return [m["shown"] or m["hidden"] for m in BLOCK.finditer(text(page)) if not m["comment"]]


def run(script: str, folder: Path) -> str:
    (folder / "page.py").write_text(script, encoding="utf-8")
    return output_of_script(folder / "page.py", folder, "error::UserWarning")


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=name)
def test_the_blocks_of_a_page_run_in_order_in_one_process(page, tmp_path):
    parts = [f"print('block {i}', flush=True)\n{block}" for i, block in enumerate(blocks(page))]
    run("\n".join(parts), tmp_path)


def test_enough_is_run():
    """The pattern above still finds blocks, and little is left out."""
    found = [m for page in PAGES for m in BLOCK.finditer(text(page))]
    assert sum(text(page).count("```python") for page in PAGES) == sum(m["shown"] is not None for m in found) >= 15
    assert sum(m["comment"] is not None for m in found) <= 4


def test_what_comments_say_of_an_export(tmp_path):
    """`value  # what it is` in the block of the exported network."""
    page = ROOT / "docs" / "command-line.md"
    said = dict(re.findall(r"^(net\.exported\.\w+)  # (\(.*?\)|'.*?')", text(page), re.M))
    assert len(said) == 3
    script = "\n".join([*blocks(page), f"print({', '.join(f'repr({value})' for value in said)}, sep='\\n')"])
    assert run(script, tmp_path).splitlines()[-3:] == list(said.values())


@pytest.mark.parametrize("line", sorted({line for page in PAGES for line in COMMAND.findall(text(page))}))
def test_the_commands_are_ones(line, monkeypatch):
    """Their words are understood; what they do is tested elsewhere."""
    words, called = shlex.split(line.partition("#")[0].replace("> mine.toml", "")), []
    for command in commands.COMMANDS:
        function = "report" if command is commands.env else "_run"
        monkeypatch.setattr(command, function, lambda arguments: called.append(arguments) or 0)
    assert cli.main(words) == 0 and len(called) == 1


OTHERS = [ROOT / f"{page}.md" for page in ("ARCHITECTURE", "CONTRIBUTING", "CHANGELOG", "bench/README")]


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=name)
def test_links_lead_to_files(page):
    for target in LINK.findall(re.sub(r"^```.*?^```$", "", text(page), flags=re.M | re.S)):
        path, _, heading = target.partition("#")
        if path.startswith(("http:", "https:", "mailto:")):
            continue
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not heading or heading in anchors(file), target


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_that_are_named_are_there(page):
    """`bench/results/...` and so on; capitals stand for names of one's own."""
    for path in NAMED_FILE.findall(text(page)):
        assert re.search("[A-Z]", path) or (ROOT / path).exists(), path


def test_the_api_reference_has_every_op_and_no_module_without_members():
    """A module's own functions and classes are listed, and those that it passes on where the page asks for them."""
    page = text(ROOT / "docs" / "api.md")
    found = re.findall(r"^\.\. automodule:: (\S+)\n   :members:\n(   :imported-members:\n)?", page, re.M)
    listed = {}
    for module, imported in found:
        names = vars(importlib.import_module(module)).items()
        public = {name: what for name, what in names if not name.startswith("_") and callable(what)}
        listed[module] = {name for name, what in public.items() if imported or what.__module__ == module}
    assert len(found) >= 5 and all(listed.values()), listed
    assert set(hmf.functional.OPS) <= listed["hypermask_fast.ops.reference"]


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub and MyST make them."""
    headings = re.findall(r"^#+ (.*)$", text(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("goal", ["help", "demo"])
def test_make_says_how_the_command_is_called(goal):
    words = ["make", "--dry-run", "VENV=environment", goal]
    said = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "environment/bin/hypermask-fast " in said and "source environment/bin/activate, hypermask-fast" in said
    assert "silent" in said or "pip says nothing meanwhile" in said
