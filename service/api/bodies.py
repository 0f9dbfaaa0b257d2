"""From a request's bytes to a checked body."""

from __future__ import annotations

from email.message import Message
from typing import TypeVar

from pydantic import ValidationError
from pydantic_core import from_json
from starlette.requests import Request

from service.api.schemas import Body, input_error
from service.errors import MalformedError, MediaTypeError

BodyT = TypeVar("BodyT", bound=Body)
# `curl -d` says form-urlencoded unless told otherwise, and some clients say nothing: what they send is read as JSON.
JSON_TYPES = ("", "application/json", "application/x-www-form-urlencoded")


async def read_body(request: Request, kind: type[BodyT]) -> BodyT:
    """The request's JSON body, types checked.

    Raises:
        MediaTypeError: a content type other than JSON (or what curl says by default), or a charset other than UTF-8.
        MalformedError: not JSON.
        InputError: a field is unknown, missing or of the wrong type.
    """
    _check_media_type(request.headers.get("content-type", ""))
    data = await request.body()
    try:
        value = from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise MalformedError(f"body: not JSON: {error}" if data else "body: empty; a JSON object is needed") from None
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise input_error(error.errors(include_url=False), kind) from None


def _check_media_type(header: str) -> None:
    message = Message()
    message["content-type"] = header
    media_type = message.get_content_type() if header else ""
    if media_type not in JSON_TYPES and not media_type.endswith("+json"):
        raise MediaTypeError(f"Content-Type: {header!r} is not understood; application/json is", param="Content-Type")
    charset = message.get_content_charset("utf-8")
    if charset not in ("utf-8", "utf8", "us-ascii"):
        raise MediaTypeError(f"Content-Type: charset {charset!r} is not understood; utf-8 is", param="Content-Type")
