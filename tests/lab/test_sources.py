"""The source hash: what it sees, what it must not see, and that no module which makes a number escapes it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import pytest

from papercore.lab import sources
from papercore.lab.sources import reached_modules, source_hash

TREE = {
    "__init__.py": '"""papercore."""\n',
    "cli.py": "LINES = 80\n",
    "lab/__init__.py": "",
    "lab/training.py": "from papercore.lab.progress import progress\nfrom papercore.lab.statistics import mean\nRATE = 0.1\n",
    "lab/statistics.py": "def mean(x):\n    return sum(x) / len(x)\n",
    "lab/progress.py": "from papercore.lab.behind_progress import WIDTH\n",
    "lab/behind_progress.py": "WIDTH = 80\n",
    "lab/figures.py": "COLOUR = 'red'\n",
    "lab/claims.py": "RULES = 1\n",
    "lab/record.py": "DIGITS = 8\n",
    "lab/unused.py": "X = 1\n",
    "kernel/__init__.py": """
        '''The kernel.'''
        from papercore.kernel.optimizer import Step as Optimizer
        from .estimators import estimate
        _LAZY = {"Trainer": ".trainer"}
        def __getattr__(name):
            import importlib
            return getattr(importlib.import_module(_LAZY[name], __name__), name)
    """,
    "kernel/optimizer.py": "from . import claims\nfrom .noise import draw\nclass Step: ...\n",
    "kernel/noise.py": "import importlib\ndef draw(backend):\n    return importlib.import_module(f'papercore.kernel._{backend}')\n",
    "kernel/_fast.py": "SPEED = 9\n",
    "kernel/_slow.py": "SPEED = 1\n",
    "kernel/estimators.py": "def estimate(): return 1\n",
    "kernel/trainer.py": "class Trainer: ...\n",
    "kernel/untouched.py": "Y = 2\n",
    "kernel/claims.py": "POWER = 2\n",  # a kernel's own module, whatever its name
    "experiments/__init__.py": "import papercore.lab.claims\nCHAPTERS = {}\n",
    "experiments/toy/__init__.py": "from papercore.experiments.toy.config import Config\ndef run(c): ...\n",
    "experiments/toy/config.py": "STEPS = 40\n",
    "experiments/toy/quick.py": """
        '''Quick.'''
        from __future__ import annotations
        import numpy as np
        from papercore.kernel import Optimizer, estimate as guess
        from papercore.experiments.toy import arms
        from papercore.experiments.toy.config import STEPS
        from papercore.lab.record import DIGITS
        def run():
            import papercore.experiments.toy.late
            from papercore.lab.training import RATE
            from papercore.lab import figures
            return RATE
    """,
    "experiments/toy/arms.py": "ARMS = ('full', 'lora')\n",
    "experiments/toy/late.py": "Z = 3\n",
    "experiments/toy/standard.py": "from papercore.kernel import Trainer\n",
    "experiments/toy/figures.py": "import papercore.lab.unused\n",
}


@pytest.fixture
def tree(tmp_path, monkeypatch):
    for name, text in TREE.items():
        path = tmp_path / "papercore" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    monkeypatch.setattr(sources, "PACKAGE", tmp_path / "papercore")
    sources._source_hash.cache_clear()
    yield tmp_path / "papercore"
    sources._source_hash.cache_clear()


QUICK = [
    "experiments.toy.arms", "experiments.toy.late", "experiments.toy.quick", "kernel._fast", "kernel._slow", "kernel.claims",
    "kernel.estimators", "kernel.noise", "kernel.optimizer", "lab.statistics", "lab.training",
]  # fmt: skip


def test_the_walk_follows_every_kind_of_import_and_nothing_else(tree):
    assert reached_modules("toy", "quick") == [f"papercore.{name}" for name in QUICK]
    assert reached_modules("toy", "standard") == [
        "papercore.experiments.toy.standard",
        "papercore.kernel.trainer",
    ]
    # No module of its own for this scale: the package itself is the entry.
    assert reached_modules("toy", "paper") == ["papercore.experiments.toy"]
    with pytest.raises(ValueError, match=r"no experiment 'tay' in papercore\.experiments"):
        reached_modules("tay", "quick")


def test_the_hash_changes_with_the_code_of_every_reached_module_and_of_no_other(tree):
    before = source_hash("toy", "quick")
    for number, name in enumerate(TREE):
        path = tree / name
        whole = path.read_text()
        path.write_text(whole + "\nADDED = 1\n")
        os.utime(path, (2e9 + number, 2e9 + number))
        reached = name.removesuffix(".py").replace("/", ".") in QUICK
        assert (source_hash("toy", "quick") != before) is reached, name
        path.write_text(whole)
        os.utime(path, (2e9 + number + 0.5, 2e9 + number + 0.5))
        assert source_hash("toy", "quick") == before


SAME = {
    "comments": "def f(x):  # doubles\n    # it does\n    return 2 * x\n",
    "docstrings": '"""A module."""\n\ndef f(x):\n    """Twice x."""\n    return 2 * x\n',
    "layout": "def f(\n    x,\n):\n\n    return (2\n        * x)\n",
}
OTHER = {
    "a number": "def f(x):\n    return 3 * x\n",
    "a float": "def f(x):\n    return 2.0 * x\n",
    "the order": "def f(x):\n    return x * 2\n",
    "a name": "def g(x):\n    return 2 * x\n",
    "a default": "def f(x=1):\n    return 2 * x\n",
    "a decorator": "@cache\ndef f(x):\n    return 2 * x\n",
    "a string that is no docstring": "def f(x):\n    y = 'text'\n    return 2 * x\n",
    "more": "def f(x):\n    return 2 * x\nf(1)\n",
}


def test_comments_docstrings_and_layout_do_not_count_and_code_does(tree):
    path = tree / "lab" / "statistics.py"

    def hashed(text, moment):
        path.write_text(text)
        os.utime(path, (moment, moment))
        return source_hash("toy", "quick")

    plain = hashed("def f(x):\n    return 2 * x\n", 2e9)
    assert {name: hashed(text, 2e9 + 1 + i) for i, (name, text) in enumerate(SAME.items())} == dict.fromkeys(
        SAME, plain
    )
    others = [hashed(text, 2e9 + 10 + i) for i, text in enumerate(OTHER.values())]
    assert len({plain, *others}) == len(OTHER) + 1


def test_what_the_sweep_chose_is_source_of_the_quick_scale(tree):
    before = {scale: source_hash("toy", scale) for scale in ("quick", "standard")}
    tuning = tree / "experiments" / "toy" / "tuning.json"

    def write(document, moment):
        tuning.write_text(json.dumps(document))
        os.utime(tuning, (moment, moment))
        return source_hash("toy", "quick")

    first = write({"metrics": {"lr": 0.1}, "provenance": {"seconds": 3}}, 2e9)
    assert first != before["quick"] and source_hash("toy", "standard") == before["standard"]
    assert write({"provenance": {"seconds": 9}, "metrics": {"lr": 0.1}}, 2e9 + 1) == first
    assert write({"metrics": {"lr": 0.2}, "provenance": {"seconds": 3}}, 2e9 + 2) != first


def test_reported_numbers_are_source_where_they_are_reckoned_with(tree):
    arms = tree / "experiments" / "toy" / "arms.py"
    reported = tree / "claims" / "toy.csv"
    reported.parent.mkdir()
    hashes = []
    for moment, (code, numbers) in enumerate(
        [
            ("X = 1\n", "12"),
            ("X = 1\n", "13"),
            ("from papercore.lab.claims import reported\n", "12"),
            ("from papercore.lab.claims import reported\n", "13"),
        ]
    ):
        arms.write_text(code)
        reported.write_text(numbers)
        for path in (arms, reported):
            os.utime(path, (2e9 + moment, 2e9 + moment))
        hashes.append(source_hash("toy", "quick"))
    assert hashes[0] == hashes[1] and len(set(hashes)) == 3


def test_the_text_of_a_tree_is_written_down(tmp_path):
    """Every Python from 3.11 on must give this text, or records made under another one would be stale."""
    path = tmp_path / "module.py"
    path.write_text(
        textwrap.dedent(
            '''
            """Docstring."""
            from . import a as b
            class C(D, metaclass=M):
                """Another."""
                x: int = -1
            async def f(p, /, q=1.5, *args, r: "text" = None, **kwargs) -> None:
                """A third."""
            g = lambda z: f"{z!r:>{w}} é" if z else [i async for i in z if i][::2]
            with open(b) as h, i:
                pass
            match x:
                case {"k": [1, *_], **rest} | None:
                    del y
            '''
        ),
        encoding="utf-8",
    )
    assert sources._tree_text(path) == (
        "Module(body=[ImportFrom(names=[alias(name='a',asname='b')],level=1),"
        "ClassDef(name='C',bases=[Name(id='D')],keywords=[keyword(arg='metaclass',value=Name(id='M'))],"
        "body=[AnnAssign(target=Name(id='x'),annotation=Name(id='int'),value=UnaryOp(op=USub(),operand=Constant(value=1)),simple=1)]),"
        "AsyncFunctionDef(name='f',args=arguments(posonlyargs=[arg(arg='p')],args=[arg(arg='q')],vararg=arg(arg='args'),"
        "kwonlyargs=[arg(arg='r',annotation=Constant(value='text'))],kw_defaults=[Constant()],kwarg=arg(arg='kwargs'),"
        "defaults=[Constant(value=1.5)]),body=[],returns=Constant()),"
        "Assign(targets=[Name(id='g')],value=Lambda(args=arguments(args=[arg(arg='z')]),body=IfExp(test=Name(id='z'),"
        "body=JoinedStr(values=[FormattedValue(value=Name(id='z'),conversion=114,format_spec=JoinedStr(values=[Constant(value='>'),"
        "FormattedValue(value=Name(id='w'),conversion=-1)])),Constant(value=' \\xe9')]),"
        "orelse=Subscript(value=ListComp(elt=Name(id='i'),generators=[comprehension(target=Name(id='i'),iter=Name(id='z'),"
        "ifs=[Name(id='i')],is_async=1)]),slice=Slice(step=Constant(value=2)))))),"
        "With(items=[withitem(context_expr=Call(func=Name(id='open'),args=[Name(id='b')]),optional_vars=Name(id='h')),"
        "withitem(context_expr=Name(id='i'))],body=[Pass()]),"
        "Match(subject=Name(id='x'),cases=[match_case(pattern=MatchOr(patterns=[MatchMapping(keys=[Constant(value='k')],"
        "patterns=[MatchSequence(patterns=[MatchValue(value=Constant(value=1)),MatchStar()])],rest='rest'),MatchSingleton()]),"
        "body=[Delete(targets=[Name(id='y')])])])])"
    )


JUDGES = (
    "figures",
    "figure_style",
    "picture",
    "plot",
    "explore",
    "scoreboard",
    "claims",
    "rules",
    "record",
    "progress",
    "config",
)


@pytest.mark.parametrize("scale", ["quick", "standard", "paper"])
def test_the_hash_of_the_first_chapter_covers_its_kernel_and_leaves_out_what_only_shows(scale):
    reached = reached_modules("mezo", scale)
    assert f"papercore.experiments.mezo.{scale}" in reached
    assert {"papercore.mezo.optimizer", "papercore.mezo.philox", "papercore.lab.training"} <= set(reached)
    assert not {
        "papercore.cli",
        "papercore.experiments",
        *(f"papercore.lab.{name}" for name in JUDGES),
    } & set(reached)


# Runs a very small quick run and prints the files of papercore in which a function was called.
CALLED = """
import json, sys, tempfile
from pathlib import Path

