"""Images in folders: layouts, how they are read, and every way in which a folder can be wrong."""

import os
import shutil
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from hypermask_fast import InputError
from hypermask_fast.data import DatasetSplit, TensorSplit, image_folders
from hypermask_fast.data.folders import folder_fingerprint
from hypermask_fast.data.transforms import Normalize

CLASSES = ("ant", "bee", "cat2", "cat10")  # in order: numbers by their value


def picture(path, value=None, size=(6, 4), mode="RGB", **save) -> None:
    """An image of one grey value, or of noise; size: (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0], 3)
    generator = np.random.default_rng(zlib.crc32(path.name.encode()))
    pixels = generator.integers(0, 256, shape) if value is None else np.full(shape, value)
    Image.fromarray(pixels.astype(np.uint8)).convert(mode).save(path, **save)


@pytest.fixture
def by_class(tmp_path):
    """train/CLASS with 3 images, test/CLASS with 2; the image's value is 40 c + i, 20 more to test."""
    for c, name in enumerate(CLASSES):
        for i in range(5):
            part, value = ("train", 40 * c + i) if i < 3 else ("test", 40 * c + 20 + i)
            picture(tmp_path / part / name / f"{i}.png", value)
    return tmp_path


@pytest.fixture
def by_task(tmp_path):
    """Tasks night2 (2 classes) and night10 (3 classes)."""
    for task, classes in (("night10", "abc"), ("night2", "xy")):
        for part in ("train", "test"):
            for name in classes:
                picture(tmp_path / part / task / name / "0.png")
    return tmp_path


def values(split) -> list[int]:
    """Each image's grey value."""
    x, _ = next(split.chunks(100))
    return (x[:, 0, 0, 0] * 255).round().int().tolist()


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_folder_per_class(by_class, in_memory):
    made = image_folders(by_class, 2, validation=2, in_memory=in_memory)
    assert made.name == "images" and made.input_shape == (3, 4, 6) and made.num_classes == 2
    assert [task.name for task in made.tasks] == ["ant, bee", "cat2, cat10"]
    assert [task.class_names for task in made.tasks] == [("ant", "bee"), ("cat2", "cat10")]
    task = made.tasks[1]
    assert isinstance(task.train, TensorSplit if in_memory else DatasetSplit)
    assert values(task.validation) == [80, 120], "evenly from both classes"
    assert values(task.train) == [81, 121, 82, 122]
    assert values(task.test) == [103, 143, 104, 144]
    x, y = task.test.batch(torch.tensor([3, 0]))
    assert x.dtype == torch.float32 and y.tolist() == [1, 0] and (x[0] == 144 / 255).all()


def test_a_folder_per_task_and_class(by_task):
    made = image_folders(by_task)
    assert [task.name for task in made.tasks] == ["night2", "night10"]
    assert made.classes == (2, 3) and made.num_classes == 3
    assert made.tasks[1].class_names == ("a", "b", "c")
    assert len(image_folders(by_task, tasks=1).tasks) == 1


def test_which_way_they_are_read_changes_no_bit(tmp_path):
    for name in "ab":
        for i in range(7):
            picture(tmp_path / "train" / name / f"{i}.jpg", size=(8 + i, 9))
            picture(tmp_path / "test" / name / f"{i}.png", size=(30, 11), mode="P")
    for settings in ({}, {"normalise": "imagenet"}, {"normalise": "first-task"}, {"colour": "grey"}):
        made = [image_folders(tmp_path, 2, image_size=(7, 5), in_memory=way, **settings) for way in (True, False)]
        rows = torch.tensor([[5, 0, 3], [1, 2, 4]])
        for a, b in zip(*(list(each.tasks[0].train.batches(rows, train=True)) for each in made), strict=True):
            assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
        for a, b in zip(*(list(each.tasks[0].test.chunks(5)) for each in made), strict=True):
            assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_large_ones_are_read_when_they_are_asked_for(by_class, monkeypatch):
    import hypermask_fast.data.folders as folders

    assert isinstance(image_folders(by_class, 2).tasks[0].train, TensorSplit)
    monkeypatch.setattr(folders, "IN_MEMORY", 20 * 3 * 4 * 6 - 1)
    assert isinstance(image_folders(by_class, 2).tasks[0].train, DatasetSplit)
    monkeypatch.setattr(folders, "IN_MEMORY", 20 * 3 * 4 * 6)
    assert isinstance(image_folders(by_class, 2).tasks[0].train, TensorSplit)


def test_normalisation_by_the_first_task_s_training_images(by_class):
    task = image_folders(by_class, 2, normalise="first-task", validation=1).tasks[0]
    pixels = np.repeat([40, 1, 41, 2, 42], 4 * 6) / 255  # of all but the one that is held out
    assert isinstance(task.train.prepare, Normalize)
    assert task.train.prepare.mean == pytest.approx((pixels.mean(),) * 3)
    assert task.train.prepare.std == pytest.approx((pixels.std(),) * 3)
    x, _ = next(task.train.chunks(10))
    assert x.mean() == pytest.approx(0, abs=1e-5) and x.std(correction=0) == pytest.approx(1, abs=1e-5)


