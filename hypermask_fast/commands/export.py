"""hypermask-fast export"""

import argparse
from pathlib import Path
from typing import Any

from .. import exporting
from ..training import run
from .command import add_data_dir, add_own_code, command


def add(commands: Any) -> None:
    parser = command(commands, "export", _run, "the plain network of one task, mask baked in")
    parser.add_argument("dir", type=Path, metavar="DIR", help="the run's folder")
    parser.add_argument("--task", type=int, required=True, metavar="K", help="a task the run has learned, from 0")
    parser.add_argument("--to", type=Path, required=True, metavar="FILE", help="a new file")
    parser.add_argument(
        "--format",
        choices=exporting.FILES,
        default="safetensors",
        help="safetensors: its weights (default); pt2: a program for torch.export.load; onnx: for any ONNX runtime",
    )
    add_data_dir(parser)
    add_own_code(parser)


_LOADING = {
    "safetensors": "    from hypermask_fast.training.exported import load_exported\n    net = load_exported({})",
    "pt2": "    import torch\n    net = torch.export.load({}).module()",
    "onnx": "    import onnxruntime\n    session = onnxruntime.InferenceSession({})",
}


def _run(arguments: argparse.Namespace) -> int:
    own = {"scenario": arguments.scenario, "network": arguments.network}
    run.export_task(arguments.dir, arguments.task, arguments.to, arguments.data_dir, arguments.format, **own)
    print(f"{arguments.to}: task {arguments.task}'s network; load it in Python with")
    loading = _LOADING[arguments.format].format(repr(str(arguments.to)))
    if arguments.network is not None and arguments.format == "safetensors":
        loading = loading.removesuffix(")") + ", net)  # net: made as your function makes it"
    print(loading)
    return 0
