"""Facts beside the numbers: versions, the commit, and a memory watch that sees what a run takes and ends with it."""

from __future__ import annotations

import gc
import platform
import subprocess
import threading
import time

import pytest
import torch

from papercore.lab import provenance
from papercore.lab.provenance import MemoryWatch, commit, hardware, resident_bytes, versions


def test_versions_are_those_of_the_installed_libraries(monkeypatch):
    found = versions()
    assert found["python"] == platform.python_version()
    assert found["torch"] == torch.__version__.split("+")[0] and "+" not in "".join(found.values())
    monkeypatch.setattr(provenance, "VERSIONS_OF", ("no-such-library", "torch"))
    assert set(versions()) == {"python", "torch"}


def test_the_commit_names_the_tree_and_says_when_it_differs(monkeypatch, tmp_path):
    monkeypatch.setattr(provenance, "PACKAGE", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert commit() is None  # no repository

    def git(*words):
        named = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *named, *words], cwd=tmp_path, check=True, capture_output=True)

    git("init", "-q")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-q", "-m", "one")
    git("tag", "v1")
    short = commit()
    assert short is not None and len(short) == 10 and set(short) <= set("0123456789abcdef")
    (tmp_path / "file").write_text("two")
    assert commit() == f"{short}+"
    monkeypatch.setenv("PATH", "")
    assert commit() is None  # no git


def test_hardware_names_the_device():
    facts = hardware("cpu")
    assert facts["device"] == "cpu" and facts["threads"] == torch.get_num_threads() and facts["cores"] >= 1


@pytest.mark.skipif(resident_bytes() == 0, reason="this system does not tell how much memory a process holds")
def test_the_watch_sees_memory_that_is_gone_at_the_end():
    watch = MemoryWatch("cpu").start()
    before = resident_bytes()
    block = torch.ones(20_000_000)  # 80 MB
    time.sleep(0.25)
    del block
    gc.collect()
    assert watch.stop()["peak_memory_bytes"] >= before + 60_000_000


def test_the_watch_of_a_run_that_failed_ends_by_itself():
    def failing_run():
        watch = MemoryWatch("cpu").start()
        assert watch._thread.is_alive()
        threads.append(watch._thread)

    threads: list[threading.Thread] = []
    failing_run()
    gc.collect()
    threads[0].join(timeout=5)
    assert not threads[0].is_alive()
