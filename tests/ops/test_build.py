"""Whatever is wrong with the compilers, the build goes on without what they were for and notes why, in one line."""

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


def record_of(tmp_path: Path, **environment: str) -> dict[str, str]:
    """The notes of a build of its own under these variables."""
    folders = ["--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")]
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", *folders],
        cwd=ROOT,
        env={**os.environ, "HYPERMASK_CUDA": "0", **environment},
        capture_output=True,
        check=True,
    )
    return json.loads((tmp_path / "lib" / "hypermask_fast" / "_build.json").read_text())


@pytest.mark.skipif(sys.platform != "linux", reason="the extension is built on Linux only")
def test_a_failed_build_does_not_ship_an_earlier_one(tmp_path):
    library = tmp_path / "lib" / "hypermask_fast" / "_native.abi3.so"
    library.parent.mkdir(parents=True)
    library.write_bytes(b"of other sources")
    assert record_of(tmp_path, CXX="false")["native"]
    assert not library.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="the extension is built on Linux only")
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


@pytest.mark.skipif(sys.platform != "linux", reason="the extension is built on Linux only")
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
