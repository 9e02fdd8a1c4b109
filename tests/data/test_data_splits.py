"""TensorSplit and DatasetSplit, each against plain indexing and against the other."""

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

from hypermask_fast.data import DatasetSplit, HorizontalFlip, Normalize, PadCrop, Split, TensorSplit
from hypermask_fast.errors import InputError


def tensors(n=23, dtype=torch.uint8):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (n, 1, 5, 5), generator=generator, dtype=torch.uint8)
    return (x if dtype == torch.uint8 else x / 255), torch.randint(0, 3, (n,), generator=generator)


class Items(Dataset):
    """A map-style dataset of a list; like some, it raises no IndexError past its end."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i % len(self.items)]


class Noisy(Dataset):
    """Random per item, from torch's default generator."""

    def __len__(self):
        return 12

    def __getitem__(self, i):
        return torch.rand(2), i


@pytest.mark.parametrize("kind", [TensorSplit, lambda x, y: DatasetSplit(TensorDataset(x, y))])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_split_interface(kind, dtype):
    x, y = tensors(dtype=dtype)
    split = kind(x, y)
    model_input = x / 255 if dtype == torch.uint8 else x
    assert isinstance(split, Split) and len(split) == 23 and split.device == torch.device("cpu")

    index = torch.tensor([4, 0, 22, 4])
    got_x, got_y = split.batch(index)
    assert got_x.dtype == torch.float32 and got_y.dtype == torch.int64
    assert torch.equal(got_x, model_input[index]) and torch.equal(got_y, y[index])

    rows = torch.tensor([[3, 2], [1, 0], [9, 9]])
    for given in (rows, list(rows), iter(rows)):
        got = list(split.batches(given, train=True))
        assert len(got) == 3
        for row, (got_x, got_y) in zip(rows, got, strict=True):
            assert torch.equal(got_x, model_input[row]) and torch.equal(got_y, y[row])

    chunks = list(split.chunks(10))
    assert [len(b) for _, b in chunks] == [10, 10, 3]
    assert torch.equal(torch.cat([a for a, _ in chunks]), model_input)
    assert torch.equal(torch.cat([b for _, b in chunks]), y)
    with pytest.raises(InputError, match="chunk"):
        list(split.chunks(0))


def test_batches_reads_an_endless_stream_lazily():
    def endless():
        while True:
            yield torch.tensor([0, 1])

    x, y = tensors()
    for split in (TensorSplit(x, y), DatasetSplit(TensorDataset(x, y))):
        stream = split.batches(endless())
        assert len(next(stream)[1]) == 2 and len(next(stream)[1]) == 2


def test_empty_splits_yield_nothing():
    x, y = tensors()
    assert list(TensorSplit(x[:0], y[:0]).chunks(4)) == []
    assert list(DatasetSplit(Items([])).chunks(4)) == []
    assert list(TensorSplit(x, y).batches(torch.zeros(0, 4, dtype=torch.int64))) == []


def test_augment_only_in_training_batches_and_before_prepare():
    x, y = tensors()
    prepare, augment = Normalize((0.5,), (0.25,)), PadCrop(5, 2)
    split = TensorSplit(x, y, prepare, augment)
    index = torch.arange(23)
    plain = prepare(x)
    assert torch.equal(split.batch(index)[0], plain)
    assert torch.equal(next(split.chunks(23))[0], plain)
    torch.manual_seed(1)
    trained = split.batch(index, train=True)[0]
    torch.manual_seed(1)
    assert torch.equal(trained, prepare(augment(x))) and not torch.equal(trained, plain)


def test_training_resumes_bit_for_bit():
    x, y = tensors()
    split = TensorSplit(x, y, augment=HorizontalFlip())
    rows = torch.arange(20).view(5, 4)
    torch.manual_seed(2)
    stream = split.batches(rows, train=True)
    next(stream), next(stream)
    state = torch.get_rng_state()
    rest = [a for a, _ in stream]
    torch.set_rng_state(state)
    again = [a for a, _ in split.batches(rows[2:], train=True)]
    assert all(torch.equal(a, b) for a, b in zip(rest, again, strict=True)) and len(again) == 3


def test_evaluation_draws_nothing():
    x, y = tensors()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    for split in (TensorSplit(x, y, augment=HorizontalFlip()), DatasetSplit(TensorDataset(x, y))):
        list(split.chunks(5))
        split.batch(torch.arange(3))
    assert torch.equal(state, torch.get_rng_state())


def test_dataset_split_resumes_without_workers():
    rows = torch.arange(12).view(6, 2)
    split = DatasetSplit(Noisy())
    torch.manual_seed(4)
    stream = split.batches(rows)
    for _ in range(2):
        next(stream)
    state = torch.get_rng_state()
    rest = [x for x, _ in stream]
    torch.set_rng_state(state)
    again = [x for x, _ in split.batches(rows[2:])]
    assert len(again) == 4 and all(torch.equal(a, b) for a, b in zip(rest, again, strict=True))


def test_dataset_split_with_workers():
    split = DatasetSplit(Noisy(), num_workers=2)
    rows = torch.arange(12).view(6, 2).flip(0)
    torch.manual_seed(5)
    first = list(split.batches(rows))
    second = list(split.batches(rows))
    torch.manual_seed(5)
    again = list(split.batches(rows))
    assert torch.equal(torch.stack([y for _, y in first]), rows)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0][0], second[0][0])


def test_workers_errors_keep_their_one_line():
    split = DatasetSplit(Items([(torch.zeros(2), 0.5)]), num_workers=1)
    with pytest.raises(InputError) as caught:
        list(split.chunks(1))
    assert str(caught.value) == "labels must be integers, not 0.5 (float)"


