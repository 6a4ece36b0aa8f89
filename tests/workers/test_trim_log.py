"""What the trim log adds up to, layer by layer."""

from __future__ import annotations

import json
from typing import Any

import pytest

from workers.trim_log import LAYERS, SCORES, SPECTRUM_FIGURES, layer_of, summarize, summarize_rows


def row(parameter: str, task: str = "cars", role: str = "linear", **changes: Any) -> dict[str, Any]:
    return {
        "parameter": parameter,
        "task": task,
        "role": role,
        "treatment": "projection",
        "scores": [2.0, 1.0],
        "energy": 4.0,
        "energy_removed": 0.25,
        "conflict_before": 3.0,
        "conflict_after": 1.0,
        **changes,
    }


@pytest.mark.parametrize(
    ("parameter", "layer"),
    [
        ("vit.encoder.layer.3.attention.query.weight", "vit.encoder.layer.3"),
        ("model.layers.0.experts.7.w1.weight", "model.layers.0"),
        ("vit.embeddings.patch_embeddings.projection.weight", "vit.embeddings"),
        ("vit.layernorm.bias", "vit.layernorm"),
        ("fc.weight", "fc"),
        ("scale", "scale"),
        ("blocks.1", "blocks"),
    ],
)
def test_a_parameter_stands_in_its_block_or_in_what_surrounds_the_blocks(parameter: str, layer: str) -> None:
    assert layer_of(parameter) == layer


def test_energy_is_weighed_by_size_and_conflict_is_added_up() -> None:
    found = summarize_rows(
        [
            row("m.layers.0.a.weight", energy=4.0, energy_removed=0.5),
            row("m.layers.0.b.weight", energy=12.0, energy_removed=0.0, conflict_before=5.0, conflict_after=5.0),
            row("m.layers.0.a.bias", role="shift", energy=0.0, conflict_before=None, conflict_after=None),
        ]
    )
    assert found is not None
    (energy,) = found["energy"]
    assert (energy["energy"], energy["removed"]) == (16.0, 0.125)
    assert [(c["role"], c["before"], c["after"]) for c in found["conflict"]] == [("linear", 8.0, 6.0)]


def test_layers_go_from_input_to_output_and_drop_what_all_names_share() -> None:
    names = ["m.norm.weight", "m.layers.10.a.weight", "m.layers.9.a.weight", "m.table.weight"]
    found = summarize_rows([row(name, role="embedding" if "table" in name else "linear") for name in names])
    assert found is not None
    assert found["names"] == ["table", "layers.9", "layers.10", "norm"]


def test_more_layers_than_a_screen_shows_are_put_together() -> None:
    found = summarize_rows([row(f"m.layers.{i}.a.weight", energy=1.0) for i in range(2 * LAYERS)])
    assert found is not None
    assert len(found["names"]) == LAYERS
    assert found["names"][0] == "0 … 1"
    assert {energy["energy"] for energy in found["energy"]} == {2.0}


def test_spectra_are_those_with_the_most_conflict_and_fit_a_page() -> None:
    tasks = [f"task{i}" for i in range(20)]
    rows = [
        row(f"m.layers.{i}.a.weight", task, scores=[1.0] * 100, conflict_before=float(i))
        for i in range(400)
        for task in tasks
    ]
    found = summarize_rows(rows)
    assert found is not None
    assert max(len(spectrum["scores"]) for spectrum in found["spectra"]) == SCORES
    assert sum(len(spectrum["scores"]) for spectrum in found["spectra"]) <= SPECTRUM_FIGURES
    parameters = list(dict.fromkeys(spectrum["parameter"] for spectrum in found["spectra"]))
    assert parameters == [f"m.layers.{i}.a.weight" for i in range(400 - len(parameters), 400)]


def test_masks_have_no_eigenvalues() -> None:
    found = summarize_rows([row("m.norm.weight", role="scale", treatment="scale_mask")])
    assert found is not None
    assert found["spectra"] == []


def test_a_log_is_read_line_by_line_and_an_empty_one_says_nothing() -> None:
    line = json.dumps(row("fc.weight")).encode() + b"\n"
    assert summarize([line, b"\n"]) == summarize_rows([row("fc.weight")])
    assert summarize([]) is None
