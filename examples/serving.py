"""Two threads serve two tasks: from the model itself, and from one file that needs no hypernetwork.

    python examples/serving.py

Takes a second on one CPU core.
"""

import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn

import hypermask_fast as hmf


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 3))


def main() -> None:
    torch.manual_seed(0)
    model = hmf.HyperMask(network(), 4, sparsity=30, hypernetwork=hmf.HypernetConfig(embedding=16, hidden=(32,)))
    requests = [(task, torch.randn(8, 32)) for task in (0, 2) * 50]  # in earnest, a trained model and real requests

    model.eval()
    model.cache_bytes = 64 * 2**20
    with model.serving(), ThreadPoolExecutor(2) as threads:

        def answer(request: tuple[int, Tensor]) -> Tensor:
            task, x = request
            return model(x, task).argmax(-1)

        answers = list(threads.map(answer, requests))
        print(model.cache)

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "tasks.safetensors")
        packed = model.pack([0, 2], dtype="bfloat16")
        packed.save(file)
        print(packed)
        server = hmf.inference.load_packed(file, network())  # in another program, on another machine
        with ThreadPoolExecutor(2) as threads:
            again = list(threads.map(lambda request: server(request[1], request[0]).argmax(-1), requests))
    same = torch.cat(answers) == torch.cat(again)
    print(f"the same classes from the file: {100 * same.float().mean():.1f} %")


if __name__ == "__main__":
    main()
