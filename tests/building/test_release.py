"""What is released: sdist and wheel are whole, say the version that the package has, and one is made from the other."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from email import message_from_string
from email.message import Message
from pathlib import Path

import pytest

from hypermask_fast import __version__

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).parents[2]
RELEASED = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "CHANGELOG.md", "CITATION.cff")
MADE = ("__pycache__", "_native.abi3.so", "_build.json")
FAKE_COMPILER = (
    '#!/bin/sh\nwhile [ $# -gt 1 ]; do [ "$1" = -o ] && : > "$2"; shift; done; true\n'  # writes an empty file
)


def sources(folder: Path, *patterns: str) -> set[str]:
    """Files of a checkout, or of what was made from it, by their path in it; what a build has left there is none."""
    found = (path for pattern in patterns for path in folder.glob(pattern))
    return {str(path.relative_to(folder)) for path in found if path.is_file() and not set(path.parts) & set(MADE)}


def package_files(folder: Path) -> set[str]:
    kernels = sources(folder, "hypermask_fast/kernels/**/*")  # a link in the checkout, which "**" does not follow
    return sources(folder, "hypermask_fast/**/*") | kernels


def setup(root: Path, *words: str, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", *words],
        cwd=root,
        env={**os.environ, "HYPERMASK_CUDA": "0", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Iterator[Path]:
    """The sdist of this checkout, unpacked. It is made in a copy: setuptools leaves notes beside setup.py."""
    folder = tmp_path_factory.mktemp("sdist")
    copy = folder / "project"
    copy.mkdir()
    for name in RELEASED:
        shutil.copy(ROOT / name, copy)
    for name in ("csrc", "kernels", "hypermask_fast", "tests", "bench"):
        ignored = shutil.ignore_patterns(*MADE, "results")
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignored)
    setup(copy, "sdist", "--dist-dir", str(folder))
    (archive,) = folder.glob("*.tar.gz")
    assert archive.name == f"hypermask_fast-{__version__}.tar.gz"
    with tarfile.open(archive) as file:
        file.extractall(folder)
    yield folder / f"hypermask_fast-{__version__}"


def test_an_sdist_has_all_that_a_build_needs(sdist):
    wanted = package_files(ROOT) | sources(ROOT, "csrc/**/*") | set(RELEASED)
    assert wanted - sources(sdist, "**/*") == set()
    for some in ("hypermask_fast/py.typed", "hypermask_fast/presets/split-mnist.toml", "csrc/cuda/masks.cu"):
        assert some in wanted
    assert (sdist / "hypermask_fast" / "kernels" / "__init__.py").is_file()  # no link, which would lead nowhere


def metadata_of(archive: zipfile.ZipFile) -> Message:
    return message_from_string(archive.read(f"hypermask_fast-{__version__}.dist-info/METADATA").decode())


def test_a_wheel_without_a_compiler_is_for_every_machine(sdist, tmp_path):
    setup(sdist, "bdist_wheel", "--dist-dir", str(tmp_path), "--bdist-dir", str(tmp_path / "b"), HYPERMASK_NATIVE="0")
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"hypermask_fast-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        assert package_files(ROOT) - names == set()
        assert not {name for name in names if name.startswith(("tests", "bench", "csrc", "kernels"))}
        told = metadata_of(archive)
        assert (
            "hypermask-fast = hypermask_fast.cli:main"
            in archive.read(f"hypermask_fast-{__version__}.dist-info/entry_points.txt").decode()
        )
    assert (told["Name"], told["Version"], told["License-Expression"]) == ("hypermask-fast", __version__, "Apache-2.0")
    assert told["Description-Content-Type"] == "text/markdown" and told.get_payload().startswith("# ")
    assert told["Project-URL"] == "Paper, https://arxiv.org/abs/2310.00113"
    assert "torch>=2.11" in told.get_all("Requires-Dist") and told["Requires-Python"] == ">=3.10"
    assert {"train", "triton", "onnx", "test"} <= set(told.get_all("Provides-Extra"))


@pytest.mark.skipif(sys.platform != "linux", reason="the extension is built on Linux only")
def test_a_compiled_wheel_serves_every_later_python(sdist, tmp_path):
    compiler = tmp_path / "g++"
    compiler.write_text(FAKE_COMPILER)
    compiler.chmod(0o755)
    config = tmp_path / "cuda.cfg"
    config.write_text("[egg_info]\ntag_build = +cuda\n")  # as .github/workflows/wheels.yml marks those with CUDA
    environment = {"CXX": str(compiler), "DIST_EXTRA_CONFIG": str(config)}
    setup(sdist, "bdist_wheel", "--dist-dir", str(tmp_path), "--bdist-dir", str(tmp_path / "b"), **environment)
    (wheel,) = tmp_path.glob("*.whl")
    assert re.fullmatch(rf"hypermask_fast-{re.escape(__version__)}\+cuda-cp310-abi3-linux_\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        assert {"hypermask_fast/_native.abi3.so", "hypermask_fast/_build.json"} <= set(archive.namelist())


def test_the_version_is_in_one_place():
    for name in ("pyproject.toml", "setup.py", "CITATION.cff", ".github/workflows/wheels.yml"):
        assert __version__ not in (ROOT / name).read_text().replace(f"cff-version: {__version__}", "")


def test_the_citation_names_software_and_paper():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["cff-version"] == "1.2.0" and {"message", "title", "authors"} <= cited.keys()
    (paper,) = cited["references"]
    assert paper["url"] == "https://arxiv.org/abs/2310.00113"
    assert [author["family-names"] for author in paper["authors"]] == ["Książek", "Spurek"]


def test_issue_forms_ask_for_something():
    forms = [path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml"]
    assert len(forms) == 3
    for path in forms:
        form = yaml.safe_load(path.read_text())
        assert {"name", "description", "body"} <= form.keys()
        ids = [part["id"] for part in form["body"]]
        assert len(ids) == len(set(ids)) and all(part["attributes"]["label"] for part in form["body"])


@pytest.mark.parametrize("name", ["tests", "wheels"])
def test_workflows_run_what_is_there(name):
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text())
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert set(job.get("needs", [])) <= workflow["jobs"].keys()
        assert "actions/checkout" in job["steps"][0]["uses"] or job["needs"]
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step)
            for script in re.findall(r"\.ci/\w+", step.get("run", "")):
                assert os.access(ROOT / script, os.X_OK)
            for target in re.findall(r"make (\w+)", step.get("run", "")):
                assert f"\n{target}:" in (ROOT / "Makefile").read_text()
