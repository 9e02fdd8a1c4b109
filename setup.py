"""Builds csrc/ into hypermask_fast/_native.abi3.so where that can be done; installs pure Python where it can't.

`pip install --no-build-isolation .` finds the installed torch and builds; a plain `pip install .` has no torch while it
builds and skips the extension. Nothing that goes wrong here fails the install: what was left out and why is printed,
kept in hypermask_fast/_build.json and shown by `python -m hypermask_fast.env`. Only HYPERMASK_CUDA=1 makes it an error.

Environment: HYPERMASK_NATIVE=0 leaves the extension out; HYPERMASK_CUDA=auto|0|1 (auto: where it can be built; 1: an
error where it can't); HYPERMASK_CUDA_ARCHS="80;90;100"; CXX, NVCC, MAX_JOBS.
"""

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import SetupError

ROOT = Path(__file__).resolve().parent
X86 = platform.machine() in ("x86_64", "AMD64")
OLDEST_NVCC = (12, 8)  # the first that knows sm_100
# Torch's ABI of 2.11 and CPython's of 3.10: one binary for all later ones.
ABI_FLAGS = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DPy_LIMITED_API=0x030a0000", "-std=c++17"]
CXX_FLAGS = ["-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
CXX_FLAGS += ["-Wall", "-Wextra", "-Wno-psabi", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]
LIBRARY = "_native.abi3.so"
ISA_FLAGS = {
    "kernels_avx2": ["-mavx2", "-mfma", "-mbmi"],
    "kernels_avx512": ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mavx2", "-mfma", "-mbmi"],
}


def compiler() -> list[str]:
    """The C++ compiler's command, such as ["ccache", "g++"]; [] where there is none."""
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
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
        raise SetupError(f"HYPERMASK_CUDA=1, but CUDA would be left out: {why}")
    return why


def native_problem() -> str:
    """Why the extension is not tried, "" if it is."""
    if os.environ.get("HYPERMASK_NATIVE") == "0":
        return "left out by HYPERMASK_NATIVE=0"
    if sys.platform != "linux":
        return f"the extension is built on Linux only, not on {sys.platform}"
    if not compiler():
        return "no C++ compiler found"
    try:
        import torch
    except ImportError:
        return "torch was not there while building: pip install --no-build-isolation ."
    release = tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2])
    return "" if release >= (2, 11) else f"torch {torch.__version__} is older than 2.11"


def architecture_flags() -> list[str]:
    archs = os.environ.get("HYPERMASK_CUDA_ARCHS", "80;90;100").split(";")
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    newest = archs[-1].rstrip("af")
    return [*flags, f"-gencode=arch=compute_{newest},code=compute_{newest}"]  # PTX for devices to come


def run(command: list[str]) -> None:
    """Runs a compiler from the project's root, unless its output is newer than all sources; raises with its message."""
    output = Path(command[-1])
    if "-c" in command and output.exists():
        newest = max(p.stat().st_mtime for p in [*ROOT.glob("csrc/**/*.*"), ROOT / "setup.py"])
        if output.stat().st_mtime > newest:
            return
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError as error:
        raise RuntimeError(f"{command[0]} does not run: {error.strerror}") from error
    if done.returncode:
        text = (done.stderr or done.stdout).strip()
        print(text, file=sys.stderr)
        lines = text.splitlines() or ["without a message"]
        reason = next((line for line in lines if "error" in line), lines[0])
        raise RuntimeError(f"{command[0]} failed with exit code {done.returncode}: {reason[:300]}")
    if done.stderr:
        print(done.stderr, file=sys.stderr)