def test_sizes_colours_and_orientation(tmp_path):
    left = np.zeros((4, 8, 3), np.uint8)
    left[:, :4] = 200
    for part in ("train", "test"):
        for name in "ab":
            (tmp_path / part / name).mkdir(parents=True)
            Image.fromarray(left).save(tmp_path / part / name / "0.png")
    grey = image_folders(tmp_path, 2, colour="grey").tasks[0].train
    assert grey.inputs.shape == (2, 1, 4, 8)
    square = image_folders(tmp_path, 2, image_size=(4, 4)).tasks[0].train.inputs[0, 0]
    assert square.tolist() == [[200, 200, 0, 0]] * 4, "cut in the middle, not squeezed"
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees: the upper half is bright then
    for part in ("train", "test"):
        for name in "ab":
            Image.fromarray(left).save(tmp_path / part / name / "0.png", exif=exif)
    for in_memory in (True, False):
        made = image_folders(tmp_path, 2, in_memory=in_memory)
        assert made.input_shape == (3, 8, 4)
        assert (next(made.tasks[0].train.chunks(1))[0][0, 0, :4] == 200 / 255).all()


def test_hidden_files_and_those_of_the_system_are_not_looked_at(by_class):
    (by_class / "train" / ".DS_Store").touch()
    (by_class / "train" / "ant" / "Thumbs.db").touch()
    assert len(image_folders(by_class, 2).tasks) == 2


def test_the_fingerprint_is_of_names_and_sizes(by_class, tmp_path):
    first = folder_fingerprint(by_class)
    (by_class / "notes.txt").touch()
    assert folder_fingerprint(by_class) == first
    (by_class / "train" / "ant" / "0.png").rename(by_class / "train" / "ant" / "9.png")
    renamed = folder_fingerprint(by_class)
    picture(by_class / "test" / "ant" / "new.png")
    assert len({first, renamed, folder_fingerprint(by_class)}) == 3


# -- what is refused --------------------------------------------------------------------------------------------------


