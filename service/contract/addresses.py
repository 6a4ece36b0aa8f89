"""How a recipe says where things lie and what they are called."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import unquote

from pydantic import AfterValidator, Field

SCHEMES = ("s3://", "file:///")


def _checked_address(address: str) -> str:
    if not address.startswith(SCHEMES):
        raise ValueError(f"must start with {' or '.join(SCHEMES)}")
    if any(ord(character) < 32 or ord(character) == 127 for character in address):
        raise ValueError("must not contain control characters")
    path = unquote(address.split("://", 1)[1])
    if ".." in path.replace("\\", "/").split("/"):
        raise ValueError("must not contain '..', encoded or not")
    if address.startswith("s3://") and not address[5:].partition("/")[0]:
        raise ValueError("must name a bucket: s3://bucket/key")
    return address


Address = Annotated[
    str,
    Field(min_length=6, max_length=2048, description="s3://bucket/key, or file:///path under a configured root"),
    AfterValidator(_checked_address),
]
Prefix = Annotated[Address, AfterValidator(lambda prefix: prefix if prefix.endswith("/") else prefix + "/")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="Letters, digits, . _ -")]
