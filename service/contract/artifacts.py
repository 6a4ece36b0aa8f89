"""The key of everything a job leaves behind, and of everything kept while it runs."""

from __future__ import annotations

import re

RECIPE = "merge/recipe.json"
PLAN = "merge/plan.json"
ANALYSIS = "merge/analysis.json"
TRIM_LOG = "merge/trim-log.jsonl"
REPORT_JSON = "merge/report.json"
REPORT_HTML = "merge/report.html"
MANIFEST = "merge/manifest.json"
MODEL_CARD = "README.md"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
HEADS = "heads/"

# What a merge writes beside its weights, known by name: a job without a result has no list of what it wrote.
BESIDE_WEIGHTS = re.compile(
    r"merge/(recipe\.json|plan\.json|report\.json|report\.html|analysis\.json|trim-log\.jsonl|removed-\d+\.safetensors)"
)
HALF_WRITTEN = re.compile(
    BESIDE_WEIGHTS.pattern
    + r"|merge/manifest\.json|model(-\d{5}-of-\d{5})?\.safetensors|heads/[^/]+\.(safetensors|json)"
    r"|[^/]+\.(json|txt|model)"
    r"|((merge|heads)/)?\.catmerge-staging-[0-9a-f]+"  # a file that is being written tells nothing else
)

MEDIA_TYPES = {
    "json": "application/json",
    "jsonl": "application/x-ndjson",
    "html": "text/html; charset=utf-8",
    "md": "text/markdown; charset=utf-8",
    "txt": "text/plain; charset=utf-8",
    "safetensors": "application/octet-stream",
}


def media_type(name: str) -> str:
    """The media type of an artifact, by the end of its name."""
    return MEDIA_TYPES.get(name.rpartition(".")[2], "application/octet-stream")


def role(name: str) -> str:
    """What an artifact is for: weights, head, tokenizer, report or provenance."""
    if name == INDEX or (name.startswith("model") and name.endswith(".safetensors")):
        return "weights"
    if name.startswith(HEADS):
        return "configuration" if name.endswith(".json") else "head"
    if name in (REPORT_JSON, REPORT_HTML, MODEL_CARD, ANALYSIS):
        return "report"
    if name.startswith("merge/"):
        return "provenance"
    return "configuration"


def shard(index: int, count: int) -> str:
    """Name of output shard ``index`` of ``count``, counted from 0, as Hugging Face names them."""
    return "model.safetensors" if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def removed(index: int) -> str:
    """Name of the removed components of shard ``index``, counted from 0."""
    return f"merge/removed-{index + 1:05d}.safetensors"


def head(task: str) -> str:
    """Name of a task's head."""
    return f"{HEADS}{task}.safetensors"


def head_config(task: str) -> str:
    """Name of the configuration of the model that a task's head makes of the merged weights."""
    return f"{HEADS}{task}.json"


def may_be_ours(name: str) -> bool:
    """Whether a file that was left half written in a job's folder has a name under which merges write."""
    return HALF_WRITTEN.fullmatch(name) is not None


def default_prefix(workspace: str, plural: str, job_id: str) -> str:
    """Where a result goes that was given no place; ``plural`` is what jobs of its kind are called."""
    return f"{workspace}{plural}/{job_id}/"


def scratch(workspace: str, job_id: str) -> str:
    """Where a running job keeps what its later stages need; deleted when it ends."""
    return f"{workspace}scratch/{job_id}/"


def searched_plan(workspace: str, job_id: str) -> str:
    """The plan of a job with a search, until one is made of what is chosen.

    Each has a place of its own: what a killed worker has sent may arrive late, and must not replace the other one.
    """
    return f"{scratch(workspace, job_id)}plan.json"


def trim_log_part(workspace: str, job_id: str, index: int) -> str:
    """The trim log of one shard, until the stages' end puts them together."""
    return f"{scratch(workspace, job_id)}trim-log-{index + 1:05d}.jsonl"


def analysis_part(workspace: str, job_id: str, index: int) -> str:
    """What one shard's task vectors do to each other, until the stages' end adds it up."""
    return f"{scratch(workspace, job_id)}analysis-{index + 1:05d}.json"


def survey(workspace: str, job_id: str, index: int) -> str:
    """Where the largest entries of one task's vector end, until all tensors are merged."""
    return f"{scratch(workspace, job_id)}survey-{index + 1:05d}.json"


def cached_statistics(workspace: str, digest: str) -> str:
    """Statistics of one task's exemplars, by the digest of everything they depend on."""
    return f"{workspace}cache/statistics/{digest}.safetensors"


def cached_figures(workspace: str, digest: str) -> str:
    """What a base or an expert scores, by the digest of everything it depends on."""
    return f"{workspace}cache/scores/{digest}.safetensors"


def cached_features(workspace: str, digest: str) -> str:
    """An expert's features of its task's exemplars, by the digest of everything they depend on."""
    return f"{workspace}cache/features/{digest}.safetensors"


def figures(workspace: str, job_id: str, index: int) -> str:
    """What one model scores on one task, by part of the evaluation, until the report is made."""
    return f"{scratch(workspace, job_id)}figures-{index + 1:05d}.safetensors"


def structure(workspace: str, job_id: str, digest: str) -> str:
    """Where a search's merge at scaling 1 lies, by the digest of all but the scaling; deleted when the job ends."""
    return f"{scratch(workspace, job_id)}search/{digest}.json"


def trial(workspace: str, job_id: str, number: int) -> str:
    """The folder of what one trial of a search merges; deleted when the job ends, or sooner."""
    return f"{scratch(workspace, job_id)}search/{number:05d}/"


def trial_surveys(workspace: str, job_id: str, number: int) -> str:
    """The folder of what one trial of a search surveys, for the merge if it is chosen."""
    return f"{scratch(workspace, job_id)}search/surveys-{number:05d}/"


def baseline(workspace: str, job_id: str, method: str) -> str:
    """The folder of a merge that the result is only compared with; deleted when the job ends."""
    return f"{scratch(workspace, job_id)}baselines/{method}/"
