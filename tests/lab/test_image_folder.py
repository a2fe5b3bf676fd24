"""Images in folders: crops against plain slicing, and pictures that depend on seed, epoch and index alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from papercore.lab.data import Missing
from papercore.lab.image_folder import MEAN, STD, ImageFolder, random_box


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in (("train", 3), ("val", 2)):
        for name in ("b", "a"):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 256, (24, 32, 3)).astype(np.uint8)).save(
                    folder / split / name / f"{i}.png"
                )
    (folder / "train" / "a" / "notes.txt").write_text("no image")
    return folder


def test_classes_are_folders_in_order(root):
    found = ImageFolder(root, "train", side=8)
    assert found.classes == ["a", "b"] and len(found) == 6
    assert [found[i][1] for i in range(6)] == [0, 0, 0, 1, 1, 1]


def test_a_test_image_is_its_middle(root):
    image, _ = ImageFolder(root, "val", side=16, resize=24)[1]
    pixels = np.asarray(Image.open(root / "val" / "a" / "1.png"), dtype=np.float64)[4:20, 8:24] / 255
    expected = (pixels - np.array(MEAN)) / np.array(STD)
    np.testing.assert_allclose(image.permute(1, 2, 0).numpy(), expected, atol=1e-5)


def test_training_images_depend_on_seed_epoch_and_index_alone(root):
    found = ImageFolder(root, "train", side=8, augment=True, seed=1)
    first = found[(2, 4)][0]
    found[(0, 0)]
    assert torch.equal(first, found[(2, 4)][0])
    assert torch.equal(first, ImageFolder(root, "train", side=8, augment=True, seed=1)[(2, 4)][0])
    for other in (found[(3, 4)][0], ImageFolder(root, "train", side=8, augment=True, seed=2)[(2, 4)][0]):
        assert not torch.equal(first, other)


def test_boxes_have_the_areas_and_ratios_asked_for():
    rng = np.random.default_rng(0)
    boxes = np.array([random_box(400, 300, rng) for _ in range(2000)])
    widths, heights = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2] <= 400).all() and (boxes[:, 3] <= 300).all()
    share, ratio = widths * heights / 120_000, widths / heights
    assert 0.07 < share.min() < 0.1 and share.max() > 0.85
    assert ratio.min() > 0.74 and ratio.max() < 1.35
    # A picture that no box fits in gives its middle square.
    assert random_box(1000, 1, np.random.default_rng(0)) == (499, 0, 500, 1)


def test_errors(root, tmp_path, monkeypatch):
    with pytest.raises(
        ValueError, match="has no folder 'test' with one folder a class; it has \\['train', 'val'\\]"
    ):
        ImageFolder(root, "test")
    (tmp_path / "val" / "a").mkdir(parents=True)
    with pytest.raises(ValueError, match="has no images in folders of classes"):
        ImageFolder(tmp_path, "val")
    monkeypatch.delenv("PAPERCORE_DATA", raising=False)
    with pytest.raises(Missing, match="the data set 'imagenet'"):
        ImageFolder.named("imagenet", "val")
