"""Each example runs as a user would run it and prints what it promises."""

import re
from pathlib import Path

from support.launching import output_of_script

ROOT = Path(__file__).parents[2]


def output_of(name: str) -> str:
    return output_of_script(ROOT / "examples" / f"{name}.py", ROOT)


def number(text: str, behind: str) -> float:
    """The first number that the output has behind these words."""
    return float(re.search(re.escape(behind) + r"\D*?([\d.]+(?:e[+-]\d+)?)", text).group(1))


def test_mask_one_layer_drops_and_trains_what_it_says():
    text = output_of("mask_one_layer")
    assert abs(number(text, "dropped weights:") - 30) < 0.2
    assert abs(number(text, "logits with a gradient:") - 70) < 0.2
    assert number(text, "largest difference between the three outputs:") < 1e-5
    assert "masked_linear: " in text


def test_own_loop_learns_five_tasks_and_forgets_none():
    header, *rows = output_of("own_loop").splitlines()[1:]
    assert header.split() == ["after", "task", "0", "1", "2", "3", "4"]
    matrix = [[float(value) for value in row.split()[1:]] for row in rows]
    assert [len(row) for row in matrix] == [1, 2, 3, 4, 5]
    assert all(row[-1] > 92 for row in matrix)  # learned
    assert all(matrix[-1][task] > row[-1] - 3 for task, row in enumerate(matrix))  # and not forgotten
    assert sum(matrix[-1]) / 5 > 97


def test_mixed_batch_finds_classes_and_tasks():
    text = output_of("mixed_batch")
    own = number(text, "class found under the mask of the sample's own task:")
    assert own > 97
    assert number(text, "class found under the mask of another task:") < own - 20
    assert number(text, "task found without being told:") > 80
    assert "the same outputs as the mixed batch: True" in text


def test_every_example_is_tested():
    frameworks = {"with_lightning", "with_accelerate", "with_transformers"}  # in test_frameworks.py
    frameworks |= {"with_avalanche"}  # in tests/integrations
    found = {path.stem for path in (ROOT / "examples").glob("*.py")}
    assert (
        found == {"mask_one_layer", "own_loop", "mixed_batch", "serving", "tuning", "own_data_and_network"} | frameworks
    )


def test_serving_answers_from_two_threads_and_from_a_file():
    text = output_of("serving")
    assert "W * m kept of tasks: 0, 2" in text
    assert number(text, "used") + number(text, "made") == 100
    assert number(text, "made") == 2
    assert "2 tasks packed in bfloat16" in text
    assert number(text, "the same classes from the file:") > 98


def test_tuning_finds_a_learning_rate_with_or_without_optuna():
    text = output_of("tuning")
    assert text.splitlines()[0].startswith("searching with ")
    scores = [float(value) for value in re.findall(r"^trial \d: .* validation accuracy ([\d.]+) %$", text, re.M)]
    assert len(scores) == 4
    assert abs(number(text, "best trial:") - max(scores)) < 0.006


def test_the_settings_of_a_trial_are_asked_of_it(tmp_path, monkeypatch):
    """What Optuna's trials offer: `number` and `suggest_float`."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import tuning

    asked, scored = {}, []

    class Trial:
        number = 7

        def suggest_float(self, name, low, high, log=False):
            asked[name] = (low, high, log)
            return low

    monkeypatch.setattr(tuning, "score", lambda settings, folder: scored.append((settings, folder)) or 50.0)
    assert tuning.objective(Trial(), tmp_path) == 50
    assert scored == [({"training.lr": 1e-4, "method.beta": 1e-3}, tmp_path / "trial-7")]
    assert asked == {"training.lr": (1e-4, 1e-2, True), "method.beta": (1e-3, 1.0, True)}
