"""Whatever is wrong with the compilers, the build goes on without what they were for and notes why, in one line; only
HYPERMASK_CUDA=1 makes CUDA's absence an error."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def build(tmp_path: Path, *commands: str, **environment: str) -> subprocess.CompletedProcess:
    """A build of its own under these variables, by default of the extension."""
    folders = ["--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")]
    return subprocess.run(
        [sys.executable, "setup.py", "-q", *(commands or ("build_ext", *folders))],
        cwd=ROOT,
        env={**os.environ, "HYPERMASK_CUDA": "0", **environment},
        capture_output=True,
        text=True,
    )


def record_of(tmp_path: Path, **environment: str) -> dict[str, str]:
    """The notes of such a build."""
    done = build(tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    return json.loads((tmp_path / "lib" / "hypermask_fast" / "_build.json").read_text())


@pytest.fixture
def compilers(tmp_path):
    """Variables that name a C++ compiler which writes an empty file, and an nvcc which fails but for its version."""
    nvcc = f"""echo "$@" >> {tmp_path / "nvcc.log"}
case "$1" in --version) echo 'Cuda compilation tools, release 13.0, V13.0.1' ;;
*) echo 'masks.cu(1): error: no such type' >&2; exit 2 ;; esac"""
    cxx = 'for last; do :; done; : > "$last"'
    return {"CXX": script(tmp_path / "g++", cxx), "NVCC": script(tmp_path / "nvcc", nvcc)}


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
    reason = f"{compilers['NVCC']} failed with exit code 2: masks.cu(1): error: no such type"
    assert done.returncode == 0 and f"trying again without CUDA, because {reason}" in done.stderr
    folder = tmp_path / "lib" / "hypermask_fast"
    assert json.loads((folder / "_build.json").read_text()) == {"native": "", "cuda": reason}
    assert (folder / "_native.abi3.so").exists()


@linux
def test_1_makes_it_an_error_to_leave_cuda_out(tmp_path, compilers):
    nowhere = {"CXX": compilers["CXX"], "NVCC": "", "PATH": str(tmp_path / "empty"), "CUDA_HOME": str(tmp_path)}
    for environment, reason in (
        (compilers, f"{compilers['NVCC']} failed with exit code 2: masks.cu(1): error: no such type"),
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
def test_a_failed_build_does_not_ship_an_earlier_one(tmp_path):
    library = tmp_path / "lib" / "hypermask_fast" / "_native.abi3.so"
    library.parent.mkdir(parents=True)
    library.write_bytes(b"of other sources")
    assert record_of(tmp_path, CXX="false")["native"]
    assert not library.exists()


@linux
@pytest.mark.parametrize("kind", ["missing", "silent", "broken"])
def test_a_compiler_that_does_not_work(tmp_path, kind):
    compiler, reason = {
        "missing": ("/nowhere/g++ -O1", "/nowhere/g++ does not run: No such file or directory"),
        "silent": ("false", "false failed with exit code 1: without a message"),
        "broken": (
            script(tmp_path / "g++", "echo 'In file a.h:'\necho 'a.h:1: error: no such type' >&2\nexit 3"),
            f"{tmp_path / 'g++'} failed with exit code 3: a.h:1: error: no such type",
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
