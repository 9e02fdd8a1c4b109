"""Builds csrc/ into hypermask_fast/_native.abi3.so where that can be done; installs pure Python where it can't.

`pip install --no-build-isolation .` finds the installed torch and builds; a plain `pip install .` has no torch while it
builds and skips the extension. Nothing that goes wrong here fails the install: what was left out and why is printed,
kept in hypermask_fast/_build.json and shown by `python -m hypermask_fast.env`. Only HYPERMASK_CUDA=1 makes it an error.

Compilation is BuildExtension's, by ninja: side by side, and only what has changed. Without ninja it takes one file
after the other and leaves out CUDA.

Environment: HYPERMASK_NATIVE=0 leaves the extension out; HYPERMASK_CUDA=auto|0|1 (auto: where it can be built; 1: an
error where it can't); HYPERMASK_CUDA_ARCHS="80;90;100"; CXX, NVCC, MAX_JOBS.
"""

import contextlib
import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import BinaryIO

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
LIBRARY = "_native.abi3.so"
OLDEST_NVCC = (12, 8)  # the first that knows sm_100
# Torch's ABI of 2.11; BuildExtension adds CPython's of 3.10. So one binary serves all later ones.
ABI_FLAGS = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-std=c++17"]
# Behind those that Python itself was compiled with, hence -fno-wrapv and -g0.
CXX_FLAGS = ["-O3", "-fno-wrapv", "-g0", "-fvisibility=hidden"]
CXX_FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
CXX_FLAGS += ["-Wall", "-Wextra", "-Wno-psabi", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]
NINJA = r"\[\d+/\d+\] |FAILED: |ninja: "  # how its own lines begin
NVCC_FLAGS = ["-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "--threads=0", "-DUSE_CUDA"]

try:
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns of what this file takes care of
    import torch
    from torch.utils.cpp_extension import BuildExtension, include_paths, library_paths
except ImportError:
    torch, BuildExtension = None, build_ext
# The environment's own ninja, where it has one: pip leaves its programs out of PATH. Everything that looks at the build
# later goes by the same one, for another version throws away the log of what has been compiled.
os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
os.environ["TORCH_DONT_CHECK_COMPILER_ABI"] = "1"  # the stable ABI is C's, the same for every compiler


def compiler() -> list[str]:
    """The C++ compiler's command, such as ["ccache", "g++"]; [] where there is none."""
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    return shlex.split(found) if found else []


def nvcc_problem() -> tuple[str | None, str]:
    """The nvcc to use and "", or None and why there is none."""
    wanted = os.environ.get("HYPERMASK_CUDA", "auto")
    if wanted == "0":
        return None, "left out by HYPERMASK_CUDA=0"
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = os.environ.get("NVCC") or shutil.which("nvcc") or shutil.which(str(Path(home, "bin", "nvcc")))
    if not nvcc:
        return None, "no nvcc found: put it on PATH or set CUDA_HOME"
    try:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
        version = tuple(int(n) for n in re.search(r"release (\d+)\.(\d+)", text).groups())
    except (OSError, subprocess.CalledProcessError, AttributeError) as error:
        return None, f"{nvcc} --version did not work: {error}"
    if version < OLDEST_NVCC:
        return None, f"nvcc {version[0]}.{version[1]} is older than {OLDEST_NVCC[0]}.{OLDEST_NVCC[1]}"
    return nvcc, ""


def without_cuda(why: str) -> str:
    """`why`, for the record; an error of the build where HYPERMASK_CUDA=1."""
    if os.environ.get("HYPERMASK_CUDA") == "1":
        raise SystemExit(f"error: HYPERMASK_CUDA=1, but CUDA would be left out: {why}")
    return why


def native_problem() -> str:
    """Why the extension is not tried, "" if it is."""
    if os.environ.get("HYPERMASK_NATIVE") == "0":
        return "left out by HYPERMASK_NATIVE=0"
    if sys.platform != "linux":
        return f"the extension is built on Linux only, not on {sys.platform}"
    if torch is None:
        return "torch was not there while building: pip install --no-build-isolation ."
    release = tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2])
    if release < (2, 11):
        return f"torch {torch.__version__} is older than 2.11"
    command = compiler()
    if not command:
        return "no C++ compiler found"
    return "" if shutil.which(command[0]) else f"no C++ compiler found: {command[0]} does not run"


