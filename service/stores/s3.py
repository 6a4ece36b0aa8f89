"""Objects on a server that speaks S3, through boto3; its transfer manager is never used, so no CRT client either."""

from __future__ import annotations

import hashlib
import logging
import re
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import quote

import boto3
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    IncompleteReadError,
    NoCredentialsError,
    ParamValidationError,
)
from botocore.response import StreamingBody
from pydantic import SecretStr

from service.contract.settings import Connections
from service.stores.base import (
    AccessDenied,
    Bookmark,
    NearObject,
    ObjectChanged,
    ObjectInfo,
    ObjectMissing,
    StoreDown,
    StoreError,
    Unfinished,
    parse_address,
)

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client
    from types_boto3_s3.type_defs import GetObjectOutputTypeDef

log = logging.getLogger(__name__)

FIRST_PART_BYTES = 16 << 20
PARTS_PER_SIZE = 1000  # then parts double; 10,000 of them, S3's limit, hold more than its largest object, 5 TiB
LARGEST_DOUBLING = 7
UPLOADS_AT_ONCE = 3  # per writer: it holds up to one part more than this in memory
CHUNK_BYTES = 1 << 20  # read from the socket at once; stays in the cache between the two copies
PAUSES_SECONDS = (0.2, 0.8, 3.2)  # boto3 retries until an answer begins; one that breaks off is ours to ask for again
CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
MISSING = frozenset({"404", "NoSuchKey", "NoSuchBucket", "NotFound", "InvalidBucketName"})
MD5 = re.compile(r"[0-9a-f]{32}")
NO_UPLOADS = frozenset({"NoSuchUpload", "NotImplemented", "MethodNotAllowed"})
SPOILED = frozenset({"InvalidPart", "InvalidPartOrder", "EntityTooSmall", "NotImplemented"})  # of an upload's parts
CHANGED = frozenset({"412", "PreconditionFailed", "416", "InvalidRange"})


class BrokenOff(StoreDown):
    """An answer ended before its announced length."""


class UploadGone(StoreDown):
    """The store knows no such upload: it has been completed or aborted."""


@dataclass(frozen=True)
class SentPart:
    """A part of an upload that the store has: ``size`` in bytes, ``etag`` as the store spells it."""

    size: int
    etag: str

    def holds(self, data: bytearray) -> bool:
        """Whether it is known to be these bytes; of an ETag that is no MD5 digest nothing is known."""
        return self.size == len(data) and _bare(self.etag) == hashlib.md5(data, usedforsecurity=False).hexdigest()


