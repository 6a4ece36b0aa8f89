"""An API with two checkpoints in its store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.service.front import Front, checkpoint, open_front


@pytest.fixture
def front(tmp_path: Path) -> Iterator[Front]:
    with open_front(tmp_path) as opened:
        for name in ("base", "cars"):
            opened.put(f"s3://models/{name}.safetensors", checkpoint(weight=(2, 3), bias=(2,)))
        yield opened
