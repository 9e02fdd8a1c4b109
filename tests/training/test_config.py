import dataclasses

import pytest

from hypermask_fast import InputError
from hypermask_fast.data import SCENARIOS
from hypermask_fast.data.scenario import HoldOut
from hypermask_fast.training import describe
from hypermask_fast.training.config import RunConfig, TrainingConfig, load_preset, presets
from hypermask_fast.training.targets import TARGETS

MINIMAL = {
    "data": {"scenario": "split-digits"},
    "target": {"name": "mlp"},
    "training": {"iterations": 10},
}

# The published experiments, line by line: target and its widths; widths of the embedding and of the hidden layers; p;
# beta; lambda; whether the drift is masked; learning rate, batch; length of a task; scenario; tasks and their classes;
# validation set of each task; which model is kept, schedule of the learning rate; first seed.
PUBLISHED = """
split-mnist             | mlp 784-400-400-2      | 128 25 25  | 30 | 1e-3 | 1e-3 | yes | 1e-3 128 | 2000 it | split-mnist | 5 x 2 | 1000 | last constant | 0
permuted-mnist          | mlp 1024-1000-1000-10  | 24 100 100 | 0  | 5e-4 | 1e-3 | yes | 1e-3 128 | 5000 it | permuted-mnist | 10 x 10 | 5000 | last constant | 0
split-cifar100-resnet20 | resnet20 32            | 48 100     | 0  | .01  | 1    | no  | 1e-3 32  | 200 ep  | split-cifar100 | 10 x 10 | 500 | best plateau | 0
split-cifar100-zenkenet | zenkenet               | 48 100     | 0  | .01  | .01  | no  | 1e-3 32  | 200 ep  | split-cifar100 | 10 x 10 | 500 | best plateau | 0
tiny-imagenet-resnet20  | resnet20 32            | 96 100 100 | 0  | 1    | .1   | no  | 1e-4 16  | 10 ep   | tiny-imagenet | 40 x 5 | 250 | best plateau | 5
tiny-imagenet-zenkenet  | zenkenet               | 96 100 100 | 50 | .01  | 1    | no  | 1e-3 16  | 10 ep   | tiny-imagenet | 40 x 5 | 250 | best plateau | 5
cifar100-5x20           | resnet20 32            | 48 200     | 0  | .01  | 1    | no  | 1e-4 32  | 200 ep  | cifar100-5x20 | 5 x 20 | 1000 | best plateau | 0
cifar100-5x20-zenkenet  | zenkenet               | 48 200     | 0  | .01  | .01  | no  | 1e-4 32  | 200 ep  | cifar100-5x20 | 5 x 20 | 1000 | best plateau | 0
cifar100-50-5x10        | resnet20 32            | 48 200     | 0  | .01  | 1    | no  | 1e-4 32  | 200 ep  | cifar100-50-5x10 | 50 + 5 x 10 | 2500 500 | best plateau | 0
cifar100-50-10x5        | resnet20 32            | 48 200     | 0  | .01  | 1    | no  | 1e-4 32  | 200 ep  | cifar100-50-10x5 | 50 + 10 x 5 | 2500 250 | best plateau | 0
cifar100-40-20x3        | resnet20 32            | 48 200     | 0  | .01  | 1    | no  | 1e-4 32  | 200 ep  | cifar100-40-20x3 | 40 + 20 x 3 | 2000 150 | best plateau | 0
"""  # noqa: E501
ROWS = {row[0]: row for row in ([cell.strip() for cell in line.split("|")] for line in PUBLISHED.split("\n") if line)}


def whole(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split())


