"""The paper scale: settings as published, networks, and a whole run by two real processes on a few made images."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from papercore import experiments
from papercore.experiments.local_sgd import paper
from papercore.experiments.local_sgd.paper_runs import RUNS, VGG16, make_network
from papercore.lab.claims import reported_value
from papercore.lab.record import Record
from papercore.lab.stages import Stages
from papercore.lab.torchrun import Processes, launch

TINY = {
    "paper_workers": 2, "paper_local_batch": 2, "paper_period": 3, "paper_start_epochs": 1, "paper_epochs": 2, "paper_lr": 0.05,
    "paper_evaluate_epochs": 1, "paper_batch_norm_batches": 2, "paper_depth": 8, "paper_checkpoint_steps": 2,
}  # fmt: skip


def write_images(folder, train=12, test=6):
    """A set in the hub's layout: parquet files with columns img and label."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rng = np.random.default_rng(0)
    for split, n in (("train", train), ("test", test)):
        rows = []
        for i in range(n):
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (16, 16, 3)).astype(np.uint8)).save(buffer, "PNG")
            rows.append({"img": {"bytes": buffer.getvalue(), "path": None}, "label": i % 3})
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}.parquet")
    return folder


def run_tiny(processes: Processes, folder: str, stages: str, overrides: dict) -> dict:
    """What each of the processes runs; the first one's numbers come back."""
    config = experiments.configure(
        "local_sgd", "paper", "cpu", overrides={**TINY, **overrides, "paper_data": folder}
    )
    record = Record.start(config)
    paper.run_paper(config, record, Stages(stages))
    steps = record.arrays[f"paper_h{config.paper_period}_step"]
    return {
        "metrics": record.metrics,
        "rows": record.tables["paper"]["rows"],
        "steps": steps,
        "notes": record.notes,
    }


def test_settings_are_those_of_the_official_code():
    for name, table in (
        ("cifar-post", "CIFAR-10 post-local"),
        ("cifar-noise", "CIFAR-10 label noise"),
        ("imagenet-post", "ImageNet post-local"),
    ):
        run = RUNS[name]
        stated = {
            "K": run.workers, "B": run.workers * run.local_batch, "B_loc": run.local_batch, "lr": run.lr, "H": run.period,
            "start_epoch": run.start_epochs,
        }  # fmt: skip
        if name != "cifar-noise":  # whose length the code leaves open
            stated |= {"extra_epochs": run.epochs, "weight_decay": run.weight_decay}
        else:
            stated |= {"noise_p": run.flips}
        for column, value in stated.items():
            assert value == reported_value("local_sgd", table, "setting", column), (name, column)


def test_networks():
    images = torch.randn(2, 3, 32, 32)
    for name, parameters in (("resnet-batch", 853_018), ("resnet-group", 853_018), ("vgg", 14_719_818)):
        net = make_network(name, 10, seed=0)
        assert sum(p.numel() for p in net.parameters()) == parameters
        assert net(images).shape == (2, 10)
        assert torch.equal(next(make_network(name, 10, seed=0).parameters()), next(net.parameters()))
    assert not any(isinstance(m, torch.nn.MaxPool2d | torch.nn.BatchNorm2d) for m in VGG16().modules())


def test_hub_resnet_50_is_the_real_one():
    pytest.importorskip("transformers")
    with torch.device("meta"):
        net = make_network("resnet-50", 1000, seed=0)
    assert sum(p.numel() for p in net.parameters()) == 25_557_032  # torchvision's count, too
    before = torch.random.get_rng_state()
    tiny = make_network("resnet-50", 7, seed=0, depth=8)
    assert torch.equal(before, torch.random.get_rng_state())
    assert tiny(torch.randn(2, 3, 64, 64)).shape == (2, 7)


def test_two_processes_run_both_arms_from_one_start(tmp_path):
    folder = write_images(tmp_path)
    found = launch(
        "tests.experiments.test_local_sgd_paper:run_tiny",
        {"folder": str(folder), "stages": str(tmp_path / "parts"), "overrides": {}},
        processes=2,
        timeout=400,
    )
    m = found["metrics"]
    # 12 images in steps of 4: 3 steps an epoch, 6 in phase 2: rounds of 3 or of 1.
    assert m["paper_h1_rounds"] == 6 and m["paper_h3_rounds"] == 2
    assert m["paper_gain"] == pytest.approx(m["paper_h3_accuracy"] - m["paper_h1_accuracy"])
    assert list(found["steps"]) == [3, 6]
    assert [row[0] for row in found["rows"]] == [1, 3] and found["rows"][1][-1] == pytest.approx(100 / 3)
    assert "resnet-batch on cifar10, K = 2" in found["notes"]["paper_run"]


