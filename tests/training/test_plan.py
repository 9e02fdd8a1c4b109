"""Seeds and grids of settings, as one planned run per folder."""

import pytest

from hypermask_fast import InputError
from hypermask_fast.training import plan
from hypermask_fast.training.config import load_preset

BASE = load_preset("split-digits")


@pytest.mark.parametrize(
    ("text", "found"),
    [("0-4", [0, 1, 2, 3, 4]), ("0,3,7", [0, 3, 7]), ("0-2,5", [0, 1, 2, 5]), ("7", [7]), (" 3 , 1-2", [3, 1, 2])],
)
def test_seeds(text, found):
    assert plan.seeds(text) == found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "takes whole numbers and ranges of them, such as 0-4 or 0,3,7, not ''"),
        ("a", "not 'a'"),
        ("1,", "not '1,'"),
        ("0-", "not '0-'"),
        ("-1", "not '-1'"),
        ("0--1", "not '0--1'"),
        ("1.5", "not '1.5'"),
        ("²", "not '²'"),
        ("4-0", "the range 4-0 is empty; it goes from low to high, 0-4"),
        ("0-2,1", "seed 1 is named twice"),
        ("3,3", "seed 3 is named twice"),
        ("0-99999999999", "at most 1000 runs"),
        ("9" * 30, "a seed must be at most 9223372036854775807"),
    ],
)
def test_seeds_that_are_none(text, message):
    with pytest.raises(InputError) as caught:
        plan.seeds(text)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_grid_is_split_at_commas_outside_of_brackets():
    words = ["method.beta=0.01, 0.1", "target.hidden=[8],[16,16]", 'title="a,b",c']
    assert plan.grid(words) == {
        "method.beta": ["0.01", "0.1"],
        "target.hidden": ["[8]", "[16,16]"],
        "title": ['"a,b"', "c"],
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method.beta"], "--grid takes key=value,value,..., such as method.beta=0.01,0.1, not 'method.beta'"),
        (["=1,2"], "--grid takes key=value"),
        (["method.beta=1,,2"], "a value is empty"),
        (["method.beta="], "a value is empty"),
        (["method.beta=1,2,1"], "1 is named twice"),
        (["method.beta=1", "method.beta=2"], "names method.beta twice"),
        (["seed=1,2"], "several seeds are asked for by --seeds"),
        (["data.tasks=2,3"], "runs of different tasks can't be summed up"),
        (["data.scenario=split-digits,split-mnist"], "runs of different tasks can't be summed up"),
        (["data.dir=a,b"], "runs of different tasks can't be summed up"),
        (["data.edition=1,2"], "runs of different tasks can't be summed up"),
        (["target.fingerprint=a,b"], "runs of different tasks can't be summed up"),
    ],
)
def test_grids_that_are_none(words, message):
    with pytest.raises(InputError) as caught:
        plan.grid(words)
    assert message in str(caught.value)


def test_every_combination_is_a_run_in_a_folder_of_its_own():
    runs = plan.planned(BASE, [0, 1], {"method.beta": ["0.01", "1"], "target.hidden": ["[8]", "[4, 4]"]})
    assert [run.name for run in runs] == [
        f"method.beta={beta},target.hidden={hidden}/seed-{seed}"
        for beta in ("0.01", "1")
        for hidden in ("[8]", "[4,_4]")
        for seed in (0, 1)
    ]
    assert runs[7].settings == {"method.beta": "1", "target.hidden": "[4, 4]", "seed": "1"}
    assert runs[7].config == BASE.with_values({"method.beta": 1, "target.hidden": [4, 4], "seed": 1})


def test_seeds_alone_and_a_grid_alone():
    assert [run.name for run in plan.planned(BASE, [3, 5], {})] == ["seed-3", "seed-5"]
    alone = plan.planned(BASE, None, {"training.keep": ["last", "best"]})
    assert [run.name for run in alone] == ["training.keep=last", "training.keep=best"]
    assert [run.config.seed for run in alone] == [BASE.seed] * 2


def test_a_folder_s_name_is_one_folder_in_place():
    (run,) = plan.planned(BASE, None, {"title": ['"../up/ä"']})
    assert "/" not in run.name and run.name.isascii()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method.beta": ["0.1", "0.10"]}, "method.beta=0.1 and method.beta=0.10 give the same numbers"),
        ({"training.log_every": ["1", "2"]}, "training.log_every=1 and training.log_every=2 give the same numbers"),
        ({"method.bta": ["1"]}, "unknown setting 'method.bta'"),
        ({"method.sparsity": ["0", "101"]}, "from 0 to 100, not 101"),
        ({"training.iterations": ["1"], "training.epochs": ["1"]}, "one of the two"),
        ({"method.beta": [str(i) for i in range(40)], "method.lam": [str(i) for i in range(40)]}, "1600 runs"),
    ],
)
def test_plans_that_are_refused(values, message):
    with pytest.raises(InputError) as caught:
        plan.planned(BASE, None, values)
    assert message in str(caught.value) and "\n" not in str(caught.value)
