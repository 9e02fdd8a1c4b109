import math

import numpy as np
import pytest
import torch

from hypermask_fast import InputError
from hypermask_fast.training.metrics import forgetting, summarize, tasks_learned

NAN = float("nan")
MATRIX = [[90.0, 20.0, 30.0], [80.0, 95.0, 40.0], [70.0, 97.0, 99.0]]
BASELINE = [10.0, 11.0, 12.0]


def test_metrics_by_hand():
    summary = summarize(torch.tensor(MATRIX, dtype=torch.float64), torch.tensor(BASELINE))
    assert summary.tasks_learned == 3
    assert summary.average_accuracy == pytest.approx((70 + 97 + 99) / 3)
    assert summary.learning_accuracy == pytest.approx((90 + 95 + 99) / 3)
    assert summary.forgetting == pytest.approx(((90 - 70) + (95 - 97)) / 2)
    assert summary.backward_transfer == pytest.approx(((70 - 90) + (97 - 95)) / 2)
    assert summary.forward_transfer == pytest.approx(((20 - 11) + (40 - 12)) / 2)


def test_a_run_under_way_counts_its_learned_tasks_only():
    matrix = np.array(MATRIX)
    matrix[2] = NAN
    summary = summarize(matrix, BASELINE)
    assert summary.tasks_learned == 2
    assert summary.average_accuracy == pytest.approx((80 + 95) / 2)
    assert summary.forgetting == pytest.approx(10)
    assert summary.forward_transfer == pytest.approx(20 - 11)


def test_forgetting_takes_the_best_of_all_earlier_rows():
    assert forgetting([[50.0, 0, 0], [90.0, 50, 0], [60.0, 50, 50]]) == pytest.approx((30 + 0) / 2)
    # Better before it was learned than after: the definition counts that too.
    assert forgetting([[50.0, 80, 0], [50.0, 70, 0], [50.0, 60, 50]]) == pytest.approx((0 + 20) / 2)


def test_what_cannot_be_known_is_none():
    first = summarize([[90.0, NAN], [NAN, NAN]])
    assert (first.average_accuracy, first.learning_accuracy) == (90, 90)
    assert first.forgetting is first.backward_transfer is first.forward_transfer is None
    none = summarize(np.full((2, 2), NAN), BASELINE[:2])
    assert none.tasks_learned == 0 and set(none.to_dict().values()) == {0, None}


def test_upper_triangle_is_needed_for_forward_transfer_only():
    matrix = np.array(MATRIX)
    matrix[np.triu_indices(3, 1)] = NAN
    summary, full = summarize(matrix, BASELINE), summarize(MATRIX, BASELINE)
    assert summary.forward_transfer is None
    assert summary.forgetting == full.forgetting and math.isfinite(summary.backward_transfer)
    assert summarize(MATRIX).forward_transfer is None, "no baseline, no forward transfer"


def test_wrong_shapes_are_refused():
    with pytest.raises(InputError, match=r"square \(tasks, tasks\), not \(2, 3\)"):
        summarize(np.zeros((2, 3)))
    with pytest.raises(InputError, match=r"\(3,\) percentages, not \(2,\)"):
        summarize(MATRIX, [1.0, 2.0])
    with pytest.raises(InputError, match="without gaps"):
        tasks_learned([[NAN, NAN], [50.0, 50.0]])
