"""Ranks that make different calls of a model are told, in place of waiting for each other without end."""

import pytest
import torch
from support import loops, meeting


@pytest.fixture(scope="module")
def found():
    return loops.in_processes(meeting.pairs, 2)


@pytest.mark.parametrize("pair", meeting.PAIRS)
def test_different_calls_are_told_on_all_ranks_and_the_same_ones_go_on(found, pair):
    (said, output), (other_said, other_output) = (rank[pair] for rank in found)
    for words in (said, other_said):
        assert words.startswith(
            ("ranks make different calls", "ranks ask a sharded model for", "ranks make backward passes")
        )
    assert output.isfinite().all() and torch.equal(output, other_output)
