"""Checkpoints of several processes: each writes and reads its slices, and at every moment one of them is whole."""

import itertools
import math
import os
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import forging_folders, sharding
from support.launching import ranks

from hypermask_fast import InputError, cli
from hypermask_fast.training import checkpoint, report, run, tensor_files
from hypermask_fast.training.interrupt import Stopped
from hypermask_fast.training.lock import taken

KINDS = ("dense", "chunks")
MESHES = [(1,), (2,), (3,), (4,), (2, 2)]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with a run of each kind, by a single process, stopped within task 1."""
    folder = tmp_path_factory.mktemp("runs")
    for kind in KINDS:
        asked = iter(range(1, 100))
        with pytest.raises(Stopped):
            run.train(sharding.config_of(kind), folder / kind, stop=lambda asked=asked: next(asked) == 11)
        for name in report.FILES:
            (folder / kind / name).unlink(missing_ok=True)
    return folder


def results(count: int, function, *arguments) -> list:
    """What the ranks return, none of which fails."""
    ended = ranks(count, sharding.in_group, function, *arguments)
    assert not any(rank.code for rank in ended), [rank.err for rank in ended]
    return [rank.result for rank in ended]


def contents(path: Path) -> dict[str, bytes]:
    """All files below a folder, by name."""
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


# -- on any number of ranks --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(made) -> Path:
    """The same runs, as each mesh of ranks would have saved them."""
    for kind, mesh in itertools.product(KINDS, MESHES):
        folder = shutil.copytree(made / kind, made / f"{kind} {mesh}")
        results(math.prod(mesh), sharding.save_again, folder, mesh)
    return made


@pytest.mark.parametrize("mesh", MESHES[1:], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_per_rank_that_owns_something_and_one_for_the_rest(saved, kind, mesh):
    folder = saved / f"{kind} {mesh}"
    assert {path.name for path in folder.iterdir()} == {
        "checkpoint-001-0000005",
        "checkpoint.json",
        "config.toml",
        "log.csv",
    }
    files = {path.name: path.stat().st_size for path in (folder / "checkpoint-001-0000005").iterdir()}
    assert files.keys() == {"replicated.safetensors", *(f"rank-{rank:04d}.safetensors" for rank in range(mesh[-1]))}
    whole = sum(tensor.nbytes for tensor in checkpoint.load(folder).tensors.values())
    assert sum(files.values()) < whole + 4000 * len(files), "each tensor once, besides the files' headers"


@pytest.mark.parametrize("kind", KINDS)
def test_a_mesh_of_one_rank_saves_as_a_single_process_does(saved, kind):
    assert contents(saved / f"{kind} (1,)") == contents(saved / kind)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_ranks_reads_what_any_number_has_saved(saved, kind, mesh):
    """Each its own slices."""
    sources = [saved / kind, *(saved / f"{kind} {by}" for by in MESHES)]
    parts = {"dense": 9, "chunks": 5}[kind]  # weight and bias: model, best, two moments; the anchor's target
    for found in results(math.prod(mesh), sharding.differences, sources, saved / kind, mesh):
        assert found == {source.name: ([], parts) for source in sources}


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_process_goes_on_with_it(saved, tmp_path, kind):
    """To the very end of a run that was never sharded; and every reader takes it."""
    one, four = (shutil.copytree(saved / name, tmp_path / name) for name in (kind, f"{kind} (4,)"))
    for folder in (one, four):
        run.export_task(folder, 0, folder.with_suffix(".safetensors"))
        run.train(sharding.config_of(kind), folder, resume=True)
    exported = [load_file(folder.with_suffix(".safetensors")) for folder in (one, four)]
    assert all(torch.equal(tensor, exported[1][name]) for name, tensor in exported[0].items())
    assert (one / report.METRICS).read_bytes() == (four / report.METRICS).read_bytes()
    ended = [checkpoint.load(folder) for folder in (one, four)]
    assert ended[0].file.name == ended[1].file.name == "checkpoint-002-0000000.safetensors"
    assert not [p for p in four.iterdir() if p.name.startswith("checkpoint") and p.is_dir()]
    for name, tensor in ended[0].tensors.items():
        assert torch.allclose(tensor, ended[1].tensors[name], 0, 0, equal_nan=True), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_from_four_ranks_to_two_and_to_one(tmp_path, kind):
    """And ends as one that was never stopped."""
    (tmp_path / "one").mkdir()
    expected = sharding.trains(0, tmp_path / "one", kind, None, None)
    folder, at = tmp_path / "several", []
    folder.mkdir()
    for mesh, steps in (((4,), 17), ((2, 2), 4), ((2,), 4)):
        assert set(results(math.prod(mesh), sharding.trains_until_it_dies, folder, kind, mesh, steps)) == {"died"}
        at.append(checkpoint.load(folder).file.name)
    assert at == ["checkpoint-001-0000003", "checkpoint-001-0000006", "checkpoint-001-0000009"]
    assert results(2, sharding.with_load_model, folder, kind, (2,))[0][0] == 1
    found = sharding.trains(0, folder, kind, None, None)
    torch.testing.assert_close(found.matrix, expected.matrix, equal_nan=True, rtol=0, atol=1.01)  # a sample of 100
    ended = [checkpoint.load(path).tensors for path in (tmp_path / "one", folder)]
    for name, tensor in ended[0].items():
        if name.startswith("model."):
            torch.testing.assert_close(ended[1][name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_load_model_into_a_sharded_one(tmp_path, kind):
    sharding.trains(0, tmp_path, kind, None, None)
    told = results(3, sharding.with_load_model, tmp_path, kind, (3,))
    assert {learned for learned, _ in told} == {2}
    assert len({line for _, line in told}) == 1 and "is of another network" in told[0][1]


@pytest.mark.parametrize("helpers", [True, False], ids=["get_state_dict", "state_dict"])
@pytest.mark.parametrize("optimiser", sharding.OPTIMISERS)
@pytest.mark.parametrize("kind", KINDS)
def test_torch_distributed_checkpoint(tmp_path, kind, optimiser, helpers):
    """Of a loop of one's own."""
    assert results(2, sharding.with_dcp, tmp_path, kind, optimiser, helpers) == [[], []]
    if helpers:
        assert results(2, sharding.untrained_with_dcp, kind, optimiser) == [[], []]


