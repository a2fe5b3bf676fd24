"""pyproject.toml, constraints.txt and environment.yml say the same, and the package carries its data."""

import os
import re
import subprocess
import tomllib
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

import papercore

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
EXTRAS = PROJECT["optional-dependencies"]


def requirements(lines: list[str]) -> list[Requirement]:
    return [Requirement(line) for line in lines]


def pins() -> dict[str, Version]:
    lines = [line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    found = {}
    for line in filter(None, lines):
        name, sign, version = line.partition("==")
        assert sign == "==", f"constraints.txt: {line!r} is not an exact pin"
        assert canonicalize_name(name) not in found, f"constraints.txt pins {name} twice"
        found[canonicalize_name(name)] = Version(version)
    return found


def test_every_dependency_is_pinned_inside_its_range() -> None:
    pinned = pins()
    for group, lines in {"core": PROJECT["dependencies"], **EXTRAS}.items():
        for requirement in requirements(lines):
            name = canonicalize_name(requirement.name)
            if name == "papercore":
                assert requirement.extras <= set(EXTRAS), (
                    f"{group}: {requirement} names an extra that is not there"
                )
                continue
            assert name in pinned, f"{group}: {requirement} is not in constraints.txt"
            assert pinned[name] in requirement.specifier, (
                f"{group}: {requirement} does not admit {pinned[name]}"
            )


def test_every_dependency_has_a_lower_bound_or_a_pin() -> None:
    for lines in (PROJECT["dependencies"], *EXTRAS.values()):
        for requirement in requirements(lines):
            if canonicalize_name(requirement.name) != "papercore":
                assert {s.operator for s in requirement.specifier} & {">=", "=="}, (
                    f"{requirement} says nothing of old versions"
                )


def test_pins_carry_no_local_tags_and_torch_is_the_tested_one() -> None:
    pinned = pins()
    assert not [name for name, version in pinned.items() if version.local], (
        "a local tag names one build of many"
    )
    assert pinned["torch"] == Version("2.13.0")


def test_what_torch_itself_pins_is_pinned_alike() -> None:
    # torch's Linux builds for CUDA ask for one exact triton; any other pin would make them impossible to install.
    asked = [Requirement(line) for line in metadata.requires("torch") or []]
    for requirement in asked:
        pin = pins().get(canonicalize_name(requirement.name))
        if pin is not None and requirement.marker is None:
            assert pin in requirement.specifier, (
                f"torch {metadata.version('torch')} asks for {requirement}, constraints.txt has {pin}"
            )
    assert pins()["triton"] == Version("3.7.1")


def test_jupyter_book_stays_below_two() -> None:
    bounds = [r.specifier for r in requirements(EXTRAS["book"]) if r.name == "jupyter-book"]
    assert bounds and Version("2.1") not in bounds[0], "version 2 does not read _config.yml"


def test_environment_yml_reads_the_pins_and_takes_every_extra() -> None:
    document = yaml.safe_load((ROOT / "environment.yml").read_text())
    dependencies = document["dependencies"]
    (section,) = [entry["pip"] for entry in dependencies if isinstance(entry, dict)]
    assert "-c constraints.txt" in section
    (own,) = [line for line in section if line.startswith("-e ")]
    match = re.fullmatch(r"-e \.\[([\w,]+)\]", own)
    assert match and set(match[1].split(",")) == set(EXTRAS)
    others = [line for line in section if not line.startswith("-")]
    assert not others, f"{others} belong into an extra of pyproject.toml"
    assert [entry for entry in dependencies if isinstance(entry, str)][1:] == ["pip", "make"]


def test_the_python_range_is_the_same_everywhere() -> None:
    wanted = SpecifierSet(PROJECT["requires-python"])
    (conda,) = [
        d
        for d in yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
        if str(d).startswith("python>")
    ]
    conda_range = SpecifierSet(conda.removeprefix("python"))
    named = [c.rsplit(" ", 1)[1] for c in PROJECT["classifiers"] if re.fullmatch(r".*:: 3\.\d+", c)]
    matrix = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())["jobs"]["test"]["strategy"][
        "matrix"
    ]["python"]
    assert named == matrix
    for version in named:
        assert version in wanted and version in conda_range
    for outside in ("3.10", "3.9"):
        assert outside not in wanted and outside not in conda_range
    assert PYPROJECT["tool"]["ruff"]["target-version"] == "py" + named[0].replace(".", "")
    assert PYPROJECT["tool"]["mypy"]["python_version"] == named[0]


def test_the_core_is_light() -> None:
    names = {canonicalize_name(r.name) for r in requirements(PROJECT["dependencies"])}
    assert names <= {
        "torch",
        "numpy",
        "pyyaml",
        "safetensors",
        "tqdm",
        "matplotlib",
        "pillow",
        "scikit-learn",
    }


def test_no_file_names_a_package_index() -> None:
    for name in ("pyproject.toml", "constraints.txt", "environment.yml", "Makefile", "tooling/install.py"):
        text = (ROOT / name).read_text()
        for word in ("--index-url", "--extra-index-url", "--find-links", "index.html", "download.pytorch"):
            assert word not in text, f"{name} names an index: {word}"


DATA = [
    path
    for path in (ROOT / "papercore").rglob("*")
    if path.is_file() and path.suffix != ".py" and path.parent.name != "__pycache__"
]


@pytest.mark.parametrize("name", sorted(path.relative_to(ROOT / "papercore").as_posix() for path in DATA))
def test_data_files_are_packaged(name: str) -> None:
    patterns = PYPROJECT["tool"]["setuptools"]["package-data"]["papercore"]
    assert any(fnmatch(name, pattern) for pattern in patterns), (
        f"{name} would be missing from an installed papercore"
    )


def test_one_version_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"] == papercore.__version__
    assert citation["license"] == PROJECT["license"]


def test_continuous_integration_can_run() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True)
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        steps = [step for job in yaml.safe_load(path.read_text())["jobs"].values() for step in job["steps"]]
        targets = {word for step in steps for word in re.findall(r"make (\w+)", step.get("run", ""))}
        assert targets <= set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)), (
            path.name
        )