def architecture_flags() -> list[str]:
    archs = os.environ.get("HYPERMASK_CUDA_ARCHS", "80;90;100").split(";")
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    newest = archs[-1].rstrip("af")
    return [*flags, f"-gencode=arch=compute_{newest},code=compute_{newest}"]  # PTX for devices to come


def static_cuda_runtime(nvcc: str) -> list[str]:
    """The linker's flags for it; where it lies, nvcc tells."""
    dry = subprocess.run([nvcc, "--dryrun", "-shared", "x.o"], capture_output=True, text=True)
    found = re.search(r"LIBRARIES=(.*)", dry.stderr)
    return [*shlex.split(found[1] if found else ""), "-lcudart_static", "-lrt", "-lpthread", "-ldl"]


def sources(pattern: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for p in ROOT.glob(pattern))


@contextlib.contextmanager
def output_in(file: BinaryIO) -> Iterator[None]:
    """Whatever this process and those it starts write to their standard output and error goes to `file`."""
    sys.stdout.flush()
    sys.stderr.flush()
    before = os.dup(1), os.dup(2)
    try:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for at, original in enumerate(before, start=1):
            os.dup2(original, at)
            os.close(original)


def failure(output: str, error: Exception) -> tuple[str, str]:
    """Of what made a build fail: all that it wrote, and one line with its first error."""
    lines = output.splitlines()
    failed = next((i for i, line in enumerate(lines) if line.startswith("FAILED: ")), None)
    if failed is None:  # not in ninja: the linker, or something unforeseen
        who, silent = "the build", str(error)
        told = [line for line in lines if not re.match(NINJA, line)]
    else:  # the command follows, then what it wrote
        who, silent = shlex.split(lines[failed + 1])[0], "without a message"
        told = list(takewhile(lambda line: not re.match(NINJA, line), lines[failed + 2 :]))
    told = [line for line in told if line.strip()]
    reason = next((line for line in told if "error" in line), told[0] if told else silent)
    return "\n".join(told), f"{who} failed: {reason.strip()[:300]}"


