"""Which licenses a merge's inputs say they have, and what follows for the result."""

from __future__ import annotations

import re
from collections.abc import Mapping

from service.contract.artifacts import MODEL_CARD
from service.stores.objects import ObjectMissing, Objects, ObjectTooLarge, failures

CARD_LIMIT_BYTES = 4 << 20
FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*$", re.DOTALL | re.MULTILINE)
LICENSE = re.compile(r"^license:\s*[\"']?([A-Za-z0-9.+_-]+)", re.MULTILINE)


def read_license(objects: Objects, address: str) -> str | None:
    """The license that a checkpoint folder's model card states, as model hubs spell it; None where it states none."""
    if address.endswith(".safetensors"):
        return None  # a lone file has no card of its own
    folder = address if address.endswith("/") else f"{address}/"
    with failures():
        try:
            card = objects.read_all(folder + MODEL_CARD, CARD_LIMIT_BYTES)
        except (ObjectMissing, ObjectTooLarge):
            return None
    return stated_license(card.decode(errors="replace"))


def stated_license(card: str) -> str | None:
    """The ``license`` of a model card's front matter."""
    front = FRONT_MATTER.match(card)
    found = LICENSE.search(front[1]) if front else None
    return found[1] if found else None


def conjunction(licenses: Mapping[str, str | None]) -> str | None:
    """What the result is under: all of its inputs' licenses at once, as an SPDX expression; None if one is unknown."""
    if not licenses or None in licenses.values():
        return None
    return " AND ".join(sorted({license for license in licenses.values() if license}))
