"""Brings a result's files to this machine: goes on where it stopped, and trusts nothing that it has not hashed."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import httpx

CHUNK_BYTES = 1 << 20
Fetch = Callable[[str, int], AbstractContextManager[httpx.Response]]


class CatmergeError(Exception):
    """Anything that the client raises."""


class DownloadError(CatmergeError):
    """A file could not be brought here whole and right; the sentence says which and why."""


@dataclass(frozen=True)
class DownloadProgress:
    """How far a download is: the file underway, and bytes over all files."""

    name: str
    bytes_done: int
    bytes_total: int


@dataclass(frozen=True)
class Wanted:
    """One file to bring, and what it must be."""

    name: str
    size: int
    sha256: str
    path: Path

    @property
    def part(self) -> Path:
        """Where its bytes wait until they are whole; named by digest, so that no other file's bytes are taken up."""
        return self.path.with_name(f"{self.path.name}.{self.sha256[:12]}.part")


class Part:
    """A file in the making, and the digest of what it holds so far."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        self._file.seek(0)
        self._digest = hashlib.sha256()
        self.size = 0
        while chunk := self._file.read(CHUNK_BYTES):
            self._digest.update(chunk)
            self.size += len(chunk)

    def append(self, chunk: bytes) -> None:
        self._file.write(chunk)
        self._digest.update(chunk)
        self.size += len(chunk)

    def restart(self) -> None:
        """Throw away what is there."""
        self._file.seek(0)
        self._file.truncate()
        self._digest = hashlib.sha256()
        self.size = 0

    def is_right(self, wanted: Wanted) -> bool:
        return self.size == wanted.size and self._digest.hexdigest() == wanted.sha256

    def finish(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class Download:
    """One download into a folder.

    Args:
        fetch: opens an artifact's bytes by its name, from a byte on.
        out: the folder.
        progress: called as bytes arrive.
        overwrite: whether files that are there with other content may be replaced.
        attempts: how often in a row a file may bring nothing before it is given up.
    """

    def __init__(
        self,
        fetch: Fetch,
        out: Path,
        *,
        progress: Callable[[DownloadProgress], None] | None = None,
        overwrite: bool = False,
        attempts: int = 5,
    ) -> None:
        self._fetch = fetch
        self._out = out
        self._progress = progress
        self._overwrite = overwrite
        self._attempts = attempts
        self._done = 0
        self._total = 0

    def run(self, artifacts: Sequence[dict[str, Any]]) -> Sequence[Path]:
        """Bring all of them; nothing is fetched before every name is known to be harmless. Raises DownloadError."""
        files = [Wanted(a["name"], a["size"], a["sha256"], safe_path(self._out, a["name"])) for a in artifacts]
        self._total = sum(file.size for file in files)
        try:
            missing = [file for file in files if not self._is_here(file)]
            for file in missing:
                self._bring(file)
        except OSError as error:
            raise DownloadError(f"{error.filename or self._out} can't be written: {error.strerror}") from error
        return [file.path for file in files]

    def _is_here(self, file: Wanted) -> bool:
        if not file.path.exists():
            return False
        if file.path.is_file() and _sha256(file.path) == file.sha256:
            self._advance(file, file.size)
            return True
        if file.path.is_file() and self._overwrite:
            return False
        raise DownloadError(f"{file.path} is there already with other content; overwrite it, or choose another folder")

    def _bring(self, file: Wanted) -> None:
        part = Part(file.part)
        try:
            self._advance(file, part.size)
            self._fill(part, file)
            part.finish()
        finally:
            part.close()
        file.part.replace(file.path)

    def _fill(self, part: Part, file: Wanted) -> None:
        """Fetch until the part is right; one that turns out wrong when it is whole is begun anew once."""
        failures, mismatches = 0, 0
        while not part.is_right(file):
            if part.size >= file.size:
                mismatches += 1
                if mismatches > 1:
                    raise DownloadError(f"{file.name}: the bytes that came do not match its SHA-256 {file.sha256}")
                self._restart(part, file)
            before = part.size
            trouble = self._fetch_into(part, file)
            failures = failures + 1 if part.size == before and file.size else 0
            if failures >= self._attempts:
                raise DownloadError(f"{file.name}: {trouble or 'no bytes came'}; run it again to go on from here")
            if trouble:
                time.sleep(min(0.2 * 2.0**failures, 10.0))

    def _fetch_into(self, part: Part, file: Wanted) -> str | None:
        """Append what comes; returns in words what cut it short."""
        try:
            with self._fetch(file.name, part.size) as response:
                if response.is_error:
                    return f"the store answered {response.status_code}"
                if part.size and not _begins_at(response, part.size):
                    self._restart(part, file)
                for chunk in response.iter_bytes():  # as they come: gathered ones would be lost with the line
                    self._take(part, file, chunk)
        except httpx.TransportError as error:
            return str(error) or type(error).__name__
        return None

    def _take(self, part: Part, file: Wanted, chunk: bytes) -> None:
        if part.size + len(chunk) > file.size:
            raise DownloadError(f"{file.name}: more bytes came than the {file.size} it has")
        part.append(chunk)
        self._advance(file, len(chunk))

    def _restart(self, part: Part, file: Wanted) -> None:
        self._advance(file, -part.size)
        part.restart()

    def _advance(self, file: Wanted, count: int) -> None:
        self._done += count
        if self._progress is not None:
            self._progress(DownloadProgress(file.name, self._done, self._total))


def safe_path(out: Path, name: str) -> Path:
    """Where an artifact goes. Raises DownloadError for a name that leads out of the folder."""
    pure = PurePosixPath(name)
    is_plain = bool(name) and name == str(pure) and not pure.is_absolute() and ".." not in pure.parts
    if not is_plain or any(character in name for character in "\\:\x00"):
        raise DownloadError(f"The artifact name {name!r} is not a plain relative path; nothing was downloaded")
    path = out / name
    if not path.parent.resolve().is_relative_to(out.resolve()):
        raise DownloadError(f"{path} leads out of {out} by a symbolic link; nothing was downloaded")
    return path


def _begins_at(response: httpx.Response, start: int) -> bool:
    """Whether the answer is the range that was asked for; some servers answer with the whole."""
    return response.status_code == 206 and response.headers.get("content-range", "").startswith(f"bytes {start}-")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