def test_imagenet_from_a_folder_of_images_by_two_processes(tmp_path):
    pytest.importorskip("transformers")
    rng = np.random.default_rng(0)
    for split, n in (("train", 4), ("val", 3)):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 256, (40, 50, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{i}.JPEG")
    overrides = {"paper_run": "imagenet-post", "paper_side": 32, "paper_readers": 0, "paper_period": 4}
    found = launch(
        "tests.experiments.test_local_sgd_paper:run_tiny",
        {"folder": str(tmp_path), "stages": str(tmp_path / "parts"), "overrides": overrides},
        processes=2,
        timeout=400,
    )
    assert found["metrics"]["paper_h4_rounds"] == 1 and found["metrics"]["paper_h1_rounds"] == 4
    assert 100 * 6 * found["metrics"]["paper_h4_accuracy"] / 1e4 == pytest.approx(
        round(6 * found["metrics"]["paper_h4_accuracy"] / 100)
    )


def test_one_process_with_label_noise_resumes_from_its_parts(tmp_path, monkeypatch):
    folder = write_images(tmp_path)
    noisy = {"paper_run": "cifar-noise", "paper_workers": 1}
    first = run_tiny(Processes.join(), str(folder), str(tmp_path / "parts"), noisy)

    def untrained(*arguments, **options):
        raise AssertionError("trained again")

    monkeypatch.setattr(paper, "train_processes", untrained)
    again = run_tiny(Processes.join(), str(folder), str(tmp_path / "parts"), noisy)
    assert again["metrics"] == first["metrics"]


def test_phase_two_starts_from_a_checkpoint_and_stops_in_time(tmp_path, monkeypatch):
    folder = write_images(tmp_path)
    state = make_network("resnet-batch", 3, seed=5, depth=8).state_dict()
    torch.save(state, tmp_path / "start.pt")
    seen = {}
    load = paper.load_weights
    monkeypatch.setattr(paper, "load_weights", lambda model, start: (seen.update(start), load(model, start)))
    run_tiny(
        Processes.join(),
        str(folder),
        str(tmp_path / "parts"),
        {"paper_workers": 1, "paper_checkpoint": str(tmp_path / "start.pt")},
    )
    np.testing.assert_array_equal(seen["weights:stem.weight"], state["stem.weight"].numpy())
    with pytest.raises(
        RuntimeError,
        match="start: stopped after . of 6 steps, as paper_seconds asks; start the same line again",
    ):
        run_tiny(
            Processes.join(),
            str(folder),
            str(tmp_path / "other"),
            {"paper_workers": 1, "paper_seconds": 1e-9, "paper_start_epochs": 1},
        )


def test_errors(tmp_path):
    folder = write_images(tmp_path)
    processes = Processes.join()
    with pytest.raises(
        ValueError,
        match="cifar-post has 32 workers, one a process, and 1 processes run.*--set paper_workers=1",
    ):
        run_tiny(processes, str(folder), str(tmp_path / "parts"), {"paper_workers": 0})
    with pytest.raises(
        ValueError, match="a step takes 64 images and there are 12: fewer workers or a smaller local batch"
    ):
        run_tiny(
            processes, str(folder), str(tmp_path / "parts"), {"paper_workers": 1, "paper_local_batch": 64}
        )
    with pytest.raises(ValueError, match="no such file; give a state dict saved by torch.save"):
        run_tiny(
            processes,
            str(folder),
            str(tmp_path / "parts"),
            {"paper_workers": 1, "paper_checkpoint": "nowhere.pt"},
        )
    net = make_network("resnet-batch", 3, seed=0, depth=8)
    with pytest.raises(ValueError, match="the weights to start from do not fit the network"):
        paper.load_weights(net, {"weights:stem.weight": np.zeros((1, 3, 3, 3))})
