"""The resources that a job may be: what each is called in sentences, in paths and in ids."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Resource:
    """One kind of job, with a door of its own."""

    name: str
    plural: str
    id_prefix: str

    def is_id(self, text: str) -> bool:
        """Whether a job of this kind may have the id."""
        return re.fullmatch(rf"{self.id_prefix}[0-9a-f]{{32}}", text) is not None


MERGES = Resource("merge", "merges", "mrg_")
EVALUATIONS = Resource("evaluation", "evaluations", "evl_")
RESOURCES = (MERGES, EVALUATIONS)


def resource_named(job_id: str) -> Resource:
    """The resource whose ids begin as this one does; a merge where none does."""
    return next((resource for resource in RESOURCES if job_id.startswith(resource.id_prefix)), MERGES)
