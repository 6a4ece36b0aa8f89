"""The body of a request, read strictly: what two parsers could understand differently is refused."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

from starlette.requests import Request

from service.api.deps import Doors
from service.contract.errors import MalformedJson, PayloadTooLarge, UnsupportedMediaType
from service.contract.recipe import canonical_sha256


@dataclass(frozen=True)
class Body:
    """A parsed body; ``sha256`` is the digest of its canonical spelling."""

    value: Any
    sha256: str


async def json_body(request: Request, doors: Doors) -> Body:
    """The request's JSON. Raises UnsupportedMediaType, PayloadTooLarge, MalformedJson."""
    _check_media_type(request)
    return parse(await _read(request, doors.settings.max_body_bytes))


def parse(data: bytes) -> Body:
    """JSON with every name once in an object, finite numbers, and text that UTF-8 can spell.

    Raises:
        MalformedJson: it is anything else, or nested too deeply.
    """
    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=_object, parse_constant=_no_constant, parse_float=_finite
        )
        has_nul = any("\x00" in text for text in _texts(value))
        digest = canonical_sha256(value)
    except UnicodeDecodeError as error:
        raise MalformedJson(f"The body is not UTF-8: byte {error.start} can't be read.") from None
    except UnicodeEncodeError:
        raise MalformedJson("A string contains half of a surrogate pair.") from None
    except json.JSONDecodeError as error:
        raise MalformedJson(f"Line {error.lineno}, column {error.colno}: {error.msg}.") from None
    except RecursionError:
        raise MalformedJson("The body is nested too deeply.") from None
    except ValueError:  # Python's limit on the digits of an integer
        raise MalformedJson("A number has too many digits.") from None
    if has_nul:
        raise MalformedJson("A string contains the character U+0000, which databases can't keep.")
    return Body(value, digest)


def _check_media_type(request: Request) -> None:
    given = request.headers.get("content-type", "")
    media_type, _, parameters = given.partition(";")
    name, _, charset = parameters.strip().partition("=")
    is_utf8 = name.lower() != "charset" or charset.strip('"').lower() in ("utf-8", "utf8", "us-ascii")
    if media_type.strip().lower() != "application/json" or not is_utf8:
        raise UnsupportedMediaType(f"Content-Type is {given!r}; send application/json in UTF-8.")
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise UnsupportedMediaType(f"Content-Encoding is {encoding!r}; send the body as it is.")


async def _read(request: Request, limit_bytes: int) -> bytes:
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > limit_bytes:
        _too_large(limit_bytes)
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > limit_bytes:  # a chunked body declares nothing
            _too_large(limit_bytes)
    return bytes(data)


def _too_large(limit_bytes: int) -> NoReturn:
    raise PayloadTooLarge(f"The body may have {limit_bytes} bytes at most.")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise MalformedJson(f"The name {twice!r} appears twice in one object.")
    return members


def _no_constant(text: str) -> NoReturn:
    raise MalformedJson(f"{text} is no JSON number.")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise MalformedJson(f"The number {text} is too large.")
    return number


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, dict):
        for name, item in value.items():
            yield name
            yield from _texts(item)
