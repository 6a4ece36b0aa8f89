"""One model of an evaluation on one task: its checkpoint as it is, with the task's head where one lies beside it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from service.contract.checkpoint import Checkpoint
from service.contract.errors import InputChanged
from service.contract.evaluating import EvaluatedModel, EvaluationRecipe
from service.contract.evaluation import TaskEvaluation
from service.contract.evaluation_plan import inputs_of
from service.stores.checkpoints import read_checkpoint
from service.stores.heads import find_heads, read_whole, with_head
from service.stores.objects import Objects, failures
from workers.bench import Bench
from workers.loading import load_model
from workers.tensors import TensorReader
from workers.work import Work


@dataclass(frozen=True, eq=False)
class Candidate(Bench):
    """A model and what it is measured with. ``own`` is its checkpoint without the task's head."""

    model: EvaluatedModel
    own: Checkpoint

    @classmethod
    def open(cls, work: Work, reader: TensorReader, row: TaskEvaluation, model: EvaluatedModel) -> Candidate:
        """Raises InputChanged, InputMissing, StorageFailure."""
        recipe, plan = work.evaluation_recipe, work.plan()
        with failures():
            base = read_base(work.objects, recipe)
            own = read_whole(work.objects, model, base)
            checkpoint = with_head(work.objects, own, find_heads(work.objects, model), row.task)
        found = {file.address: file.etag for file in (*checkpoint.files, *checkpoint.beside)}
        for pin in (pin for name in _names(checkpoint, model, row.task) for pin in plan.inputs.get(name, ())):
            if found.get(pin.address) != pin.etag:
                raise InputChanged(f"{pin.address} changed after the job was planned; submit the evaluation again")
        return cls(work, plan, recipe.evaluation, row, base, checkpoint, reader, model, own)

    def digest(self) -> str:
        """Of everything that the model's scores depend on; of a lone checkpoint the same as a merge's expert has."""
        names = _names(self.checkpoint, self.model, self.row.task)
        return self.digest_of("with head" if self._has_head else "expert", names)

    def load(self) -> nn.Module:
        """The model. Raises BadInput, InputChanged, StorageFailure, UnsupportedArchitecture."""
        weights = self.reader.read(self.checkpoint, self.checkpoint.tensors)
        self.work.watch.step(bytes_read=sum(tensor.nbytes for tensor in weights.values()))
        # Under another head, what the checkpoint's own head was may have no place.
        spare = frozenset(self.own.tensors) if self._has_head else frozenset[str]()
        return load_model(self.checkpoint.config or {}, weights, self.work.device, spare)

    @property
    def _has_head(self) -> bool:
        return len(self.checkpoint.files) > len(self.own.files)


def _names(checkpoint: Checkpoint, model: EvaluatedModel, task: str) -> list[str]:
    """What the plan calls the files that a model is read from."""
    return [*inputs_of(model.name, task), *(["base"] if checkpoint.beside else [])]


def read_base(objects: Objects, recipe: EvaluationRecipe) -> Checkpoint | None:
    """The whole model that adapters among the checkpoints are of. Raises StoreError, MalformedHeader."""
    return None if recipe.base is None else read_checkpoint(objects, recipe.base)
