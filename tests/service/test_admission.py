"""Admission of evaluations: labeled files of tensors and of text, each fault with a pointer to its field."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from service.admission import admit
from service.contract.errors import Refusal
from service.contract.recipe import Recipe
from service.stores.local import LocalStore
from service.stores.objects import Objects
from tests.checkpoints import Family, write_family
from tests.workers import tiny_tokenizers
from tests.workers.tiny_models import tokens

LABELED = "/evaluation/tasks/1/labeled"


@pytest.fixture
def family(tmp_path: Path) -> Family:
    return write_family(tmp_path, "bert", {"cars": 2, "pets": 3})


@pytest.fixture
def submit(family: Family) -> Callable[..., dict[str, str]]:
    """Admits a recipe whose second task is evaluated so; returns its faults by pointer, a line each."""
    place = f"file://{family.folder}/"
    objects = Objects({"file": LocalStore(roots=(family.folder,))}, buckets=None, workspace=f"{place}workspace/")

    def submitted(**row: Any) -> dict[str, str]:
        body = family.recipe(place, evaluated=True)
        body["evaluation"]["tasks"][1] |= row
        try:
            admit(Recipe.model_validate(body), objects)
        except Refusal as refusal:
            found: dict[str, str] = {}
            for fault in refusal.faults:
                found[fault.pointer] = f"{found.get(fault.pointer, '')}{fault.detail}\n"
            return found
        return {}

    return submitted


def write_text(family: Family, *rows: dict[str, Any]) -> str:
    file = family.folder / "pets.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"file://{file}"


def test_a_labeled_file_of_another_kind(submit: Callable[..., dict[str, str]]) -> None:
    assert submit() == {}
    found = submit(kind="retrieval")
    assert "begins with neither 'query.' nor 'document.'" in found[LABELED]


def test_a_model_that_can_not_be_measured_so(submit: Callable[..., dict[str, str]]) -> None:
    found = submit(kind="token_classification")
    assert "BertForSequenceClassification can't be measured by token_classification; it can by" in found[LABELED]
    assert "one number, but that of the checkpoint gives 3" in submit(kind="regression")[LABELED]


def test_validation_samples_are_looked_at_too(submit: Callable[..., dict[str, str]], family: Family) -> None:
    save_file({**tokens(4), "labels": torch.zeros(3, dtype=torch.long)}, family.folder / "few.safetensors")
    found = submit(validation=f"file://{family.folder}/few.safetensors")
    assert found.keys() == {"/evaluation/tasks/1/validation"}
    missing = submit(validation=f"file://{family.folder}/none.safetensors")
    assert "none.safetensors" in missing["/evaluation/tasks/1/validation"]


def test_text_needs_a_tokenizer(submit: Callable[..., dict[str, str]], family: Family) -> None:
    address = write_text(family, {"text": "good film", "label": 1})
    assert "has no tokenizer.json beside it" in submit(labeled=address)[LABELED]
    tiny_tokenizers.bert_like(family.checkpoint("pets"))
    assert submit(labeled=address) == {}


def test_the_first_rows_of_text_are_looked_at(submit: Callable[..., dict[str, str]], family: Family) -> None:
    tiny_tokenizers.bert_like(family.checkpoint("pets"))
    address = write_text(family, {"text": "good film", "label": 1}, {"review": "bad film", "label": 0})
    assert "line 2: there is no column 'text'" in submit(labeled=address)[LABELED]
    (family.folder / "empty.csv").write_text("")
    assert "it holds no rows" in submit(labeled=f"file://{family.folder}/empty.csv")[LABELED]
    assert "none.csv" in submit(labeled=f"file://{family.folder}/none.csv")[LABELED]


def test_columns_may_be_called_otherwise(submit: Callable[..., dict[str, str]], family: Family) -> None:
    tiny_tokenizers.bert_like(family.checkpoint("pets"))
    address = write_text(family, {"review": "good film", "stars": 1})
    assert submit(labeled=address, columns={"text": "review", "label": "stars"}) == {}


def test_labels_are_held_to_the_names_of_the_checkpoint(submit: Callable[..., dict[str, str]], family: Family) -> None:
    tiny_tokenizers.bert_like(family.checkpoint("pets"))
    for label in ("joy", 3):
        address = write_text(family, {"text": "good film", "label": "LABEL_1"}, {"text": "bad film", "label": label})
        assert "line 2: column 'label' has" in submit(labeled=address)[LABELED]
    address = write_text(family, {"text": "good film", "label": "LABEL_1"}, {"text": "bad film", "label": 2})
    assert submit(labeled=address) == {}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"architectures": ["BertForMaskedLM"]}, "pets: BertForMaskedLM scores no classes of samples"),
        ({"id2label": {"0": "LABEL_0"}}, "pets: the head of BertForSequenceClassification gives one number"),
        ({}, None),
    ],
)
def test_predictions_are_compared_of_models_that_predict_classes(
    family: Family, changes: dict[str, Any], says: str | None
) -> None:
    place = f"file://{family.folder}/"
    objects = Objects({"file": LocalStore(roots=(family.folder,))}, buckets=None, workspace=f"{place}workspace/")
    config = family.checkpoint("pets") / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
    search = {"space": {"scaling": [0.3, 0.5]}, "objective": "prediction_likeness"}
    body = {**family.recipe(place), "search": search}
    if says is None:
        admit(Recipe.model_validate(body), objects)
        return
    with pytest.raises(Refusal) as refused:
        admit(Recipe.model_validate(body), objects)
    (fault,) = refused.value.faults
    assert (fault.pointer, fault.code) == ("/search/objective", "exemplars_do_not_fit")
    assert fault.detail.startswith(says)
    assert "feature_likeness" in fault.detail
