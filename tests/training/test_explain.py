"""What `hypermask-fast settings` and `hypermask-fast presets NAME` say of each setting comes from the dataclasses."""

import dataclasses
import inspect
import re

import pytest

from hypermask_fast import InputError, cli
from hypermask_fast.settings import kinds, meanings
from hypermask_fast.training import explain
from hypermask_fast.training.config import RunConfig, load_preset, presets, setting_names, tables


@pytest.mark.parametrize("owner", [RunConfig, *tables().values()], ids=lambda owner: owner.__name__)
def test_every_field_has_a_meaning_and_every_meaning_a_field(owner):
    fields = [field.name for field in dataclasses.fields(owner)]
    assert list(meanings(owner)) == fields
    assert all(len(text) > 10 and "\n" not in text for text in meanings(owner).values())
    section = inspect.cleandoc(owner.__doc__).partition("Attributes:\n")[2].split("\n\n")[0]
    assert re.findall(r"^    (\w+):", section, re.M) == fields
    assert set(kinds(owner)) == set(fields) - set(tables()), "a table or a setting"


def test_all_settings_are_listed(capsys):
    assert cli.main(["settings"]) == 0
    shown = capsys.readouterr().out
    listed = re.findall(r"^([\w.]+) (?:= |\()", shown, re.M)
    assert listed == [setting.key for setting in explain.settings()]
    assert sorted(listed) == sorted(set(setting_names()) - set(tables()))
    assert re.findall(r"^\[(\w+)\]  [A-Z]", shown, re.M) == list(tables())
    for expected in (
        "data.scenario (required)",
        "data.tasks (not set)   (a whole number, 1 or more; unit: tasks)",
        "training.lr = 0.001   (a positive number)\n    Learning rate of Adam, which",
        'training.keep = "last"   ("last", "best")',
        "hypernet.hidden = [100]   (a list of one or more positive widths; unit: units)",
        "method.sparsity = 0.0   (a percentage from 0 to 100)",
        "method.ramp = true   (true or false)",
        '"tiny-imagenet")',
    ):
        assert expected in shown


def test_one_table_and_one_setting(capsys):
    assert cli.main(["settings", "method"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("[method]  The method's strengths") and "method.beta" in shown and "training" not in shown
    assert cli.main(["settings", "training.batch_size"]) == 0
    assert capsys.readouterr().out == (
        "training.batch_size = 128   (a whole number, 1 or more; unit: samples)\n    Training samples per iteration.\n"
    )


@pytest.mark.parametrize(
    ("key", "nearest"),
    [("sparsity", "method.sparsity"), ("training.batchsize", "training.batch_size"), ("metod", "method")],
)
def test_an_unknown_setting_says_the_nearest(capsys, key, nearest):
    assert cli.main(["settings", key]) == 2
    told = f"unknown setting '{key}' (did you mean '{nearest}'?); `hypermask-fast settings` lists all"
    assert told in capsys.readouterr().err
    with pytest.raises(InputError, match=f"did you mean '{nearest}'.*`hypermask-fast settings.*` explains them$"):
        load_preset("split-digits").with_values({key: "1"})


def test_help_points_there(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    assert "`hypermask-fast settings` explains all" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("name", presets())
def test_a_preset_with_comments_is_the_preset(name):
    config = load_preset(name)
    text = explain.commented_toml(config)
    assert RunConfig.from_toml(text, name) == config
    without = [line for line in text.split("\n") if line and not line.startswith("#")]
    assert without == [line for line in config.to_toml().split("\n") if line], "nothing but comments was added"
    comments = text.count("\n# ") + text.startswith("# ")
    assert comments >= len(setting_names())
    assert max(map(len, text.split("\n"))) <= 100
    assert "\n# tasks =\n" in text and ("\n# epochs =\n" in text) == (config.training.epochs is None)


def test_what_presets_shows_trains(tmp_path, capsys):
    assert cli.main(["presets", "split-digits"]) == 0
    (tmp_path / "mine.toml").write_text(capsys.readouterr().out.replace("# tasks =", "tasks = 1"), encoding="utf-8")
    words = ["train", str(tmp_path / "mine.toml"), "--out", str(tmp_path / "run"), "--set", "training.iterations=2"]
    assert cli.main(words) == 0
    assert RunConfig.load(tmp_path / "run" / "config.toml").data.tasks == 1
