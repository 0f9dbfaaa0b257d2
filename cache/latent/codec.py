"""Records: what a store keeps of a latent and of a header. Damage is found here, never served.

    latent  magic "HSL", version, dtype, shape (C, h, w), alpha, id, length, crc32 | payload
    header  magic "HSH", version, id, lengths of both parts, crc32                  | JSON, embedding (float32)

The checksum covers everything but itself. The id and alpha that a record was written under are part of it, so that a
record found under another key is damage too.

A latent's payload is its low bytes as they are, then its high bytes (sign, exponent, two bits of mantissa) in a Huffman
code. Latents are mostly noise: only the exponent compresses, and matches are never found. Measured at alpha 0.1 to 0.8
on [4, 64, 64], 32 KiB: 84.5% of the size, coded in 0.08 ms and decoded in 0.04 ms, where zlib at level 1 over the raw
bytes leaves 92.5% (0.6 and 0.1 ms) and over both byte planes 86% (0.4 and 0.05 ms). Since LMDB stores large values in
pages of 4 KiB and Redis in size classes, 32 KiB then take 28 KiB instead of 36 (LMDB) or 40 (Redis), and 8 KiB take 8
instead of 12 or 10: more than a fifth more entries in a budget for 0.04 ms a read.
"""

from __future__ import annotations

import json
import struct
import zlib
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from cache.latent.keys import Header, KeySpace

_VERSION = 1
_FLOAT16 = b"<f2"
_LATENT = struct.Struct("<3sB3s3HdqII")
_HEADER = struct.Struct("<3sBqIII")
_CHECKSUM = struct.Struct("<I")  # the last field of both


class DamagedRecordError(ValueError):
    """A record that is cut short, altered, of another version, or not the one that was asked for."""


def encode_latent(id: int, alpha: float, latent: NDArray[np.float16]) -> bytes:
    """A record of `latent` ([C, h, w], float16, finite; ValueError for anything else)."""
    if latent.dtype != np.float16 or latent.ndim != 3 or not latent.size or not np.isfinite(latent).all():
        raise ValueError(f"a latent is [C, h, w] in float16 and finite, not {latent.dtype} {list(latent.shape)}")
    low, high = latent.astype(_FLOAT16.decode(), order="C").view(np.uint8).reshape(-1, 2).T
    huffman = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS, 9, zlib.Z_HUFFMAN_ONLY)
    payload = low.tobytes() + huffman.compress(high.tobytes()) + huffman.flush()
    return _sealed(_LATENT.pack(b"HSL", _VERSION, _FLOAT16, *latent.shape, alpha, id, len(payload), 0), payload)


def decode_latent(record: bytes, id: int, alpha: float) -> NDArray[np.float16]:
    """The latent of a record, an array of its own. Raises DamagedRecordError."""
    payload = _unsealed(record, _LATENT)
    magic, version, dtype, channels, height, width, found_alpha, found_id, length, _ = _LATENT.unpack_from(record)
    if (magic, version, dtype) != (b"HSL", _VERSION, _FLOAT16) or length != len(payload):
        raise DamagedRecordError("not a latent's record")
    if (found_id, found_alpha) != (id, alpha):
        raise DamagedRecordError("the record of another latent")
    count = channels * height * width
    planes = np.empty((count, 2), np.uint8)
    try:
        planes[:, 0] = np.frombuffer(payload[:count], np.uint8)
        planes[:, 1] = np.frombuffer(zlib.decompress(payload[count:], -zlib.MAX_WBITS, count), np.uint8)
    except (zlib.error, ValueError) as error:
        raise DamagedRecordError("a payload that does not fit its shape") from error
    return planes.view(_FLOAT16.decode()).reshape(channels, height, width)


def encode_header(header: Header) -> bytes:
    text = json.dumps(
        [header.space.to_json(), header.prompt, header.created, header.levels, header.sizes], separators=(",", ":")
    ).encode()
    embedding = header.embedding.astype("<f4").tobytes()
    return _sealed(_HEADER.pack(b"HSH", _VERSION, header.id, len(text), len(embedding), 0), text + embedding)


def decode_header(record: bytes, id: int) -> Header:
    """Raises DamagedRecordError."""
    payload = _unsealed(record, _HEADER)
    magic, version, found_id, text_length, embedding_length, _ = _HEADER.unpack_from(record)
    if (magic, version) != (b"HSH", _VERSION) or text_length + embedding_length != len(payload):
        raise DamagedRecordError("not a header's record")
    if found_id != id:
        raise DamagedRecordError("the header of another entry")
    space, prompt, created, levels, sizes = json.loads(bytes(payload[:text_length]))
    embedding = np.frombuffer(payload[text_length:], "<f4").astype(np.float32)
    return Header(id, _space(space), prompt, embedding, created, tuple(levels), tuple(sizes))


@lru_cache(maxsize=1024)
def _space(text: str) -> KeySpace:
    """Many headers share few spaces: parsed once, kept once."""
    return KeySpace.from_json(text)


def _sealed(head: bytes, payload: bytes) -> bytes:
    open_head = head[: -_CHECKSUM.size]
    return open_head + _CHECKSUM.pack(zlib.crc32(payload, zlib.crc32(open_head))) + payload


def _unsealed(record: bytes, layout: struct.Struct) -> memoryview:
    view = memoryview(record)
    head, payload = view[: layout.size], view[layout.size :]
    checksum = zlib.crc32(payload, zlib.crc32(head[: -_CHECKSUM.size]))
    if len(head) < layout.size or _CHECKSUM.pack(checksum) != head[-_CHECKSUM.size :]:
        raise DamagedRecordError("the checksum does not match")
    return view[layout.size :]