class S3Store:
    """Objects in buckets.

    Args:
        client: talks to the server.
        public: makes the links; its host is part of their signature, so it is the one that clients will use.
    """

    def __init__(self, client: S3Client, public: S3Client) -> None:
        self._client = client
        self._public = public

    @classmethod
    def connect(cls, connections: Connections) -> Self:
        """A store on the server that the settings name. Nothing is sent yet."""
        client = _client(connections, connections.s3_endpoint)
        public = connections.s3_public_endpoint
        return cls(client, client if public is None else _client(connections, public))

    def head(self, address: str) -> ObjectInfo:
        bucket, key = _bucket_and_key(address)
        with _errors(address):
            answer = self._client.head_object(Bucket=bucket, Key=key)
        return ObjectInfo(
            address,
            answer["ContentLength"],
            _bare(answer["ETag"]),
            answer.get("VersionId"),
            answer["LastModified"].timestamp(),
        )

    def read(self, address: str, start: int, into: memoryview, *, etag: str | None = None) -> None:
        into = into.cast("B")
        if not into:
            return
        for pause in PAUSES_SECONDS:
            try:
                self._read_once(address, start, into, etag)
                return
            except BrokenOff as error:
                log.warning("reading again: %s", error)
                time.sleep(pause)
        self._read_once(address, start, into, etag)

    def _read_once(self, address: str, start: int, into: memoryview, etag: str | None) -> None:
        bucket, key = _bucket_and_key(address)
        span = f"bytes={start}-{start + len(into) - 1}"
        condition: dict[str, Any] = {} if etag is None else {"IfMatch": f'"{etag}"'}
        with _errors(address):
            answer = self._client.get_object(Bucket=bucket, Key=key, Range=span, **condition)
        with closing(answer["Body"]) as body:
            if etag is not None and _bare(answer["ETag"]) != etag:  # some servers ignore If-Match
                raise ObjectChanged(f"{address} has changed: its ETag is {answer['ETag']}, expected {etag}")
            before = _bytes_before(answer, address, start, len(into))
            try:
                _skip(body, before)
                _fill(body, into)
            except BotoCoreError as error:
                raise BrokenOff(f"{address}: the answer broke off: {error}") from error

    def write(
        self, address: str, *, media_type: str = "application/octet-stream", bookmark: Bookmark | None = None
    ) -> S3Writer:
        return S3Writer(self, self._client, address, media_type, bookmark)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        parsed = parse_address(prefix)
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=parsed.bucket, Prefix=parsed.key)
        with _errors(prefix):
            for page in pages:
                for row in page.get("Contents", ()):
                    if row["Key"].endswith("/") and row["Size"] == 0:
                        continue  # consoles make such objects to show an empty folder
                    address = f"s3://{parsed.bucket}/{row['Key']}"
                    yield ObjectInfo(address, row["Size"], _bare(row["ETag"]), None, row["LastModified"].timestamp())

    def delete(self, address: str) -> None:
        bucket, key = _bucket_and_key(address)
        try:
            with _errors(address):
                self._client.delete_object(Bucket=bucket, Key=key)
        except ObjectMissing:
            return

    def near(self, address: str, etag: str) -> NearObject | None:  # noqa: ARG002 (each read is a request here)
        return None

    def unfinished(self, prefix: str) -> Iterator[Unfinished]:
        parsed = parse_address(prefix)
        pages = self._client.get_paginator("list_multipart_uploads").paginate(Bucket=parsed.bucket, Prefix=parsed.key)
        with _errors(prefix), _nothing_unfinished():
            for page in pages:
                clock = parsedate_to_datetime(page["ResponseMetadata"]["HTTPHeaders"]["date"])
                for row in page.get("Uploads", ()):
                    age = (clock - row["Initiated"]).total_seconds()
                    yield Unfinished(f"s3://{parsed.bucket}/{row['Key']}", row["UploadId"], max(age, 0.0))

    def abandon(self, found: Unfinished) -> None:
        bucket, key = _bucket_and_key(found.address)
        with suppress(UploadGone), _errors(found.address):
            self._client.abort_multipart_upload(Bucket=bucket, Key=key, UploadId=found.handle)

    def link(self, address: str, *, seconds: int, filename: str) -> str | None:
        bucket, key = _bucket_and_key(address)
        with _errors(address):
            return self._public.generate_presigned_url(
                "get_object",
                Params={"Bucket": bucket, "Key": key, "ResponseContentDisposition": attachment(filename)},
                ExpiresIn=seconds,
            )