@pytest.mark.parametrize("name", ROWS)
def test_presets_are_the_published_experiments(name):
    _, target, widths, p, beta, lam, masked, adam, length, scenario, tasks, validation, selection, seed = ROWS[name]
    config = load_preset(name)
    info = SCENARIOS[scenario]
    kind, _, shape = target.partition(" ")
    assert config.target.name == kind
    if kind == "mlp":
        inputs, *hidden, classes = whole(shape.replace("-", " "))
        assert (config.target.hidden, info.num_classes) == (tuple(hidden), classes)
        assert inputs == {"split-mnist": 28 * 28, "permuted-mnist": 32 * 32}[scenario]
    elif kind == "resnet20":
        assert config.target.width == int(shape)
    embedding, *hidden = whole(widths)
    assert (config.hypernet.embedding, config.hypernet.hidden, config.hypernet.chunk_size) == (
        embedding,
        tuple(hidden),
        None,
    )
    method = config.method
    assert (method.sparsity, method.beta, method.lam) == (float(p), float(beta), float(lam))
    assert (method.drift_masked, method.drift_norm, method.ramp) == (masked == "yes", 1, True)
    training = config.training
    assert (training.lr, training.batch_size) == (float(adam.split()[0]), int(adam.split()[1]))
    lengths = {"it": training.iterations, "ep": training.epochs}
    assert lengths == dict.fromkeys(lengths) | {length.split()[1]: int(length.split()[0])}
    assert config.data.scenario == scenario
    assert [describe.title(config), config.data.tasks] == [
        f"{scenario}, {len(info.classes)} tasks of {tasks.partition(' x ')[2] if '+' not in tasks else tasks} classes, "
        f"{describe.title(config).rpartition(', ')[2]}",
        None,
    ]
    first, *later = tasks.split(" + ")
    count, each = whole((later or [first])[0].replace(" x ", " "))
    assert info.classes == ((int(first),) if later else ()) + (each,) * count
    own = config.data.validation, config.data.validation_per_class
    held_out = [own[0] if own[1] is None else own[1] * classes for classes in info.classes]
    assert held_out == [*whole(validation), *[whole(validation)[-1]] * len(held_out)][: len(held_out)]
    assert HoldOut.asked(*own) == info.validation, "what load_scenario holds out by itself"
    assert [training.keep, training.schedule] == selection.split()
    assert (config.seed, config.fidelity) == (int(seed), "default")


def test_every_preset_can_run_and_is_told_apart_by_its_title():
    known = presets()
    assert list(known) == sorted([*ROWS, "split-digits", "split-cifar10"])
    assert len({describe.title(config) for config in known.values()}) == len(known)
    for config in known.values():
        assert config.data.scenario in SCENARIOS
        assert config.target.name in TARGETS


@pytest.mark.parametrize("name", presets())
def test_toml_round_trip(name):
    config = load_preset(name)
    assert RunConfig.from_toml(config.to_toml(), name) == config


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("split-digits", "acb2665e4d390e9126da4946b495cfee2136597929d3e1c435b7e3a2ece9cfc3"),
        ("split-cifar100-zenkenet", "7cedd4974b508a47c138a3d964e906fd667e79410a867edd44b32611b165b6f9"),
        ("tiny-imagenet-zenkenet", "af523eac6463e7f861c080640be2cb48508e04c229895de6bbd27cb11a99a778"),
        ("cifar100-5x20", "8038ba7e2eb75ea3f3edb99005997915e454a36dce457047d858e6f067c0ca70"),
    ],
)
def test_digests_stay_what_they_were(name, digest):
    """Checkpoints hold them: one that changes makes every run refuse to go on."""
    config = load_preset(name)
    assert config.digest() == digest
    assert dataclasses.replace(config, data=dataclasses.replace(config.data, dir="elsewhere")).digest() == digest
    assert dataclasses.replace(config, title="for people").digest() == digest
    assert config.with_values({"seed": 1}).digest() != digest
    assert config.with_values({"method.sparsity": int(config.method.sparsity)}).digest() == digest, "30 is 30.0"


@pytest.mark.parametrize(
    ("name", "before", "digest"),
    [
        (
            "tiny-imagenet-zenkenet",
            {"seed": 0, "data.validation": 250},
            "453e8ce4ba37ef8d57a1f7c2bbe76fd35fd1188b8a93ef915992d0953ac2c03e",
        ),
        (
            "cifar100-5x20",
            {"data.validation": 500},
            "621e13252333874bfa2f4e58a18bc7ce915a961cf7dbd0fb57a874a68058bf27",
        ),
    ],
)
def test_editions_of_data_tell_runs_apart(name, before, digest):
    """What a preset was is known as that, and is another one than what it is."""
    config = load_preset(name)
    old = config.with_values({**before, "data.edition": 1})
    assert old.digest() == digest, "checkpoints hold it"
    assert config.with_values(before).digest() != digest
    assert config.settled().data.edition == 2 and config.settled().digest() == config.digest()
    assert load_preset("split-digits").settled() == load_preset("split-digits")
    assert load_preset("split-digits").with_values({"data.edition": 1}).digest() == load_preset("split-digits").digest()


