"""The registry: what a config may be, where its record goes, when a record is used again, and which one is shown."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

from papercore import experiments
from papercore.experiments import (
    CHAPTERS,
    configure,
    execute,
    finished,
    is_current,
    load,
    records,
    run_path,
    scoreboard,
    sweep_one,
)
from papercore.lab import record as record_module
from papercore.lab import stages as stages_module
from papercore.lab.config import SCALES, Config
from papercore.lab.record import Record
from papercore.lab.stages import Stages


@pytest.fixture
def source(monkeypatch):
    """The hash of the source, as a word that a test may change."""
    now = {"hash": "a" * 16}
    for module in (record_module, stages_module):
        monkeypatch.setattr(module, "source_hash", lambda slug, scale: now["hash"])
    return now


@pytest.fixture
def runs(monkeypatch, tmp_path, source):
    """Chapters that write a small record and note that they ran; folders of their own for runs and records."""
    ran: list[Config] = []

    def run(config):
        ran.append(config)
        record, stages = Record.start(config), Stages.of(config)
        record.metric("first", stages.get("first", lambda: {"value": 1.0})["value"])
        if config.seed == 13:
            raise RuntimeError("the second part fails")
        record.metric("runs", len(ran), "exact")
        return record.finish()

    really = experiments.load
    monkeypatch.setattr(
        experiments, "load", lambda slug: SimpleNamespace(Config=really(slug).Config, run=run)
    )
    monkeypatch.setenv("PAPERCORE_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("PAPERCORE_RECORDS", str(tmp_path / "records"))
    monkeypatch.setattr(experiments, "record_folders", lambda: [tmp_path / "records"])
    return ran


@pytest.mark.parametrize("slug", sorted(CHAPTERS))
def test_every_chapter_has_what_the_registry_needs(slug):
    chapter, module = CHAPTERS[slug], load(slug)
    assert chapter.slug == slug == module.Config.slug and chapter.title and chapter.part
    assert chapter.arxiv[:4].isdigit() and chapter.arxiv[4] == "."
    assert set(module.NEEDS) == set(SCALES) and callable(module.run)
    digests = set()
    for scale in SCALES:
        config = configure(slug, scale, "cpu")
        assert isinstance(config, module.Config) and isinstance(config, Config)
        assert (config.slug, config.scale, config.device, config.seed) == (slug, scale, "cpu", 0)
        assert config.changed() == {"device": "cpu"}
        assert all(help for _, _, help in config.describe()), "every setting has a line of help"
        # What JSON keeps of it makes the same config again.
        again = json.loads(json.dumps(config.as_dict()))
        del again["scale"]
        assert getattr(module.Config, scale)(**again) == config
        digests.add(config.digest())
    assert len(digests) == len(SCALES)


@pytest.mark.parametrize(
    ("words", "kind", "message"),
    [
        ({"slug": "meso"}, ValueError, r"unknown chapter 'meso': expected one of .*mezo.*Did you mean 'mezo'\?"),
        ({"slug": "mezo", "scale": "full"}, ValueError, r"unknown scale 'full': expected one of quick, standard, paper\."),
        ({"slug": "mezo", "device": "tpu"}, ValueError, r"unknown device 'tpu': expected one of auto, cpu, cuda\."),
        ({"slug": "mezo", "overrides": {"step": 3}}, ValueError, r"chapter mezo has no setting 'step'\. Did you mean 'steps'\?"),
        ({"slug": "mezo", "overrides": {"steps": "x"}}, TypeError, r"setting steps = 'x' is of kind str: expected int"),
        ({"slug": "mezo", "overrides": {"device": "cpu", "seed": 3}}, ValueError, r"overrides must not hold device, seed: these have a parameter of their own"),
    ],
)  # fmt: skip
def test_what_no_chapter_knows_is_refused(words, kind, message):
    with pytest.raises(kind, match=message):
        configure(**words)


def test_overrides_and_seed_reach_the_config():
    config = configure("mezo", seed=4, overrides={"steps": 8, "shots": [2]})
    assert (config.seed, config.steps, config.shots) == (4, 8, (2,))
    assert configure("mezo", overrides=None) == configure("mezo", overrides={})


def test_a_finished_run_is_used_again_and_force_runs_it(runs, tmp_path):
    config = configure("mezo", device="cpu")
    first = execute(config)
    assert first.path == run_path(config) == tmp_path / "runs" / "mezo" / f"quick-{config.digest()}.json"
    assert execute(config).metrics == first.metrics and len(runs) == 1
    assert execute(config, force=True).metrics["runs"] == 2.0
    assert sweep_one(config) == str(first.path) and len(runs) == 2
    assert sorted(p.name for p in first.path.parent.iterdir()) == [first.path.name]  # its parts are gone


@pytest.mark.parametrize("change", ["setting", "seed", "source", "scale"])
def test_what_changes_a_result_makes_a_new_run(runs, source, change):
    config = configure("mezo", device="cpu")
    execute(config)
    if change == "source":
        source["hash"] = "b" * 16
    other = {
        "setting": config.replace(steps=7),
        "seed": config.replace(seed=1),
        "source": config,
        "scale": configure("mezo", "paper", "cpu"),
    }[change]
    assert finished(other) is None
    execute(other)
    assert len(runs) == 2 and finished(other) is not None


def test_auto_and_the_device_that_it_stands_for_are_one_run(runs, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    execute(configure("mezo", device="cpu"))
    execute(configure("mezo", device="auto"))
    assert len(runs) == 1
    assert finished(configure("mezo", device="cuda")) is None  # asked without CUDA, and answered


def test_a_record_of_another_chapter_or_scale_is_not_taken_for_this_one(runs, tmp_path):
    config = configure("mezo", device="cpu")
    path = tmp_path / "mine.json"
    execute(config, out=path)
    for change in ({"slug": "other"}, {"scale": "paper"}):
        loaded = Record.load(path)
        for field, value in change.items():
            setattr(loaded, field, value)
        loaded.save(tmp_path / "foreign.json")
        assert finished(config, tmp_path / "foreign.json") is None
    assert finished(config, path) is not None


def test_a_run_that_failed_goes_on_and_counts_the_time_of_its_parts(runs, monkeypatch):
    config = configure("mezo", device="cpu", seed=13)
    with pytest.raises(RuntimeError, match="the second part fails"):
        execute(config)
    stages = Stages.of(config)
    assert stages.done("first") and not run_path(config).exists()
    monkeypatch.setattr(Stages, "seconds", lambda self: 100.0 if self.root == stages.root else 0.0)
    monkeypatch.setattr(
        experiments, "load", lambda slug: SimpleNamespace(run=lambda c: Record.start(c).finish())
    )
    record, other = execute(config), execute(config.replace(seed=14))
    assert 100.0 <= record.provenance["seconds"] < 200 and record.provenance["resumed"] is True
    assert not stages.done("first")
    assert other.provenance["seconds"] < 100 and "resumed" not in other.provenance


def test_files_of_others_are_not_written_over(runs, tmp_path):
    config = configure("mezo", device="cpu")
    path = tmp_path / "mine.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"mine\.json is not a record"):
        execute(config, out=path)
    with pytest.raises(ValueError, match=r"a record is a \.json file, got --out .*mine\.txt"):
        execute(config, out=tmp_path / "mine.txt")
    assert runs == [] and path.read_text() == "{}"
    execute(config, out=path, force=True)
    assert finished(config, path) is not None


def test_a_damaged_record_of_ones_own_is_run_again(runs, tmp_path):
    config = configure("mezo", device="cpu")
    path = execute(config).path
    path.write_text(path.read_text()[:100])
    assert finished(config) is None and execute(config).metrics["runs"] == 2.0


def test_a_folder_that_cannot_be_written_is_found_before_the_run(runs, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="nothing was changed there"):
        execute(configure("mezo", device="cpu"), out=tmp_path / "file" / "record.json")
    monkeypatch.setenv("PAPERCORE_RUNS", str(tmp_path / "file"))
    with pytest.raises(OSError, match="PAPERCORE_RUNS"):
        execute(configure("mezo", device="cpu"), out=tmp_path / "record.json")  # its parts would go there
    assert runs == []


def test_the_record_to_show_is_current_before_stale_and_ones_own_before_the_books(runs, source, tmp_path):
    def book(name, config):
        return execute(config, out=tmp_path / "records" / "mezo" / name).path

    config = configure("mezo", device="cpu")
    assert records("mezo", "quick") == []
    cpu = book("quick-cpu.json", config)
    book("standard-cpu.json", configure("mezo", "standard", "cpu"))
    assert [r.path for r in records("mezo", "quick")] == [cpu]
    own = execute(config).path
    assert [r.path for r in records("mezo", "quick")] == [own, cpu]
    assert [r.path for r in records("mezo", "quick", own_runs=False)] == [cpu]
    other = book(
        "quick.json", config.replace(steps=7)
    )  # other settings than the scale's own: not what the scale measured
    assert not is_current(Record.load(other)) and [r.path for r in records("mezo", "quick")] == [
        own,
        cpu,
        other,
    ]
    source["hash"] = "b" * 16
    assert [is_current(r) for r in records("mezo", "quick")] == [False] * 3
    newest = execute(config, out=cpu).path
    assert records("mezo", "quick")[0].path == newest


def test_the_scoreboard_has_every_claim_at_every_scale(runs):
    execute(configure("mezo", device="cpu"))
    rows = scoreboard()
    assert {row.slug for row in rows} == set(CHAPTERS)
    mine = [row for row in rows if row.slug == "mezo"]
    assert len(mine) == 18 * len(SCALES) and len({(row.id, row.scale) for row in mine}) == len(mine)
    assert {row.verdict for row in mine if row.scale == "paper"} <= {"not run", "not tested at this scale"}
    # The small record above holds none of the metrics.
    assert {row.verdict for row in mine if row.scale == "quick"} <= {"not run", "not tested at this scale"}
    assert [row.scale for row in scoreboard(["mezo"], ["standard"])] == ["standard"] * 18
    with pytest.raises(ValueError, match="unknown chapter 'qrs'"):
        scoreboard(["qrs"])
    with pytest.raises(ValueError, match="unknown scale 'huge'"):
        scoreboard(["mezo"], ["huge"])


def test_chapters_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        CHAPTERS["mezo"].title = "x"
