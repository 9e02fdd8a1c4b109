"""Trainers in several processes: the numbers of one, in step, and what must be the same on all of them."""

import pytest
import torch
from support.launched import TRAINERS, agreed, compared, stopped, trained
from support.launching import ranks

from hypermask_fast import InputError
from hypermask_fast.ranks import ranks_named
from hypermask_fast.training.config import TrainingConfig
from hypermask_fast.training.world import Stopping, World


@pytest.fixture(scope="module")
def alone():
    return {case: trained(case) for case in TRAINERS}


@pytest.fixture(scope="module", params=[2, 3])
def together(request):
    """Per rank: case -> what it has found."""
    ended = ranks(request.param, compared)
    assert all(rank.code == 0 for rank in ended), ended
    return [rank.result for rank in ended]


@pytest.mark.parametrize("case", [name for name, trainer in TRAINERS.items() if not trainer.random])
def test_the_numbers_of_one_process(alone, together, case):
    for rank in together:
        assert rank[case].matrix == alone[case].matrix and rank[case].baseline == alone[case].baseline
        for name, value in alone[case].weights.items():
            assert torch.allclose(rank[case].weights[name], value, rtol=1e-4, atol=1e-5), name
    assert [rank[case].rows for rank in together[1:]] == [[]] * (len(together) - 1), "one logs"
    for mine, theirs in zip(together[0][case].rows, alone[case].rows, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("case", TRAINERS)
def test_all_ranks_end_alike(together, case):
    first, *others = (rank[case] for rank in together)
    for other in others:
        assert torch.equal(first.generator, other.generator)
        assert first.weights.keys() == other.weights.keys()
        assert all(torch.equal(first.weights[name], value) for name, value in other.weights.items())


@pytest.mark.parametrize("case", [name for name, trainer in TRAINERS.items() if trainer.random])
def test_ranks_have_noise_of_their_own_and_repeat_it(together, case):
    again = [rank["again"][case] for rank in together]
    for rank, repeated in zip(together, again, strict=True):
        assert all(torch.equal(rank[case].weights[name], value) for name, value in repeated.weights.items())
    drawn = [rank["noise"] for rank in together]
    assert len({tuple(noise) for noise in drawn}) == len(drawn)


def test_a_run_that_one_rank_stops_goes_on_bit_for_bit(tmp_path):
    ended = ranks(2, stopped, str(tmp_path))
    assert all(rank.code == 0 for rank in ended), ended
    places = {rank.result[0] for rank in ended}
    assert len(places) == 1 and places.pop().endswith("which is saved")
    for rank in ended:
        _, whole, resumed = rank.result
        assert whole.matrix == resumed.matrix
        assert all(torch.equal(resumed.weights[name], value) for name, value in whole.weights.items())


def test_ranks_that_differ_are_named():
    ended = ranks(3, agreed)
    assert all(rank.code == 0 for rank in ended), ended
    said = ended[0].result
    assert all(rank.result == said for rank in ended)
    for what, told in {
        "data": "rank 2 differs from rank 0 in its data: all ranks of a run need the same",
        "labels": "rank 2 differs from rank 0 in its data",
        "Dataset": "rank 2 differs from rank 0 in its data",
        "settings": "rank 2 differs from rank 0 in its settings",
        "seed": "ranks 1 and 2 differ from rank 0 in their settings",
        "networks": "rank 2 differs from rank 0 in its networks",
        "package": "rank 2 differs from rank 0 in its version or sources of hypermask_fast",
    }.items():
        assert told in said[what], what


def test_no_process_group(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="there is no process group, and WORLD_SIZE is 2"):
        World.here()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert World.here() == World()


def test_names_of_ranks():
    assert [ranks_named(each) for each in ([1], [1, 2], [0, 2, 3])] == ["rank 1", "ranks 1 and 2", "ranks 0, 2 and 3"]


def test_in_one_process_a_stop_is_asked_every_step():
    asked = iter([False, False, True])
    stopping = Stopping(lambda: next(asked), World())
    assert [stopping() for _ in range(3)] == [False, False, True]


def test_how_processes_share_decides_no_number():
    from hypermask_fast.training.config import load_preset

    preset = load_preset("split-digits")
    assert preset.with_values({"training.shard": "none"}).digest() == preset.digest()
    assert preset.with_values({"training.batch_norm": "local"}).digest() != preset.digest()
    assert TrainingConfig(iterations=1).batch_norm == "synchronised"
