"""The codec as a part of the plan: what it takes, and what it says to the rest."""

from __future__ import annotations

from typing import Any

import pytest

from fedmerge.delta.codec import Codec
from fedmerge.errors import ConfigError

KEYS = (
    "one of: sparsify, density, values, block_size, small_elements, small_values, zstd_level, "
    "max_noise_ratio, fallback, rank, factors"
)
VALUES = "one of: fp32, bf16, fp16, int8, int4, lloyd3, lloyd2, sign"


@pytest.mark.parametrize(
    ("table", "message", "hint"),
    [
        ({"value": "int8"}, "unknown name 'value'; did you mean 'values'?", KEYS),
        ({"values": "int9"}, "codec.values: unknown name 'int9'; did you mean 'int8'?", VALUES),
        ({"values": "q"}, "codec.values: unknown name 'q'", VALUES),
        (
            {"sparsify": "seed"},
            "codec.sparsify: unknown name 'seed'; did you mean 'seeded'?",
            "one of: none, seeded, topk, layerwise_topk, lowrank",
        ),
        ({"values": 8}, "codec.values: 8 is not of type str", None),
        ({"block_size": "1024"}, "codec.block_size: '1024' is not of type int", None),
        ({"block_size": True}, "codec.block_size: True is not of type int", None),
        ({"block_size": 64.0}, "codec.block_size: 64.0 is not of type int", None),
        ({"block_size": 0}, "codec.block_size: 0 is not between", None),
        ({"zstd_level": 22}, "codec.zstd_level: 22 is not between 1 and 19", None),
        ({"small_values": "exact"}, "codec.small_values: unknown name 'exact'", f"one of: same, {VALUES[8:]}"),
        ({"small_elements": -1}, "codec.small_elements: -1 is not between", None),
        ({"sparsify": "seeded", "density": 0.0}, "codec.density: 0.0 is not between", None),
        ({"sparsify": "seeded", "density": 1.5}, "codec.density: 1.5 is not between", None),
        ({"sparsify": "seeded", "density": float("nan")}, "codec.density: nan is not between", None),
        ({"sparsify": "seeded", "density": None}, "codec.density: None is not of type float", None),
        (
            {"density": 0.5},
            "codec.density: 0.5 has no effect",
            'set sparsify = "seeded", "topk" or "layerwise_topk", or leave density out',
        ),
    ],
)
def test_codec_refuses_what_it_can_not_do(table: dict[str, Any], message: str, hint: str | None) -> None:
    with pytest.raises(ConfigError) as caught:
        Codec.from_dict(table)
    assert message in caught.value.message
    assert caught.value.hint == hint
