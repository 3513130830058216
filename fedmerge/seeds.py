"""Randomness that replays: every seed is derived from names, so that two who know the names know the seed."""

from __future__ import annotations

import hashlib


def derive_seed(*parts: str | int) -> int:
    """Return the 64-bit seed for the given `parts`, for example `derive_seed(nonce, node_id, "encoder.weight")`.

    Parts are length-prefixed before hashing, so ("ab", "c") and ("a", "bc") differ.
    """
    digest = hashlib.sha256(b"fedmerge.seed.v1")
    for part in parts:
        data = str(part).encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return int.from_bytes(digest.digest()[:8], "little")


def fraction(*parts: str | int) -> float:
    """Return a number between 0 and 1 for the given `parts`, as evenly spread as their seeds, in steps of 2^-53."""
    return ((derive_seed(*parts) >> 11) + 0.5) / 2**53
