"""Where everything is: the database, the broker and the object store, read from the environment."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Self

import pydantic
from pydantic import Field, SecretStr, model_validator

from service.contract.base import Frozen

PREFIX = "CATMERGE_"
LISTS = ("buckets", "file_roots")  # written with commas in the environment
SECRETS = ("s3_access_key", "s3_secret_key")


class SettingsError(Exception):
    """A variable of the environment can't be used; the sentence names it and says what to do."""


def variable(field: str) -> str:
    """The environment variable that sets a field: ``database_url`` -> ``CATMERGE_DATABASE_URL``."""
    return PREFIX + field.upper()


def _default_database() -> str:
    return f"sqlite:///{Path.cwd() / '.catmerge' / 'catmerge.db'}"


def _default_objects() -> str:
    return f"file://{Path.cwd() / '.catmerge' / 'objects'}"


class Connections(Frozen):
    """Where the service and its workers find what they share, and how long a worker may be silent.

    ``object_store`` is ``s3`` for an S3 server, or ``file:///folder``: then ``s3://bucket/key`` lives at
    ``folder/bucket/key``. ``buckets`` are the buckets that recipes may name (None: any), ``file_roots`` the folders
    under which they may name ``file:///`` addresses (none by default). ``workspace`` is where caches, scratch and
    results without an address of their own go. Without keys or a region, boto3's own chain finds them. ``input_cache``
    is the folder in which the workers of a machine keep what they read from an S3 server, up to ``input_cache_bytes``.
    """

    database_url: str = Field(default_factory=_default_database)
    broker_url: str = "redis://127.0.0.1:6379/0"
    object_store: str = Field(default_factory=_default_objects)
    s3_endpoint: str | None = None
    s3_public_endpoint: str | None = None
    s3_region: str | None = None
    s3_access_key: SecretStr | None = None
    s3_secret_key: SecretStr | None = None
    buckets: tuple[str, ...] | None = None
    file_roots: tuple[Path, ...] = ()
    workspace: str = "s3://catmerge/"
    input_cache: Path | None = None
    input_cache_bytes: int | None = Field(None, ge=1)
    lease_seconds: int = Field(60, ge=2, le=3600)
    heartbeat_seconds: int = Field(10, ge=1, le=1800)
    part_attempts: int = Field(3, ge=1, le=100)

    @model_validator(mode="after")
    def _usable(self) -> Self:
        _check_addresses(self)
        if (self.s3_access_key is None) != (self.s3_secret_key is None):
            raise SettingsError(
                f"{variable('s3_access_key')} and {variable('s3_secret_key')} go together: set both, "
                "or neither to use the credentials boto3 finds by itself"
            )
        _check_input_cache(self)
        if 2 * self.heartbeat_seconds > self.lease_seconds:
            raise SettingsError(
                f"{variable('heartbeat_seconds')} is {self.heartbeat_seconds}, but one late beat must not lose a lease "
                f"of {self.lease_seconds} s: set it to at most {self.lease_seconds // 2}"
            )
        return self

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Self:
        """The settings that ``environ`` describes; an empty variable counts as not set.

        Raises:
            SettingsError: a variable can't be used.
        """
        given = {name: environ[variable(name)] for name in cls.model_fields if environ.get(variable(name))}
        values = {name: _split(text) if name in LISTS else text for name, text in given.items()}
        try:
            return cls.model_validate(values)
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            field = str(first["loc"][0])
            shown = "" if field in SECRETS else f" is {given[field]!r}"
            raise SettingsError(f"{variable(field)}{shown}: {first['msg']}") from None

    def to_environment(self) -> dict[str, str]:
        """The variables that make these settings again, secrets in clear: for a child process, not for a log."""
        values = {name: getattr(self, name) for name in type(self).model_fields}
        return {variable(name): _text(value) for name, value in values.items() if value is not None}


def _split(text: str) -> tuple[str, ...]:
    return tuple(item.strip() for item in text.split(",") if item.strip())


def _text(value: object) -> str:
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or ","  # an empty variable would count as not set
    return str(value)


def _check_input_cache(settings: Connections) -> None:
    folder = settings.input_cache
    if (folder is None) != (settings.input_cache_bytes is None):
        raise SettingsError(
            f"{variable('input_cache')} and {variable('input_cache_bytes')} go together: set both, the folder and how "
            "many bytes of its disk may be taken, or neither to keep no inputs"
        )
    if folder is not None and not folder.is_absolute():
        raise SettingsError(f"{variable('input_cache')} is {str(folder)!r}: write an absolute path")


def _check_addresses(settings: Connections) -> None:
    if settings.object_store != "s3" and not settings.object_store.startswith("file:///"):
        raise SettingsError(
            f"{variable('object_store')} is {settings.object_store!r}: write s3, or file:///folder for a local folder"
        )
    if not settings.workspace.startswith(("s3://", "file:///")) or not settings.workspace.endswith("/"):
        raise SettingsError(
            f"{variable('workspace')} is {settings.workspace!r}: write a folder's address with a slash at its end, "
            "such as s3://bucket/folder/"
        )
    for field in ("s3_endpoint", "s3_public_endpoint"):
        endpoint = getattr(settings, field)
        if endpoint is not None and not endpoint.startswith(("http://", "https://")):
            raise SettingsError(f"{variable(field)} is {endpoint!r}: write http:// or https:// and the host")
    for root in settings.file_roots:
        if not root.is_absolute() or "," in str(root):
            raise SettingsError(f"{variable('file_roots')} names {str(root)!r}: write absolute paths without commas")
