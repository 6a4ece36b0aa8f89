"""Finishes an evaluation by itself: gates and report; and last of all the manifest."""

from __future__ import annotations

import json
from typing import Any

from service.contract import artifacts
from service.contract.evaluating import EvaluationRecipe
from service.contract.evaluation_plan import bytes_of_model
from service.contract.job import Artifact, Status
from service.contract.notices import as_rows
from service.contract.parts import Done
from service.contract.plan import Plan
from service.contract.stages import Stage
from workers.evaluation_report import EvaluationFacts, build_evaluation_report
from workers.figures_file import ModelScores, read_scores
from workers.licenses import read_license
from workers.page import render_page
from workers.provenance import digested, digests, made_by, manifest_of, told, write
from workers.recording import notices, usage
from workers.standing import evaluated, judged, uncertain
from workers.work import Work
from workers.writing import write_artifact


def run(work: Work) -> Done:
    """Write the report and the manifest; when that is there, the result is whole.

    Raises:
        InputChanged, StorageFailure; Stopped where the job was cancelled before the manifest.
    """
    recipe, plan = work.evaluation_recipe, work.plan()
    found = _scores(work, recipe)
    sizes = {model.name: bytes_of_model(plan, recipe, model.name) for model in recipe.models}
    speed = next((output["speed"] for output in work.outputs(Stage.EVALUATE) if "speed" in output), None)
    metrics = evaluated(recipe, found, sizes, speed)
    verdicts, doubtful = judged(recipe, metrics), uncertain(recipe, found)
    files = [digested(work, plan.prefix, name) for name in (artifacts.RECIPE, artifacts.PLAN)]
    inputs = digests(work, plan)
    report = build_evaluation_report(
        EvaluationFacts(
            recipe=recipe,
            plan=plan,
            metrics=metrics,
            gates=verdicts,
            so_far=work.so_far(),
            inputs=told(inputs),
            made_by=made_by(work),
            licenses={model.name: read_license(work.objects, model.checkpoint) for model in recipe.models},
            warnings=[*notices(work), *as_rows(doubtful)],
            usage=usage(work),
        )
    )
    files.append(write(work, artifacts.REPORT_JSON, json.dumps(report, indent=2)))
    files.append(write(work, artifacts.REPORT_HTML, render_page(report)))
    status = Status.SUCCEEDED if all(verdict["passed"] for verdict in verdicts) else Status.REJECTED
    manifest = manifest_of(work, recipe, inputs, files, {})
    work.watch.announce_commit()
    whole = [*files, write_artifact(work.objects, plan.prefix, artifacts.MANIFEST, manifest)]
    return Done(status=status, result=_result(report, plan, whole), warnings=tuple(doubtful))


def _scores(work: Work, recipe: EvaluationRecipe) -> dict[tuple[str, str], ModelScores]:
    """What every part of the evaluation left, by task and model."""
    return {
        (row.task, model.name): read_scores(work.objects, artifacts.figures(work.workspace, work.claim.job_id, index))
        for index, (row, model) in enumerate(recipe.parts)
    }


def _result(report: dict[str, Any], plan: Plan, files: list[Artifact]) -> dict[str, Any]:
    return {
        "prefix": plan.prefix,
        **{key: report[key] for key in ("metrics", "gates", "cost")},
        "artifacts": [file.model_dump() for file in files],
    }