class S3Writer:
    """An object being written: small ones in one request, larger ones in parts, which nobody sees before the commit.

    A process that is killed leaves its parts behind; the service drops them when their job has ended. With a bookmark
    the next writer finds them, and sends only parts that are not there or are others. A writer that has been taken for
    dead may still be at work on the same upload: it sends the same bytes, and it never aborts what is noted.
    """

    def __init__(
        self, store: S3Store, client: S3Client, address: str, media_type: str, bookmark: Bookmark | None
    ) -> None:
        self._store = store
        self._client = client
        self._address = address
        self._bucket, self._key = _bucket_and_key(address)
        self._media_type = media_type
        self._part = bytearray()  # being filled: the first grows with what comes, later ones have their size at once
        self._filled = 0
        self._spare: deque[bytearray] = deque()  # of parts that were sent: fresh memory would have to be touched first
        self._size = 0
        self._bookmark = bookmark
        self._upload: str | None = None
        self._is_noted = False
        self._sent: dict[int, SentPart] = {}  # by an earlier writer, by number
        self._etags: list[Future[str]] = []
        self._senders = ThreadPoolExecutor(UPLOADS_AT_ONCE, thread_name_prefix="s3-upload")  # no thread until used
        self._ended = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        view = memoryview(data).cast("B")
        self._size += len(view)
        while view:
            room = part_bytes(len(self._etags)) - self._filled
            self._fill(view[:room])
            view = view[room:]
            if self._filled == part_bytes(len(self._etags)):
                self._send_part()

    def _fill(self, data: memoryview) -> None:
        if self._etags and not self._filled:
            self._part = self._next_part(part_bytes(len(self._etags)))
        if self._filled == len(self._part):
            self._part += data
        else:
            memoryview(self._part)[self._filled : self._filled + len(data)] = data
        self._filled += len(data)

    def commit(self) -> ObjectInfo:
        with _errors(self._address):
            if self._upload is None:
                self._put()
            else:
                self._complete(self._upload)
        self._ended = True
        self._senders.shutdown()
        return self._checked()

    def abort(self) -> None:
        """Drop what was written, or leave it to who finds it noted; after a commit this does nothing."""
        if self._ended:
            return
        self._ended = True
        self._senders.shutdown(cancel_futures=True)  # waits for parts underway: they would outlive the abort
        if self._upload is None or self._is_noted:
            return
        try:
            with _errors(self._address):
                self._client.abort_multipart_upload(Bucket=self._bucket, Key=self._key, UploadId=self._upload)
        except StoreError as error:  # the reason for the abort matters more to whoever is watching
            log.warning("parts of %s stay behind until their job has ended: %s", self._address, error)

    def _put(self) -> None:
        body: Any = self._part  # the stubs do not know that boto3 takes a bytearray
        self._client.put_object(Bucket=self._bucket, Key=self._key, Body=body, ContentType=self._media_type)

    def _send_part(self) -> None:
        with self._answers():
            upload = self._upload or self._begin()
            if len(self._etags) >= UPLOADS_AT_ONCE:
                self._etags[-UPLOADS_AT_ONCE].result()
            del self._part[self._filled :]
            self._etags.append(self._senders.submit(self._upload_part, upload, len(self._etags) + 1, self._part))
            self._part, self._filled = bytearray(), 0

    def _next_part(self, size: int) -> bytearray:
        """Memory for a part: that of one that has been sent, if there is one of this size."""
        while self._spare:
            part = self._spare.popleft()
            if len(part) == size:
                return part
        return bytearray(size)

    def _begin(self) -> str:
        begun = self._bookmark.find() if self._bookmark else None
        sent = self._sent_to(begun) if begun else None
        if begun is None or sent is None:
            return self._begin_anew()
        log.info("Going on with an upload of %s: %d parts are there", self._address, len(sent))
        self._upload, self._sent, self._is_noted = begun, sent, True
        return begun

    def _begin_anew(self) -> str:
        answer = self._client.create_multipart_upload(Bucket=self._bucket, Key=self._key, ContentType=self._media_type)
        self._upload = answer["UploadId"]
        if self._bookmark is not None:
            self._bookmark.note(self._upload)
            self._is_noted = True
        return self._upload

    def _sent_to(self, upload: str) -> dict[int, SentPart] | None:
        """The parts that an upload has; None where it is gone, or the store does not tell."""
        pages = self._client.get_paginator("list_parts").paginate(Bucket=self._bucket, Key=self._key, UploadId=upload)
        try:
            with _errors(self._address):
                rows = [row for page in pages for row in page.get("Parts", ())]
        except StoreError as error:
            log.info("Beginning anew: %s", error)
            return None
        return {row["PartNumber"]: SentPart(row["Size"], row["ETag"]) for row in rows}

    def _upload_part(self, upload: str, number: int, part: Any) -> str:
        sent = self._sent.get(number)
        if sent is not None and sent.holds(part):
            self._spare.append(part)
            return sent.etag
        answer = self._client.upload_part(
            Bucket=self._bucket, Key=self._key, UploadId=upload, PartNumber=number, Body=part
        )
        self._spare.append(part)
        return answer["ETag"]

    def _complete(self, upload: str) -> None:
        if self._filled:
            self._send_part()
        with self._answers():
            etags = [etag.result() for etag in self._etags]
        parts = [{"PartNumber": number, "ETag": etag} for number, etag in enumerate(etags, 1)]
        try:
            with self._answers():
                self._client.complete_multipart_upload(
                    Bucket=self._bucket,
                    Key=self._key,
                    UploadId=upload,
                    MultipartUpload={"Parts": parts},  # type: ignore[typeddict-item]
                )
        except UploadGone as error:  # asked again, where the first answer was lost, a server may say so
            if not self._is_complete(etags):
                raise
            log.warning("%s; but the object is whole", error)

    @contextmanager
    def _answers(self) -> Iterator[None]:
        """Errors as ours. An upload whose parts the store does not take is not for the next writer to go on with:
        rclone, for one, replaces no part by another."""
        with _errors(self._address):
            try:
                yield
            except ClientError as error:
                if self._bookmark is not None and self._is_noted and error.response["Error"].get("Code") in SPOILED:
                    self._bookmark.note(None)
                raise

    def _is_complete(self, etags: Sequence[str]) -> bool:
        """Whether the object is what these parts make, by the ETag that S3 gives to an object of parts."""
        try:
            return self._store.head(self._address).etag == etag_of_parts(etags)
        except ObjectMissing:
            return False

    def _checked(self) -> ObjectInfo:
        """What the store holds now: its ETag for later reads, and a size that must be what was written."""
        info = self._store.head(self._address)
        if info.size != self._size:
            raise StoreDown(f"{self._address} has {info.size} bytes after {self._size} were written")
        return info