# -- consolidated ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", MESHES[1:], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_consolidated_it_is_the_single_process_s_to_the_byte(saved, tmp_path, capsys, kind, mesh):
    folder = shutil.copytree(saved / f"{kind} {mesh}", tmp_path / "run")
    assert cli.main(["consolidate", str(folder)]) == 0
    assert contents(folder) == contents(saved / kind)
    told = capsys.readouterr().out
    assert told == f"{folder}/checkpoint-001-0000005.safetensors has taken the place of checkpoint-001-0000005/\n"
    assert cli.main(["consolidate", str(folder)]) == 0
    assert "already" in capsys.readouterr().out and contents(folder) == contents(saved / kind)


def test_what_can_t_be_consolidated(saved, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    folder = shutil.copytree(saved / "dense (2,)", tmp_path / "run")
    before = contents(folder)
    (file, *_) = folder.glob("checkpoint-*/rank-0001.safetensors")
    refusals = {
        tmp_path / "nowhere": "no checkpoint in",
        tmp_path / "empty": "no checkpoint in",
        tmp_path / "file": "cannot read",
        folder: "is in use by process",
    }
    with taken(folder):  # by another thread, or process
        for path, message in refusals.items():
            with ThreadPoolExecutor() as thread:
                assert thread.submit(cli.main, ["consolidate", str(path)]).result() == 2
            line = capsys.readouterr().err
            assert message in line and line.count("\n") == 1, line
    assert contents(folder) == before
    file.write_bytes(file.read_bytes()[:-1])
    assert cli.main(["consolidate", str(folder)]) == 2
    line = capsys.readouterr().err
    assert "rank-0001.safetensors is cut off or was altered" in line and line.count("\n") == 1
    assert not (folder / ".lock").exists() and not (tmp_path / "empty" / ".lock").exists()


@pytest.mark.parametrize("moment", range(1, 10))
def test_a_kill_at_any_moment_of_consolidating(saved, tmp_path, monkeypatch, moment):
    folder = shutil.copytree(saved / "dense (3,)", tmp_path / "run")
    calls = itertools.count(1)

    def dies(change):
        def wrapper(*args, **kwargs):
            if next(calls) == moment:
                raise KeyboardInterrupt
            return change(*args, **kwargs)

        return wrapper

    for owner, name in ((tensor_files, "save_file"), (os, "replace"), (os, "unlink"), (os, "rmdir"), (os, "mkdir")):
        monkeypatch.setattr(owner, name, dies(getattr(owner, name)))
    with pytest.raises(KeyboardInterrupt):
        checkpoint.consolidate(folder)
    monkeypatch.undo()
    expected, found = checkpoint.load(saved / "dense"), checkpoint.load(folder)
    assert found.state == expected.state and found.tensors.keys() == expected.tensors.keys()
    checkpoint.consolidate(folder)


# -- kills and full disks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("before", [True, False], ids=["the second", "the first"])
def test_a_kill_of_any_rank_at_any_moment_of_saving(tmp_path, victim, before):
    """Leaves one whole checkpoint, the old or the new one; and what else it leaves goes with the next one."""
    (tmp_path / "before").mkdir()
    if before:
        results(2, sharding.save, tmp_path / "before", sharding.OLD)
    seen = []
    for moment in itertools.count(1):
        folder = tmp_path / str(moment)
        shutil.copytree(tmp_path / "before", folder)
        ended = ranks(2, sharding.in_group, sharding.save_and_die, folder, victim, moment)
        if ended[victim].code == 0:
            break
        assert ended[victim].code == -signal.SIGKILL
        if before or checkpoint.exists(folder):
            found = checkpoint.load(folder)
            assert found.state in ((sharding.OLD, sharding.NEW) if before else (sharding.NEW,))
            seen.append(found.state["task"])
            for name, tensor in sharding.whole(found.state).items():
                assert torch.equal(found.tensors[name], tensor)
        checkpoint.save(folder, "next", sharding.whole(sharding.OLD), sharding.OLD)
        assert {path.name for path in folder.iterdir()} == {"checkpoint.json", "checkpoint-next.safetensors"}
    assert seen == sorted(seen) and moment > (15 if victim == 0 else 5)
    assert sharding.NEW["task"] in seen


def test_a_rank_that_can_t_write_stops_all(tmp_path):
    results(2, sharding.save, tmp_path, sharding.OLD)
    told, others = results(2, sharding.failing_saves, tmp_path)
    assert told == others
    for case, line in told.items():
        victim, what = case.split(maxsplit=1)
        file = "replicated" if victim == "0" else f"rank-000{victim}"
        file = f"{tmp_path}/checkpoint-000-0000002" + {
            "save_file": f"/{file}.safetensors",
            "limit": f"/{file}.safetensors",
            "replicas": ".safetensors",
        }.get(what, "")
        assert line.startswith(f"rank {victim}: cannot write {file}: "), line
        assert line.endswith("; nothing on disk was lost") and "\n" not in line
    found = checkpoint.load(tmp_path)
    assert found.state == sharding.OLD


def test_of_replicas_the_first_one_saves(tmp_path):
    results(2, sharding.save_replicas, tmp_path, sharding.OLD)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint.json", "checkpoint-000-0000001.safetensors"}
    found = checkpoint.load(tmp_path)
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in sharding.whole(sharding.OLD).items())