import papercore
import peft  # its import alone is most of what would be watched
from papercore.experiments import configure, load
from papercore.experiments.mezo import replaying, theory

# The two parts that no setting makes small; their modules are called for other parts too.
theory.steps_to_target = lambda d, r, **_: d + r
replaying.bytes_of_log = lambda *_: 0.0
package = str(Path(papercore.__file__).parent)
small = dict(pretrain_steps=4, pretrain_batch=2, segments=2, shots=(1,), seeds=3, steps=4, backprop_steps=1, tests=4, draws=100,
             drift_weights=1000, drift_steps=10)
config = configure("mezo", "quick", "cpu", overrides=small)
chapter = load("mezo")
called = set()

def watch(frame, event, argument):
    if event == "call":
        called.add(frame.f_code.co_filename)

sys.setprofile(watch)
try:
    chapter.run(config)
finally:
    sys.setprofile(None)
print(json.dumps(sorted(Path(f).relative_to(package).with_suffix("").as_posix() for f in called if f.startswith(package))))
"""


def test_no_module_that_a_quick_run_calls_is_missing_from_its_hash(tmp_path):
    env = {**os.environ, "PAPERCORE_RUNS": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CALLED], capture_output=True, text=True, timeout=250, env=env
    )
    assert done.returncode == 0, done.stderr
    called = {"papercore." + name.replace("/", ".") for name in json.loads(done.stdout)}
    assert {"papercore.experiments.mezo.quick", "papercore.mezo.optimizer", "papercore.lab.decoder"} <= called
    allowed = {f"papercore.lab.{name}" for name in sources.NOT_HASHED}
    allowed |= {
        "papercore.experiments.mezo.config",
        "papercore.experiments.mezo.__init__",
        "papercore.mezo.__init__",
        *sources.BIT_EQUAL,
    }
    assert called - set(reached_modules("mezo", "quick")) - allowed == set()
