"""The table of networks: quick rows are run, and the page in docs/ has every network and check; none fails."""

import re
from pathlib import Path

import pytest

from bench import networks, zoo
from hypermask_fast import InputError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
PAGE = Path(__file__).parents[2] / "docs" / "networks.md"
QUICK = [name for name, entry in zoo.ZOO.items() if entry.quick]
SLOW = {"torch.compile", ".pt2", "ONNX"}


def needed(name: str) -> None:
    try:
        zoo.ZOO[name].build()
    except InputError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", QUICK)
def test_a_quick_row(name):
    needed(name)
    row = networks.row(name, [check for check in networks.CHECKS if check not in SLOW])
    assert re.fullmatch(r"[\d,]+ of [\d,]+", row.pop("masked parameters"))
    assert set(row.values()) == {networks.PASSES}


@pytest.mark.parametrize("check", sorted(SLOW))
def test_one_network_by_the_slower_checks(check):
    if check == "ONNX":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    assert networks.row("MLP (preset)", [check]) == {check: networks.PASSES}


def test_a_check_that_fails_says_so(monkeypatch):
    monkeypatch.setattr(networks.Subject, "defined", lambda self, model: self.pass_(model, 0))  # another task
    assert networks.row("MLP (preset)", ["forward"])["forward"].startswith("fails: output: off by ")


def test_the_page_has_all_of_it_and_nothing_fails():
    text = PAGE.read_text()
    header = next(line for line in text.splitlines() if line.startswith("| network |"))
    assert [cell.strip() for cell in header.strip("|").split("|")][1:] == list(networks.CHECKS)
    for name in zoo.ZOO:
        row = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
        assert row.count("|") == len(networks.CHECKS) + 2
        assert "fails" not in row


def test_a_table_tells_long_cells_below():
    cells = dict.fromkeys(networks.CHECKS, networks.PASSES) | {"ONNX": "refused: " + "because " * 9}
    text = networks.table({"one": cells, "two": cells})
    assert text.count("refused [1]") == 2 and "\n1. refused: because" in text and "2. " not in text
