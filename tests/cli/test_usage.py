"""The command line's other words: presets, wrong usage, bugs."""

import pytest

from hypermask_fast import cli, commands
from hypermask_fast.training import describe
from hypermask_fast.training.config import RunConfig, load_preset, presets


def test_presets_lists_every_preset(capsys):
    assert cli.main(["presets"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(presets())
    assert all(describe.title(config) in line for line, config in zip(lines, presets().values(), strict=True))


def test_presets_shows_a_preset_as_a_configuration_file(tmp_path, capsys, refused):
    assert cli.main(["presets", "split-mnist"]) == 0
    (tmp_path / "mine.toml").write_text(capsys.readouterr().out)
    assert RunConfig.load(tmp_path / "mine.toml") == load_preset("split-mnist")
    assert "unknown preset" in refused("presets", "nothing")


@pytest.mark.parametrize("words", [[], ["trian"], ["train"], ["evaluate", "somewhere", "--task-id", "guess"]])
def test_wrong_usage_exits_with_2_in_one_line(capsys, words):
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith("hypermask-fast: error: ") and line.count("\n") == 1


def test_other_exceptions_keep_their_traceback(monkeypatch):
    def fail():
        raise RuntimeError("a bug")

    monkeypatch.setattr(commands.presets, "presets", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["presets"])
