"""Merkle roots against the published test data of Certificate Transparency, and a second, recursive implementation."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmerge.transparency.merkle import (
    LEAF_BYTES,
    LeafHashes,
    MerkleTree,
    leaf_hash,
    leaves_of,
    merkle_root,
    num_leaves,
)

CT_LEAVES = ["", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f"]
CT_ROOTS = [
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]


@pytest.mark.parametrize("count", range(9))
def test_roots_of_certificate_transparencys_test_data(count: int) -> None:
    leaves = [leaf_hash(bytes.fromhex(text)) for text in CT_LEAVES[:count]]
    assert merkle_root(leaves).hex() == CT_ROOTS[count]


def recursive_root(leaves: list[bytes]) -> bytes:
    """RFC 6962, section 2.1, as it is written."""
    if len(leaves) == 1:
        return leaves[0]
    split = 1
    while 2 * split < len(leaves):
        split *= 2
    return hashlib.sha256(b"\x01" + recursive_root(leaves[:split]) + recursive_root(leaves[split:])).digest()


@given(st.lists(st.binary(min_size=32, max_size=32), min_size=1, max_size=70))
def test_any_number_of_leaves_agrees_with_the_rfcs_recursion(leaves: list[bytes]) -> None:
    assert merkle_root(leaves) == recursive_root(leaves)
    tree = MerkleTree(leaves)
    for size in range(1, len(leaves) + 1):
        assert tree.root(0, size) == recursive_root(leaves[:size])


@pytest.mark.parametrize("num_bytes", [0, 1, LEAF_BYTES - 1, LEAF_BYTES, LEAF_BYTES + 1, 3 * LEAF_BYTES])
def test_a_file_is_cut_into_leaves_of_one_mebibyte(tmp_path: Path, num_bytes: int) -> None:
    data = bytes(i % 251 for i in range(num_bytes))
    path = tmp_path / "payload"
    path.write_bytes(data)
    expected = [hashlib.sha256(b"\0" + data[i : i + LEAF_BYTES]).digest() for i in range(0, num_bytes, LEAF_BYTES)]
    assert leaves_of(path) == expected
    assert num_leaves(num_bytes) == len(expected)


@pytest.mark.parametrize("cuts", [[], [1], [LEAF_BYTES - 1, LEAF_BYTES + 1], [LEAF_BYTES, 2 * LEAF_BYTES], [7, 7, 8]])
@pytest.mark.parametrize("num_bytes", [0, LEAF_BYTES, 2 * LEAF_BYTES + 5])
def test_a_payload_that_comes_in_pieces_has_the_same_leaves(num_bytes: int, cuts: list[int]) -> None:
    data = (bytes(range(251)) * (num_bytes // 251 + 1))[:num_bytes]
    hashes = LeafHashes()
    for begin, end in zip([0, *cuts], [*cuts, num_bytes], strict=True):
        hashes.update(data[begin:end])
        came = data[:end]  # of which the leaves can be asked for at any time
        assert hashes.leaves == [leaf_hash(came[i : i + LEAF_BYTES]) for i in range(0, len(came), LEAF_BYTES)]
    assert hashes.num_bytes == num_bytes
