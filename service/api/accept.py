"""Which of the media types on offer an Accept header asks for (RFC 9110, section 12.5.1)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from service.errors import NotAcceptableError


def negotiate(accept: str, offers: Sequence[str]) -> str:
    """The offer with the highest quality value; among equals the one that comes first in `offers`.

    Raises:
        NotAcceptableError: the header allows none of them.
    """
    ranges = [_parse(part) for part in accept.split(",") if part.strip()]
    if not ranges:
        return offers[0]
    qualities = {offer: _quality(offer, ranges) for offer in offers}
    best = max(offers, key=lambda offer: qualities[offer])
    if qualities[best] == 0:
        raise NotAcceptableError(
            f"Accept: {accept[:200]!r} cannot be met; this request can be answered as {', '.join(offers)}",
            param="Accept",
        )
    return best


def _parse(part: str) -> tuple[str, float]:
    media_range, *parameters = (piece.strip().lower() for piece in part.split(";"))
    quality = 1.0
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            quality = float(value) if re.fullmatch(r"0(\.\d{0,3})?|1(\.0{0,3})?", value.strip()) else 0.0
    return media_range, quality


def _quality(offer: str, ranges: list[tuple[str, float]]) -> float:
    """The most specific range that matches decides."""
    by_range = dict(ranges)
    for media_range in (offer, offer.partition("/")[0] + "/*", "*/*"):
        if media_range in by_range:
            return by_range[media_range]
    return 0.0
