"""An API with two checkpoints in its store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.service.front import Front, open_front, with_checkpoints


@pytest.fixture
def front(tmp_path: Path) -> Iterator[Front]:
    """For the test alone."""
    with open_front(tmp_path) as opened:
        yield with_checkpoints(opened)


@pytest.fixture(scope="package")
def empty_front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    """For all tests that are refused everything, so that nothing is ever stored."""
    with open_front(tmp_path_factory.mktemp("front")) as opened:
        yield with_checkpoints(opened)
