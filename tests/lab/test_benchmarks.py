"""Records of speed: written whole, found by name, and refused where they are something else."""

import pytest

from papercore.lab.benchmarks import find_benchmark, save_benchmark


def test_what_is_saved_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("PAPERCORE_RECORDS", str(tmp_path))
    document = {"what": "a ratio", "rows": [{"name": "ours", "ratio": 1.5}]}
    save_benchmark(tmp_path / "benchmarks" / "toy.json", document)
    assert find_benchmark("toy") == document
    assert find_benchmark("no_such_kernel") is None


def test_a_source_file_is_never_overwritten(tmp_path):
    source = tmp_path / "kernel.py"
    source.write_text("x = 1\n")
    with pytest.raises(ValueError, match=r"go to a \.json file, got .*kernel\.py"):
        save_benchmark(source, {"rows": []})
    assert source.read_text() == "x = 1\n"


def test_a_list_is_no_record(tmp_path, monkeypatch):
    monkeypatch.setenv("PAPERCORE_RECORDS", str(tmp_path))
    path = tmp_path / "benchmarks" / "toy.json"
    path.parent.mkdir()
    path.write_text("[]")
    with pytest.raises(ValueError, match="top level is a list, expected an object"):
        find_benchmark("toy")
