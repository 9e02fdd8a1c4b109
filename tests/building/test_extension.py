"""A library of the extension that can't serve: one line says so and what to type, and PyTorch's operations serve."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import hypermask_fast
from hypermask_fast.ops import native
from hypermask_fast.ops.native import extension

PACKAGE = Path(hypermask_fast.__file__).parent
LIBRARY = PACKAGE / "_native.abi3.so"
BUILD = "build it again by pip install --no-build-isolation ."
pytestmark = pytest.mark.skipif(bool(native.PROBLEM), reason="needs the extension")


def instead(old, new):
    """The library with other bytes in one place, as long as those that were there."""
    assert len(old) == len(new)
    whole = LIBRARY.read_bytes()
    assert old in whole
    return whole.replace(old, new)


OTHERS = {
    "an older one without an operator": (
        lambda: instead(b"checksum(Tensor bytes)", b"checksun(Tensor bytes)"),
        r"was built from other sources than these \(it has no hypermask_native::checksum\)",
    ),
    "an older one with other arguments": (
        lambda: instead(b"mask_thresholds(Tensor logits, int[]", b"mask_thresholds(Tensor? logits,int[]"),
        r"was built .* than these \(hypermask_native::mask_thresholds takes or returns something else there\)",
    ),
    "one for another PyTorch": (
        lambda: instead(b"\0aoti_torch_get_sizes\0", b"\0aoti_torch_got_sizes\0"),
        r"does not load \(undefined symbol: aoti_torch_got_sizes\)",
    ),
    "one for another processor": (
        lambda: LIBRARY.read_bytes()[:18] + b"\xb7" + LIBRARY.read_bytes()[19:],
        r"does not load \(.*\)",
    ),
    "a part of one": (lambda: LIBRARY.read_bytes()[:-5000], "is no whole library"),
    "the beginning of one": (lambda: LIBRARY.read_bytes()[:40], "is no whole library"),
    "an empty file": (lambda: b"", "is no whole library"),
    "a page of text": (lambda: b"<html>not found</html>" * 100, "is no whole library"),
}


def python(folder, *words):
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture(params=OTHERS)
def installed(request, tmp_path):
    """A folder with the package and such a library, and what is said of that."""
    library, told = OTHERS[request.param]
    left_out = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "hypermask_fast", ignore=left_out)
    (tmp_path / "hypermask_fast" / LIBRARY.name).write_bytes(library())
    return tmp_path, f"{re.escape(str(tmp_path))}\\S*{re.escape(LIBRARY.name)} {told}[;:] {re.escape(BUILD)}"


USE = """
import torch, hypermask_fast as hmf
print(hmf.functional.semi_binary_mask(torch.tensor([-2.0, 0.5, 1.0]), torch.tensor(0.7)).tolist()[1])
"""


def test_a_library_that_can_not_serve_is_told_in_one_line(installed):
    folder, told = installed
    done = python(folder, "-c", USE)
    assert done.returncode == 0 and done.stdout == "0.0\n", done.stderr
    assert len(re.findall(told, done.stderr)) == 1 and "Traceback" not in done.stderr, done.stderr
    done = python(folder, "-m", "hypermask_fast", "env")
    assert done.returncode == 0 and done.stderr == ""
    assert re.search(f"^backend cpu: +{told}$", done.stdout, re.M)


def test_the_operators_of_the_sources_are_those_that_the_package_calls():
    import torch

    prefix = "hypermask_native::"
    built = {s.name.removeprefix(prefix) for s in torch._C._jit_get_all_schemas() if s.name.startswith(prefix)}
    listed = [schema.partition("(")[0] for schema in extension.SCHEMAS]
    assert listed == sorted(built)
    assert extension._other_operator() == ""


def test_every_macro_of_ours_that_the_sources_ask_for_is_set_by_somebody():
    """One that nobody sets leaves out what it guards, and no test of the values sees that."""
    root = PACKAGE.parent
    sources = [path.read_text() for path in (root / "csrc").rglob("*") if path.suffix in {".h", ".cpp", ".cu", ".cuh"}]
    asked = {name for text in sources for name in re.findall(r"#.*defined\(?\s*\(?(HYPERMASK_\w+)", text)}
    asked |= {name for text in sources for name in re.findall(r"#ifn?def\s+(HYPERMASK_\w+)", text)}
    setting = "\n".join([*sources, (root / "setup.py").read_text(), (root / "tests/support/emulation.py").read_text()])
    set_by_somebody = {*re.findall(r"-D(HYPERMASK_\w+)", setting), *re.findall(r"#define (HYPERMASK_\w+)", setting)}
    assert "HYPERMASK_EMULATED" in asked and asked <= set_by_somebody


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"native": "no compiler"}'])
def test_a_record_of_the_build_that_can_not_be_read_is_none(text, tmp_path, monkeypatch):
    monkeypatch.setattr(extension, "PACKAGE", tmp_path)
    assert extension.recorded("native") == ""
    (tmp_path / "_build.json").write_text(text)
    assert extension.recorded("native") == ("no compiler" if "compiler" in text else "")
