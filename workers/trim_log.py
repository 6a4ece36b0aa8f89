"""Sums the trim log up by layer, task and role, so that a page can draw what is too long to read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from service.contract.treatments import Role

LAYERS = 120  # more are put together, neighbor with neighbor, or no screen could show them
SCORES = 32  # of one task's eigenvalues, the largest
SPECTRUM_FIGURES = 20_000  # over all parameters and tasks: what a page can carry
SPECTRA = 100


@dataclass
class _Energy:
    """Sums of squares of one task's vectors within one layer."""

    whole: float = 0.0
    removed: float = 0.0


@dataclass
class _Conflict:
    """The conflict within one layer and role, before and after trimming."""

    before: float = 0.0
    after: float = 0.0


@dataclass
class _Spectrum:
    """The eigenvalues of what was removed from one parameter, by the task on whose behalf, and its conflict."""

    conflict: float = 0.0
    scores: dict[str, list[float]] = field(default_factory=dict)


@dataclass
class _Sums:
    """Everything that one pass over the log gathers."""

    tasks: dict[str, None] = field(default_factory=dict)
    order: dict[str, tuple[int, list[int | str]]] = field(default_factory=dict)
    energy: dict[tuple[str, str], _Energy] = field(default_factory=dict)
    conflict: dict[tuple[str, str], _Conflict] = field(default_factory=dict)
    spectra: dict[str, _Spectrum] = field(default_factory=dict)

    def add(self, row: Mapping[str, Any]) -> None:
        layer, task, role = layer_of(row["parameter"]), row["task"], row["role"]
        self.tasks[task] = None
        place = _place(layer, role)
        self.order[layer] = min(self.order.get(layer, place), place)
        energy = self.energy.setdefault((layer, task), _Energy())
        energy.whole += row["energy"]
        energy.removed += row["energy"] * (row["energy_removed"] or 0.0)
        if row["conflict_before"] is not None and row["conflict_after"] is not None:
            conflict = self.conflict.setdefault((layer, role), _Conflict())
            conflict.before += row["conflict_before"]
            conflict.after += row["conflict_after"]
        if row["treatment"] == "projection" and row["scores"]:
            self._add_spectrum(row)

    def _add_spectrum(self, row: Mapping[str, Any]) -> None:
        spectrum = self.spectra.setdefault(row["parameter"], _Spectrum())
        spectrum.conflict += row["conflict_before"] or 0.0
        spectrum.scores[row["task"]] = [_short(score) for score in row["scores"][:SCORES]]
        # The rows of one parameter follow each other, so what is dropped here does not come again.
        if len(self.spectra) > 2 * SPECTRA:
            self.spectra = self.strongest(SPECTRA)

    def strongest(self, count: int) -> dict[str, _Spectrum]:
        """The parameters with the most conflict, in their order."""
        kept = set(sorted(self.spectra, key=lambda name: -self.spectra[name].conflict)[:count])
        return {name: spectrum for name, spectrum in self.spectra.items() if name in kept}


def summarize(lines: Iterable[bytes]) -> dict[str, Any] | None:
    """What a trim log says layer by layer; None where it has no rows.

    Returns:
        ``names``: the layers from input to output; ``tasks``; ``energy``: per layer and task the sum of squares of the
        task vectors and the share ``removed``; ``conflict``: per layer and role its sum ``before`` and ``after``
        trimming; ``spectra``: per parameter, for those with the most conflict, the largest eigenvalues by task.
    """
    return summarize_rows(json.loads(line) for line in lines if line.strip())


def summarize_rows(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any] | None:
    """As ``summarize``, from the log's rows."""
    sums = _Sums()
    for row in rows:
        sums.add(row)
    if not sums.tasks:
        return None
    names = _folded(sorted(sums.order, key=lambda layer: (sums.order[layer], layer)))
    return {
        "names": list(dict.fromkeys(names.values())),
        "tasks": list(sums.tasks),
        "energy": _energies(sums, names),
        "conflict": _conflicts(sums, names),
        "spectra": _spectra(sums),
    }


def layer_of(parameter: str) -> str:
    """Where a parameter stands: ``vit.encoder.layer.3`` for all of block 3, ``vit.embeddings`` outside of any."""
    parts = parameter.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if number is not None and number < len(parts) - 1:
        return ".".join(parts[: number + 1])
    return ".".join(parts[:-1][:2]) or parameter


def _place(layer: str, role: str) -> tuple[int, list[int | str]]:
    """Embeddings first, then what is numbered, then the rest; numbers as numbers."""
    numbered = layer.rpartition(".")[2].isdigit()
    first = 0 if role == Role.EMBEDDING and not numbered else 1 if numbered else 2
    return first, [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", layer)]


def _folded(layers: Sequence[str]) -> dict[str, str]:
    """The name under which each layer is shown: its own without what all share, or that of a run of neighbors."""
    shared = _shared_start(layers)
    short = {layer: layer[shared:] for layer in layers}
    size = -(-len(layers) // LAYERS)
    if size <= 1:
        return short
    runs = [layers[start : start + size] for start in range(0, len(layers), size)]
    return {layer: f"{short[run[0]]} … {short[run[-1]]}" for run in runs for layer in run}


def _shared_start(layers: Sequence[str]) -> int:
    """How many characters of whole leading parts all names share."""
    split = [layer.split(".")[:-1] for layer in layers]
    shared = 0
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        shared += len(parts[0]) + 1
    return shared if len(layers) > 1 else 0


def _energies(sums: _Sums, names: Mapping[str, str]) -> list[dict[str, Any]]:
    found: dict[tuple[str, str], _Energy] = {}
    for layer, shown in names.items():
        for task in sums.tasks:
            part, total = sums.energy.get((layer, task), _Energy()), found.setdefault((shown, task), _Energy())
            total.whole += part.whole
            total.removed += part.removed
    return [
        {
            "layer": layer,
            "task": task,
            "energy": _short(total.whole),
            "removed": _short(total.removed / total.whole) if total.whole else 0.0,
        }
        for (layer, task), total in found.items()
    ]


def _conflicts(sums: _Sums, names: Mapping[str, str]) -> list[dict[str, Any]]:
    found: dict[tuple[str, str], _Conflict] = {}
    roles = dict.fromkeys(role for _, role in sums.conflict)
    for layer, shown in names.items():
        for role in roles:
            if (layer, role) in sums.conflict:
                total = found.setdefault((shown, role), _Conflict())
                total.before += sums.conflict[layer, role].before
                total.after += sums.conflict[layer, role].after
    return [
        {"layer": layer, "role": role, "before": _short(total.before), "after": _short(total.after)}
        for (layer, role), total in found.items()
    ]


def _spectra(sums: _Sums) -> list[dict[str, Any]]:
    count = max(1, min(SPECTRA, SPECTRUM_FIGURES // (SCORES * len(sums.tasks))))
    return [
        {"parameter": parameter, "task": task, "scores": scores}
        for parameter, spectrum in sums.strongest(count).items()
        for task, scores in spectrum.scores.items()
    ]


def _short(value: float) -> float:
    """Six digits: more than any page shows."""
    return float(f"{value:.6g}")
