"""The benchmarks of finding the task run, on small shapes."""

import csv
import json

from bench import inference_ops, unknown_task
from hypermask_fast.training import run
from hypermask_fast.training.config import load_preset


def test_runs_are_measured_by_every_method(tmp_path):
    few = {"data.tasks": 2, "training.iterations": 20, "training.log_every": 20, "training.checkpoint_every": 0}
    run.train(load_preset("split-digits").with_values(few), tmp_path / "two")
    to = tmp_path / "kept" / "found"
    unknown_task.main([str(tmp_path / "two"), "--samples", "30", "--one", "3", "--to", str(to)])
    with (tmp_path / "kept" / "found.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["method"] for row in rows} >= {"known", "entropy", "fecam_task", "mahalanobis", "gradient+entropy"}
    means = json.loads((tmp_path / "kept" / "found.json").read_text())["means"]
    assert len(means) == len(rows) and all(0 <= mean["class_percent"] <= 100 for mean in means)


def test_times_are_taken(tmp_path):
    inference_ops.main(["--quick", "--turns", "1", "--to", str(tmp_path / "speed.json")])
    found = json.loads((tmp_path / "speed.json").read_text())
    assert found["gradient"]["20 tasks by 10"] > 0 and found["distances"][0]["times faster, factors kept"] > 0