class Build(build_ext):
    """Compiles all sources side by side, CPU and CUDA apart, so that a failure of CUDA leaves the CPU part."""

    def run(self) -> None:
        record = {"native": "", "cuda": ""}  # "" is built, otherwise why not
        nvcc, why = nvcc_problem()
        if not nvcc:
            record["cuda"] = without_cuda(why)
        try:
            self.build_native(nvcc)
        except RuntimeError as error:
            if nvcc:
                record["cuda"] = without_cuda(str(error))
                print(f"hypermask_fast: trying again without CUDA, because {error}", file=sys.stderr)
                try:
                    self.build_native(None)
                except RuntimeError as again:
                    record["native"] = str(again)
            else:
                record["native"] = str(error)
        if record["native"]:
            record["cuda"] = "the extension was not built"
        self.write_record(record)
        if self.inplace:
            self.copy_extensions_to_source()

    def write_record(self, record: dict) -> None:
        target = Path(self.build_lib, "hypermask_fast")
        write_record(record, [ROOT / "hypermask_fast"] if self.inplace else [target])

    def build_native(self, nvcc: str | None) -> None:
        import torch
        from torch.utils.cpp_extension import include_paths

        temp = Path(self.build_temp).resolve() / "csrc"
        temp.mkdir(parents=True, exist_ok=True)
        includes = [flag for p in [*include_paths(), sysconfig.get_paths()["include"]] for flag in ("-isystem", p)]
        defines = [*ABI_FLAGS, *(["-DHYPERMASK_X86"] if X86 else []), *(["-DHYPERMASK_WITH_CUDA"] if nvcc else [])]
        commands, objects = [], []
        for source in sorted(Path("csrc").glob("*.cpp")) + sorted(Path("csrc/cpu").glob("*.cpp")):
            if source.stem in ISA_FLAGS and not X86:
                continue
            objects.append(temp / f"{source.stem}{'_cuda' if nvcc else ''}.o")
            flags = [*CXX_FLAGS, *ISA_FLAGS.get(source.stem, [])]
            commands.append([*compiler(), *flags, *defines, *includes, "-c", str(source), "-o", str(objects[-1])])
        for source in sorted(Path("csrc/cuda").glob("*.cu")) if nvcc else []:
            objects.append(temp / f"{source.stem}.cu.o")
            commands.append([nvcc, "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "--threads=0",
                             "--expt-relaxed-constexpr", "-DUSE_CUDA", *architecture_flags(), *defines, *includes,
                             "-c", str(source), "-o", str(objects[-1])])  # fmt: skip
        jobs = int(os.environ.get("MAX_JOBS", 0)) or len(os.sched_getaffinity(0))
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(run, commands))
        output = Path(self.get_ext_fullpath("hypermask_fast._native")).resolve()
        if self.inplace:
            output = Path(self.build_lib).resolve() / "hypermask_fast" / LIBRARY
        output = output.with_name(LIBRARY)
        output.parent.mkdir(parents=True, exist_ok=True)
        libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch", "-ltorch_cpu"]
        if nvcc:  # which knows where its static runtime lies
            link = [nvcc, "-shared", "--cudart=static", "-Xlinker", "--no-as-needed,-s"]
        else:
            link = [*compiler(), "-shared", "-Wl,--no-as-needed,-s"]
        link += [*map(str, objects), *libraries, "-o", str(output)]
        run(link)


class Python(build_py):
    """Also leaves a note where no extension is tried."""

    def run(self) -> None:
        super().run()
        if not self.distribution.ext_modules:
            why = native_problem()
            without_cuda(why)
            here = [ROOT] if getattr(self, "editable_mode", False) else [Path(self.build_lib)]
            write_record({"native": why, "cuda": why}, [p / "hypermask_fast" for p in here])


def write_record(record: dict, folders: list[Path]) -> None:
    for part, why in record.items():
        if why:
            print(f"hypermask_fast: left out {part}: {why}", file=sys.stderr)
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        if record["native"]:  # an earlier build's library, which may not fit these sources
            (folder / LIBRARY).unlink(missing_ok=True)
        (folder / "_build.json").write_text(json.dumps(record))


extension = Extension("hypermask_fast._native", ["csrc/registration.cpp"], py_limited_api=True, optional=True)
problem = native_problem()
setup(
    packages=find_packages(include=["hypermask_fast*"]),  # hypermask_fast/kernels is a link to kernels/
    package_dir={"": "."},
    ext_modules=[] if problem else [extension],
    cmdclass={"build_ext": Build, "build_py": Python},
    options={} if problem else {"bdist_wheel": {"py_limited_api": "cp310"}},
)