def test_validation_is_of_tasks_or_of_classes():
    config = load_preset("cifar100-5x20").with_values({"data.validation": "30"})
    assert (config.data.validation, config.data.validation_per_class) == (30, None)
    config = config.with_values({"data.validation_per_class": 3})
    assert (config.data.validation, config.data.validation_per_class) == (None, 3)
    with pytest.raises(InputError, match="data takes either validation or validation_per_class, one of the two"):
        config.with_values({"data.validation": 3, "data.validation_per_class": 3})


@pytest.mark.parametrize(
    ("name", "title", "digest"),
    [
        (
            "split-digits",
            "Split digits: 5 tasks of 2 of scikit-learn's 8x8 digits, MLP 64-100-100-2",
            "01e5e1cf2aca98a7d6c87ccdfcf6608c8273174a8488ed1f457fccb005898615",
        ),
        (
            "tiny-imagenet-zenkenet",
            "Tiny ImageNet: 40 tasks of 5 classes, ZenkeNet",
            "6023b36e9500dd0e9d0b370db60498242eba5a401a47a2743867fa1174cbdbb5",
        ),
    ],
)
def test_digests_of_version_0_1_0_stay_what_they_were(name, title, digest):
    """Its presets had titles, which its checkpoints hold; such runs go on."""
    config = dataclasses.replace(load_preset(name), title=title)
    if name == "tiny-imagenet-zenkenet":  # whose data were others
        config = config.with_values({"seed": 0, "data.validation": 250, "data.edition": 1})
    assert config.digest_with_title() == digest
    assert (
        dataclasses.replace(config, data=dataclasses.replace(config.data, dir="elsewhere")).digest_with_title()
        == digest
    )


def test_with_values_parses_as_toml_does():
    config = RunConfig.from_dict(MINIMAL).with_values(
        {
            "training.lr": "1e-2",
            "target.hidden": "[3, 4]",
            "method.sparsity": "50",
            "method.ramp": "false",
            "fidelity": "official",
            "hypernet.chunk_size": 100,
        }
    )
    assert config.training.lr == 0.01
    assert config.target.hidden == (3, 4)
    assert config.method.sparsity == 50.0 and config.method.ramp is False
    assert config.fidelity == "official"
    assert config.hypernet.chunk_size == 100


def test_iterations_and_epochs_replace_each_other():
    config = RunConfig.from_dict(MINIMAL).with_values({"training.epochs": "3"})
    assert (config.training.iterations, config.training.epochs) == (None, 3)
    assert config.with_values({"training.iterations": 7}).training.epochs is None


