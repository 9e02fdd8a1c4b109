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
    "a part of one": (lambda: LIBRARY.read_bytes()[:-5000], "is no whole library"),  # loaded, it would end the process
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
import sys
import torch, hypermask_fast as hmf
from hypermask_fast import cli
assert cli.main(["env"]) == 0
print("then an op", file=sys.stderr)
print(hmf.functional.semi_binary_mask(torch.tensor([-2.0, 0.5, 1.0]), torch.tensor(0.7)).tolist()[1])
"""


def test_a_library_that_can_not_serve_is_told_in_one_line(installed):
    """By `env` where it is asked, and once by the first op."""
    folder, told = installed
    done = python(folder, "-c", USE)
    assert done.returncode == 0, done.stderr
    *report, result = done.stdout.splitlines()
    assert result == "0.0"
    assert re.search(f"^backend cpu: +{told}$", "\n".join(report), re.M)
    before, _, then = done.stderr.partition("then an op\n")
    assert before == ""
    assert len(re.findall(told, then)) == 1 and "Traceback" not in then, then
    assert then.count("hypermask_fast runs its reference ops on cpu") == 1


NO_WHOLE_LIBRARIES = {
    "an empty file": lambda whole: b"",
    "the beginning of one": lambda whole: whole[:40],
    "all of its header but a byte": lambda whole: whole[:63],
    "half of one": lambda whole: whole[: len(whole) // 2],
    "all but the last byte": lambda whole: whole[:-1],
    "a page of text": lambda whole: b"<html>not found</html>" * 100,
}


@pytest.mark.parametrize("kind", NO_WHOLE_LIBRARIES)
def test_what_is_no_whole_library_is_not_loaded(tmp_path, monkeypatch, kind):
    """Loading it would end the process, where a build or a copy was interrupted."""
    library = tmp_path / "library.so"
    library.write_bytes(NO_WHOLE_LIBRARIES[kind](LIBRARY.read_bytes()))
    monkeypatch.setattr(extension.torch.ops, "load_library", None)
    assert extension._problem(library) == f"{library} is no whole library: {BUILD}"


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