# -- damaged and forged ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def altered(saved) -> dict[str, Path]:
    """Runs whose checkpoint of two ranks is not as it was, by what has happened to it."""
    folders: dict[str, Path] = {}

    def another(name: str) -> Path:
        assert name not in folders
        folders[name] = shutil.copytree(saved / "dense (2,)", saved / "altered" / str(len(folders)))
        return folders[name]

    for name, damage in forging_folders.damages():
        damage(another(f"damage: {name}") / "checkpoint-001-0000005")
    for name, edit in forging_folders.edits():
        forging_folders.forge(another(name), edit)
    return folders


def wrong(line: str, folder: Path) -> bool:
    """Whether a refusal is none, or does not say in one short line where the fault is."""
    where = f"{folder}/checkpoint" in line or f"checkpoint in {folder}" in line
    return not where or "\n" in line or len(line) > 300 + 2 * len(str(folder))


def test_altered_checkpoints_are_refused_by_a_single_process(altered, saved, monkeypatch):
    model = run.build_model(sharding.config_of("dense"), sharding.scenario())
    monkeypatch.setattr(run, "read_scenario", lambda _: sharding.scenario())
    commands = [
        *[lambda folder: sharding.loaded(folder, model)] * 20,  # as both of the others do
        run.load_run,
        lambda folder: run.train(sharding.config_of("dense"), folder, resume=True),
    ]
    problems = []
    for (name, folder), command in zip(altered.items(), itertools.cycle(commands), strict=False):
        before = contents(folder)
        try:
            command(folder)
            line = "accepted"
        except InputError as error:
            line = str(error)
        except Exception as error:
            line = f"{type(error).__name__}: {error}"
        if wrong(line, folder) or contents(folder) != before:
            problems.append(f"{name}: {line}")
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("mesh", [(2,), (3,)], ids=str)
def test_altered_checkpoints_are_refused_by_all_ranks_alike(altered, saved, mesh):
    """Also where only one of them reads what is altered."""
    told = results(math.prod(mesh), sharding.refusals, list(altered.values()), saved / "dense", mesh)
    problems = [
        f"{name}: {lines}"
        for (name, folder), *lines in zip(altered.items(), *told, strict=True)
        if len(set(lines)) > 1 or wrong(lines[0], folder)
    ]
    assert not problems, "\n".join(problems)
