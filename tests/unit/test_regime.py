"""What `codec = "auto"` chooses, and where it is said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fedmerge.config import parse_config
from fedmerge.coordinator.coordinator import Coordinator
from fedmerge.delta.codec import Codec
from fedmerge.delta.regime import Regime, choose
from fedmerge.statements import RoundSpec
from fedmerge.tensors import TensorSpec
from fedmerge.trust.sign import SigningKey
from tests.conftest import make_config

LARGE = {"w": TensorSpec((10**5, 10**4), "BF16")}
ONE_SHOT = Regime(
    schema=LARGE,
    num_rounds=1,
    lora_rank=0,
    merge="fedavg",
    is_linear=True,
    has_momentum=False,
    is_local=False,
)
DENSE = Codec(values="lloyd3", block_size=256)


@pytest.mark.parametrize(
    ("changes", "codec", "error_feedback", "reason"),
    [
        ({}, Codec(sparsify="seeded", density=0.01, values="lloyd2", block_size=64), 0, "one round, merged by fedavg"),
        ({"is_linear": False, "merge": "ties"}, DENSE, 0, "one round, and ties or a robust rule looks at every entry"),
        ({"lora_rank": 16}, Codec(sparsify="lowrank", rank=16), 0, "adapters of rank 16"),
        ({"schema": {"w": TensorSpec((10**4, 10**3), "F32")}}, Codec(), 0, "the model is small, 10,000,000 parameters"),
        ({"is_local": True}, Codec(), 0, "the coordinator's own network"),
        ({"num_rounds": 4}, DENSE, 0, "4 rounds, too few"),
        ({"num_rounds": 30, "has_momentum": True}, Codec(values="int4", block_size=64), 0, "outer momentum"),
        (
            {"num_rounds": 30},
            Codec(sparsify="topk", density=1 / 64, values="sign", block_size=64),
            0.95,
            "30 rounds without outer momentum",
        ),
    ],
)
def test_each_regime_has_its_codec(
    changes: dict[str, object], codec: Codec, error_feedback: float, reason: str
) -> None:
    chosen = choose(replace(ONE_SHOT, **changes))  # type: ignore[arg-type]
    assert (chosen.codec, chosen.error_feedback) == (replace(codec, small_values="fp32"), error_feedback)
    assert reason in chosen.reason
    assert str(chosen).startswith(codec.summary())


@pytest.mark.parametrize(
    ("codec", "fewest"),
    [
        # The number of matrix elements that make a thousand vector elements' 32,000 bits a fortieth.
        ("values = 'int8'", 160_000),
        ("values = 'fp32'", 40_000),
        ("values = 'lloyd2'\nsparsify = 'seeded'\ndensity = 0.01", 64_000_000),
        # 64 of 4096, a bit each, and log2(e * 4096 / 64) = 7.44 bits for where.
        ("values = 'sign'\nsparsify = 'topk'\ndensity = 0.015625", 9_704_000),
        # Two exact factors of rank 4 of matrices with rows of 1,000: 4 * (1,000 + rows) elements.
        ("sparsify = 'lowrank'\nrank = 4", 9_000_000),
    ],
)
def test_vectors_travel_exactly_unless_that_makes_a_delta_much_larger(codec: str, fewest: int) -> None:
    def small_values(num_elements: int) -> str:
        config = parse_config(f"{FEDERATION}[delta]\n{codec}\n", folder=Path(), where="fedmerge.toml")
        schema = {"w": TensorSpec((num_elements // 1000, 1000), "F32"), "b": TensorSpec((1000,), "F32")}
        return config.uplink(schema).codec.small_values

    assert small_values(fewest + 1000) == "fp32"
    assert small_values(fewest - 1000) == "same"


FEDERATION = "[federation]\nname = 'f'\n[model]\nbase = 'base'\n"
MINIMAL = f"{FEDERATION}[delta]\ncodec = 'auto'\n"


@pytest.mark.parametrize(
    ("text", "summary"),
    [
        ("[rounds]\nnum_rounds = 1\n", "seeded 1 % lloyd2/64, vectors fp32 "),
        ("[rounds]\nnum_rounds = 1\n[merge]\nmethod = 'ties'\n", "lloyd3/256, vectors fp32 "),
        ("[rounds]\nnum_rounds = 40\n", "topk 1.56 % sign/64, vectors fp32, error feedback 0.95 "),
        ("[rounds]\nnum_rounds = 40\n[outer]\nname = 'nesterov'\n", "int4/64, vectors fp32 "),
        ("[train]\nlora_rank = 8\n", "lowrank 8 exact, else int8/1024, vectors fp32 "),
        ("[server]\nlisten = '192.168.1.5:8700'\n", "int8/1024, vectors fp32 "),
        ("[server]\nlisten = '[fd00::1]:8700'\n", "int8/1024, vectors fp32 "),
        ("[server]\nlisten = '0.0.0.0:8700'\n", "lloyd3/256, vectors fp32 "),
        ("[server]\nlisten = 'coordinator.example.org:8700'\n", "lloyd3/256, vectors fp32 "),
    ],
)
def test_the_regime_is_read_from_the_configuration(text: str, summary: str, tmp_path: Path) -> None:
    config = parse_config(MINIMAL + text, folder=tmp_path, where="fedmerge.toml")
    assert str(config.uplink(LARGE)).startswith(summary)


def test_the_choice_is_signed_into_the_round(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    config, _ = make_config(tmp_path, num_rounds=30, extra="[delta]\ncodec = 'auto'\n")
    coordinator = Coordinator(config, tmp_path / "base", clock=lambda: 0.0)
    try:
        coordinator.advance()
        key = SigningKey.load(tmp_path / "coordinator.key").public
        spec, _ = RoundSpec.open(coordinator.spec_envelope(), {key.key_id: key}, where="spec")
    finally:
        coordinator.close()
    assert Codec.from_dict(spec.codec) == Codec(small_values="fp32")
    assert "codec: int8/1024, vectors fp32 (the model is small, 600,300 parameters: next to no loss)" in caplog.text
