"""AutoAugment and its operations, against Pillow's functions on one image at a time."""

import math

import numpy as np
import pytest
import torch

from hypermask_fast.data import AutoAugment, BrightnessJitter, autoaugment
from hypermask_fast.data.image_operations import NAMES, Operation, Operations
from hypermask_fast.errors import InputError

Image = pytest.importorskip("PIL.Image")
from PIL import ImageEnhance, ImageOps  # noqa: E402 (after what skips)

GREY = (128, 128, 128)


def shifted(image, matrix):
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST, fillcolor=GREY)


PILLOW = {
    "rotate": lambda image, amount: image.rotate(amount, Image.Resampling.NEAREST, fillcolor=GREY),
    "shear_x": lambda image, amount: shifted(image, (1, amount, 0, 0, 1, 0)),
    "shear_y": lambda image, amount: shifted(image, (1, 0, 0, amount, 1, 0)),
    "translate_x": lambda image, amount: shifted(image, (1, 0, amount, 0, 1, 0)),
    "translate_y": lambda image, amount: shifted(image, (1, 0, 0, 0, 1, amount)),
    "brightness": lambda image, amount: ImageEnhance.Brightness(image).enhance(amount),
    "contrast": lambda image, amount: ImageEnhance.Contrast(image).enhance(amount),
    "color": lambda image, amount: ImageEnhance.Color(image).enhance(amount),
    "sharpness": lambda image, amount: ImageEnhance.Sharpness(image).enhance(amount),
    "posterize": ImageOps.posterize,
    "solarize": ImageOps.solarize,
    "invert": lambda image, _: ImageOps.invert(image),
    "autocontrast": lambda image, _: ImageOps.autocontrast(image),
    "equalize": lambda image, _: ImageOps.equalize(image),
}
AMOUNTS = {
    "rotate": (0.0, 6.6667, -30.0, 17.0),
    "shear_x": (0.3, -0.2667),
    "shear_y": (0.3, -0.2333),
    "translate_x": (14.5, -12.9, 0.4),
    "translate_y": (4.8, -14.5, 40.0),
    "posterize": (1, 5, 8),
    "solarize": (0.0, 28.4, 128.0, 170.7, 256.0),
    **dict.fromkeys(("brightness", "contrast", "color", "sharpness"), (0.1, 0.7, 1.0, 1.3, 1.9)),
    **dict.fromkeys(("invert", "autocontrast", "equalize"), (0.0,)),
}
EVERY = tuple(Operation(name, amount) for name in NAMES for amount in AMOUNTS[name])


