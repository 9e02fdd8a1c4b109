"""Every setting with every kind of wrong, odd and huge value: the run begins, or one line says what is wrong."""

import dataclasses
import json
import signal
import sys

import pytest

from hypermask_fast import HypernetConfig, InputError, cli
from hypermask_fast.training import needs, run, trainer
from hypermask_fast.training.config import RunConfig, TrainingConfig, load_preset, setting_names, tables
from hypermask_fast.training.step import TaskWork
from hypermask_fast.training.targets import TargetConfig

NUMBERS = ["0", "-1", "1", "2", "3.5", "-0.5", "1e300", "1e999", "nan", "inf", "-inf", "0x" + "f" * 5000, "9" * 5000]
NUMBERS += [str(n) for n in (10**6, 10**8, 10**9, 2**63 - 1, 2**63, -(2**63) - 1, 10**400)]
LISTS = ["[]", "[0]", "[-1]", "[1.5]", '[1, "a"]', "[[1]]", "[true]", "[" * 5000, "[1000000000]", "[100000,100000]"]
LISTS += ["[10000000,10000000]", *(f"[{','.join(['1'] * depth)}]" for depth in (100, 2000))]
TEXTS = ['""', '"ü\N{SNOWMAN}"', "word", "a" * 5000, '"a\\u0000b"', '"a\\nb"', '"\\u001b[2J"', "=", "'", '"', "\\"]
OTHERS = ["true", "{}", "{a=1}", "{a={b={c=1}}}", "1979-05-27", "07:32:00", "[[a]]", "# none", ""]
VALUES = [*NUMBERS, *LISTS, *TEXTS, *OTHERS]
WRONG_KEYS = [
    "nothing",
    "data.nothing",
    "seed.x",
    "training.lr.x",
    ".",
    "training.",
    ".lr",
    "a.b.c",
    "ü",
    "a\nb",
    "x" * 5000,
]
WRONG_KEYS += [".".join(["a"] * 5000), "training." + ".".join(["a"] * 5000)]
SMALL = {
    "data.tasks": "2",
    "training.iterations": "3",
    "target.hidden": "[4]",
    "hypernet.hidden": "[3]",
    "hypernet.embedding": "2",
}
PYTHON = [
    None,
    True,
    0,
    -1,
    1.5,
    float("nan"),
    float("inf"),
    10**400,
    1j,
    "",
    "a",
    b"a",
    (),
    (1, "a"),
    [0],
    {},
    object(),
]


@pytest.fixture
def try_run(tmp_path, monkeypatch, capsys):
    """Runs the command on a machine of 2 GB until its first step is done; returns whether that was reached."""
    step, done = TaskWork.step, []

    def one_step(*args):
        step(*args)
        done.append(1)
        raise KeyboardInterrupt

    def never_begins(*_):
        raise TimeoutError("the first step does not come")

    monkeypatch.setattr(TaskWork, "step", one_step)
    monkeypatch.setattr(needs, "memory", lambda device: 2e9)
    monkeypatch.chdir(tmp_path)
    number = 0

    def try_once(key: str, value: str, preset: str = "split-digits") -> bool:
        nonlocal number
        number += 1
        done.clear()
        words = [f"{name}={text}" for name, text in SMALL.items() if name != key] + [f"{key}={value}"]
        if key == "training.epochs":
            words.remove("training.iterations=3")
        if sys.platform != "win32":
            signal.signal(signal.SIGALRM, never_begins)
            signal.alarm(60)
        code = cli.main(
            ["train", preset, "--device", "cpu", "--out", f"{number}", *(w for s in words for w in ("--set", s))]
        )
        if sys.platform != "win32":
            signal.alarm(0)
        errors = capsys.readouterr().err
        if done:
            assert code == 130
            return True
        assert code == 2 and errors.startswith("hypermask-fast: error: ") and errors.count("\n") == 1, errors
        assert len(errors) < 1000, "a line that is read"
        assert not (tmp_path / f"{number}").exists()
        return False

    return try_once


