"""The sections of fedmerge.toml that only `fedmerge simulate` reads."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from fedmerge.config.section import OpenSection, Section
from fedmerge.config.values import FilePath, Name, Positive


class SimulatedNode(OpenSection):
    """A node that `fedmerge simulate` plays. Further keys are settings of the trainer, such as text_column."""

    name: Name = Field(examples=["north"])
    """Name of the node."""
    data: FilePath | None = Field(default=None, examples=["data/north-train.jsonl"])
    """Its training data; only trainers that bring their own do without."""
    test: FilePath | None = Field(default=None, examples=["data/north-test.jsonl"])
    """Its held-out data; without it the node is not evaluated."""


class Simulate(Section):
    """What `fedmerge simulate` supposes about nodes. Time is virtual: waiting takes none, and all reports are in it."""

    nodes: int = Field(default=0, ge=0, le=1_000_000)
    """Nodes to make up, each with a part of data, instead of those in [[nodes]]."""
    data: FilePath | None = Field(default=None, examples=["data/all.jsonl"])
    """The data to share out among them: JSON Lines or CSV."""
    partition: Literal["iid", "dirichlet", "group", "size"] = "iid"
    """How: at random ("iid"); each label unevenly ("dirichlet"), the less alpha the more so; one label or domain to a
    node ("group"); or at random in uneven parts ("size")."""
    by: str = Field(default="label", min_length=1)
    """Column with the label or domain to share out by."""
    alpha: float = Field(default=0.5, gt=0, le=1e6)
    """Parameter of the Dirichlet distribution of "dirichlet" and "size"."""
    test_share: float = Field(default=0.0, ge=0, le=0.5)
    """Share of a node's rows that it keeps to evaluate models with; 0 evaluates none."""
    engine: Literal["inline", "pool", "ray", "flower"] = "inline"
    """Where nodes train: in this process ("inline"), in several ("pool"), on Ray ("ray"; needs the extra ray), or in
    ClientApps of Flower's simulation engine ("flower"; needs the extra flower)."""
    workers: Positive = 2
    """Processes of "pool", virtual SuperNodes of "flower"."""
    threads: int = Field(default=0, ge=0, le=1024)
    """Threads that a node trains with, whatever the engine, since results depend on it; 0: as many as PyTorch would
    take here (the cores, or OMP_NUM_THREADS), shared among so many workers."""
    ray_address: str | None = Field(default=None, min_length=1, examples=["auto"])
    """Ray cluster to use, HOST:PORT, or "auto" for the one that runs here. Without it one is started."""
    ray_cpus: float = Field(default=1.0, ge=0, le=1e4)
    """Cores that a node takes on Ray, Flower's too; fractions share one."""
    ray_gpus: float = Field(default=0.0, ge=0, le=1e4)
    """Accelerators that a node takes on Ray, Flower's too; fractions share one."""
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    """Seed of everything below that is drawn at random, by node."""
    train_s: float = Field(default=0.0, ge=0, le=1e9)
    """Seconds that a fine-tune takes."""
    up_mbit_s: float = Field(default=0.0, ge=0, le=1e9)
    """Megabits per second from a node to the coordinator; 0 is no limit."""
    down_mbit_s: float = Field(default=0.0, ge=0, le=1e9)
    """Megabits per second to a node; 0 is no limit."""
    latency_s: float = Field(default=0.0, ge=0, le=1e6)
    """Seconds until a transfer begins."""
    spread: float = Field(default=0.0, ge=0, le=5)
    """How nodes differ: the standard deviation of the logarithm of each of these three, whose medians stand above."""
    stragglers: float = Field(default=0.0, ge=0, le=1)
    """Share of nodes that train more slowly than the others."""
    straggler_factor: float = Field(default=4.0, ge=1, le=1e6)
    """How many times more slowly."""
    online: float = Field(default=1.0, gt=0, le=1)
    """Share of hours in which a node is there; away, it neither begins a round nor delivers."""
    dropout: float = Field(default=0.0, ge=0, le=1)
    """Share of rounds that a node begins and never delivers in."""
    availability: FilePath | None = Field(default=None, examples=["availability.csv"])
    """CSV with columns node, from_s and to_s: when nodes are there, in seconds since the simulation began, in place of
    "online"."""
    availability_period_s: float = Field(default=0.0, ge=0, le=1e9)
    """After so many seconds the file begins again; 0: after its last row nobody is there any more."""
    bad_nodes: int = Field(default=0, ge=0, le=1_000_000)
    """How many nodes are bad."""
    attack: Literal["sign_flip", "scale", "noise", "inner_product", "little", "label_flip"] = "sign_flip"
    """What they send: their update the other way or many times too large; noise; together the other way, or as far off
    the mean as others are; or what they train on data whose labels, in the column "by", are changed."""
    attack_strength: float | None = Field(default=None, gt=0, le=1e6, examples=[1.5])
    """How many times their update's length (of "little": how many standard deviations). Without it .5 of
    "inner_product", 1.5 of "little", 1 of "sign_flip", 10 of the others."""

    @field_validator("data")
    @classmethod
    def _enough_to_share_out(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        if info.data.get("nodes") and value is None:
            raise ValueError("is needed with simulate.nodes: the data to share out among them")
        return value

    @field_validator("availability")
    @classmethod
    def _one_way_to_be_away(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        if value is not None and info.data.get("online") != 1.0:
            raise ValueError("and simulate.online both say when nodes are there: leave one out")
        return value