def test_label_map():
    x, _ = tensors(4)
    labels = [7, 3, 7, 3]
    split = DatasetSplit(Items(list(zip(x, labels, strict=True))), label_map={7: 0, 3: 1})
    assert split.batch(torch.arange(4))[1].tolist() == [0, 1, 0, 1]
    with pytest.raises(InputError, match="label 7 is not in label_map"):
        DatasetSplit(split.dataset, label_map={3: 0}).batch(torch.arange(4))
    with pytest.raises(InputError, match=r"0 .. 4, found 7"):
        DatasetSplit(split.dataset, num_classes=5).batch(torch.arange(4))


@pytest.mark.parametrize("label", [2, np.int64(2), np.uint8(2), torch.tensor(2), torch.tensor(2, dtype=torch.uint8)])
def test_labels_that_are_integers(label):
    assert DatasetSplit(Items([(torch.zeros(2), label)])).batch(torch.tensor([0]))[1].tolist() == [2]


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ((torch.zeros(2), 1.0), "integers"),
        ((torch.zeros(2), True), "integers"),
        ((torch.zeros(2), torch.tensor([1])), "integers"),
        ((torch.zeros(2), "cat"), "integers"),
        ((torch.zeros(2),), "pair"),
        (torch.zeros(2), "pair"),
        (([0.0, 1.0], 1), "tensors or arrays, not list"),
        ((np.zeros((32, 32, 3), np.uint8), 1), "permute it first"),
        ((torch.zeros(2, dtype=torch.int32), 1), "uint8 or float"),
        ((np.zeros(2, np.int64), 1), "uint8 or float"),
    ],
)
def test_items_refused(item, message):
    with pytest.raises(InputError, match=message):
        DatasetSplit(Items([item])).batch(torch.tensor([0]))


def test_pil_images_are_refused():
    image_module = pytest.importorskip("PIL.Image")
    with pytest.raises(InputError, match="not Image; convert"):
        DatasetSplit(Items([(image_module.new("L", (4, 4)), 1)])).batch(torch.tensor([0]))


def test_items_of_different_shape_are_refused():
    split = DatasetSplit(Items([(torch.zeros(2), 1), (torch.zeros(3), 1)]))
    with pytest.raises(InputError, match="share shape"):
        split.batch(torch.tensor([0, 1]))


def test_float_arrays_of_any_width_become_float32():
    for dtype in (np.float16, np.float64, ">f4"):
        item = np.array([0.5, -2.0], dtype=dtype), 0
        assert torch.equal(DatasetSplit(Items([item])).batch(torch.tensor([0]))[0], torch.tensor([[0.5, -2.0]]))


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.zeros(3, 2, dtype=torch.float64), torch.zeros(3, dtype=torch.int64), "uint8 or float32"),
        (torch.zeros(3, 2), torch.zeros(3), "int64"),
        (torch.zeros(3, 2), torch.zeros(3, 1, dtype=torch.int64), "int64"),
        (torch.zeros(3, 2), torch.zeros(4, dtype=torch.int64), "3 and 4"),
        (torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64, device="meta"), "one device"),
    ],
)
def test_tensor_split_refuses(x, y, message):
    with pytest.raises(InputError, match=message):
        TensorSplit(x, y)


def test_dataset_split_refuses():
    with pytest.raises(InputError, match="map-style"):
        DatasetSplit(iter([]))
    with pytest.raises(InputError, match="num_workers"):
        DatasetSplit(Items([]), num_workers=-1)


def test_to_moves_everything():
    x, y = tensors()
    split = TensorSplit(x, y, Normalize((0.5,), (0.25,)), HorizontalFlip()).to("meta")
    got_x, got_y = split.batch(torch.empty(4, dtype=torch.int64, device="meta"))
    assert split.device.type == got_x.device.type == got_y.device.type == "meta"
    assert DatasetSplit(TensorDataset(x, y)).to("meta").batch(torch.arange(2))[0].device.type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batch_waits_for_nothing_and_is_captured():
    x, y = tensors()
    split = TensorSplit(x, y, Normalize((0.5,), (0.25,)), PadCrop(5, 2)).to("cuda")
    index = torch.arange(8, device="cuda")
    split.batch(index, train=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        split.batch(index, train=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _, got = split.batch(index, train=True)
    index.copy_(torch.arange(8, 16))
    graph.replay()
    assert torch.equal(got.cpu(), y[8:16])


WRONG = {
    "fewer": (lambda x: x[1:], r"float32 of 3 samples of a batch of 3, not \(2, 4\) float32"),
    "one for all": (lambda x: x.sum(), r"not \(\) float32"),
    "float64": (lambda x: x.double(), r"not \(3, 4\) float64"),
    "no tensor": (lambda x: x.numpy(), "not ndarray, which is no tensor"),
    "nothing": (lambda x: None, "not NoneType, which is no tensor"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_transforms_that_make_something_else_are_refused(kind):
    wrong, said = WRONG[kind]
    inputs, labels, index = torch.rand(3, 4), torch.arange(3), torch.tensor([2, 0, 1])
    prepared, augmented = TensorSplit(inputs, labels, wrong), TensorSplit(inputs, labels, augment=wrong)
    for read in (lambda: prepared.batch(index), lambda: next(prepared.chunks(3))):
        with pytest.raises(InputError, match="prepare must make .*" + said):
            read()
    with pytest.raises(InputError, match="augment must make .*" + said):
        augmented.batch(index, train=True)
    assert torch.equal(augmented.batch(index)[0], inputs[index])
