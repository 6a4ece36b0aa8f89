"""Runs a job's stages one after another in this process, on a real folder: no broker and no database."""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from service.contract.asked import AnyRecipe
from service.contract.parts import Claim, Done, SoFar
from service.contract.recipe import Recipe
from service.contract.stages import Stage
from service.contract.trials import Propose, TrialRecord
from service.stores.local import LocalStore
from service.stores.objects import Objects
from tests.workers.architectures import Case
from tests.workers.tiny_models import build, configuration
from workers.cleanup import remove_scratch
from workers.stages import RUN
from workers.watch import Watch
from workers.work import Work


@dataclass
class Trials:
    """A job's trials in a list; a part asks for one at most."""

    known: list[TrialRecord] = field(default_factory=list)
    asked_at: float | None = None

    def ask(self, propose: Propose, seconds: float | None) -> TrialRecord | None:
        if self.asked_at is None:
            self.asked_at = time.monotonic()
        is_over = bool(self.known) and seconds is not None and time.monotonic() > self.asked_at + seconds
        parameters = None if is_over else propose(self.known)
        if parameters is None:
            return None
        self.known.append(TrialRecord(len(self.known), len(self.known), "running", parameters))
        return self.known[-1]

    def tell(self, trial: TrialRecord) -> None:
        self.known[trial.number] = trial

    def trials(self) -> list[TrialRecord]:
        return list(self.known)


@dataclass
class Run:
    """A job in a folder: its models lie there, and its result is put there."""

    folder: Path
    recipe: AnyRecipe
    calibration_bytes: int | None = None
    output: str = "result"
    done: dict[Stage, list[Done]] = field(default_factory=dict)
    bytes_read: dict[Stage, int] = field(default_factory=dict)
    study: Trials = field(default_factory=Trials)

    def go(self) -> None:
        """Everything up to the merged weights."""
        asked = self._do(Stage.PLAN, 0).parts
        for stage in (stage for stage in RUN if stage not in (Stage.PLAN, Stage.EVALUATE, Stage.FINALIZE)):
            for part in asked:
                if part.stage is stage:
                    self._do(stage, part.part)

    def finish(self) -> Done:
        """All stages, and what the last one leaves."""
        last = Done()
        for part in self._do(Stage.PLAN, 0).parts:
            last = self._do(part.stage, part.part)
        work = self.work(Stage.FINALIZE, 0)
        remove_scratch(work.objects, work.workspace, work.claim.job_id)  # as the runner does
        return last

    def warnings(self, stage: Stage) -> list[str]:
        return [warning for done in self.done.get(stage, []) for warning in done.warnings]

    def log(self) -> list[dict[str, Any]]:
        """The rows of the trim log."""
        logs = sorted((self.folder / "workspace").rglob("trim-log-*.jsonl"))
        return [json.loads(line) for log in logs for line in log.read_text().splitlines()]

    def merged(self) -> dict[str, Tensor]:
        return load_file(self.folder / self.output / "model.safetensors")

    def statistics(self) -> list[dict[str, Tensor]]:
        return [load_file(file) for file in sorted((self.folder / "workspace").rglob("cache/statistics/*.safetensors"))]

    def forget(self) -> None:
        """Take away the statistics that a later run would find in the cache."""
        for file in (self.folder / "workspace").rglob("cache/statistics/*.safetensors"):
            file.unlink()

    def work(self, stage: Stage, part: int) -> Work:
        """What a part is given."""
        place = f"file://{self.folder}/"
        claim = Claim("job", stage, part, stage.value, "token", 1, self.recipe, f"{place}{self.output}/")
        return Work(
            claim=claim,
            objects=Objects({"file": LocalStore(roots=(self.folder,))}, buckets=None, workspace=f"{place}workspace/"),
            watch=Watch(lambda: True),
            workspace=f"{place}workspace/",
            device="cpu",
            outputs=lambda wanted: [dict(done.output) for done in self.done.get(wanted, [])],
            so_far=lambda: SoFar(0, 0, 0, 0, 0),
            calibration_bytes=self.calibration_bytes,
            study=self.study if isinstance(self.recipe, Recipe) and self.recipe.search else None,
        )

    def _do(self, stage: Stage, part: int) -> Done:
        work = self.work(stage, part)
        self.done.setdefault(stage, []).append(RUN[stage](work))
        self.bytes_read[stage] = self.bytes_read.get(stage, 0) + work.watch.counters.bytes_read
        return self.done[stage][-1]


def family(folder: Path, architecture: str, case: Case, tasks: int = 2) -> dict[str, Any]:
    """A base, tasks a little away from it and their exemplars, written to a folder; and the recipe that merges them."""
    base = build(architecture, configuration(case.model_type, **case.values))
    base.save_pretrained(folder / "base")
    rows = []
    for seed in range(1, tasks + 1):
        generator = torch.Generator().manual_seed(seed)
        expert = build(architecture, configuration(case.model_type, **case.values))
        with torch.no_grad():
            for before, after in zip(base.parameters(), expert.parameters(), strict=True):
                after.copy_(before + 0.05 * torch.randn(before.shape, generator=generator))
        expert.save_pretrained(folder / f"task{seed}")
        samples = {name: values.roll(seed, 0).contiguous() for name, values in case.inputs.items()}
        save_file(samples, folder / f"task{seed}.safetensors")
        rows.append(
            {
                "name": f"task{seed}",
                "checkpoint": f"file://{folder}/task{seed}/",
                "exemplars": f"file://{folder}/task{seed}.safetensors",
            }
        )
    return {
        "base": f"file://{folder}/base/",
        "tasks": rows,
        "method": {"name": "cat", "balance": 0.5, "scale_balance": 0.5},
    }
