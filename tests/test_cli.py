"""The command line, run for real on a copy of papercore with one small chapter."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from papercore import __version__
from papercore.cli import main
from tests.toy_book import Done, ToyBook, wait_for

if not hasattr(os, "fork"):
    pytest.skip("the tests end processes by signals", allow_module_level=True)


@pytest.fixture(scope="module")
def _book(tmp_path_factory):
    made = ToyBook(tmp_path_factory.mktemp("book"))
    yield made
    made.close()


@pytest.fixture
def book(_book):
    _book.reset()
    return _book


def files(folder: Path) -> list[str]:
    """Every file under a folder, by its name from there."""
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def record_of(book: ToyBook) -> Path:
    (path,) = book.runs.glob("toy/*.json")
    return path


# ---- list ------------------------------------------------------------------------------------------------------------


def test_list_names_chapters_scales_and_records(book):
    first = book.call("list")
    assert (first.status, first.err) == (0, "")
    assert re.search(r"^toy +A toy  \(arXiv 0000\.00000\)$", first.out, re.M)
    assert re.search(r"^  quick +record: none +needs: nothing$", first.out, re.M)
    assert re.search(r"^  standard +record: none +needs: patience$", first.out, re.M)
    book.call("run", "toy", "--device", "cpu")
    assert re.search(
        r"^  quick +record: fresh, cpu, \d{4}-\d\d-\d\d +needs: nothing$", book.call("list").out, re.M
    )
    with book.experiment.open("a") as file:
        file.write("\nMORE = 1\n")
    assert re.search(r"^  quick +record: stale, cpu, ", book.call("list").out, re.M)


def test_list_as_json_has_every_setting_of_every_scale(book):
    (row,) = book.call("list", "--json").json
    assert (row["slug"], row["title"], row["part"], row["arxiv"]) == ("toy", "A toy", "Tests", "0000.00000")
    assert row["needs"] == {"quick": "nothing", "standard": "patience", "paper": "a cluster"}
    assert row["records"] == {"quick": "none", "standard": "none", "paper": "none"}
    quick, standard = ({s["name"]: s for s in row["settings"][scale]} for scale in ("quick", "standard"))
    assert set(quick) == {"scale", "device", "seed", "parts", "rate", "kinds", "end"}
    assert (
        quick["parts"] == {"name": "parts", "default": 3, "help": "parts of the run"}
        and standard["parts"]["default"] == 5
    )
    assert (quick["scale"]["default"], standard["scale"]["default"]) == ("quick", "standard")


# ---- words that are not understood -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("run", "tou"), "papercore: unknown chapter 'tou': expected one of toy. Did you mean 'toy'?"),
        (("run", "toy", "--scale", "quik"), "papercore: unknown scale 'quik': expected one of quick, standard, paper. Did you mean 'quick'?"),
        (("run", "toy", "--device", "gpu"), "papercore: unknown device 'gpu': expected one of auto, cpu, cuda."),
        (("run", "toy", "--set", "part=3"), "papercore: chapter toy has no setting 'part'. Did you mean 'parts'? Settings: scale, device, seed, parts, rate, kinds, end."),
        (("run", "toy", "--set", "parts=many"), "papercore: setting parts = 'many' is of kind str: expected int (parts of the run)."),
        (("run", "toy", "--set", "parts=0"), "papercore: setting parts = 0 is too small: expected at least 1 (parts of the run)."),
        (("run", "toy", "--set", "kinds=plain,fany"), "papercore: unknown kinds 'fany': expected one of plain, fancy. Did you mean 'fancy'?"),
        (("run", "toy", "--set", "parts"), "papercore: --set takes FIELD=VALUE, got 'parts': for example --set steps=40."),
        (("run", "toy", "--set", "seed=3"), "papercore: overrides must not hold seed: these have a parameter of their own."),
        (("run", "toy", "--seed", "-1"), "papercore: setting seed = -1 is too small: expected at least 0"),
        (("run", "toy", "--seed", "x"), "papercore: argument --seed: invalid int value: 'x'"),
        (("run", "toy", "--out", "record.txt"), "papercore: a record is a .json file, got --out record.txt."),
        (("run",), "papercore: the following arguments are required: slug"),
        (("claims", "tou"), "papercore: unknown chapter 'tou': expected one of toy. Did you mean 'toy'?"),
        (("claims", "--scale", "huge"), "papercore: unknown scale 'huge': expected one of quick, standard, paper."),
        (("sweep", "toy", "--grid", "rat=1,2"), "papercore: chapter toy has no setting 'rat'. Did you mean 'rate'?"),
        (("sweep", "toy", "--jobs", "0"), "papercore: --jobs 0: expected at least 1."),
        (("frobnicate",), "papercore: argument list | run | claims | sweep: invalid choice: 'frobnicate'"),
        ((), "papercore: the following arguments are required: list | run | claims | sweep"),
    ],
)  # fmt: skip
def test_words_that_are_not_understood_are_answered_with_those_that_are(book, words, message):
    done = book.call(*words)
    assert (done.status, done.out) == (2, "")
    assert done.err.startswith(message) and "Traceback" not in done.err
    assert not book.runs.exists() and not book.log.exists()  # nothing ran, nothing is left


def test_cuda_that_is_not_there_is_refused_at_once(book):
    done = book.call("run", "toy", "--device", "cuda", CUDA_VISIBLE_DEVICES="")
    assert (done.status, done.out) == (2, "")
    assert done.err.startswith(
        "papercore: device 'cuda' was asked for, but torch sees no CUDA device: use --device cpu"
    )
    assert files(book.runs) == [] and not book.log.exists()


def test_help_and_version_are_to_be_had_without_torch(capsys):
    for words, text in (
        (["--version"], f"papercore {__version__}"),
        (["run", "--help"], "--set FIELD=VALUE"),
    ):
        with pytest.raises(SystemExit) as end:
            main(words)
        assert end.value.code == 0 and text in capsys.readouterr().out
    script = "import sys; from papercore import cli; cli.parser(); print('torch' in sys.modules, 'numpy' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout
        == "False False\n"
    )


# ---- run -------------------------------------------------------------------------------------------------------------


def test_a_run_writes_its_record_and_prints_the_verdicts(book):
    done = book.call("run", "toy", "--device", "cpu")
    assert (done.status, done.err) == (0, "")
    path = record_of(book)
    assert re.fullmatch(r"quick-[0-9a-f]{10}\.json", path.name)
    assert done.out.startswith(f"wrote {path}\n")
    assert (
        "+ toy/C1     holds                      The parts add up.\n    reported 1.5\n    measured 1.5   rule == 1.5\n"
        in done.out
    )
    assert (
        "- toy/C2     fails (expected)           The sum is large.\n    reported above 100\n    measured 1.50 and ?   rule total > 100\n    why      Small parts make a small sum.\n"
        in done.out
    )
    assert (
        "  toy/C3     not tested at this scale   It works at any size.\n    why      There is no other size.\n"
        in done.out
    )
    assert re.search(
        r"^toy at quick on cpu: \d+ s, 0\.\d GiB; 1 holds, 1 fails \(expected\), 1 not tested at this scale$",
        done.out,
        re.M,
    )
    document = json.loads(path.read_text())
    assert document["metrics"] == {"total": 1.5, "total_in_numpy": 1.5} and document["config"]["parts"] == 3
    assert files(book.runs) == [
        f"toy/{path.name}",
        f"toy/{path.stem}.npz",
    ]  # the parts are gone, nothing temporary is left


def test_a_second_run_says_that_it_reuses_the_record_unless_forced(book):
    first = book.call("run", "toy", "--device", "cpu")
    before = record_of(book).read_bytes()
    second = book.call(
        "run", "toy", "--device", "auto", CUDA_VISIBLE_DEVICES=""
    )  # auto is cpu here: the same run
    assert second.status == 0 and second.out.startswith(
        f"reused {record_of(book)} (same settings, same code; --force runs it again)\n"
    )
    assert second.out.splitlines()[1:] == first.out.splitlines()[1:]
    assert book.log.read_text() == "0 1 2 " and record_of(book).read_bytes() == before
    assert book.call("run", "toy", "--device", "cpu", "--force").out.startswith("wrote ")
    assert book.log.read_text() == "0 1 2 0 1 2 "
    assert book.call("run", "toy", "--device", "cpu", "--set", "rate=0.25").out.startswith("wrote ")
    assert len(list(book.runs.glob("toy/*.json"))) == 2
    with book.experiment.open("a") as file:
        file.write("\nMORE = 1\n")
    assert book.call("run", "toy", "--device", "cpu").out.startswith("wrote ")  # other code


def test_settings_reach_the_run_in_every_spelling(book):
    words = ["--set", "parts=2", "rate=1e-1", "--set", "kinds=fancy", "--seed", "7"]
    done = book.call("run", "toy", *words, "--out", "deep/er/mine.json", "--device", "cpu")
    assert done.status == 0 and files(book.root / "deep") == ["er/mine.json", "er/mine.npz"]
    config = json.loads((book.root / "deep/er/mine.json").read_text())["config"]
    assert config == {
        "scale": "quick",
        "device": "cpu",
        "seed": 7,
        "parts": 2,
        "rate": 0.1,
        "kinds": ["fancy"],
        "end": "well",
    }
    assert files(book.runs) == []


def test_an_unexpected_verdict_is_status_1_for_the_settings_of_the_book_alone(book):
    # With other settings the claim fails too, but nobody claimed it there.
    other = book.call("run", "toy", "--device", "cpu", "--set", "parts=4")
    assert "- toy/C1     fails " in other.out and (other.status, other.err) == (0, "")
    book.claims.write_text(book.claims.read_text().replace('"== 1.5"', '"== 1.6"'))
    for device in ("cpu", "auto"):
        done = book.call("run", "toy", "--device", device, CUDA_VISIBLE_DEVICES="")
        assert (done.status, done.err) == (1, "unexpected: toy/C1 at quick fails\n")
    book.reset()
    book.claims.write_text(book.claims.read_text().replace('"total > 100"', '"total > 1"'))
    done = book.call("run", "toy", "--device", "cpu")
    assert (done.status, done.err) == (
        1,
        "unexpected: toy/C2 at quick holds although marked as expected to fail\n",
    )


def test_a_place_that_cannot_be_written_is_refused_before_the_run(book):
    (book.root / "a-file").write_text("")
    (book.root / "folder.json").mkdir(exist_ok=True)
    (book.root / "mine.json").write_text('{"shopping": ["bread"]}')
    for words, env, status, message in (
        (("--out", "a-file/record.json"), {}, 1, r"papercore: \w+Error: .*a-file/record\.json"),
        (
            ("--out", "folder.json"),
            {},
            1,
            r"papercore: IsADirectoryError: .*is a folder, where a file was expected",
        ),
        (("--out", "/proc/self/record.json"), {}, 1, r"papercore: \w+Error: .*nothing was changed there"),
        (
            (),
            {"PAPERCORE_RUNS": "a-file"},
            1,
            r"papercore: \w+Error: .*nothing was changed there.*PAPERCORE_RUNS",
        ),
        (("--out", "mine.json"), {}, 2, r"papercore: mine\.json is not a record: schema None"),
    ):
        done = book.call("run", "toy", "--device", "cpu", *words, **env)
        assert (done.status, done.out) == (status, "") and re.match(message, done.err), done.err
        assert not book.log.exists() and len(done.err.splitlines()) == 1
    assert (book.root / "mine.json").read_text() == '{"shopping": ["bread"]}'


def test_a_disk_that_fills_keeps_the_finished_parts(book):
    """A limit on the size of files, set by the system, stands in for a full disk."""
    first = book.call("run", "toy", "--device", "cpu", "--set", "end=error")
    assert (first.status, first.out, first.err) == (1, "", "papercore: RuntimeError: the last part fails\n")
    parts = files(book.runs)
    assert len(parts) == 2 and all(p.endswith(".npz") for p in parts)
    script = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300)); from papercore.cli import main; sys.exit(main())"
    words = ["run", "toy", "--device", "cpu", "--set", "parts=2"]
    limited = subprocess.run(
        [sys.executable, "-c", script, *words],
        cwd=book.root,
        env=book.environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (limited.returncode, limited.stdout) == (1, "")
    assert re.match(
        r"papercore: OSError: .*File too large; nothing was changed there\. Free some space or name another folder",
        limited.stderr,
    )
    assert files(book.runs) == parts  # what was there is there, and nothing half-written
    assert book.call(*words).status == 0


@pytest.mark.parametrize(
    ("end", "message"),
    [
        ("error", "papercore: RuntimeError: the last part fails\n"),
        ("nan", "papercore: FloatingPointError: the loss is nan at step 3\n"),
    ],
)
def test_a_run_that_fails_says_why_and_keeps_its_parts(book, end, message):
    done = book.call("run", "toy", "--device", "cpu", "--set", f"end={end}")
    assert (done.status, done.out, done.err) == (1, "", message)
    assert [Path(p).name[:6] for p in files(book.runs)] == ["part_0", "part_1"]
    told = book.call("run", "toy", "--device", "cpu", "--set", f"end={end}", PAPERCORE_TRACEBACK="1")
    assert told.status == 1 and "Traceback" in told.err and "in part\n" in told.err
    assert book.log.read_text() == "0 1 2 2 "


def test_a_bug_is_shown_with_its_place(book):
    done = book.call("run", "toy", "--device", "cpu", "--set", "end=bug")
    assert done.status == 1 and "Traceback" in done.err and "KeyError: 'nobody thought of this'" in done.err


@pytest.mark.parametrize(("how", "status"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_an_interrupted_run_keeps_its_finished_parts_and_goes_on(book, how, status):
    gate = book.root / "gate"
    gate.touch()
    process = book.start("run", "toy", "--device", "cpu", TOY_GATE=str(gate))
    reached = Path(f"{gate}.reached")
    wait_for(reached, process)
    process.send_signal(how)
    out, err = process.communicate(timeout=60)
    gate.unlink()
    reached.unlink()
    assert (process.returncode, out) == (status, "")
    if how == signal.SIGINT:
        assert (
            err == "\npapercore: interrupted; finished parts are kept, the same command goes on after them.\n"
        )
    (left,) = files(book.runs)
    assert re.fullmatch(r"toy/quick-\w{10}\.parts/\w{16}/part_0-\w{6}\.npz", left)
    done = book.call("run", "toy", "--device", "cpu")
    assert done.status == 0 and done.out.startswith("wrote ")
    assert book.log.read_text() == "0 1 1 2 "  # the first part was not run again
    resumed = json.loads(record_of(book).read_text())
    assert resumed["provenance"]["resumed"] is True
    book.call("run", "toy", "--device", "cpu", "--force")
    whole = json.loads(record_of(book).read_text())
    assert {k: resumed[k] for k in ("metrics", "arrays", "config")} == {
        k: whole[k] for k in ("metrics", "arrays", "config")
    }
    assert "resumed" not in whole["provenance"]


def test_a_damaged_record_of_ones_own_is_run_again(book):
    book.call("run", "toy", "--device", "cpu")
    record_of(book).write_text("{")
    refused = book.call("claims", "toy")
    assert refused.status == 2 and f"{record_of(book)} is not a record" in refused.err
    assert book.call("run", "toy", "--device", "cpu").out.startswith("wrote ")
    assert book.call("claims", "toy").status == 0


# ---- claims ----------------------------------------------------------------------------------------------------------


def test_claims_as_json_is_a_list_of_rows(book):
    before = book.call("claims", "toy", "--json")
    assert before.status == 0 and {(r["id"], r["scale"]): r["verdict"] for r in before.json} == {
        ("toy/C1", "quick"): "not run", ("toy/C1", "standard"): "not run", ("toy/C1", "paper"): "not tested at this scale",
        ("toy/C2", "quick"): "not run", ("toy/C2", "standard"): "not tested at this scale", ("toy/C2", "paper"): "not tested at this scale",
        ("toy/C3", "quick"): "not tested at this scale", ("toy/C3", "standard"): "not tested at this scale", ("toy/C3", "paper"): "not tested at this scale",
    }  # fmt: skip
    book.call("run", "toy", "--device", "cpu")
    book.call("run", "toy", "--device", "cpu", "--scale", "standard")
    done = book.call("claims", "--json")
    assert (done.status, done.err) == (0, "")
    rows = {(r["id"], r["scale"]): r for r in done.json}
    assert len(rows) == len(done.json) == 9
    first = rows["toy/C1", "quick"]
    wanted = {
        "slug": "toy",
        "id": "toy/C1",
        "scale": "quick",
        "verdict": "holds",
        "measured": 1.5,
        "reported": "1.5",
        "rule": "== 1.5",
    }
    assert {k: first[k] for k in wanted} == wanted
    assert Path(first["record"]).is_file() and Path(first["record"]).name.startswith("quick-")
    assert (rows["toy/C1", "standard"]["verdict"], rows["toy/C1", "standard"]["label"]) == (
        "fails",
        "fails (expected)",
    )
    assert rows["toy/C1", "standard"]["why"] == "There are five parts at this scale."
    assert rows["toy/C3", "quick"]["record"] is None and rows["toy/C3", "quick"]["measured"] is None
    one = book.call("claims", "toy", "--scale", "standard", "--json")
    assert [r["scale"] for r in one.json] == ["standard"] * 3


def test_claims_in_a_terminal_and_in_one_line(book):
    book.call("run", "toy", "--device", "cpu")
    text = book.call("claims").out
    assert [line for line in text.splitlines() if line.startswith("---")] == [
        "--- quick",
        "--- standard",
        "--- paper",
    ]
    assert "+ toy/C1     holds                      The parts add up." in text
    assert book.call("claims", "--summary").out.splitlines() == [
        "toy          quick     1 holds, 1 fails (expected), 1 not tested at this scale",
        "toy          standard  1 not run, 2 not tested at this scale",
        "toy          paper     3 not tested at this scale",
    ]
    assert (
        book.call("claims", "toy", "--summary", "--scale", "paper").out
        == "toy          paper     3 not tested at this scale\n"
    )


def test_claims_end_with_status_1_on_an_unexpected_verdict(book):
    book.call("run", "toy", "--device", "cpu")
    good = book.claims.read_text()
    for old, new, message in (
        ('"== 1.5"', '"< 1.5"', "unexpected: toy/C1 at quick fails\n"),
        (
            '"total > 100"',
            '"total > 1"',
            "unexpected: toy/C2 at quick holds although marked as expected to fail\n",
        ),
    ):
        assert old in good
        book.claims.write_text(good.replace(old, new))
        for words in ((), ("--json",), ("--summary",), ("toy", "--scale", "quick")):
            done = book.call("claims", *words)
            assert (done.status, done.err) == (1, message)
        assert book.call("claims", "--scale", "standard").status == 0  # the surprise is at another scale
    book.claims.write_text(good.replace("rule:", "rules:"))
    done = book.call("claims")
    assert done.status == 2 and "claims/toy.yml, toy/C1: unknown fields ['rules']" in done.err


def test_a_stale_record_is_shown_as_stale_and_surprises_nobody(book):
    book.claims.write_text(book.claims.read_text().replace('"== 1.5"', '"== 1.6"'))
    book.call("run", "toy", "--device", "cpu")
    with book.experiment.open("a") as file:
        file.write("\nMORE = 1\n")
    done = book.call("claims", "--json", "--scale", "quick")
    assert (done.status, [r["verdict"] for r in done.json]) == (
        0,
        ["stale", "stale", "not tested at this scale"],
    )


def test_the_book_shows_its_own_record_where_there_is_no_other(book):
    book.call(
        "run", "toy", "--device", "cpu", "--scale", "standard", "--out", "book/records/toy/standard-cpu.json"
    )
    rows = book.call("claims", "--scale", "standard", "--json").json
    assert rows[0]["verdict"] == "fails" and rows[0]["record"].endswith("book/records/toy/standard-cpu.json")
    # A run of one's own comes first, as long as it is fresh.
    book.call("run", "toy", "--device", "cpu", "--scale", "standard")
    assert "/runs/toy/standard-" in book.call("claims", "--scale", "standard", "--json").json[0]["record"]
    # Other settings are another run, and never stand for the scale.
    book.reset()
    book.call("run", "toy", "--device", "cpu", "--set", "rate=0.75", "--out", "book/records/toy/quick.json")
    assert book.call("claims", "--scale", "quick", "--json").json[0]["verdict"] == "stale"


def test_a_reader_who_stops_reading_is_no_error(book):
    command = f"{sys.executable} -m papercore claims --json | head -c 5"
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=book.root,
        env=book.environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.stdout, done.stderr) == ("[\n {\n", "")


# ---- sweep -----------------------------------------------------------------------------------------------------------


def finish(process: subprocess.Popen[str]) -> Done:
    out, err = process.communicate(timeout=180)
    return Done(process.returncode, out, err)


def test_a_sweep_runs_what_it_can_and_a_second_one_only_the_rest(book):
    words = ("sweep", "toy", "--device", "cpu", "--grid", "end=well,error", "seed=0,1,0", "--jobs", "2")
    first = finish(book.start(*words))
    assert first.status == 1
    lines = sorted(line.replace(str(book.runs), "RUNS") for line in first.out.splitlines())
    assert [re.sub(r"-\w{10}\.", "-X.", line) for line in lines] == [
        "device=cpu, end=error: FAILED RuntimeError: the last part fails",
        "device=cpu, seed=1, end=error: FAILED RuntimeError: the last part fails",
        "device=cpu, seed=1: RUNS/toy/quick-X.json",
        "device=cpu: RUNS/toy/quick-X.json",
    ]
    assert (
        len(book.log.read_text().split()) == 12
    )  # four runs of three parts: what stands there twice is run once
    assert len(list(book.runs.glob("toy/*.json"))) == 2
    book.log.unlink()
    second = finish(book.start(*words))
    assert second.status == 1 and sorted(second.out.splitlines()) == sorted(first.out.splitlines())
    assert book.log.read_text().split() == ["2", "2"]  # the failing parts alone


def test_a_lost_worker_costs_no_finished_record(book):
    done = finish(book.start("sweep", "toy", "--device", "cpu", "--grid", "end=well,killed", "--jobs", "1"))
    assert done.status == 1
    lines = done.out.splitlines()
    assert lines[0].startswith("device=cpu: ") and Path(lines[0].split(": ")[1]).is_file()
    assert lines[1].startswith("device=cpu, end=killed: FAILED BrokenProcessPool: ")


def test_an_interrupted_sweep_keeps_what_is_finished(book):
    gate, reached = book.root / "gate", book.root / "gate.reached"
    process = book.start("sweep", "toy", "--device", "cpu", "--grid", "seed=0,1,2", TOY_GATE=str(gate))
    assert process.stdout
    first = process.stdout.readline()
    gate.touch()
    wait_for(reached, process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process of the sweep
    done = finish(process)
    gate.unlink()
    reached.unlink()
    assert (done.status, done.err) == (
        130,
        "\npapercore: interrupted; finished parts are kept, the same command goes on after them.\n",
    )
    written = [str(p) for p in book.runs.glob("toy/*.json")]
    assert first.split(": ")[1].strip() in written and len(written) < 3
    again = finish(book.start("sweep", "toy", "--device", "cpu", "--grid", "seed=0,1,2"))
    assert (
        again.status == 0
        and len(again.out.splitlines()) == 3
        and len(list(book.runs.glob("toy/*.json"))) == 3
    )