@pytest.mark.parametrize("key", setting_names())
def test_every_setting(try_run, key):
    begun = [value for value in VALUES if try_run(key, value)]
    assert len(begun) < len(VALUES)


def test_settings_that_there_are_not(try_run):
    assert not any(try_run(key, "1") for key in WRONG_KEYS)


def test_a_folder_of_data_with_any_name(try_run):
    assert not any(try_run("data.dir", value, "split-mnist") for value in VALUES)


@pytest.mark.parametrize("iterations", [10**6, 10**8, 10**12, 2**63 - 1])
def test_any_number_of_iterations_begins_at_once(try_run, iterations):
    assert try_run("training.iterations", str(iterations))
    assert try_run("training.epochs", str(iterations))


@pytest.mark.parametrize("name", [*tables(), ""])
def test_wrong_values_in_python(name):
    preset = load_preset("split-digits")
    table = getattr(preset, name) if name else preset
    for field in dataclasses.fields(table):
        for value in PYTHON:
            try:
                changed = dataclasses.replace(table, **{field.name: value})
                made = dataclasses.replace(preset, **{name: changed}) if name else changed
                assert RunConfig.from_toml(made.to_toml(), "its own file") == made or isinstance(value, (list, int))
            except InputError as error:
                assert "\n" not in str(error)


@pytest.mark.parametrize("text", ["", "=", "[", "[data]", "a = 1", "data = 1", "[" * 5000, "x = " + "9" * 5000, "\0"])
def test_files_that_are_no_configuration(text):
    with pytest.raises(InputError) as caught:
        RunConfig.from_toml(text, "mine.toml")
    assert str(caught.value).startswith("mine.toml") and "\n" not in str(caught.value)


# -- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            {"hypernet.hidden": [10**7]},
            "output layer, 8562 x 10000000, takes 1.03 TB: lower target.hidden or hyp",
        ),
        (
            {"hypernet.hidden": [10**6, 10**6, 10]},
            "trunk, 24 x 1000000 x 1000000 x 10, takes 12 TB: lower hyp",
        ),
        ({"hypernet.embedding": 10**7, "hypernet.hidden": [10**5]}, "trunk, 10000000 x 100000, takes 12 TB"),
        (
            {"hypernet.embedding": 10**7, "hypernet.hidden": [1]},
            "embeddings of 5 tasks, takes 600 MB: lower hyper",
        ),
        (
            {"hypernet.chunk_size": 1, "hypernet.chunk_embedding": 10**5},
            "embeddings of 5 tasks and 8562 chunks, takes 10.3 GB: lower hypernet.embedding or hypernet.chunk_embedding"
            ", or raise hypernet.chunk_size",
        ),
        (
            {"hypernet.chunk_size": 10, "hypernet.hidden": [10**5]},
            "hidden layers of 857 chunks, takes 1.71 GB: lower hypernet.hidden or raise hypernet.chunk_size",
        ),
        ({"target.hidden": [10**7], "hypernet.hidden": [1]}, "output layer, 670000002 x 1, takes 16.1 GB"),
        (
            {"target.hidden": [10**7, 10**7], "hypernet.chunk_size": 10**9, "hypernet.hidden": [1]},
            "the target network's weights, takes 1.2 PB: lower target.hidden",
        ),
        (
            {"training.batch_size": 10**8},
            "a batch of 100000000 samples, takes 75.2 GB: lower training.batch_size or",
        ),
        ({"target.hidden": [], "training.batch_size": 10**8}, "takes 27.2 GB: lower training.batch_size\n"),
    ],
)
def test_what_is_too_large_is_named(monkeypatch, settings, told):
    monkeypatch.setattr(needs, "memory", lambda device: 5e8)
    config = load_preset("split-digits").with_values({"target.hidden": [100, 20], **settings})
    with pytest.raises(InputError, match="these settings need at least .* of memory, and there are 500 MB: ") as caught:
        run.train(config, "never")
    assert told in f"{caught.value}\n"


