"""Runs that are asked to stop: a checkpoint is saved at once, and no number changes."""

import os
import signal
import threading

import pytest
import torch
from support.networks import blob_model, blob_scenario

from hypermask_fast.training import checkpoint, interrupt
from hypermask_fast.training.config import TrainingConfig
from hypermask_fast.training.interrupt import Stopped, StopSignals
from hypermask_fast.training.trainer import Trainer

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
ITERATIONS = 20


def trainer(run_dir=None, stop_at: int | None = None, **settings) -> Trainer:
    """Asked to stop once so many steps are done."""
    settings = {"iterations": ITERATIONS, "batch_size": 32, "checkpoint_every": 0, "validate_every": 7} | settings
    training = Trainer(
        blob_model(),
        blob_scenario(),
        TrainingConfig(**settings),
        seed=4,
        run_dir=run_dir,
        stop=lambda: stop_at is not None and training.result.steps >= stop_at,
    )
    return training


@pytest.mark.parametrize("stop_at", [1, 7, 19, 20, 21, 59])
@pytest.mark.parametrize("settings", [{}, {"keep": "best", "schedule": "plateau"}, {"checkpoint_every": 7}], ids=str)
def test_a_run_that_was_asked_to_stop_goes_on_bit_for_bit(tmp_path, stop_at, settings):
    whole = trainer(**settings)
    expected = whole.fit()
    task, iteration = divmod(stop_at, ITERATIONS)
    with pytest.raises(
        Stopped, match=rf"^stopped at task {task} \(blobs {task}\), iteration {iteration}, which is saved$"
    ):
        trainer(tmp_path, stop_at, **settings).fit()
    state = checkpoint.load(tmp_path)[1]
    assert (state["task"], state["iteration"], state["steps"]) == (task, iteration, stop_at)
    torch.manual_seed(99)  # whatever the new process has drawn
    resumed = trainer(tmp_path, **settings)
    result = resumed.fit(resume=True)
    assert torch.equal(result.matrix, expected.matrix) and torch.equal(result.baseline, expected.baseline)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name


def test_a_run_that_is_over_is_not_stopped(tmp_path):
    assert not trainer(tmp_path, stop_at=3 * ITERATIONS).fit().matrix.isnan().any()


def test_without_a_folder_nothing_is_saved():
    with pytest.raises(Stopped, match=r"^stopped at task 0 \(blobs 0\), iteration 3, nothing is saved$"):
        trainer(stop_at=3).fit()


@pytest.mark.parametrize("number", SIGNALS)
def test_before_there_is_something_to_save_a_signal_ends_at_once(number):
    with StopSignals() as signals, pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), number)
    assert signals.number == number


@pytest.mark.parametrize("number", SIGNALS)
def test_a_run_is_told_of_a_signal_when_it_asks(number):
    with StopSignals() as signals:
        assert not signals()
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)  # as `timeout` sends it twice
        assert signals() and signals.number == number


def test_a_second_signal_later_ends_at_once(monkeypatch):
    monkeypatch.setattr(interrupt, "_PATIENCE", 0.0)
    with StopSignals() as signals:
        assert not signals()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert signals.number == signal.SIGTERM


def test_signals_are_as_they_were_afterwards_and_ignored_ones_stay_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        handlers = [signal.getsignal(number) for number in SIGNALS]
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not signals()
            assert signal.getsignal(signal.SIGTERM) != handlers[1]
        assert [signal.getsignal(number) for number in SIGNALS] == handlers
    finally:
        signal.signal(signal.SIGHUP, before)


def test_other_threads_have_no_signals():
    def enter():
        with StopSignals() as signals:
            asked.append(signals())

    asked, handlers = [], [signal.getsignal(number) for number in SIGNALS]
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert asked == [False] and [signal.getsignal(number) for number in SIGNALS] == handlers