def refused(*arguments, **settings) -> str:
    with pytest.raises(InputError) as caught:
        image_folders(*arguments, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_folders_that_are_missing_or_empty(tmp_path):
    assert f"{tmp_path / 'train'} is missing: images lie in train/CLASS and test/CLASS" in refused(tmp_path, 2)
    (tmp_path / "train").mkdir()
    assert "train is empty: it should hold a folder per class, or per task" in refused(tmp_path, 2)
    (tmp_path / "train" / "ant").mkdir()
    assert "ant has no images: leave the class out" in refused(tmp_path, 2)
    (tmp_path / "file").touch()
    assert "train is missing" in refused(tmp_path / "nothing", 2)
    assert "train is missing" in refused(tmp_path / "file", 2)


def test_one_class(by_class, tmp_path):
    for name in CLASSES[1:]:
        for part in ("train", "test"):
            shutil.rmtree(by_class / part / name)
    assert "train has one class only (ant): to tell classes apart takes two or more" in refused(by_class, 2)
    assert "classes_per_task must be a whole number, 2 or more, not 1" in refused(by_class_again(by_class), 1)


def by_class_again(folder):
    for part in ("train", "test"):
        picture(folder / part / "bee" / "0.png")
    return folder


def test_one_class_in_a_task(by_task):
    for part in ("train", "test"):
        shutil.rmtree(by_task / part / "night2" / "x")
    assert "night2 has one class only (y)" in refused(by_task)


def test_classes_that_are_in_one_part_only(by_class):
    shutil.rmtree(by_class / "test" / "bee")
    assert f"class 'bee' is in {by_class / 'train'} and not in {by_class / 'test'}" in refused(by_class, 2)
    picture(by_class / "test" / "bee" / "0.png")
    picture(by_class / "test" / "dog" / "0.png")
    assert f"class 'dog' is in {by_class / 'test'} and not in {by_class / 'train'}" in refused(by_class, 2)


def test_tasks_and_classes_of_tasks_that_are_in_one_part_only(by_task):
    picture(by_task / "train" / "night2" / "z" / "0.png")
    assert "class of task night2 'z' is in" in refused(by_task)
    shutil.rmtree(by_task / "train" / "night2" / "z")
    shutil.rmtree(by_task / "test" / "night10")
    assert "task 'night10' is in" in refused(by_task)


def test_layouts_that_are_mixed(by_class, by_task, tmp_path):
    assert "night2 has folders in it, as a task has, and ant has none" in refused(tmp_path, 2)
    for name in CLASSES:
        shutil.rmtree(tmp_path / "train" / name)
    for task in ("night2", "night10"):
        shutil.rmtree(tmp_path / "test" / task)
    assert "train and test must both have folders of classes, or both folders of tasks" in refused(tmp_path, 2)


def test_how_many_classes_a_task_has(by_class, by_task, tmp_path):
    shutil.rmtree(tmp_path / "train")
    shutil.rmtree(tmp_path / "test")
    for part in ("train", "test"):
        for name in "abcde":
            picture(tmp_path / part / name / "0.png")
    assert "has 5 classes: say how many a task has (--classes-per-task)" in refused(tmp_path)
    assert "the 5 classes of" in refused(tmp_path, 2) and "can't be cut into tasks of 2" in refused(tmp_path, 2)
    for part in ("train", "test"):
        for task in ("s", "t"):
            (tmp_path / part / task).mkdir()
            for name in "abcde" if task == "s" else "":
                shutil.move(tmp_path / part / name, tmp_path / part / task / name)
        shutil.rmtree(tmp_path / part / "t")
    assert "leave classes_per_task out" in refused(tmp_path, 2)
    assert "tasks of" in refused(tmp_path, tasks=2) and "1 .. 1, not 2" in refused(tmp_path, tasks=2)
    assert "validation 5 leaves task 0 (s) no training samples: it has 5" in refused(tmp_path, validation=5)


@pytest.mark.parametrize("in_memory", [True, False])
def test_files_that_are_no_images(by_class, in_memory):
    damaged = by_class / "test" / "bee" / "4.png"
    content = damaged.read_bytes()
    damaged.write_bytes(b"no image")
    assert refused(by_class, 2, in_memory=in_memory) == f"{damaged} is not a readable image"
    damaged.write_bytes(content)
    (by_class / "test" / "bee" / "notes.txt").touch()
    assert "notes.txt is no image of a known kind (.png, .jpg" in refused(by_class, 2, in_memory=in_memory)


def test_a_file_that_is_cut_off(by_class):
    damaged = by_class / "train" / "ant" / "1.png"
    picture(damaged)
    damaged.write_bytes(damaged.read_bytes()[:80])
    assert f"{damaged} is not a readable image (" in refused(by_class, 2)
    later = image_folders(by_class, 2, image_size=(4, 6), in_memory=False).tasks[0].train
    with pytest.raises(InputError, match="1.png is not a readable image"):
        list(later.chunks(10))


@pytest.mark.parametrize("in_memory", [True, False])
def test_images_of_several_sizes_or_of_more_bits(by_class, in_memory):
    odd = by_class / "test" / "bee" / "4.png"
    picture(odd, size=(5, 4))
    assert f"{odd} is 4 x 5 pixels, the first image 4 x 6" in refused(by_class, 2, in_memory=in_memory)
    Image.fromarray(np.full((4, 6), 40000, np.uint16)).save(odd)
    assert f"{odd} has more than 8 bits a channel" in refused(by_class, 2, in_memory=in_memory)


def test_files_beside_folders_and_folders_beside_files(by_class):
    picture(by_class / "train" / "0.png")
    assert "0.png is a file: " in refused(by_class, 2)
    (by_class / "train" / "0.png").unlink()
    for name in CLASSES:
        (by_class / "train" / name / "deep").mkdir()
    assert "is a file: " in refused(by_class, 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"colour": "blue"}, "colour must be rgb or grey, not 'blue'"),
        ({"normalise": "z"}, "normalise must be none or imagenet or first-task, not 'z'"),
        ({"colour": "grey", "normalise": "imagenet"}, "imagenet has numbers for three channels"),
        ({"image_size": (3,)}, "image_size is (height, width), not [3]"),
        ({"image_size": (0, 3)}, "image_size must be a whole number, 1 .. 10000, not 0"),
        ({"validation": -1}, "validation must be a whole number"),
    ],
)
def test_settings_that_are_wrong(by_class, settings, message):
    assert message in refused(by_class, 2, **settings)


def test_the_fingerprint_follows_links_and_leaves_hidden_files_out(by_class):
    """As the images themselves are read."""
    elsewhere = by_class / "elsewhere"
    (by_class / "train" / "ant").rename(elsewhere)
    (by_class / "train" / "ant").symlink_to(elsewhere)
    first = folder_fingerprint(by_class)
    picture(by_class / "train" / "bee" / ".0.png", 3)
    assert folder_fingerprint(by_class) == first
    picture(elsewhere / "9.png", 3)
    assert folder_fingerprint(by_class) != first
    (by_class / "train" / "bee" / "loop").symlink_to(by_class / "train")
    folder_fingerprint(by_class)


def test_what_is_no_file_is_not_waited_for(by_class):
    os.mkfifo(by_class / "train" / "ant" / "9.png")
    assert "9.png is no file that can be read: take it out" in refused(by_class, 2)
