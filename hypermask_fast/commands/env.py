"""hypermask-fast env"""

import argparse
from typing import Any

from .. import env
from .command import command


def add(commands: Any) -> None:
    command(commands, "env", report, "versions, devices, threads and backends")


def report(arguments: argparse.Namespace) -> int:
    print(env.report())
    return 0
