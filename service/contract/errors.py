"""Everything that can go wrong, a class per sentence: a Refusal says no before we begin, a Failure underway."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar


class Blame(StrEnum):
    """Who has to act."""

    USER = "user"
    STORAGE = "storage"
    SYSTEM = "system"


@dataclass(frozen=True)
class Fault:
    """One thing wrong with a request.

    ``pointer`` is an RFC 6901 JSON pointer into the request body ("" is the whole of it).
    """

    pointer: str
    code: str
    detail: str


class Refusal(Exception):
    """No, before we begin: the request is answered with a problem and nothing is stored."""

    status: ClassVar[int] = 400
    code: ClassVar[str] = "invalid_parameter"
    title: ClassVar[str] = "The request can't be carried out"
    retryable: ClassVar[bool] = False

    def __init__(self, detail: str, faults: tuple[Fault, ...] = (), *, retry_after_seconds: int | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.faults = faults
        self.retry_after_seconds = retry_after_seconds


class MalformedJson(Refusal):
    code, title = "malformed_json", "The body is not valid JSON"


class InvalidParameter(Refusal):
    code, title = "invalid_parameter", "A query parameter or header is not valid"


class InvalidCursor(Refusal):
    code, title = "invalid_cursor", "The cursor does not name an item of this list"


class Forbidden(Refusal):
    status, code, title = 403, "forbidden", "The address is outside what this service may read or write"


class BucketNotAllowed(Forbidden):
    code, title = "bucket_not_allowed", "The bucket is not one this service may use"


class NotFound(Refusal):
    status, code, title = 404, "not_found", "There is no such thing here"


class MethodNotAllowed(Refusal):
    status, code, title = 405, "method_not_allowed", "This address does not answer that method"


class JobNotTerminal(Refusal):
    status, code, title = 409, "job_not_terminal", "The job has not ended yet"


class OutputExists(Refusal):
    status, code, title = 409, "output_exists", "The output prefix is not free"


class NotReady(Refusal):
    status, code, title = 409, "not_ready", "The job has no result yet"
    retryable = True


class JobNotRetryable(Refusal):
    status, code, title = 409, "job_not_retryable", "Only a failed or cancelled job can be retried"


class IdempotencyInProgress(Refusal):
    status, code, title = 409, "idempotency_in_progress", "A request with this idempotency key is still being handled"
    retryable = True


class PreconditionFailed(Refusal):
    status, code, title = 412, "precondition_failed", "The resource is not in the state the request expects"


class PayloadTooLarge(Refusal):
    status, code, title = 413, "payload_too_large", "The body is larger than this service accepts"


class UnsupportedMediaType(Refusal):
    status, code, title = 415, "unsupported_media_type", "The body must be JSON"


class RangeNotSatisfiable(Refusal):
    status, code, title = 416, "range_not_satisfiable", "The range lies outside the artifact"


class ValidationError(Refusal):
    status, code, title = 422, "validation_error", "The recipe is not valid"


class IdempotencyKeyReused(Refusal):
    status, code, title = 422, "idempotency_key_reused", "This idempotency key was used with another body"


class CheckpointNotFound(Refusal):
    status, code, title = 422, "checkpoint_not_found", "A file the recipe names does not exist"


class MalformedCheckpoint(Refusal):
    status, code, title = 422, "malformed_checkpoint", "A file the recipe names is not a valid safetensors checkpoint"


class IncompatibleCheckpoints(Refusal):
    status, code, title = 422, "incompatible_checkpoints", "The checkpoints do not fit each other"


class ExemplarsDoNotFit(Refusal):
    status, code, title = 422, "exemplars_do_not_fit", "The exemplars, statistics or labeled samples do not fit"


class RecipeUnfit(Refusal):
    """Several kinds of fault at once; each carries its own code."""

    status, code, title = 422, "validation_error", "The recipe can't be carried out"


class TooManyActiveJobs(Refusal):
    status, code, title = 429, "too_many_active_jobs", "As many jobs as one caller may have wait or run already"
    retryable = True


class StoreUnavailable(Refusal):
    status, code, title = 503, "store_unavailable", "The object store or the database does not answer"
    retryable = True


class ServiceError(Refusal):
    """Ours, not the caller's: the cause is in the log under the request's id."""

    status, code, title = 500, "internal_error", "The service failed"
    retryable = True


class Failure(Exception):
    """No, underway: the job fails with this record, or the part is tried again where ``retryable`` says so."""

    code: ClassVar[str] = "failed"
    blame: ClassVar[Blame] = Blame.SYSTEM
    retryable: ClassVar[bool] = False

    def __init__(self, detail: str, *, tensor: str | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.tensor = tensor


class InputChanged(Failure):
    code, blame = "input_changed", Blame.USER


class InputMissing(Failure):
    code, blame = "input_missing", Blame.USER


class AccessLost(Failure):
    """An address may no longer be used, or may be read but not written: keys or rules have changed."""

    code, blame = "access_denied", Blame.STORAGE


class BadTensor(Failure):
    """NaN or infinity where there must be numbers."""

    code, blame = "non_finite_tensor", Blame.USER


class BadInput(Failure):
    """A file that admission could not see into turns out not to fit."""

    code, blame = "bad_input", Blame.USER


class OutputTaken(Failure):
    """Another job put its result where this one's was to go."""

    code, blame = "output_exists", Blame.USER


class UnsupportedArchitecture(Failure):
    code, blame = "unsupported_architecture", Blame.USER


class DeadlineExceeded(Failure):
    code, blame = "deadline_exceeded", Blame.USER


class StorageFailure(Failure):
    code, blame, retryable = "store_unavailable", Blame.STORAGE, True


class WorkerLost(Failure):
    code, blame, retryable = "worker_lost", Blame.SYSTEM, True


class NoWorkerFits(Failure):
    """A part needs more memory than any worker has; a retry helps once there is a larger one."""

    code, blame, retryable = "no_worker_fits", Blame.SYSTEM, True


class WorkerError(Failure):
    """A fault of ours; retried in case it was the machine."""

    code, blame, retryable = "worker_error", Blame.SYSTEM, True


class Stopped(Exception):
    """The part is no longer this worker's to do: cancelled, taken over, or the worker is shutting down."""
