"""Runs of split-digits under torchrun whose ranks are killed at random moments: metrics.json is the same each time.

    PYTHONPATH=.:tests python -m support.kill_ranks --kills 20

kills 5 per run, and needs about ten seconds for each.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
SETTINGS = "data.tasks=2 training.iterations=40 training.log_every=4 training.checkpoint_every=7 target.hidden=[16]"
TRAIN = ["train", "split-digits", *(word for setting in SETTINGS.split() for word in ("--set", setting))]
_ROWS = 20  # that log.csv has in the end


def torchrun(words: Sequence[str], processes: int = 2, restarts: int = 0) -> subprocess.Popen:
    """The command line under torchrun, both of whose outputs are in the process's stdout."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    return subprocess.Popen(
        [*command, f"--max-restarts={restarts}", "-m", "hypermask_fast", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )


def workers(agent: int) -> dict[int, int]:
    """Rank -> process, of those that torchrun has started."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1]) if entry.name.isdigit() else 0
            if parent == agent:
                variables = dict(each.split("=", 1) for each in (entry / "environ").read_text().split("\0") if each)
                found[int(variables["RANK"])] = int(entry.name)
        except (OSError, IndexError, KeyError, ValueError):
            pass  # it has just ended, or has just begun
    return found


def killed(folder: Path, kills: Sequence[tuple[int, float]], generator: random.Random) -> tuple[int, str]:
    """torchrun's exit code and what was printed, of a run in `folder` whose ranks are killed.

    kills: when log.csv has so many rows, which is counted from 0 at each start, and so many seconds later.
    """
    agent = torchrun([*TRAIN, "--out", str(folder)], restarts=len(kills))
    seen: set[int] = set()
    try:
        for rows, seconds in kills:
            while agent.poll() is None and (
                len(now := workers(agent.pid)) < 2 or seen & set(now.values()) or _rows(folder) < rows
            ):
                time.sleep(0.02)
            time.sleep(seconds)
            now = workers(agent.pid)
            if agent.poll() is not None or not now:
                break
            seen = set(now.values())
            with_rank = generator.choice(sorted(now))
            os.kill(now[with_rank], signal.SIGKILL)
        return agent.wait(300), agent.stdout.read() if agent.stdout else ""
    finally:
        agent.terminate()
        agent.wait()


def _rows(folder: Path) -> int:
    try:
        return max(len((folder / "log.csv").read_text().splitlines()) - 1, 0)
    except OSError:
        return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    generator, left, per_run = random.Random(arguments.seed), arguments.kills, 5
    with tempfile.TemporaryDirectory() as place:
        whole = torchrun([*TRAIN, "--out", f"{place}/whole"])
        whole.communicate()
        expected = Path(place, "whole", "metrics.json").read_bytes()
        while left > 0:
            count = min(per_run, left)
            rows = sorted(generator.choice((0, generator.randrange(_ROWS - 2))) for _ in range(count))
            kills = [(row, generator.random() * (8 if row == 0 else 0.3)) for row in rows]
            folder = Path(place, f"run-{left}")
            code, said = killed(folder, kills, generator)
            done = said.count("exitcode: -9")
            same = code == 0 and (folder / "metrics.json").read_bytes() == expected
            print(
                f"{done} of {count} killed at {kills}: exit code {code}, metrics.json {'the same' if same else 'OTHER'}"
            )
            if not same:
                sys.exit(said)
            left -= max(done, 1)


if __name__ == "__main__":
    main()
