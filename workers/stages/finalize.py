"""Finishes a job: gates, heads, configuration, model card, trim log and report; and last of all the manifest."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from io import BytesIO
from math import prod
from typing import Any

from service.contract import artifacts
from service.contract.job import Artifact, Status
from service.contract.notices import Notice, as_rows
from service.contract.parts import Done
from service.contract.plan import HeadPlan, Plan
from service.contract.stages import Stage
from service.stores.objects import failures
from workers.analysis import Analysis, merged_places
from workers.chosen import as_chosen
from workers.conflict import Conflict, total
from workers.figures_file import read_scores
from workers.gates import judge
from workers.licenses import read_license
from workers.provenance import digested, digests, made_by, manifest_of, told, write
from workers.recording import notices, usage
from workers.report import Facts, build_report, render_card, render_html
from workers.scores import doubts, measured, task_scores
from workers.search_summary import summary
from workers.tensors import NAMES, TensorReader, chunks
from workers.trim_log import summarize
from workers.work import Work
from workers.writing import TensorWriter, write_artifact

LOG_LIMIT_BYTES = 4 << 30
TYPE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def run(work: Work) -> Done:
    """Write everything that goes beside the weights; when the manifest is there, the result is whole.

    Raises:
        InputChanged, StorageFailure; Stopped where the job was cancelled before the manifest.
    """
    asked, trials = work.recipe, work.study.trials() if work.study else []
    whole_job, work = work, as_chosen(work)
    plan = work.plan()
    stage = Stage.ANALYZE if work.recipe.mode == "analysis" else Stage.MERGE
    merged = work.outputs(stage)[: len(plan.shards)]  # those after are baselines', which are no result
    analysis = _analysis(work, plan) if stage is Stage.ANALYZE else None
    files = _described(work, plan)
    if analysis is not None:
        files.append(write(work, artifacts.ANALYSIS, json.dumps(analysis.as_dict(), indent=2)))
    else:
        files += _model(work, plan, merged)
    log = _trim_log(work, plan)
    files.append(write_artifact(work.objects, plan.prefix, artifacts.TRIM_LOG, log))
    inputs = digests(work, plan)
    metrics, doubtful = _metrics(work, plan)
    found = summary(asked, trials, metrics, skipped=_skipped(work)) if asked.search else None
    verdicts = judge(work.recipe.gates, metrics, sum(file.size for file in files if file.role in ("weights", "head")))
    facts = Facts(
        recipe=work.recipe,
        plan=plan,
        metrics=metrics,
        gates=verdicts,
        trimmed=_trimmed(merged),
        so_far=work.so_far(),
        files=tuple(files),
        licenses=_licenses(work),
        layers=summarize(BytesIO(log)),
        inputs=told(inputs),
        made_by=made_by(work),
        conflict=_conflict(work, merged) if analysis is None else analysis.conflict(),
        analysis=None if analysis is None else analysis.summary(),
        warnings=[*notices(whole_job), *as_rows(doubtful)],
        usage=usage(whole_job),
        search=found,
        asked=asked,
    )
    report = build_report(facts)
    files.append(write(work, artifacts.REPORT_JSON, json.dumps(report, indent=2)))
    files.append(write(work, artifacts.REPORT_HTML, render_html(report)))
    if analysis is None:
        files.append(write(work, artifacts.MODEL_CARD, render_card(report)))
    status = Status.SUCCEEDED if all(verdict["passed"] for verdict in verdicts) else Status.REJECTED
    manifest = manifest_of(work, asked, inputs, files, {"method": work.recipe.method.model_dump(mode="json")})
    work.watch.announce_commit()
    whole = [*files, write_artifact(work.objects, plan.prefix, artifacts.MANIFEST, manifest)]
    # What lies in scratch stays until the database knows of the end: whoever has to finish this job again needs it.
    return Done(status=status, result=_result(report, plan, whole), warnings=tuple(doubtful))


def _model(work: Work, plan: Plan, merged: Sequence[dict[str, Any]]) -> list[Artifact]:
    """The merged model's files: weights and what was removed, which are there, and what goes beside them."""
    files = [Artifact.model_validate(file) for output in merged for file in output["files"]]
    files += _side_files(work, plan)
    files += [file for head in plan.heads for file in _head(work, plan, head)]
    return files + _index(work, plan)


def _analysis(work: Work, plan: Plan) -> Analysis:
    """What the analysis of every shard left."""
    parts = []
    for index in range(len(plan.shards)):
        address = artifacts.analysis_part(work.workspace, work.claim.job_id, index)
        with failures():
            parts.append(json.loads(work.objects.read_all(address, LOG_LIMIT_BYTES)))
    names = tuple(task.name for task in work.recipe.tasks)
    return Analysis(names, merged_places(parts), stand_ins=not work.recipe.has_features)


