"""Small data sets in the formats in which the real ones are published."""

import io
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest


def jpeg_bytes(pixels):
    """A JPEG of (H, W, 3) or grey (H, W) uint8 pixels."""
    image_module = pytest.importorskip("PIL.Image")
    file = io.BytesIO()
    image_module.fromarray(pixels).save(file, "JPEG", quality=95)
    return file.getvalue()


def idx_bytes(array):
    """The IDX file of a uint8 array."""
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def python2_pickle(data, labels, key):
    """What Python 2 wrote for the published files: protocol 2 with byte strings, built opcode by opcode."""

    def string(value):
        return b"T" + struct.pack("<I", len(value)) + value

    def number(value):
        return b"J" + struct.pack("<i", value)

    dtype = b"cnumpy\ndtype\n(" + string(b"u1") + number(0) + number(1) + b"tR("
    dtype += number(3) + string(b"|") + b"NNN" + number(-1) + number(-1) + number(0) + b"tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(" + number(0) + b"t" + string(b"b") + b"tR("
    array += number(1) + b"(" + b"".join(number(n) for n in data.shape) + b"t" + dtype + b"\x89"
    array += string(data.tobytes()) + b"tb"
    listed = b"](" + b"".join(number(label) for label in labels) + b"e"
    return b"\x80\x02}(" + string(b"data") + array + string(key) + listed + b"u."


def batch(n, classes, seed):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, 3072), dtype=np.uint8), rng.integers(0, classes, n).tolist()


def write_npz(path, files, numbers, save=np.savez, **changes):
    arrays = {
        "jpeg": np.frombuffer(b"".join(files), np.uint8),
        "offsets": np.cumsum([0] + [len(f) for f in files]),
        "labels": np.array(numbers, np.uint8),
    }
    arrays.update(changes)
    save(path, **{key: value for key, value in arrays.items() if value is not None})


def smooth(rng, side):
    """An image that JPEG keeps well: a colour that rises from left to right."""
    colour = rng.integers(40, 160, 3)
    return (colour + np.arange(side)[None, :, None] * 64 // side + np.zeros((side, 1, 1), int)).astype(np.uint8)


def write_cifar100(root: Path, per_class: int) -> None:
    """CIFAR-100's pickles, of so many training images and one test image a class, in a shuffled order; every pixel of
    an image is its label."""
    folder = root / "cifar-100-python"
    folder.mkdir()
    for name, repeats in (("train", per_class), ("test", 1)):
        labels = np.random.default_rng(0).permutation(np.repeat(np.arange(100), repeats))
        images = np.repeat(labels.astype(np.uint8)[:, None], 3072, 1)
        (folder / name).write_bytes(pickle.dumps({"data": images, "fine_labels": labels.tolist()}))


def write_tiny_imagenet(root: Path) -> dict[tuple[int, int], np.ndarray]:
    """Three classes of two training images (one grey) and one validation image; returns their colours."""
    rng = np.random.default_rng(0)
    wnids = ["n3", "n1", "n2"]
    (root / "val" / "images").mkdir(parents=True)
    (root / "wnids.txt").write_text("\n".join(wnids) + "\n")
    colours, lines = {}, []
    for c, wnid in enumerate(wnids):
        folder = root / "train" / wnid / "images"
        folder.mkdir(parents=True)
        for i in range(2):
            pixels = smooth(rng, 64)
            pixels = pixels[..., 0] if (c, i) == (1, 1) else pixels
            (folder / f"{wnid}_{i}.JPEG").write_bytes(jpeg_bytes(pixels))
            colours[c, i] = np.broadcast_to(pixels[0, 0], 3).astype(int)
    for v, c in enumerate((2, 0, 1)):
        (root / "val" / "images" / f"val_{v}.JPEG").write_bytes(jpeg_bytes(smooth(rng, 64)))
        lines.append(f"val_{v}.JPEG\t{wnids[c]}\t0\t0\t62\t62")
    (root / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    return colours
