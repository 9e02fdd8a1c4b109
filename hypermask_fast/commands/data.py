"""hypermask-fast data"""

import argparse
from pathlib import Path
from typing import Any

from ..data import SCENARIOS
from ..data.download import DOWNLOADS, download
from ..errors import InputError
from ..training.logs import DownloadProgress
from .command import command


def add(commands: Any) -> None:
    parser = command(commands, "data", _run, "download a data set, with checksums")
    parser.add_argument(
        "dataset",
        metavar="DATASET",
        help=f"{', '.join(DOWNLOADS)}, or the name of a scenario, whose data set it then is",
    )
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="where it goes: for train's --data-dir")
    parser.add_argument("--mirror", metavar="URL", help="download from here, files of the same names and checksums")


def _run(arguments: argparse.Namespace) -> int:
    name = arguments.dataset
    if name in SCENARIOS:
        name = SCENARIOS[name].dataset
        if name is None:
            print(f"{arguments.dataset} needs no files")
            return 0
    elif name not in DOWNLOADS:
        raise InputError(f"no data set {name!r}: there are {', '.join(DOWNLOADS)}, and the names of scenarios")
    shown = DownloadProgress()
    if not download(name, arguments.to, arguments.mirror, shown.message, shown.progress):
        print(f"{name} is in {arguments.to} already: nothing to download")
    else:
        print(f"train with --data-dir {arguments.to}")
    return 0
