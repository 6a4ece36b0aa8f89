"""The licenses of a merge's inputs, from their model cards to that of the result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from service.contract.stages import Stage
from service.stores.local import LocalStore
from service.stores.objects import Objects
from tests.workers.test_stages import PREFIX, WORKSPACE, Walk, recipe_of
from workers.licenses import conjunction, read_license, stated_license


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: apache-2.0\ntags:\n- merge\n---\n# Model\n", "apache-2.0"),
        ('---\nlanguage: en\nlicense: "mit"\n---\n', "mit"),
        ("---\ntags: []\n---\nlicense: mit\n", None),
        ("# Model\nlicense: mit\n", None),
        ("", None),
    ],
)
def test_a_license_is_read_from_the_front_matter(card: str, expected: str | None) -> None:
    assert stated_license(card) == expected


def test_all_licenses_apply_at_once_and_one_unknown_leaves_it_open() -> None:
    assert conjunction({"base": "mit", "task:a": "apache-2.0", "task:b": "mit"}) == "apache-2.0 AND mit"
    assert conjunction({"base": "mit", "task:a": "mit"}) == "mit"
    assert conjunction({"base": "mit", "task:a": None}) is None


def folder_of(models: Path, name: str, license: str | None) -> None:
    folder = models / name
    folder.mkdir(parents=True)
    save_file({"layer.weight": torch.randn(3, 2), "layer.bias": torch.randn(3)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    if license is not None:
        (folder / "README.md").write_text(f"---\nlicense: {license}\n---\n")


@pytest.mark.parametrize(
    ("licenses", "front", "sentence"),
    [
        (("mit", "mit", "mit"), "\nlicense: mit\n", "All of the inputs' licenses apply to the result: mit."),
        (("mit", "apache-2.0", "mit"), '\nlicense: other\nlicense_name: "apache-2.0 AND mit"\n', "apache-2.0 AND mit."),
        (("mit", None, "mit"), "\nbase_model_relation: merge\ntags:", "Not every input states its license"),
    ],
)
def test_the_card_states_every_license(tmp_path: Path, licenses: tuple[Any, ...], front: str, sentence: str) -> None:
    for name, license in zip(("base", "cars", "pets"), licenses, strict=True):
        folder_of(tmp_path / "models", name, license)
    objects = Objects({"s3": LocalStore(buckets=tmp_path)}, buckets=None, workspace=WORKSPACE)
    assert read_license(objects, "s3://models/base") == licenses[0]
    tasks = [{"name": name, "checkpoint": f"s3://models/{name}/"} for name in ("cars", "pets")]
    Walk(objects, recipe_of(base="s3://models/base/", tasks=tasks, method={"name": "average"})).until(Stage.FINALIZE)
    card = (tmp_path / "merged/run/README.md").read_text()
    assert front in card
    assert sentence in card
    report = json.loads(objects.read_all(f"{PREFIX}merge/report.json", 1 << 20))
    assert report["licenses"]["inputs"] == dict(zip(("base", "task:cars", "task:pets"), licenses, strict=True))
