"""`papercore list`, and words that the command line does not understand."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from papercore import __version__
from papercore.cli import main
from tests.cli.toy_book import files


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
