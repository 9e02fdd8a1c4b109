"""Whatever is wrong with the compilers, the build goes on without what they were for and notes why, in one line; only
HYPERMASK_CUDA=1 makes CUDA's absence an error."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def build(
    tmp_path: Path, *commands: str, root: Path = ROOT, run: Sequence[str] = (sys.executable,), **environment: str
) -> subprocess.CompletedProcess:
    """A build of its own under these variables, by default of the extension."""
    folders = ["--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")]
    return subprocess.run(
        [*run, "setup.py", "-q", *(commands or ("build_ext", *folders))],
        cwd=root,
        env={**os.environ, "HYPERMASK_CUDA": "0", **environment},
        capture_output=True,
        text=True,
    )


def record_of(tmp_path: Path, **environment: str) -> dict[str, str]:
    """The notes of such a build."""
    done = build(tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    return json.loads((tmp_path / "lib" / "hypermask_fast" / "_build.json").read_text())


# Writes an empty file to where -o says.
FAKE_COMPILER = 'while [ $# -gt 1 ]; do [ "$1" = -o ] && : > "$2"; shift; done; true'


@pytest.fixture
def compilers(tmp_path):
    """Variables that name a C++ compiler which writes an empty file, and an nvcc which fails but for its version."""
    nvcc = f"""echo "$@" >> {tmp_path / "nvcc.log"}
case "$1" in --version) echo 'Cuda compilation tools, release 13.0, V13.0.1' ;;
*) echo 'masks.cu(1): error: no such type' >&2; exit 2 ;; esac"""
    return {"CXX": script(tmp_path / "g++", FAKE_COMPILER), "NVCC": script(tmp_path / "nvcc", nvcc)}


linux = pytest.mark.skipif(sys.platform != "linux", reason="the extension is built on Linux only")


@linux
def test_cuda_is_left_out_by_0_although_nvcc_is_there(tmp_path, compilers):
    assert record_of(tmp_path, HYPERMASK_CUDA="0", **compilers) == {
        "native": "",
        "cuda": "left out by HYPERMASK_CUDA=0",
    }
    assert not (tmp_path / "nvcc.log").exists()


@linux
def test_an_nvcc_that_fails_is_left_out_by_auto(tmp_path, compilers):
    done = build(tmp_path, HYPERMASK_CUDA="auto", **compilers)
    reason = f"{compilers['NVCC']} failed: masks.cu(1): error: no such type"
    assert done.returncode == 0 and f"trying again without CUDA, because {reason}" in done.stderr
    folder = tmp_path / "lib" / "hypermask_fast"
    assert json.loads((folder / "_build.json").read_text()) == {"native": "", "cuda": reason}
    assert (folder / "_native.abi3.so").exists()


@linux
def test_1_makes_it_an_error_to_leave_cuda_out(tmp_path, compilers):
    nowhere = {"CXX": compilers["CXX"], "NVCC": "", "PATH": str(tmp_path / "empty"), "CUDA_HOME": str(tmp_path)}
    for environment, reason in (
        (compilers, f"{compilers['NVCC']} failed: masks.cu(1): error: no such type"),
        (nowhere, "no nvcc found: put it on PATH or set CUDA_HOME"),
    ):
        done = build(tmp_path, HYPERMASK_CUDA="1", **environment)
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1] == f"error: HYPERMASK_CUDA=1, but CUDA would be left out: {reason}"
        assert "trying again" not in done.stderr and not (tmp_path / "lib" / "hypermask_fast" / "_build.json").exists()


def test_1_makes_it_an_error_not_to_try_the_extension(tmp_path):
    done = build(tmp_path, "build_py", "--build-lib", str(tmp_path / "lib"), HYPERMASK_CUDA="1", HYPERMASK_NATIVE="0")
    assert done.returncode == 1
    expected = "error: HYPERMASK_CUDA=1, but CUDA would be left out: left out by HYPERMASK_NATIVE=0"
    assert done.stderr.splitlines()[-1] == expected


@linux
def test_only_what_has_changed_is_compiled_again(tmp_path):
    """On a copy of the sources, with a compiler that writes down what it is to compile."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "csrc", "hypermask_fast/__init__.py"):
        source, target = ROOT / name, tmp_path / "project" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
    log = tmp_path / "log"
    cxx = script(tmp_path / "g++", f'echo "$*" >> {log}; {FAKE_COMPILER}')

    def compiled() -> list[str]:
        log.write_text("")
        done = build(tmp_path, CXX=cxx, root=tmp_path / "project")
        assert done.returncode == 0, done.stderr
        return sorted(found for found in re.findall(r"-c \S+/csrc/(\S+\.cpp)", log.read_text()))

    everything = compiled()
    assert "module.cpp" in everything and "cpu/masks.cpp" in everything
    assert compiled() == []
    os.utime(tmp_path / "project/csrc/cpu/masks.cpp")
    assert compiled() == ["cpu/masks.cpp"]


@linux
def test_without_ninja_the_cpu_part_is_built(tmp_path, compilers):
    hide = "import torch.utils.cpp_extension as t, runpy, sys; t.is_ninja_available = lambda: False"
    run = [sys.executable, "-c", f"{hide}; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"]
    done = build(tmp_path, run=run, HYPERMASK_CUDA="auto", **compilers)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "lib" / "hypermask_fast"
    reason = "there is no ninja to compile CUDA with: pip install ninja"
    assert json.loads((folder / "_build.json").read_text()) == {"native": "", "cuda": reason}
    assert (folder / "_native.abi3.so").exists()


@linux
def test_a_failed_build_does_not_ship_an_earlier_one(tmp_path):
    library = tmp_path / "lib" / "hypermask_fast" / "_native.abi3.so"
    library.parent.mkdir(parents=True)
    library.write_bytes(b"of other sources")
    assert record_of(tmp_path, CXX="false")["native"]
    assert not library.exists()


@linux
def test_a_compiler_that_is_missing(tmp_path):
    reason = "no C++ compiler found: /nowhere/g++ does not run"
    assert record_of(tmp_path, CXX="/nowhere/g++ -O1") == {"native": reason, "cuda": reason}


@linux
@pytest.mark.parametrize("kind", ["silent", "broken"])
def test_a_compiler_that_does_not_work(tmp_path, kind):
    compiler, reason = {
        "silent": ("false", "false failed: without a message"),
        "broken": (
            script(tmp_path / "g++", "echo 'In file a.h:'\necho 'a.h:1: error: no such type' >&2\nexit 3"),
            f"{tmp_path / 'g++'} failed: a.h:1: error: no such type",
        ),
    }[kind]
    assert record_of(tmp_path, CXX=compiler) == {"native": reason, "cuda": "the extension was not built"}


@linux
@pytest.mark.parametrize(
    ("says", "why"),
    [
        ("echo 'Cuda compilation tools, release 11.8, V11.8.89'", "nvcc 11.8 is older than 12.8"),
        ("exit 1", "--version did not work"),
        ("echo hello", "--version did not work"),
    ],
)
def test_an_nvcc_that_does_not_serve(tmp_path, monkeypatch, says, why):
    sys.path.insert(0, str(ROOT))
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    monkeypatch.delitem(sys.modules, "setup", raising=False)
    try:
        import setup
    finally:
        sys.path.remove(str(ROOT))
    monkeypatch.setenv("HYPERMASK_CUDA", "auto")
    monkeypatch.setenv("NVCC", script(tmp_path / "nvcc", says))
    nvcc, problem = setup.nvcc_problem()
    assert nvcc is None and why in problem
