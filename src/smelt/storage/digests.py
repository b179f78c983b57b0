"""The digest of a tensor: XXH3-128 over the XXH3-128 digests of its 1 MiB blocks.

Blocks can be hashed in any order and by any thread, while they are written or read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable

import xxhash

from smelt.storage.files import ReadFile

BLOCK = 1 << 20
"""Bytes of a block."""
_READ = BLOCK
"""Bytes read at a time: they are still in the second cache when they are hashed."""


def of_blocks(data: memoryview) -> list[bytes]:
    """The digests of the blocks of `data`, which begins with a block."""
    return [xxhash.xxh3_128_digest(data[low : low + BLOCK]) for low in range(0, len(data), BLOCK)]


def joined(blocks: Iterable[bytes]) -> str:
    """The tensor's digest, in hexadecimal, from those of its blocks in order."""
    return xxhash.xxh3_128_hexdigest(b"".join(blocks))


def of_stored(nbytes: int, read: Callable[[int, int, memoryview], None]) -> str:
    """The digest of a stored tensor of so many bytes; `read(start, stop, buffer)` fills the buffer with its bytes."""
    blocks: list[bytes] = []
    buffer = memoryview(bytearray(min(_READ, nbytes)))
    for start in range(0, nbytes, _READ):
        piece = buffer[: min(_READ, nbytes - start)]
        read(start, start + len(piece), piece)
        blocks += of_blocks(piece)
    return joined(blocks)


def sha256(file: ReadFile) -> str:
    """sha256 of a whole file, in hexadecimal, as the hub has it for its large files."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(min(_READ, max(file.size, 1))))
    for start in range(0, file.size, _READ):
        piece = buffer[: min(_READ, file.size - start)]
        file.read_into(start, piece)
        digest.update(piece)
    return digest.hexdigest()
