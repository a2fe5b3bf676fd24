"""Grafts on disk: what a file holds, folders, files that are no grafts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from papercore.grafting import (
    Graft,
)
from tests.grafting.reference import DTYPES, made


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_file_is_a_header_and_k_times_index_and_value(dtype: torch.dtype, tmp_path: Path) -> None:
    _, _, _, graft = made(dtype, k=100)
    item = torch.empty(0, dtype=dtype).element_size()
    assert graft.nbytes == 100 * (4 + item)
    path = tmp_path / "skill.safetensors"
    graft.save(path)
    assert graft.nbytes < path.stat().st_size < graft.nbytes + 3000
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        for name, index in graft.index.items():
            assert file.get_tensor(f"{name}.idx").dtype == torch.int32
            assert torch.equal(file.get_tensor(f"{name}.idx").long(), index)
            assert torch.equal(file.get_tensor(f"{name}.val"), graft.values[name])
        assert file.metadata()["fingerprint"] == graft.fingerprint
        assert file.metadata()["entries"] == "100"


def test_folders_and_metadata(tmp_path: Path) -> None:
    base, tuned, mask, _ = made()
    graft = Graft.from_mask(tuned, mask, metadata={"task": "signs", "rule": "random"})
    graft.save_pretrained(tmp_path / "new" / "folder")
    loaded = Graft.from_pretrained(tmp_path / "new" / "folder")
    assert loaded == graft and loaded.metadata == {"task": "signs", "rule": "random"}
    with loaded.applied(base):
        pass
    with pytest.raises(ValueError, match="metadata must map names other than format, version"):
        Graft.from_mask(tuned, mask, metadata={"base": "x"}).save(tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


def test_files_that_are_no_grafts(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    _, _, _, graft = made()
    with pytest.raises(FileNotFoundError, match="no such file"):
        Graft.load(tmp_path / "none.safetensors")
    text = tmp_path / "notes.txt"
    text.write_text("not a graft")
    with pytest.raises(ValueError, match="not a safetensors file, or damaged"):
        Graft.load(text)
    with pytest.raises(ValueError, match="exists and is not a graft: it is not replaced"):
        graft.save(text)
    assert text.read_text() == "not a graft"
    model = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(2)}, model)
    with pytest.raises(ValueError, match="a safetensors file, but not a graft"):
        Graft.load(model)
    with pytest.raises(ValueError, match="exists and is not a graft"):
        graft.save(model)
    good = tmp_path / "good.safetensors"
    graft.save(good)
    graft.save(good)  # an earlier graft is replaced
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(good.read_bytes()[:-3])
    with pytest.raises(ValueError, match="damaged"):
        Graft.load(cut)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "cut.safetensors",
        "good.safetensors",
        "model.safetensors",
        "notes.txt",
    ]


def test_grafting_needs_safetensors_only_for_files() -> None:
    import subprocess
    import sys

    code = "import sys, papercore.grafting; print(sorted({'safetensors', 'transformers', 'sklearn', 'matplotlib'} & set(sys.modules)))"
    done: Any = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
