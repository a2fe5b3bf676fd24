"""Tells the replay kernel which execution belongs to the notebook under test: the file of its name in a folder.

pytest -p tooling.replay_plugin --executed _build/notebooks --nbval-lax --nbval-kernel-name papercore-replay book/*.ipynb
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--executed", metavar="FOLDER", required=True, help="folder that holds the executed notebooks"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    # nbval starts a notebook's kernel when it sets up the first of its cells, and the kernel inherits this environment.
    folder = Path(item.config.getoption("--executed")).resolve()
    os.environ["PAPERCORE_REPLAY"] = str(folder / item.path.name)
