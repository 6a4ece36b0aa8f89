"""What parts will hold in memory at most, so that each goes to a worker that has room for it."""

from __future__ import annotations

from service.contract.checkpoint import DTYPE_BYTES
from service.contract.evaluation import baseline_method
from service.contract.plan import Plan, ShardPlan
from service.contract.planning import COMPUTE_BYTES, methods_of, peak_memory
from service.contract.recipe import Recipe
from service.contract.treatments import Keep


def of_shard(recipe: Recipe, shard: ShardPlan) -> int:
    """Bytes to merge or analyze a shard, by whichever method a search may choose."""
    return max(peak_memory(recipe, shard.tensors, method) for method in methods_of(recipe))


def of_baseline(recipe: Recipe, shard: ShardPlan, name: str) -> int:
    """Bytes to merge a shard by a baseline's method, without trimming."""
    method = baseline_method(name, recipe.method)
    plain = recipe.model_copy(update={"method": method, "overrides": (), "treatments": ()})
    tensors = [tensor.model_copy(update={"treatment": Keep(), "method": None}) for tensor in shard.tensors]
    return peak_memory(plain, tensors, method)


def of_model(plan: Plan) -> int:
    """Bytes to run a model: its weights in float32, and beside them as they are stored, where that is another type."""
    total = 2 * sum(head.bytes for head in plan.heads)
    for shard in plan.shards:
        for tensor in shard.tensors:
            entries = tensor.nbytes // DTYPE_BYTES[tensor.dtype]
            total += COMPUTE_BYTES * entries + (0 if tensor.dtype == "F32" else tensor.nbytes)
    return total


def of_speed(plan: Plan) -> int:
    """Bytes to time the merged model beside an expert."""
    return 2 * of_model(plan)


def of_trial(plan: Plan) -> int:
    """Bytes to merge and to run what a search tries."""
    return plan.peak_memory_bytes + of_model(plan)
