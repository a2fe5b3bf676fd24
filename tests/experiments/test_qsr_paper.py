"""The paper scale: images from a folder and from rows of the hub's kind, mixup, recipes, and two gloo processes on four images."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from papercore.experiments import configure
from papercore.experiments.qsr import paper_images
from papercore.experiments.qsr.paper_models import make_model
from papercore.lab.data import Missing
from papercore.lab.record import Record

TINY = {
    "paper_size": "tiny", "paper_epochs": 10, "paper_batch": 4, "paper_warmup_steps": 2, "paper_peak": 0.01, "paper_alpha": 0.02,
    "paper_h_base": 2, "paper_seeds": (0, 1), "paper_loaders": 0, "paper_micro_batch": 1, "paper_checkpoint_steps": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def four_images(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("imagenet"), np.random.default_rng(0)
    for split, count in (("train", 2), ("val", 1)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 255, (40, 48, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


@pytest.mark.parametrize("model", ["vit-b", "resnet-152"])
def test_two_processes_train_every_method_on_four_images(four_images, tmp_path, model):
    words = [
        f"--set={name}={','.join(map(str, v)) if isinstance(v, tuple) else v}" for name, v in TINY.items()
    ]
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"),
        *("--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1", "-m", "papercore", "run", "qsr"),
        *("--scale", "paper", "--device", "cpu", "--out", str(tmp_path / "out.json"), *words),
        *(f"--set=paper_data={four_images}", f"--set=paper_model={model}"),
    ]
    own = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PAPERCORE_RUNS": str(tmp_path / "runs")}
    done = subprocess.run(command, env=os.environ | own, capture_output=True, text=True, timeout=550)
    record = Record.load(tmp_path / "out.json") if (tmp_path / "out.json").is_file() else None
    assert record is not None, done.stderr[-3000:] + done.stdout[-2000:]
    rows = {row[0]: row for row in record.tables["paper"]["rows"]}
    assert set(rows) == {"parallel", "constant", "qsr"}
    assert record.metrics["paper_processes"] == 2
    assert (rows["parallel"][1], rows["constant"][1]) == (100.0, 50.0)
    assert rows["qsr"][1] < 50.0
    assert {"paper_qsr_minus_constant", "paper_qsr_minus_dp_se"} <= record.metrics.keys()
    # One number of four bytes a weight and average; the tiny networks have the same weights in all runs.
    bytes_sent = {name: row[5] for name, row in rows.items()}
    assert bytes_sent["parallel"] == 2 * bytes_sent["constant"] > 0
    assert record.arrays["paper_qsr_accuracy"].shape[0] == 2
    assert not list((tmp_path / "runs").rglob("step-*")), "a finished run leaves no checkpoints"


def test_a_folder_and_rows_of_the_hub_give_the_same_pixels(four_images):
    folder = paper_images.load(str(four_images), "train", side=16, seed=3)
    rows = []
    for path, label in folder.files:
        rows.append({"image": {"bytes": path.read_bytes(), "path": None}, "label": label})
    hub = paper_images.HubImages(rows, 2, side=16, resize=18, augment=True, seed=3)
    opened = [{"image": Image.open(io.BytesIO(r["image"]["bytes"])), "label": r["label"]} for r in rows]
    decoded = paper_images.HubImages(opened, 2, side=16, resize=18, augment=True, seed=3)
    for index in range(4):
        x, y = folder[(5, index)]
        assert x.shape == (3, 16, 16) and y == hub[(5, index)][1]
        assert torch.equal(x, hub[(5, index)][0]) and torch.equal(x, decoded[(5, index)][0])
    assert not torch.equal(folder[(5, 0)][0], folder[(6, 0)][0])
    assert len(hub) == 4


def test_missing_images_are_named_with_what_to_do(four_images, tmp_path):
    with pytest.raises(Missing, match="give --set paper_data=FOLDER"):
        paper_images.load(str(tmp_path), "train", side=16, seed=0)


def test_mixup_is_a_convex_combination_with_the_next_image():
    x, y = torch.randn(3, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2])
    mixed, first, second, share = paper_images.mixed(x, y, 0.2, np.random.default_rng(1))
    weight = float(share[0])
    assert 0 < weight < 1 and torch.equal(second, torch.tensor([1, 2, 0])) and torch.equal(first, y)
    assert torch.allclose(mixed[2], weight * x[2] + (1 - weight) * x[0])
    plain = paper_images.mixed(x, y, 0.0, np.random.default_rng(1))
    assert torch.equal(plain[0], x) and plain[3].tolist() == [1.0, 1.0, 1.0]


def test_recipes_are_the_scripts_and_can_be_overridden():
    vit = configure("qsr", "paper", "cpu").recipe()
    assert (vit.epochs, vit.batch, vit.peak, vit.alpha, vit.h_base) == (300, 4096, 0.008, 0.0175, 4)
    resnet = configure("qsr", "paper", "cpu", 0, {"paper_model": "resnet-152", "paper_epochs": 90}).recipe()
    assert (resnet.epochs, resnet.optimizer, resnet.smoothing, resnet.micro_batch) == (90, "sgd", 0.1, 32)


def test_resnet_152_has_the_published_number_of_weights_and_starts_from_its_seed():
    with torch.device("meta"):
        model = make_model("resnet-152", "full", 1000, 0)
    assert sum(p.numel() for p in model.parameters()) == 60_192_808
    before = torch.random.get_rng_state()
    first, second, other = (make_model("vit-b", "tiny", 3, seed) for seed in (0, 0, 1))
    assert torch.equal(before, torch.random.get_rng_state())
    weights = [next(iter(m.parameters())).detach() for m in (first, second, other)]
    assert torch.equal(*[p.detach() for p in (list(first.parameters())[-2], list(second.parameters())[-2])])
    assert len(weights) == 3 and not torch.equal(list(first.parameters())[-2], list(other.parameters())[-2])
    assert first(torch.zeros(2, 3, 32, 32)).shape == (2, 3)