@pytest.mark.parametrize("kind", ["dense", "chunked", "mlp", "resnet20"])
def test_the_estimate_counts_what_is_there(kind):
    settings = {
        "dense": {},
        "chunked": {"hypernet.chunk_size": 1000},
        "mlp": {"target.hidden": [3, 4], "hypernet.hidden": [7]},
        "resnet20": {"target.name": "resnet20", "target.width": 16},
    }[kind]
    config = load_preset("split-digits").with_values(settings)
    scenario = run.read_scenario(config)
    model = run.build_model(config, scenario)
    parts = {need.what.partition(",")[0]: need.size for need in needs.needs(config, scenario)}
    hypernet = model.hypernet
    trained = 3 * 4
    assert parts["the hypernetwork's output layer"] == trained * (
        hypernet.output.weight.numel() + len(hypernet.output.bias)
    )
    assert parts["the hypernetwork's trunk"] == trained * sum(p.numel() for p in hypernet.trunk.parameters())
    assert parts["the target network's weights"] == trained * sum(p.numel() for p in model.net.parameters())
    embeddings = sum(p.numel() for name, p in hypernet.named_parameters() if "embeddings" in name)
    (found,) = (size for what, size in parts.items() if what.startswith("embeddings"))
    assert found == trained * embeddings


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 1 GB")])
@pytest.mark.parametrize(("owner", "name"), [(run, "HyperMask"), (trainer.Trainer, "_train_task"), (TaskWork, "step")])
def test_no_memory_is_one_line_and_no_folder(tmp_path, monkeypatch, capsys, error, owner, name):
    def fails(*_, **__):
        raise error

    command = ["train", "split-digits", "--device", "cpu", "--out", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fails)
        assert cli.main(command) == 2
        told = capsys.readouterr().err.splitlines()[-1]
        assert told.startswith("hypermask-fast: error: out of memory; these settings need at least ")
        assert "the hypernetwork's output layer, 16802 x 50, takes 10.3 MB: lower target.hidden or hypernet.hid" in told
        assert list(tmp_path.iterdir()) == []
        (tmp_path / "run").mkdir()  # an empty folder of the user's stays
        assert cli.main(command) == 2
        assert list((tmp_path / "run").iterdir()) == []
    assert cli.main([*command, *(word for key, value in SMALL.items() for word in ("--set", f"{key}={value}"))]) == 0


def test_no_memory_later_keeps_the_run(tmp_path, monkeypatch, capsys):
    step, done = TaskWork.step, []

    def fails_later(*args):
        done.append(1)
        if len(done) > 10:
            raise MemoryError
        return step(*args)

    monkeypatch.setattr(TaskWork, "step", fails_later)
    words = ["--set", "training.checkpoint_every=5"]
    assert cli.main(["train", "split-digits", "--device", "cpu", "--out", str(tmp_path / "run"), *words]) == 2
    assert "out of memory" in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "checkpoint.json").read_text())["state"]["iteration"] == 10


def test_other_errors_keep_their_traceback(monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr(run, "HyperMask", fails)
    config = load_preset("split-digits")
    with pytest.raises(RuntimeError, match="a bug"):
        run.build_model(config, run.read_scenario(config))


def test_the_library_refuses_as_well():
    with pytest.raises(InputError, match="hypernetwork.embedding must be a whole number, 1 .. 10000000, not 100000000"):
        HypernetConfig(embedding=10**8)
    with pytest.raises(InputError, match=r"training\.lr must be a positive number, not 'fast'"):
        TrainingConfig(iterations=1, lr="fast")
    with pytest.raises(InputError, match=r"target\.hidden must list widths up to 10000000, not \[1000000000\]"):
        run.build_target(TargetConfig("mlp", (10**9,)), (4,), 2)