def part_bytes(parts_before: int) -> int:
    """Size of the next part of an upload, in bytes: 16 MiB for the first thousand, then twice that, and so on."""
    return FIRST_PART_BYTES << min(parts_before // PARTS_PER_SIZE, LARGEST_DOUBLING)


def etag_of_parts(etags: Sequence[str]) -> str:
    """The ETag of an object made of parts with these ETags, where they are MD5 digests; else one that nothing has."""
    bare = [_bare(etag) for etag in etags]
    if not all(MD5.fullmatch(etag) for etag in bare):
        return ""
    return f"{hashlib.md5(bytes.fromhex(''.join(bare)), usedforsecurity=False).hexdigest()}-{len(bare)}"


def attachment(filename: str) -> str:
    """A Content-Disposition that saves under ``filename``, in RFC 6266's two spellings."""
    plain = re.sub(r"[^A-Za-z0-9._ -]", "_", filename)
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(filename, safe='')}"


def _client(connections: Connections, endpoint: str | None) -> S3Client:
    session = boto3.session.Session()  # a client of its own session: the module's is not for several threads
    return session.client(
        "s3",
        endpoint_url=endpoint,
        region_name=connections.s3_region or session.region_name or "us-east-1",
        aws_access_key_id=_clear(connections.s3_access_key),
        aws_secret_access_key=_clear(connections.s3_secret_key),
        config=Config(
            signature_version="s3v4",
            s3={"addressing_style": "auto" if endpoint is None else "path"},
            # Outside AWS many servers do not know the newer checksums, or send the whole object's with a range.
            request_checksum_calculation="when_supported" if endpoint is None else "when_required",
            response_checksum_validation="when_required",
            retries={"mode": "standard", "total_max_attempts": 4},
            max_pool_connections=64,
            tcp_keepalive=True,
            connect_timeout=10,
            read_timeout=60,
        ),
    )


