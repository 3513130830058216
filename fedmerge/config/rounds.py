"""The sections of fedmerge.toml on rounds: when they close, how nodes train, and how task vectors travel."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from fedmerge.config.section import OpenSection, Section
from fedmerge.config.values import (
    Grace,
    Positive,
    Sample,
    ValueType,
)


class Rounds(Section):
    """When a round begins and ends."""

    num_rounds: Positive = 3
    """Number of rounds to run."""
    min_nodes: Positive = 2
    """Nodes whose deltas a round needs; a round that closes with fewer fails."""
    fraction: float = Field(default=0.0, ge=0, le=1)
    """Share of the nodes that it needs as well, of those that are trusted, or sampled."""
    deadline_s: float = Field(default=3600.0, gt=0)
    """Seconds after which a round closes with the deltas it has."""
    grace_s: Grace = 30.0
    """Seconds a round stays open for further nodes after it has enough deltas; or "auto", which measures how far apart
    deltas arrive, and closes once nothing has come for unusually long."""
    sample: Sample = Field(default=None, examples=[0.5])
    """Asks a part of the nodes in each round, drawn by merge.seed: so many of them, or a share of them below 1, but
    min_nodes at least. Without it every node is asked."""
    late: Literal["reject", "carry"] = "reject"
    """What becomes of a delta that comes after its round was closed: it is refused, or counts in the next merge, s
    rounds late and 1/sqrt(1+s) as much ("carry")."""
    max_staleness: Positive = 3
    """Rounds that a delta may be late."""
    async_buffer: Positive | None = Field(default=None, examples=[4])
    """Closes a round as soon as so many deltas are there, late ones included, whoever they are of: nodes at their own
    pace, none of which waits for a slower one. Then fraction and grace_s have no effect."""
    dynamic_steps: float = Field(default=1.0, gt=0, le=1)
    """With async_buffer, and below 1: asks slow nodes for fewer of the steps in [train], so that their deltas come as
    often as those of the fastest, but for this share of them at least (DyLU). 1 asks all for the same number."""
    publish_after_cosignatures: int = Field(default=0, ge=0)
    """Members that must have checked the coordinator's log, with the merge in it, and cosigned it before a model is
    published; more than half of them, and no two groups can be shown different models. 0 publishes at once."""

    @property
    def staleness_limit(self) -> int:
        """Rounds that a delta may be late; 0 where late ones are refused."""
        return self.max_staleness if self.late == "carry" or self.async_buffer is not None else 0

    @field_validator("publish_after_cosignatures")
    @classmethod
    def _within_the_quorum(cls, value: int, info: ValidationInfo) -> int:
        if value > info.data.get("min_nodes", value):
            raise ValueError("must not be more than min_nodes: only nodes that take part cosign")
        return value


class Train(OpenSection):
    """How nodes fine-tune; a node's own settings take precedence. Further keys are settings of the trainer."""

    trainer: str = Field(default="text-classification", min_length=1)
    """What fine-tunes the model on a node."""


