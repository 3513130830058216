"""Which parameters are a fragment, and which plans can't be sent in fragments."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest

from fedmerge.aggregation.fragments import Fragments
from fedmerge.config import parse_config
from fedmerge.errors import ConfigError
from fedmerge.tensors import Schema, TensorSpec
from fedmerge.training import TrainTask
from fedmerge_client.train.checkpoint import ExistingCheckpoint

MODEL: Schema = {
    f"model.layers.{layer}.{part}.weight": TensorSpec(shape, "F32")
    for layer in range(12)
    for part, shape in (("attn", (8, 8)), ("mlp", (8, 32)))
} | {"model.embed.weight": TensorSpec((64, 8), "F32"), "norm.weight": TensorSpec((8,), "F32")}


def layers(names: list[str]) -> list[int]:
    return sorted({int(name.split(".")[2]) for name in names if "layers" in name})


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("strided", [[0, 4, 8], [1, 5, 9], [2, 6, 10], [3, 7, 11]]),
        ("sequential", [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]),
    ],
)
def test_layers_are_shared_out_by_the_pattern(
    pattern: Literal["strided", "sequential"], expected: list[list[int]]
) -> None:
    schema = MODEL | {"ids": TensorSpec((5,), "I64")}
    found = Fragments(4, pattern).names(schema)
    assert [layers(names) for names in found] == expected
    assert sorted(name for names in found for name in names) == sorted(MODEL)
    # What is outside the layers goes where the least is: the embedding first, then the norm elsewhere.
    assert "model.embed.weight" in found[0]
    assert "norm.weight" in found[1]
    assert found == Fragments(4, pattern).names(dict(reversed(schema.items())))


def test_there_are_no_empty_fragments() -> None:
    assert len(Fragments(12, "strided").names(MODEL)) == 12
    with pytest.raises(ConfigError, match="26 tensors in 12 layers do not make 15 fragments"):
        Fragments(15, "strided").names(MODEL)


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        ("[rounds]\nasync_buffer = 2", "late deltas"),
        ("[train]\nlora_rank = 4", "lora_rank in"),
        ("[delta]\nsparsify = 'topk'\ndensity = 0.1\nerror_feedback = 0.9", "error_feedback"),
        ("[delta]\ncodec = 'auto'", 'codec = "auto"'),
        ("[search]\nstrategy = 'greedy_soup'", "scores whole models"),
        ("[merge]\nmethod = 'fisher'", "needs statistics"),
        ("[merge]\nmethod = 'ties'\ndensity = [0.2, 0.4]", "vary over the model"),
    ],
)
def test_what_needs_the_whole_model_is_refused(sections: str, problem: str) -> None:
    text = f"[federation]\nname = 'f'\n[model]\nbase = 'b'\n[streaming]\nfragments = 2\n{sections}\n"
    with pytest.raises(ConfigError, match=f"streaming.fragments: above 1 does not go with .*{problem}"):
        parse_config(text, folder=Path(), where="fedmerge.toml")


@pytest.mark.parametrize(
    ("train", "streaming", "problem"),
    [
        ("steps = 8", "overlap_steps = 2", "goes with fragments above 1"),
        ("steps = 8", "fragments = 2\noverlap_steps = 8", "has to be less than .* steps"),
        ("", "fragments = 2\noverlap_steps = 2", "has to be less than .* steps"),
        (
            "trainer = 'command'\nsteps = 8",
            "fragments = 2\noverlap_steps = 2",
            'goes with the trainers .*not with "command"',
        ),
    ],
)
def test_overlap_that_can_not_be_is_refused(train: str, streaming: str, problem: str) -> None:
    text = f"[federation]\nname = 'f'\n[model]\nbase = 'b'\n[train]\n{train}\n[streaming]\n{streaming}\n"
    with pytest.raises(ConfigError, match=f"streaming.overlap_steps: {problem}"):
        parse_config(text, folder=Path(), where="fedmerge.toml")


def test_a_site_whose_trainer_can_not_stop_within_a_round_says_so(tmp_path: Path) -> None:
    finished = ExistingCheckpoint(model=tmp_path, num_examples=1)
    with pytest.raises(ConfigError, match="checkpoint takes all steps of a round at once"):
        finished.train(TrainTask(tmp_path, {}, 1, 1, tmp_path, part=range(2)))