class Build(BuildExtension):
    """BuildExtension with a second try without CUDA where CUDA fails, and with a record of what was left out.

    BuildExtension takes for granted that torch and nvcc are of one CUDA version. This extension has a static runtime of
    its own and needs of torch only its stable ABI: torch's CPU build serves as well.
    """

    def finalize_options(self) -> None:
        super().finalize_options()
        if self.editable_mode:  # objects stay from one install to the next, as those of build_ext --inplace do
            self.build_temp = str(ROOT / "build" / f"temp.{self.plat_name}-{sys.implementation.cache_tag}")

    def run(self) -> None:
        inplace = self.inplace  # off while it builds
        self.record = {"native": problem, "cuda": problem and without_cuda(problem)}
        if not problem:
            os.environ["CXX"] = self.one_word(compiler())
            super().run()
        write_record(self.record, ROOT / "hypermask_fast" if inplace else Path(self.build_lib, "hypermask_fast"))

    def one_word(self, command: list[str]) -> str:
        """A program that runs the command: BuildExtension takes CXX for a program's name."""
        if len(command) == 1:
            return command[0]
        os.environ["TORCH_NO_COMPILER_WRAPPER"] = "1"  # the command may name one
        script = Path(self.build_temp).resolve() / "c++"
        script.parent.mkdir(parents=True, exist_ok=True)
        script.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
        script.chmod(0o755)
        return str(script)

    def build_extension(self, ext: Extension) -> None:
        nvcc, why = nvcc_problem()
        if nvcc and not self.use_ninja:
            nvcc, why = None, "there is no ninja to compile CUDA with: pip install ninja"
        self.record = {"native": "", "cuda": "" if nvcc else without_cuda(why)}  # "" is built, otherwise why not
        problem = self.attempt(ext, nvcc)
        if nvcc and problem:
            self.record["cuda"] = without_cuda(problem)
            print(f"hypermask_fast: trying again without CUDA, because {problem}", file=sys.stderr)
            problem = self.attempt(ext, None)
        if problem:
            self.record = {"native": problem, "cuda": "the extension was not built"}

    def attempt(self, ext: Extension, nvcc: str | None) -> str:
        """Compiles and links; "" or why that failed."""
        Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)  # an earlier build's
        ext.sources = CXX_SOURCES
        ext.extra_link_args = LINK_FLAGS
        with tempfile.TemporaryFile() as file:
            with output_in(file):
                try:
                    if nvcc:
                        self.add_cuda(ext, nvcc)
                    super().build_extension(ext)
                    error = None
                except Exception as caught:
                    error = caught
            file.seek(0)
            output = file.read().decode(errors="replace")
        if error is None:
            if "warning" in output:
                print(output, file=sys.stderr)
            return ""
        told, reason = failure(output, error)
        print(told, file=sys.stderr)
        return reason

    def add_cuda(self, ext: Extension, nvcc: str) -> None:
        """Only now, behind BuildExtension's check that nvcc is of torch's own CUDA version."""
        ext.sources = [*CXX_SOURCES, *sources("csrc/cuda/*.cu")]
        ext.extra_link_args = [*LINK_FLAGS, *static_cuda_runtime(nvcc)]
        os.environ["PYTORCH_NVCC"] = shlex.quote(nvcc)
        # BuildExtension asks nvcc for what a file includes, which ninja goes by, only where torch has CUDA.
        torch.version.cuda = torch.version.cuda or "none"


class Python(build_py):
    """Also leaves a note where no extension is tried."""

    def run(self) -> None:
        super().run()
        if not self.distribution.ext_modules:
            why = native_problem()
            without_cuda(why)
            here = ROOT if getattr(self, "editable_mode", False) else Path(self.build_lib)
            write_record({"native": why, "cuda": why}, here / "hypermask_fast")


def write_record(record: dict[str, str], folder: Path) -> None:
    for part, why in record.items():
        if why:
            print(f"hypermask_fast: left out {part}: {why}", file=sys.stderr)
    folder.mkdir(parents=True, exist_ok=True)
    if record["native"]:  # an earlier build's library, which may not fit these sources
        (folder / LIBRARY).unlink(missing_ok=True)
    (folder / "_build.json").write_text(json.dumps(record))


CXX_SOURCES = sources("csrc/*.cpp") + sources("csrc/cpu/*.cpp")
problem = native_problem()
extensions = []
if not problem:
    both = [*ABI_FLAGS, *(flag for path in include_paths() for flag in ("-isystem", path))]
    LINK_FLAGS = ["-Wl,--no-as-needed,-s", *(f"-L{path}" for path in library_paths()), "-ltorch", "-ltorch_cpu"]
    compile_flags = {"cxx": [*CXX_FLAGS, *both], "nvcc": [*NVCC_FLAGS, *architecture_flags(), *both]}
    # `optional`: setuptools goes on where there is nothing to copy.
    extensions = [Extension("hypermask_fast._native", CXX_SOURCES, extra_compile_args=compile_flags, language="c++",
                            py_limited_api=True, optional=True)]  # fmt: skip
setup(
    packages=find_packages(include=["hypermask_fast*"]),  # hypermask_fast/kernels is a link to kernels/
    package_dir={"": "."},
    ext_modules=extensions,
    cmdclass={"build_ext": Build, "build_py": Python},
    options={} if problem else {"bdist_wheel": {"py_limited_api": "cp310"}},
)