class Delta(Section):
    """How task vectors, and the update that is published, are encoded on their way."""

    codec: Literal["custom", "auto"] = "custom"
    """Who chooses how task vectors travel: the keys below ("custom"), or the number of rounds, the model's size, the
    merge method, the outer optimizer and lora_rank in [train] ("auto"; fedmerge doctor says what, and why)."""
    sparsify: Literal["none", "seeded", "topk", "layerwise_topk", "lowrank"] = "none"
    """What travels: all ("none"), or a random part that sender and receiver draw from the same seed, rescaled to keep
    its mean, so that no index travels ("seeded"), or the largest of every 4096 ("topk") or of a whole tensor
    ("layerwise_topk") and their indices, or matrices as two factors ("lowrank", exact for LoRA adapters)."""
    density: float = Field(default=1.0, ge=1e-6, le=1)
    """Share of the elements that a sparsifier keeps, at most 1."""
    values: ValueType = "int8"
    """Number format of the elements that travel: "fp32", "bf16", "fp16", or a few bits and one scale per block: evenly
    spaced ("int8", or "int4", which wants a block_size of 64), 8 or 4 levels made for Gaussian values ("lloyd3",
    "lloyd2"), or the sign alone ("sign", the match for "topk")."""
    block_size: int = Field(default=1024, ge=8, le=1 << 20)
    """Elements that share a scale, in number formats that have scales."""
    small_elements: int = Field(default=4096, ge=0, le=1 << 31)
    """Vectors (biases, norms) of fewer elements than this are never thinned."""
    small_values: ValueType | Literal["same", "auto"] = "auto"
    """Number format of those: "fp32", with which they arrive exactly, as for values ("same"), or "auto", which is
    "fp32" unless that would make a delta more than 2.5 % larger, as it does in small models."""
    zstd_level: int = Field(default=3, ge=1, le=19)
    """Effort of the final compression, from 1 (fast) to 19 (small)."""
    max_noise_ratio: float = Field(default=0.1, ge=0, le=1e6)
    """Noise that the mask of "seeded" may add to a tensor, as a share of its weights' norm; a tensor in which it would
    be more travels dense instead."""
    fallback: ValueType | Literal["none"] = "lloyd3"
    """Number format of tensors that travel dense for that reason; "none" refuses such a delta."""
    rank: int = Field(default=0, ge=0, le=4096)
    """Largest rank of the factors of "lowrank". Adapters up to it travel as they are, other matrices cut down to it."""
    factors: ValueType | Literal["exact"] = "exact"
    """Number format of the factors of "lowrank"; "exact" is the narrowest of "bf16", "fp16", "fp32" that loses
    nothing."""
    error_feedback: float = Field(default=0.0, ge=0, le=1)
    """Share of what top-k left unsent that a node adds to its next delta; 0 forgets it. Over many rounds 0.95 is
    recommended, with [outer] name = "sgd" alone."""
    downlink: Literal["auto", "steps"] | ValueType = "auto"
    """What nodes fetch after a round: the new version's step from the one before in units in the last place, which is
    exact ("steps"), or the update, in a number format as for values. "auto" takes steps where most of the base model is
    16-bit, and "int8" otherwise."""
    snapshot_every: Positive = 5
    """Rounds between snapshots, where nodes fetch steps: a step from the base model straight to a version, so that a
    newcomer need not go through all rounds."""

    @field_validator("density")
    @classmethod
    def _has_effect(cls, value: float, info: ValidationInfo) -> float:
        if value != 1.0 and info.data.get("sparsify") in {"none", "lowrank"}:
            raise ValueError('has no effect without sparsify = "seeded", "topk" or "layerwise_topk"')
        return value

    @field_validator("rank")
    @classmethod
    def _has_factors(cls, value: int, info: ValidationInfo) -> int:
        if "sparsify" in info.data and (value > 0) != (info.data["sparsify"] == "lowrank"):
            raise ValueError('sparsify = "lowrank" takes a rank of at least 1, and the others take none')
        return value

    @field_validator("error_feedback")
    @classmethod
    def _has_a_residual(cls, value: float, info: ValidationInfo) -> float:
        # Values alone lose next to nothing, and "seeded" is unbiased, so its rescaled values overshoot the residual.
        if value and info.data.get("sparsify", "topk") not in {"topk", "layerwise_topk"}:
            raise ValueError(
                'goes with "topk" and "layerwise_topk" alone: the others leave nothing out to be sent later'
            )
        return value

    def codec_settings(self) -> dict[str, Any]:
        """Return the settings that are the codec's own, by name."""
        return self.model_dump(exclude={"codec", "error_feedback", "downlink", "snapshot_every"})


class Streaming(Section):
    """Streaming DiLoCo: rounds that send a part of the model each, in turn, while nodes train all of it."""

    fragments: Positive = 1
    """Parts of the model, one of which travels in a round; 1 sends all of it in every round."""
    pattern: Literal["strided", "sequential"] = "strided"
    """Which layers are in a part: every so many-th ("strided"), or neighbours ("sequential")."""
    mixing: float = Field(default=0.0, ge=0, lt=1)
    """What a node keeps of its own values where new ones were published: nothing (0), or a share of them."""
    overlap_steps: int = Field(default=0, ge=0)
    """Of the next round's steps, those that a node takes while its part is under way, before it has what others sent
    (tau). With the trainers causal-lm and text-classification."""
