"""Images on a device: what a step draws, against plain indexing; noise and crops by their statistics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from papercore.lab.image_set import ImageSet, seeded


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (n, 8, 8, 3)).astype(np.uint8) for n in (50, 20)]
    labels = [rng.integers(0, 10, n) for n in (50, 20)]
    labels[0][:10] = np.arange(10)
    return tuple(zip(images, labels, strict=True))


@pytest.fixture(scope="module")
def images(arrays):
    return ImageSet.of(*arrays)


def test_without_augmentation_a_batch_is_the_scaled_images(images, arrays):
    (pixels, labels), _ = arrays
    x, y = images.batch(3, 6, seed=1, augment=False)
    places = images.places(3, 6, seed=1).numpy()
    flat = pixels.reshape(-1, 3).astype(float)
    expected = (pixels[places] - flat.mean(0)) / flat.std(0, ddof=1)
    np.testing.assert_allclose(x.permute(0, 2, 3, 1).numpy(), expected, atol=1e-5)
    np.testing.assert_array_equal(y.numpy(), labels[places])
    assert x.is_contiguous(memory_format=torch.channels_last)


def test_an_epoch_draws_every_image_at_most_once_and_workers_share_none(images):
    drawn = torch.cat([images.places(step, 12, seed=0) for step in range(4)])  # 4 * 12 of 50
    assert len(set(drawn.tolist())) == 48
    assert not torch.equal(drawn[:12], images.places(4, 12, seed=0))  # the next epoch has another order


def test_with_replacement_counts_are_binomial(images):
    counts = torch.zeros(50)
    for step in range(400):
        counts += torch.bincount(images.places(step, 25, seed=0, replacement=True), minlength=50)
    expected = 400 * 25 / 50
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert 25 < chi_square < 86  # 49 degrees of freedom: outside with probability 0.002


def test_what_a_step_draws_depends_on_seed_and_step_alone(images):
    first = images.batch(7, 10, seed=3, flips=0.3)
    images.batch(0, 10, seed=3)
    again = images.batch(7, 10, seed=3, flips=0.3)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], images.batch(7, 10, seed=4, flips=0.3)[0])


def test_crops_are_windows_of_the_padded_image_and_half_are_mirrored(images):
    places = torch.arange(50)
    cropped = images.pictures(places, seeded(0, 9))
    margin, side = images.margin, 8
    kinds = []
    for place in range(50):
        wide = (images.train_x[place].float() - images.mean) / images.std
        found = [
            mirror
            for top in range(2 * margin + 1)
            for left in range(2 * margin + 1)
            for mirror in (False, True)
            if torch.allclose(
                (wide[top : top + side, left : left + side].flip(1) if mirror else wide[top : top + side, left : left + side]).permute(2, 0, 1),
                cropped[place],
            )
        ]  # fmt: skip
        assert len(found) == 1
        kinds += found
    assert 13 <= sum(kinds) <= 37  # of 50 at one half: outside with probability 0.001


def test_margin_has_the_mean_colour(images, arrays):
    mean = arrays[0][0].reshape(-1, 3).mean(0).round()
    np.testing.assert_array_equal(images.train_x[0, 0, 0].numpy(), mean)


def test_label_noise_replaces_the_asked_share(images):
    changed = total = 0
    for step in range(300):
        places = images.places(step, 50, seed=0)
        _, noisy = images.batch(step, 50, seed=0, augment=False, flips=0.2)
        changed += int((noisy != images.train_y[places]).sum())
        total += 50
    assert abs(changed / total - 0.2) < 4 * (0.16 / total) ** 0.5


def test_pooling_averages_squares_and_subsets_are_drawn_once(arrays):
    small = ImageSet.of(*arrays, pool=2, train_images=20, test_images=5, seed=1)
    assert small.test_x.shape == (5, 4, 4, 3) and len(small.train_y) == 20 and small.margin == 2
    whole = ImageSet.of(*arrays, pool=2)
    by_hand = arrays[1][0].astype(float).reshape(20, 4, 2, 4, 2, 3).mean(axis=(2, 4))
    assert np.abs(whole.test_x.numpy() - by_hand).max() <= 0.5
    again = ImageSet.of(*arrays, pool=2, train_images=20, test_images=5, seed=1)
    other = ImageSet.of(*arrays, pool=2, train_images=20, test_images=5, seed=2)
    assert torch.equal(small.train_x, again.train_x) and not torch.equal(small.train_x, other.train_x)


def test_load_reads_parquet_in_the_hubs_layout(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    import io

    for split, n in (("train", 6), ("test", 4)):
        rows = []
        for i in range(n):
            buffer = io.BytesIO()
            Image.fromarray(np.full((8, 8, 3), 10 * i, dtype=np.uint8)).save(buffer, "PNG")
            rows.append({"img": {"bytes": buffer.getvalue(), "path": None}, "label": i % 2})
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{split}.parquet")
    loaded = ImageSet.load("cifar10", path=tmp_path)
    assert loaded.classes == 2 and len(loaded.train_y) == 6
    assert loaded.test_x[3].unique().tolist() == [30]


def test_errors(arrays, images):
    with pytest.raises(ValueError, match="60 images were asked for, and there are 50"):
        ImageSet.of(*arrays, train_images=60)
    with pytest.raises(ValueError, match="pool is 3: expected a divisor of the sides, 8 x 8 pixels"):
        ImageSet.of(*arrays, pool=3)
    with pytest.raises(ValueError, match="a batch of 51 from 50 images: expected 1 to 50"):
        images.places(0, 51, seed=0)
