"""What the API needs to know beyond the connections it shares with its workers."""

from __future__ import annotations

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

SECONDS_PER_DAY = 86400.0


class Settings(BaseSettings):
    """Read from the environment as ``CATMERGE_<NAME>``; an empty variable counts as not set, others are ignored.

    ``public_url`` is how callers reach this service, without a slash at its end; links in answers begin with it.
    Omitted, links are paths. ``job_retention_days`` is how long a job is remembered after it was submitted (None:
    until somebody deletes it); its artifacts stay, unless ``expire_artifacts``. ``cache_bytes`` is what cached
    statistics and scores may take (None: no limit).
    """

    model_config = SettingsConfigDict(env_prefix="CATMERGE_", env_ignore_empty=True, extra="ignore", frozen=True)

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    public_url: str | None = Field(None, pattern=r"^https?://[^/\s]+")
    max_body_bytes: int = Field(1 << 20, ge=1024, le=1 << 30)
    link_seconds: int = Field(3600, ge=1, le=604_800, description="How long a presigned link works")
    idempotency_days: float = Field(7.0, gt=0)
    job_retention_days: float | None = Field(None, gt=0)
    sweep_seconds: float = Field(1.0, gt=0, le=3600)
    housekeeping_seconds: float = Field(60.0, gt=0)
    expire_artifacts: bool = False
    cache_bytes: int | None = Field(None, ge=0)
    migrate_at_start: bool = Field(True, description="Else somebody runs catmerge migrate before this version starts")
    max_active_jobs: int | None = Field(None, ge=1, description="Of one caller, queued and running together")
    resend_after_seconds: float = Field(5.0, gt=0)
    placement_seconds: float = Field(
        600.0, ge=0, description="How long parts too large for every worker wait for a larger one"
    )

    @field_validator("public_url")
    @classmethod
    def _without_slash(cls, url: str | None) -> str | None:
        return None if url is None else url.rstrip("/")

    @property
    def job_retention_seconds(self) -> float | None:
        return None if self.job_retention_days is None else self.job_retention_days * SECONDS_PER_DAY

    @property
    def idempotency_seconds(self) -> float:
        return self.idempotency_days * SECONDS_PER_DAY
