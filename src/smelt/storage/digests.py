"""The digest of a tensor: XXH3-128 over the XXH3-128 digests of its 1 MiB blocks.

Blocks can be hashed in any order and by any thread, while they are written or read.
"""

from __future__ import annotations

from collections.abc import Iterable

import xxhash

BLOCK = 1 << 20
"""Bytes of a block."""


def of_blocks(data: memoryview) -> list[bytes]:
    """The digests of the blocks of `data`, which begins with a block."""
    return [xxhash.xxh3_128_digest(data[low : low + BLOCK]) for low in range(0, len(data), BLOCK)]


def joined(blocks: Iterable[bytes]) -> str:
    """The tensor's digest, in hexadecimal, from those of its blocks in order."""
    return xxhash.xxh3_128_hexdigest(b"".join(blocks))
