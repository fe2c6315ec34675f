"""Training and validation images: folders with those names, or a share drawn by a seed."""

import gzip

import pytest
from test_data import names, refusal, save_images

from extras import splits


def test_train_and_val_folders_are_the_splits(tmp_path):
    save_images(tmp_path, "val/a/0.png")
    assert names(splits.open_split(tmp_path, "val"), tmp_path) == ["val/a/0.png"]
    assert "no folder train" in refusal(splits.open_split, tmp_path, "train")
    save_images(tmp_path, "train/a/1.png")
    assert names(splits.open_split(tmp_path, "train"), tmp_path) == ["train/a/1.png"]
    assert names(splits.open_split(tmp_path, "val", None, 0.5), tmp_path) == ["val/a/0.png"]


@pytest.mark.parametrize("fraction", [None, 0.5])
@pytest.mark.parametrize(
    "folders, renames",
    [
        (("train", "validation"), "rename validation to val"),
        (("training", "val"), "rename training to train"),
        (("training", "valid"), "rename training to train and valid to val"),
    ],
)
def test_folders_with_nearly_the_right_names_must_be_renamed(tmp_path, folders, renames, fraction):
    save_images(tmp_path, *(f"{name}/a/{i}.png" for name in folders for i in range(2)))
    assert refusal(splits.open_split, tmp_path, "train", None, fraction).endswith(renames)


@pytest.mark.parametrize("parts", [["Training", "Testing"], ["Train"], ["training"], ["test_set"]])
def test_parts_of_a_data_set_are_no_classes(tmp_path, parts):
    save_images(tmp_path, *(f"{p}/{name}/{i}.png" for p in parts for name in "ab" for i in "012"))
    message = refusal(splits.open_split, tmp_path, "train", None, 0.5)
    assert "must hold train and val: " in message


def test_a_class_may_have_the_name_of_a_part(tmp_path):
    save_images(tmp_path, *(f"{name}/{i}.png" for name in ("Train", "test") for i in "012"))
    assert splits.open_split(tmp_path, "train", None, 0.5).classes == ["Train", "test"]


@pytest.mark.parametrize("inside", ["", "train"])
def test_a_split_is_fixed_by_its_seed_and_never_overlaps(tmp_path, inside):
    paths = [f"{name}/{i}.png" for name in "ab" for i in range(10)]
    save_images(tmp_path / inside, *paths)
    assert "--val-fraction 0.1" in refusal(splits.open_split, tmp_path, "val")

    def split(part, seed):
        return names(splits.open_split(tmp_path, part, None, 0.3, seed), tmp_path / inside)

    for seed in (0, 1):
        val = split("val", seed)
        assert [name[0] for name in val] == ["a"] * 3 + ["b"] * 3
        assert sorted(val + split("train", seed)) == paths
    assert split("val", 0) == split("val", 0) != split("val", 1)


def test_a_class_with_a_single_image_cannot_be_split(tmp_path):
    save_images(tmp_path, "a/0.png", "a/1.png", "b/0.png")
    assert "two at least" in refusal(splits.open_split, tmp_path, "train", None, 0.5)
    assert "no data folder" in refusal(splits.open_split, tmp_path / "absent", "train")


def test_a_folder_with_the_original_files_is_fashion_mnist(tmp_path):
    images, labels = bytes(16) + bytes(2 * 784), bytes(8) + bytes([3, 9])
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
    dataset = splits.open_split(tmp_path, "val")
    assert len(dataset) == 2 and dataset[1][1] == 9