def images(height=32, width=32):
    """(B, 3, H, W) uint8: noise, dark and bright noise of few values, smooth ones, one value, two values."""
    rng = np.random.default_rng(0)
    made = [rng.integers(low, high, (3, height, width)) for low, high in ((0, 256), (40, 90), (200, 256), (3, 7))]
    wave = np.sin(np.arange(height)[:, None] / 5) * np.cos(np.arange(width)[None, :] / 3)
    made += [np.stack([100 + a * wave for a in (90, 40, 3)]), np.stack([128 + 127 * wave] * 3)]
    made += [np.full((3, height, width), value) for value in (0, 77, 255)]
    made += [rng.choice(values, (3, height, width)) for values in ((0, 255), (10, 11))]
    rare = np.full((3, height, width), 255)
    rare[:, 0, : width // 2] = rng.integers(0, 255, (3, width // 2))
    return torch.from_numpy(np.stack([*made, rare]).astype(np.uint8))


def by_pillow(operation, x):
    array = np.asarray(PILLOW[operation.name](Image.fromarray(x.permute(1, 2, 0).numpy()), operation.amount))
    return torch.from_numpy(array.copy()).permute(2, 0, 1)


@pytest.mark.parametrize("size", [(32, 32), (20, 37), (2, 3), (1, 1)])
@pytest.mark.parametrize("operation", EVERY, ids=str)
def test_every_operation_is_pillows(operation, size):
    x = images(*size)
    found = Operations((operation,), *size)(x, torch.ones(len(x), dtype=torch.int64))
    assert found.dtype == torch.uint8
    for each, image in zip(found, x, strict=True):
        assert torch.equal(each, by_pillow(operation, image))


def test_every_image_gets_its_own():
    x = images()
    x = torch.cat([x] * 6)[: len(EVERY) + 1]
    which = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    found = Operations(EVERY, 32, 32)(x, which)
    for each, image, choice in zip(found, x, which.tolist(), strict=True):
        assert torch.equal(each, by_pillow(EVERY[choice - 1], image) if choice else image)


def test_brightness_jitter_is_pillows():
    x = torch.cat([images()] * 20)
    torch.manual_seed(3)
    found = BrightnessJitter(63 / 255)(x)
    torch.manual_seed(3)
    factors = 1 + 63 / 255 * (2 * torch.rand(len(x)) - 1)
    assert 1 - 63 / 255 <= factors.min() < 0.77 and 1.23 < factors.max() <= 1 + 63 / 255
    for each, image, factor in zip(found, x, factors.tolist(), strict=True):
        assert torch.equal(each, by_pillow(Operation("brightness", factor), image))


# The policy


def test_the_policy_is_the_papers():
    """Cubuk et al. 2019, the table of 25 sub-policies for CIFAR-10: operation, probability, magnitude."""
    table = """
        Invert 0.1 7       | Contrast 0.2 6
        Rotate 0.7 2       | TranslateX 0.3 9
        Sharpness 0.8 1    | Sharpness 0.9 3
        ShearY 0.5 8       | TranslateY 0.7 9
        AutoContrast 0.5 8 | Equalize 0.9 2
        ShearY 0.2 7       | Posterize 0.3 7
        Color 0.4 3        | Brightness 0.6 7
        Sharpness 0.3 9    | Brightness 0.7 9
        Equalize 0.6 5     | Equalize 0.5 1
        Contrast 0.6 7     | Sharpness 0.6 5
        Color 0.7 7        | TranslateX 0.5 8
        Equalize 0.3 7     | AutoContrast 0.4 8
        TranslateY 0.4 3   | Sharpness 0.2 6
        Brightness 0.9 6   | Color 0.2 8
        Solarize 0.5 2     | Invert 0.0 3
        Equalize 0.2 0     | AutoContrast 0.6 0
        Equalize 0.2 8     | Equalize 0.6 4
        Color 0.9 9        | Equalize 0.6 6
        AutoContrast 0.8 4 | Solarize 0.2 8
        Brightness 0.1 3   | Color 0.7 0
        Solarize 0.4 5     | AutoContrast 0.9 3
        TranslateY 0.9 9   | TranslateY 0.7 9
        AutoContrast 0.9 2 | Solarize 0.8 3
        Equalize 0.8 8     | Invert 0.1 3
        TranslateY 0.7 9   | AutoContrast 0.9 1
    """
    names = {name.replace("_", ""): name for name in NAMES}
    expected = [
        tuple(
            (names[name.lower()], float(p), int(level)) for name, p, level in (step.split() for step in row.split("|"))
        )
        for row in table.strip().splitlines()
    ]
    assert list(autoaugment.CIFAR10_POLICY) == expected and len(expected) == 25


def test_magnitudes_are_the_papers_ranges_in_ten_levels():
    amounts = {
        ("rotate", 9, -1): -30, ("rotate", 2, 1): 60 / 9,
        ("shear_x", 9, 1): 0.3, ("shear_y", 8, -1): -2.4 / 9,
        ("translate_x", 9, 1): 32 * 150 / 331, ("translate_y", 3, -1): -32 * 50 / 331,
        ("brightness", 9, 1): 1.9, ("color", 0, -1): 1.0, ("contrast", 6, -1): 0.4, ("sharpness", 1, 1): 1.1,
        ("posterize", 0, 1): 8, ("posterize", 7, -1): 5, ("posterize", 9, 1): 4,
        ("solarize", 0, 1): 256, ("solarize", 9, -1): 0, ("solarize", 3, 1): 256 * 2 / 3,
        ("invert", 3, 1): 0, ("autocontrast", 8, 1): 0, ("equalize", 5, -1): 0,
    }  # fmt: skip
    for (name, level, sign), amount in amounts.items():
        found = autoaugment.operation(name, level, sign, 32)
        assert found.name == name and math.isclose(found.amount, amount, abs_tol=1e-12)


def test_draws_have_the_policys_probabilities():
    """Of every pair of operations that an image can get: how often, against the table's."""
    augment, images = AutoAugment(32), 400_000
    expected: dict[tuple[Operation | None, Operation | None], float] = {}
    for first, then in autoaugment.CIFAR10_POLICY:
        options = []
        for step in (first, then):
            done = [(autoaugment.operation(step.name, step.level, s, 32), step.probability / 2) for s in (-1, 1)]
            options.append([(None, 1 - step.probability), *done])
        for a, p in options[0]:
            for b, q in options[1]:
                expected[a, b] = expected.get((a, b), 0) + p * q / 25
    torch.manual_seed(0)
    first, then = augment.draw(images)
    listed = (None, *augment.operations.operations)
    counts = torch.bincount(first * len(listed) + then, minlength=len(listed) ** 2).view(len(listed), -1)
    for i, a in enumerate(listed):
        for j, b in enumerate(listed):
            p = expected.get((a, b), 0)
            assert abs(counts[i, j].item() - p * images) <= 5 * math.sqrt(p * (1 - p) * images), (a, b)


def test_a_batch_is_both_operations_of_each_image():
    x, augment = torch.cat([images()] * 5), AutoAugment(32)
    torch.manual_seed(1)
    found = augment(x)
    torch.manual_seed(1)
    for i, (each, image) in enumerate(zip(found, x, strict=True)):
        if i == 0:
            drawn = augment.draw(len(x))
        for which in drawn:
            choice = int(which[i])
            image = by_pillow(augment.operations.operations[choice - 1], image) if choice else image
        assert torch.equal(each, image)


def test_augmentation_resumes_from_the_generator():
    x, augment = torch.cat([images()] * 3), AutoAugment(32)
    torch.manual_seed(0)
    augment(x)
    state = torch.get_rng_state()
    found = augment(x)
    torch.set_rng_state(state)
    assert torch.equal(augment.to("cpu")(x), found) and not torch.equal(augment(x), found)


def test_an_empty_batch_stays_one():
    x = torch.zeros(0, 3, 32, 32, dtype=torch.uint8)
    assert BrightnessJitter(0.5)(AutoAugment(32)(x)).shape == x.shape


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_same_and_captured():
    x, augment = torch.cat([images()] * 4), AutoAugment(32)
    for k in range(len(EVERY) + 1):
        which = torch.full((len(x),), k)
        found = Operations(EVERY, 32, 32, device="cuda")(x.cuda(), which.cuda())
        assert torch.equal(found.cpu(), Operations(EVERY, 32, 32)(x, which)), EVERY[k - 1]
    moved, on_device = augment.to("cuda"), x.cuda()
    moved(on_device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = moved(on_device)
    torch.cuda.manual_seed(1)
    graph.replay()
    first = out.clone()
    torch.cuda.manual_seed(1)
    assert torch.equal(moved(on_device), first)


def test_torchvision_has_the_same_policy():
    """Its amounts differ by less than a pixel, a degree of solarize; operations are compared with Pillow's."""
    transforms = pytest.importorskip("torchvision.transforms", reason="torchvision is not installed")
    theirs = transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10)
    ours = [[(s.name.replace("_", ""), s.probability) for s in pair] for pair in autoaugment.CIFAR10_POLICY]
    assert [[(name.lower(), p) for name, p, _ in pair] for pair in theirs.policies] == ours
    space = theirs._augmentation_space(10, (32, 32))
    for pair, mine in zip(theirs.policies, autoaugment.CIFAR10_POLICY, strict=True):
        for (name, _, level), step in zip(pair, mine, strict=True):
            if level is not None:
                magnitudes, signed = space[name]
                amount = autoaugment.operation(step.name, step.level, 1, 32).amount
                if step.name in ("brightness", "color", "contrast", "sharpness"):
                    amount -= 1
                assert level == step.level and abs(float(magnitudes[level]) - amount) < 1.01
                assert signed == (step.name not in ("posterize", "solarize"))


# Bad input


def test_refused():
    augment = AutoAugment(32)
    for wrong in (
        torch.zeros(2, 3, 28, 32, dtype=torch.uint8),
        torch.zeros(2, 1, 32, 32, dtype=torch.uint8),
        torch.zeros(2, 3, 32, 32),
        torch.zeros(3, 32, 32, dtype=torch.uint8),
    ):
        with pytest.raises(InputError, match=r"take uint8 images \(B, 3, 32, 32\), not"):
            augment(wrong)
    with pytest.raises(InputError, match="no image operation is called 'blur': there are rotate"):
        Operations((Operation("blur"),), 3, 3)
    with pytest.raises(InputError, match=r"amount of 0 .. 1, not 1.5"):
        BrightnessJitter(1.5)
    with pytest.raises(InputError, match="takes uint8 images, not float32"):
        BrightnessJitter(0.5)(torch.zeros(2, 3, 4, 4))