def _conflict(work: Work, merged: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """What the tasks' vectors do to each other, where trimming has measured it."""
    found = [Conflict.from_dict(output["conflict"]) for output in merged if "conflict" in output]
    tasks = [task.name for task in work.recipe.tasks]
    return total(found, len(tasks)).summary(tasks) if found and len(tasks) > 1 else None


def _metrics(work: Work, plan: Plan) -> tuple[dict[str, Any] | None, list[Notice]]:
    """What was measured, and where it is in doubt. None without an evaluation."""
    evaluation = work.recipe.evaluation
    if evaluation is None:
        return None, []
    found = [
        read_scores(work.objects, artifacts.figures(work.workspace, work.claim.job_id, index))
        for index in range(len(evaluation.parts))
    ]
    each = len(evaluation.models)
    scores = [
        task_scores(evaluation, row, found[each * index : each * (index + 1)])
        for index, row in enumerate(evaluation.tasks)
    ]
    last = work.outputs(Stage.EVALUATE)[-1]
    metrics = {**measured(evaluation, scores), "speed": last["speed"], "parameters": _parameters(work, plan)}
    return metrics, doubts(evaluation, scores)


def _parameters(work: Work, plan: Plan) -> dict[str, int]:
    """Numbers stored: in the merged model with its heads, and in all experts together."""
    merged = sum(prod(tensor.shape) for shard in plan.shards for tensor in shard.tensors)
    heads = {head.task: head.tensors for head in plan.heads}
    experts = 0
    with TensorReader(work.objects) as reader:
        base = reader.open(work.recipe.base, plan.inputs["base"])
        for task in work.recipe.tasks:
            checkpoint = reader.open(task.checkpoint, plan.inputs[f"task:{task.name}"], base)
            experts += sum(tensor.numel for tensor in checkpoint.tensors.values())
            merged += sum(checkpoint.tensors[name].numel for name in heads.get(task.name, ()))
    return {"merged": merged, "experts": experts}


def _licenses(work: Work) -> dict[str, str | None]:
    """What the base and the tasks say their licenses are."""
    addresses = {"base": work.recipe.base, **{f"task:{task.name}": task.checkpoint for task in work.recipe.tasks}}
    return {name: read_license(work.objects, address) for name, address in addresses.items()}


def _skipped(work: Work) -> int:
    """How many trials a search had no time for."""
    return sum("skipped" in output for output in work.outputs(Stage.SEARCH))


def _described(work: Work, plan: Plan) -> list[Artifact]:
    """The recipe and the plan, which the first stage wrote, digested as they lie; after a search another plan."""
    if work.planned is not None:
        write(work, artifacts.PLAN, plan.model_dump_json())
    return [digested(work, work.claim.prefix, name) for name in (artifacts.RECIPE, artifacts.PLAN)]


def _side_files(work: Work, plan: Plan) -> Iterator[Artifact]:
    """Configuration and tokenizer as the base has them, but for the type where the recipe chose another."""
    for file in plan.side_files:
        name = file.address.rpartition("/")[2]
        data = b"".join(bytes(piece) for piece in chunks(work.objects, file))
        if name == artifacts.CONFIG and work.recipe.output.dtype != "base":
            data = _retyped(data, TYPE_NAMES[work.recipe.output.dtype])
        yield write_artifact(work.objects, plan.prefix, name, data)
        work.watch.step(bytes_read=file.size, bytes_written=len(data))


def _retyped(config: bytes, dtype: str) -> bytes:
    values = json.loads(config)
    values.pop("torch_dtype", None)
    return json.dumps({**values, "dtype": dtype}, indent=2).encode()


def _head(work: Work, plan: Plan, head: HeadPlan) -> Iterator[Artifact]:
    """A task's own tensors, as its checkpoint has them, and the configuration of the model that they make."""
    task = next(task for task in work.recipe.tasks if task.name == head.task)
    with TensorReader(work.objects) as reader:
        base = reader.open(work.recipe.base, plan.inputs["base"])
        checkpoint = reader.open(task.checkpoint, plan.inputs[f"task:{task.name}"], base)
        tensors = reader.read(checkpoint, head.tensors)
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    header = {name: (NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in ordered}
    name = artifacts.head(task.name)
    with TensorWriter(work.objects, plan.prefix, name, header, work.bookmark(plan.prefix + name)) as writer:
        for name, tensor in ordered:
            writer.add(name, tensor)
        artifact = writer.commit()
    work.watch.step(bytes_read=head.bytes, bytes_written=artifact.size)
    yield artifact
    if checkpoint.config is not None:
        yield write(work, artifacts.head_config(task.name), json.dumps(checkpoint.config, indent=2))


def _index(work: Work, plan: Plan) -> list[Artifact]:
    """Which shard holds which tensor; a single file needs none."""
    if len(plan.shards) == 1:
        return []
    weight_map = {tensor.name: shard.file for shard in plan.shards for tensor in shard.tensors}
    total = sum(shard.bytes_out for shard in plan.shards)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return [write(work, artifacts.INDEX, json.dumps(index, indent=2))]


def _trim_log(work: Work, plan: Plan) -> bytes:
    """The shards' logs, one after another."""
    pieces = []
    for index in range(len(plan.shards)):
        address = artifacts.trim_log_part(work.workspace, work.claim.job_id, index)
        with failures():
            pieces.append(work.objects.read_all(address, LOG_LIMIT_BYTES))
    return b"".join(pieces)


def _trimmed(merged: Sequence[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """What trimming did by role, over all shards."""
    sums: dict[str, dict[str, float]] = {}
    for output in merged:
        for role, found in output["trimmed"].items():
            total = sums.setdefault(role, dict.fromkeys(found, 0.0))
            for key, value in found.items():
                total[key] += value
    return {
        role: {
            "vectors": int(total["vectors"]),
            "trimmed": int(total["trimmed"]),
            "energy_removed": total["energy_removed"] / total["energy"] if total["energy"] else 0.0,
            # A bias sees no inputs, so there is no conflict to measure: that is not the same as none.
            "conflict_before": total["conflict_before"] if total["measured"] else None,
            "conflict_after": total["conflict_after"] if total["measured"] else None,
        }
        for role, total in sums.items()
    }


def _result(report: dict[str, Any], plan: Plan, files: Sequence[Artifact]) -> dict[str, Any]:
    keys = ("metrics", "gates", "trimmed", "cost", "savings", *(("analysis",) if report["analysis"] else ()))
    return {
        "prefix": plan.prefix,
        **{key: report[key] for key in keys},
        **({"search": report["search"]} if report["search"] else {}),
        "artifacts": [file.model_dump() for file in files],
    }