def test_lengths_count_the_last_partial_batch():
    training = TrainingConfig(epochs=3, batch_size=10)
    assert training.epoch_length(21) == 3
    assert training.length(21) == 9
    assert TrainingConfig(iterations=5).length(21) == 5


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"training.sparsty": "1"}, "unknown setting 'training.sparsty'"),
        (
            {"training.lrr": "1"},
            r"unknown setting 'training.lrr' .did you mean 'training.lr'..; training has lr, batch",
        ),
        ({"nothing": "1"}, "unknown setting 'nothing'; the top level has data, target, training, hypernet"),
        ({"method.sparsty": "1"}, "did you mean 'method.sparsity'"),
        ({"sparsity": "1"}, "did you mean 'method.sparsity'"),
        ({"training.beta": "1"}, "did you mean 'method.beta'"),
        ({"metod.sparsity": "1"}, "unknown setting 'metod' .did you mean 'method'"),
        ({"seed.value": "1"}, "seed is not a table"),
        ({"method.sparsity": "130"}, "percentage from 0 to 100, not 130"),
        ({"method.sparsity": "-1"}, "percentage from 0 to 100, not -1"),
        ({"method.sparsity": "nan"}, "percentage from 0 to 100, not nan"),
        ({"method.sparsity": "many"}, "'method.sparsity' must be a number, not 'many'"),
        ({"training.lr": "abc"}, "^setting 'training.lr' must be a number, not 'abc'$"),
        ({"training.lr": "true"}, "^setting 'training.lr' must be a number, not True$"),
        ({"seed": "true"}, "^setting 'seed' must be an integer, not True$"),
        ({"seed": "1.0"}, "^setting 'seed' must be an integer, not 1.0$"),
        ({"title": "7"}, "^setting 'title' must be a string, not 7$"),
        ({"data.tasks": "two"}, "^setting 'data.tasks' must be an integer, not 'two'$"),
        ({"method.ramp": "1"}, "'method.ramp' must be true or false, not 1"),
        ({"training.batch_size": "1.5"}, "'training.batch_size' must be .*an integer.*, not 1.5"),
        ({"training.batch_size": "0"}, "training.batch_size must be a whole number, 1 or more, not 0"),
        ({"training.lr": "0"}, "training.lr must be a positive number, not 0"),
        ({"training.lr": "inf"}, "training.lr must be a positive number, not inf"),
        ({"training.gradient": "factored", "hypernet.chunk_size": "10"}, "needs a dense hypernetwork"),
        ({"training.gradient": "sparse"}, "must be auto, factored or dense, not 'sparse'"),
        ({"training.keep": "first"}, "training.keep must be last or best, not 'first'"),
        ({"training.schedule": "cosine"}, "constant or plateau"),
        ({"training.checkpoint_every": "-1"}, "0 or more, not -1"),
        ({"fidelity": "exact"}, "fidelity must be"),
        ({"target.hidden": "[1.5]"}, "must be a list of integers"),
        ({"target.hidden": "[true]"}, "^setting 'target.hidden' must be a list of integers, not .True.$"),
        ({"target.hidden": "12"}, "^setting 'target.hidden' must be a list of integers, not 12$"),
        ({"hypernet.hidden": "[]"}, "one or more positive widths"),
        ({"data": "3"}, "data must be a table"),
    ],
)
def test_wrong_settings_are_refused_by_name(values, message):
    with pytest.raises(InputError, match=message) as caught:
        RunConfig.from_dict(MINIMAL).with_values(values)
    assert "\n" not in str(caught.value)


def test_a_length_of_the_wrong_type_is_refused():
    with pytest.raises(InputError, match=r"training.iterations must be a whole number, 1 or more, not 5.5"):
        TrainingConfig(iterations=5.5)


def test_missing_settings_and_both_lengths_are_refused():
    with pytest.raises(InputError, match=r"'data\.scenario' is missing"):
        RunConfig.from_dict({**MINIMAL, "data": {}})
    with pytest.raises(InputError, match="one of the two"):
        RunConfig.from_dict({**MINIMAL, "training": {"iterations": 1, "epochs": 1}})
    with pytest.raises(InputError, match="one of the two"):
        RunConfig.from_dict({**MINIMAL, "training": {}})
    with pytest.raises(InputError, match="one of the two"):
        RunConfig.from_dict(MINIMAL).with_values({"training.iterations": "1", "training.epochs": "1"})


def test_unknown_preset_names_the_closest():
    with pytest.raises(InputError, match=r"unknown preset 'split-digit' .did you mean 'split-digits'.*permuted-mnist"):
        load_preset("split-digit")


def test_files_that_are_no_configuration(tmp_path):
    path = tmp_path / "config.toml"
    with pytest.raises(InputError, match="cannot read configuration"):
        RunConfig.load(path)
    path.write_text("title = 'mine'")
    with pytest.raises(InputError, match=r"config\.toml: setting 'data' is missing"):
        RunConfig.load(path)
    path.write_text("title = ")
    with pytest.raises(InputError, match="not valid TOML"):
        RunConfig.load(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="cannot read configuration"):
        RunConfig.load(path)


def test_configurations_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_preset("split-digits").seed = 1


def test_a_file_that_begins_with_a_byte_order_mark(tmp_path):
    """As editors on Windows write it."""
    path = tmp_path / "mine.toml"
    path.write_text(load_preset("split-digits").to_toml(), encoding="utf-8-sig")
    assert path.read_bytes().startswith(b"\xef\xbb\xbf")
    assert RunConfig.load(path) == load_preset("split-digits")


@pytest.mark.parametrize("key", ["title", "data.dir"])
def test_bytes_that_are_no_text_are_refused(key):
    """As a command line hands them over."""
    with pytest.raises(InputError, match=rf"^setting '{key}' must be text in UTF-8, not 'a\\udcff'$"):
        load_preset("split-digits").with_values({key: b"a\xff".decode(errors="surrogateescape")})