def _clear(secret: SecretStr | None) -> str | None:
    return None if secret is None else secret.get_secret_value()


def _bucket_and_key(address: str) -> tuple[str, str]:
    parsed = parse_address(address)
    if not parsed.key or parsed.key.endswith("/"):
        raise AccessDenied(f"{address!r} names a folder, not an object")
    return parsed.bucket, parsed.key


def _bare(etag: str) -> str:
    return etag.strip('"')


def _bytes_before(answer: GetObjectOutputTypeDef, address: str, start: int, length: int) -> int:
    """How many bytes of the body come before the ones asked for; some servers answer a range with everything.

    The status alone says nothing: rclone answers 200 with a range and its Content-Range.
    """
    size = answer["ContentLength"]
    if "ContentRange" not in answer and answer["ResponseMetadata"]["HTTPStatusCode"] == 200:
        if size < start + length:
            raise ObjectChanged(f"{address} ends at byte {size}, before byte {start + length}")
        return start
    found = CONTENT_RANGE.fullmatch(answer.get("ContentRange", ""))
    if found is None or int(found[1]) != start:
        raise StoreDown(f"{address}: the server answers {answer.get('ContentRange')!r} to bytes from {start}")
    if int(found[2]) - start + 1 < length:
        raise ObjectChanged(f"{address} ends at byte {int(found[2]) + 1}, before byte {start + length}")
    if size != length:
        raise StoreDown(f"{address}: the server sends {size} bytes where {length} were asked for")
    return 0


def _skip(body: StreamingBody, count: int) -> None:
    scratch = memoryview(bytearray(min(count, CHUNK_BYTES)))
    while count:
        _fill(body, scratch[:count])
        count -= len(scratch[:count])


def _fill(body: StreamingBody, into: memoryview) -> None:
    done = 0
    while done < len(into):
        chunk: Any = into[done : done + CHUNK_BYTES]  # the stubs ask for a file
        count = body.readinto(chunk)
        if count == 0:
            raise IncompleteReadError(actual_bytes=done, expected_bytes=len(into))
        done += count


@contextmanager
def _nothing_unfinished() -> Iterator[None]:
    """Servers that know of no upload, or of no such list, and say so by an error."""
    try:
        yield
    except ClientError as error:
        if error.response["Error"].get("Code") not in NO_UPLOADS:
            raise


@contextmanager
def _errors(address: str) -> Iterator[None]:
    """boto3's errors as ours."""
    try:
        yield
    except ClientError as error:
        raise _translated(error, address) from error
    except ParamValidationError as error:
        raise ObjectMissing(f"{address} can't exist: {error}") from error
    except NoCredentialsError as error:
        raise AccessDenied(f"{address}: no keys; set CATMERGE_S3_ACCESS_KEY and CATMERGE_S3_SECRET_KEY") from error
    except BotoCoreError as error:
        raise StoreDown(f"{address}: the store does not answer: {error}") from error


def _translated(error: ClientError, address: str) -> StoreError:
    code = error.response["Error"].get("Code", "")
    status = error.response["ResponseMetadata"].get("HTTPStatusCode", 0)
    said = error.response["Error"].get("Message") or code
    if code == "NoSuchUpload":
        return UploadGone(f"{address}: the store knows nothing of its upload any more ({said})")
    if code in MISSING:
        return ObjectMissing(f"{address} does not exist ({code})")
    if code in CHANGED:
        return ObjectChanged(f"{address} has changed ({code}: {said})")
    if status in (401, 403):
        return AccessDenied(f"{address}: the store says no ({code}: {said})")
    if status in (301, 307):
        return AccessDenied(f"{address}: the bucket is in another region; set CATMERGE_S3_REGION ({said})")
    return StoreDown(f"{address}: the store failed ({code}: {said})")
