"""Transforms against loops over single samples and pixels."""

import pytest
import torch

from hypermask_fast.data import Compose, HorizontalFlip, Normalize, PadCrop, PermutePixels, Scale
from hypermask_fast.errors import InputError


def images(batch=5, channels=3, height=6, width=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 256, (batch, channels, height, width), generator=generator, dtype=torch.uint8)


def test_scale_divides_bytes_and_leaves_floats():
    x = torch.tensor([[0, 51, 255]], dtype=torch.uint8)
    assert torch.equal(Scale()(x), torch.tensor([[0.0, 0.2, 1.0]]))
    floats = torch.tensor([[-3.0, 7.0]])
    assert torch.equal(Scale()(floats), floats)
    assert Scale()(x).dtype == torch.float32


@pytest.mark.parametrize("as_float", [False, True])
def test_normalize_is_per_channel(as_float):
    x = images()
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    out = Normalize(mean, std)(x.float() / 255 if as_float else x)
    assert out.dtype == torch.float32 and out.shape == x.shape
    for b in range(5):
        for c in range(3):
            expected = (x[b, c].double() / 255 - mean[c]) / std[c]
            torch.testing.assert_close(out[b, c].double(), expected, atol=1e-6, rtol=1e-6)


def test_normalize_refuses_other_channels():
    with pytest.raises(InputError, match="channels"):
        Normalize((0.1, 0.2, 0.3), (1.0, 1.0, 1.0))(images(channels=1))
    with pytest.raises(InputError, match="per channel: "):
        Normalize((0.1, 0.2), (1.0,))
    with pytest.raises(InputError, match="positive"):
        Normalize((0.1,), (0.0,))


@pytest.mark.parametrize("pad", [0, 2])
@pytest.mark.parametrize("channels", [1, 3])
def test_permute_pixels_matches_loop(pad, channels):
    x = images(channels=channels)
    rows, columns = 6 + 2 * pad, 7 + 2 * pad
    permutation = torch.randperm(channels * rows * columns, generator=torch.Generator().manual_seed(1))
    out = PermutePixels(permutation, pad)(x)
    assert out.dtype == torch.float32 and out.shape == (5, permutation.numel())
    for i, source in enumerate(permutation.tolist()):
        c, rest = divmod(source, rows * columns)
        r, column = rest // columns - pad, rest % columns - pad
        inside = 0 <= r < 6 and 0 <= column < 7
        expected = x[:, c, r, column].float() / 255 if inside else torch.zeros(5)
        assert torch.equal(out[:, i], expected)


def test_permute_pixels_refuses_what_is_none():
    with pytest.raises(InputError, match="exactly once"):
        PermutePixels(torch.tensor([0, 0, 2]))
    with pytest.raises(InputError, match="int64"):
        PermutePixels(torch.tensor([0.0, 1.0]))
    with pytest.raises(InputError, match="pad"):
        PermutePixels(torch.arange(3), -1)
    with pytest.raises(InputError, match="4 pixels, a padded image of this batch 126"):
        PermutePixels(torch.arange(4))(images())


@pytest.mark.parametrize(("size", "pad"), [(6, 2), (4, 0), (8, 1), (6, 4)])
def test_pad_crop_matches_loop(size, pad):
    x = images(batch=40)
    torch.manual_seed(3)
    out = PadCrop(size, pad)(x)
    torch.manual_seed(3)
    top = torch.randint(6 + 2 * pad - size + 1, (40,)).tolist()
    left = torch.randint(7 + 2 * pad - size + 1, (40,)).tolist()
    assert out.dtype == torch.uint8 and out.shape == (40, 3, size, size)
    for b in range(40):
        for r in range(size):
            for c in range(size):
                row, column = r + top[b] - pad, c + left[b] - pad
                inside = 0 <= row < 6 and 0 <= column < 7
                expected = x[b, :, row, column] if inside else torch.zeros(3, dtype=torch.uint8)
                assert torch.equal(out[b, :, r, c], expected)


def test_pad_crop_reaches_every_place_and_differs_by_sample():
    x = torch.zeros(400, 1, 3, 3, dtype=torch.uint8)
    x[:, :, 1, 1] = 255
    torch.manual_seed(0)
    places = {tuple(place[2:]) for place in PadCrop(3, 1)(x).nonzero().tolist()}
    assert places == {(r, c) for r in range(3) for c in range(3)}


def test_pad_crop_refuses_what_does_not_fit():
    with pytest.raises(InputError, match="does not fit"):
        PadCrop(9, 1)(images())
    with pytest.raises(InputError, match="PadCrop needs"):
        PadCrop(0, 1)
    with pytest.raises(InputError, match="batch of images"):
        PadCrop(2, 1)(torch.zeros(3, 4))


def test_horizontal_flip_matches_loop_and_flips_half():
    x = images(batch=400)
    torch.manual_seed(5)
    out = HorizontalFlip()(x)
    torch.manual_seed(5)
    flips = (torch.rand(400, 1, 1, 1) < 0.5).flatten().tolist()
    assert 150 < sum(flips) < 250 and out.dtype == torch.uint8
    for b in range(400):
        columns = range(6, -1, -1) if flips[b] else range(7)
        assert torch.equal(out[b], torch.stack([x[b, :, :, c] for c in columns], -1))


@pytest.mark.parametrize("augment", [PadCrop(6, 2), HorizontalFlip(), Compose(HorizontalFlip(), PadCrop(6, 2))])
def test_augmentation_resumes_from_the_generator(augment):
    x = images(batch=30)
    torch.manual_seed(7)
    augment(x)
    state = torch.get_rng_state()
    first, second = augment(x), augment(x)
    assert not torch.equal(first, second)
    torch.set_rng_state(state)
    assert torch.equal(augment(x), first) and torch.equal(augment(x), second)


def test_augmentation_leaves_its_argument_alone():
    x = images()
    before = x.clone()
    Compose(HorizontalFlip(), PadCrop(6, 2), Normalize((0.1,) * 3, (0.2,) * 3))(x)
    assert torch.equal(x, before)


def test_compose_applies_in_order():
    x = images(channels=1)
    permute = PermutePixels(torch.arange(42).flip(0))
    composed = Compose(None, Scale(), permute, lambda y: y + 1)
    assert torch.equal(composed(x), permute(Scale()(x)) + 1)


def test_to_moves_held_tensors():
    moved = Compose(Scale(), Normalize((0.1,), (0.2,)), PermutePixels(torch.arange(42))).to("meta")
    x = torch.empty(2, 1, 6, 7, dtype=torch.uint8, device="meta")
    assert moved(x).device.type == "meta" and moved(x).shape == (2, 42)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_graph_capture():
    x = images(channels=1).cuda()
    chain = Compose(HorizontalFlip(), PadCrop(6, 2), Normalize((0.1,), (0.2,)), PermutePixels(torch.randperm(36))).to(
        "cuda"
    )
    chain(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain(x)
    torch.cuda.manual_seed(1)
    graph.replay()
    first = out.clone()
    graph.replay()
    assert not torch.equal(first, out)
    torch.cuda.manual_seed(1)
    assert torch.equal(chain(x), first)
