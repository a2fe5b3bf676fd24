"""The copy of papercore that the tests of the command line run on."""

from __future__ import annotations

import os

import pytest

from tests.cli.toy_book import ToyBook


@pytest.fixture(scope="session")
def _book(tmp_path_factory):
    if not hasattr(os, "fork"):
        pytest.skip("the copy is run in forked processes")
    made = ToyBook(tmp_path_factory.mktemp("book"))
    yield made
    made.close()


@pytest.fixture
def book(_book):
    """The toy book as it is at first."""
    _book.reset()
    return _book
