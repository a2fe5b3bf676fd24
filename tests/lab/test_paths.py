"""Where files go, and that a write which fails leaves nothing behind."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from papercore.lab import paths
from papercore.lab.paths import record_folders, refuse_unwritable, runs_folder, source_root, write_atomically


def test_runs_lie_in_the_named_folder_or_in_the_source_tree_or_here(monkeypatch, tmp_path):
    monkeypatch.setenv("PAPERCORE_RUNS", str(tmp_path / "elsewhere"))
    assert runs_folder() == tmp_path / "elsewhere"
    monkeypatch.delenv("PAPERCORE_RUNS")
    monkeypatch.setattr(paths, "source_root", lambda: tmp_path / "tree")
    assert runs_folder() == tmp_path / "tree" / "runs"
    monkeypatch.setattr(paths, "source_root", lambda: None)
    monkeypatch.chdir(tmp_path)
    assert runs_folder() == tmp_path / "runs"


def test_records_are_looked_for_in_the_named_folders_first(monkeypatch, tmp_path):
    monkeypatch.setattr(paths, "source_root", lambda: tmp_path)
    monkeypatch.setenv("PAPERCORE_RECORDS", os.pathsep.join(["first", "", "second"]))
    assert record_folders() == [Path("first"), Path("second"), tmp_path / "book" / "records"]


def test_this_checkout_is_a_source_tree():
    root = source_root()
    assert root is not None and (root / "papercore" / "lab" / "paths.py").is_file()


def test_a_write_is_seen_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "folder" / "record.json"
    assert write_atomically(path, lambda p: p.write_text("one")) == path
    seen = []

    def write(temporary):
        temporary.write_text("two, half")
        seen.append((path.read_text(), temporary.parent, temporary.suffix))
        temporary.write_text("two")

    write_atomically(path, write)
    assert seen == [("one", path.parent, ".json")]
    assert path.read_text() == "two" and list(path.parent.iterdir()) == [path]


def _write_much(path):
    path.write_bytes(b"x" * 1000)
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _write_to_a_full_device(path):
    with open("/dev/full", "wb") as full:
        full.write(b"x" * 100_000)


def _replace_fails(path):
    path.write_text("new")
    # What os.replace says when a folder stands where the file should go.
    os.replace(path, path.parent)


@pytest.mark.parametrize("write", [_write_much, _write_to_a_full_device, _replace_fails])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, write):
    if write is _write_to_a_full_device and not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    path = tmp_path / "record.json"
    path.write_text("old")
    with pytest.raises(OSError) as failed:
        write_atomically(path, write)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    assert str(path) in str(failed.value) and "nothing was changed there" in str(failed.value)
    assert "name another folder (--out, PAPERCORE_RUNS)" in str(failed.value)
    if write is not _replace_fails:
        assert failed.value.errno == errno.ENOSPC and "No space left on device" in str(failed.value)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_write_leaves_nothing(tmp_path, error):
    def write(temporary):
        temporary.write_text("half")
        raise error

    with pytest.raises(error):
        write_atomically(tmp_path / "record.json", write)
    assert list(tmp_path.iterdir()) == []


def test_a_file_larger_than_the_system_allows_is_refused_by_the_system_itself(tmp_path):
    """A real failure of a real write, in a process of its own: the limit of file sizes stands in for a full disk."""
    pytest.importorskip("resource")
    script = """
import resource, sys
from pathlib import Path
from papercore.lab.paths import write_atomically
path = Path(sys.argv[1])
write_atomically(path, lambda p: p.write_bytes(b"small"))
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    write_atomically(path, lambda p: p.write_bytes(b"x" * 100_000))
except OSError as error:
    print(type(error).__name__, error)
"""
    path = tmp_path / "record.json"
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "File too large" in done.stdout and "nothing was changed there" in done.stdout
    assert path.read_bytes() == b"small" and list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written_is_refused_before_the_run(tmp_path):
    refuse_unwritable(tmp_path / "made" / "record.json")
    assert list((tmp_path / "made").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"nothing was changed there.*PAPERCORE_RUNS"):
        refuse_unwritable(tmp_path / "file" / "record.json")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(IsADirectoryError, match=r"is a folder, where a file was expected.*--out"):
        refuse_unwritable(tmp_path / "folder.json")


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that not even root can write to")
def test_a_folder_without_leave_to_write_is_refused_before_the_run():
    with pytest.raises(OSError, match="nothing was changed there"):
        refuse_unwritable(Path("/proc/self/record.json"))
