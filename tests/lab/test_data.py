"""Where data sets are looked for, in which order, and what is said when they are nowhere."""

from __future__ import annotations

import json
import zipfile

import numpy as np
import pytest

from papercore.lab import data


@pytest.fixture(autouse=True)
def _no_folders(monkeypatch, tmp_path):
    for name in ("PAPERCORE_DATA", "PAPERCORE_MODELS", "NLTK_DATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def _jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_explicit_path_comes_before_the_named_folder(monkeypatch, tmp_path):
    _jsonl(tmp_path / "root" / "toy" / "train.jsonl", [{"text": "named"}])
    _jsonl(tmp_path / "given" / "train.jsonl", [{"text": "given"}])
    monkeypatch.setenv("PAPERCORE_DATA", str(tmp_path / "root"))
    assert data.rows("toy", "train") == [{"text": "named"}]
    assert data.rows("toy", "train", path=tmp_path / "given") == [{"text": "given"}]
    assert data.folder("toy") == tmp_path / "root" / "toy"
    assert data.folder("owner/toy") == tmp_path / "root" / "toy"  # a hub id finds the folder of its last part


def test_a_part_of_a_set_is_read_from_its_own_folder(tmp_path):
    _jsonl(tmp_path / "rte" / "validation.jsonl", [{"part": "rte"}])
    _jsonl(tmp_path / "validation.jsonl", [{"part": "whole"}])
    assert data.rows("glue", "validation", config="rte", path=tmp_path) == [{"part": "rte"}]
    assert data.rows("glue", "validation", path=tmp_path) == [{"part": "whole"}]


def test_parquet_in_the_hub_s_layout_is_read_in_the_order_of_its_parts(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    (tmp_path / "data").mkdir()
    for part, values in enumerate(([1, 2], [3])):
        parquet.write_table(
            pyarrow.table({"x": values}), tmp_path / "data" / f"train-0000{part}-of-00002.parquet"
        )
    assert [row["x"] for row in data.rows("numbers", "train", path=tmp_path)] == [1, 2, 3]


def test_images_are_decoded(tmp_path):
    pytest.importorskip("pyarrow")
    image = pytest.importorskip("PIL.Image")
    import io

    import pyarrow
    from pyarrow import parquet

    picture = np.zeros((4, 5, 3), dtype=np.uint8)
    picture[1, 2] = (255, 0, 7)
    buffer = io.BytesIO()
    image.fromarray(picture).save(buffer, format="PNG")
    table = pyarrow.table({"img": [{"bytes": buffer.getvalue(), "path": None}], "label": [3]})
    parquet.write_table(table, tmp_path / "test.parquet")
    pixels, labels = data.images("cifar10", "test", path=tmp_path)
    assert pixels.dtype == np.uint8 and np.array_equal(pixels[0], picture) and labels.tolist() == [3]


def test_a_folder_without_the_split_lists_what_it_has(tmp_path):
    _jsonl(tmp_path / "train.jsonl", [{"x": 1}])
    with pytest.raises(ValueError, match=r"no split 'test'.*wanted test.parquet.*\['train.jsonl'\]"):
        data.rows("toy", "test", path=tmp_path)


def test_a_missing_set_names_what_where_and_one_command(monkeypatch, tmp_path):
    monkeypatch.setenv("PAPERCORE_DATA", str(tmp_path))
    with pytest.raises(data.Missing) as caught:
        data.folder("cifar10")
    text = str(caught.value)
    assert "the data set 'cifar10' was not found" in text
    assert f"PAPERCORE_DATA: {tmp_path / 'cifar10'} does not exist" in text
    assert "load_dataset('uoft-cs/cifar10')" in text
    assert isinstance(caught.value, ValueError)


def test_a_wrong_path_is_not_replaced_by_another_place(monkeypatch, tmp_path):
    _jsonl(tmp_path / "toy" / "train.jsonl", [{"x": 1}])
    monkeypatch.setenv("PAPERCORE_DATA", str(tmp_path))
    with pytest.raises(data.Missing, match="no such folder"):
        data.rows("toy", "train", path=tmp_path / "absent")


def test_the_hub_s_refusal_is_passed_on(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def refuse(*_, **__):
        raise ConnectionError("no network here\nlong trace")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(data.Missing) as caught:
        data.rows("sst2", "train")
    text = str(caught.value)
    assert "PAPERCORE_DATA: not set" in text
    assert (
        "the hub's 'stanfordnlp/sst2': ConnectionError: no network here" in text and "long trace" not in text
    )


def test_a_corpus_is_found_zipped_or_unpacked(monkeypatch, tmp_path):
    root = tmp_path / "nltk"
    (root / "corpora").mkdir(parents=True)
    with zipfile.ZipFile(root / "corpora" / "toy.zip", "w") as archive:
        archive.writestr("toy/a.txt", "caf\xe9\r\n".encode("latin-1"))
    monkeypatch.setenv("NLTK_DATA", str(root))
    assert data.corpus("toy") == root / "corpora" / "toy.zip"
    assert data.corpus_text("toy", "a.txt") == "caf\xe9\n"
    assert data.corpus_files("toy") == ["a.txt"]
    unpacked = tmp_path / "other" / "toy"
    unpacked.mkdir(parents=True)
    (unpacked / "a.txt").write_bytes(b"plain")
    assert data.corpus_text("toy", "a.txt", path=unpacked) == "plain"
    assert data.corpus_text("toy", "a.txt", path=tmp_path / "other") == "plain"
    with pytest.raises(ValueError, match=r"no file 'b.txt'; it has \['a.txt'\]"):
        data.corpus_text("toy", "b.txt")


def test_a_missing_corpus_and_a_broken_one(monkeypatch, tmp_path):
    monkeypatch.setenv("NLTK_DATA", str(tmp_path))
    with pytest.raises(
        data.Missing, match=r"(?s)the NLTK corpus 'qc'.*qc.zip or qc/.*python -m nltk.downloader qc"
    ):
        data.corpus("qc")
    (tmp_path / "qc.zip").write_bytes(b"not a zip")
    with pytest.raises(ValueError, match="no readable zip file"):
        data.corpus_text("qc", "train.txt")
