"""The sections of fedmerge.toml, one class each: the keys, their defaults, and what they mean.

The docstring below each field is its only documentation: `fedmerge init` and `fedmerge schema` print it.
Only what one value can show to be wrong is checked here; that a path exists is checked when it is used.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationInfo, field_validator

from fedmerge.config.section import OpenSection, Section
from fedmerge.config.simulate import Simulate, SimulatedNode
from fedmerge.config.values import (
    Address,
    BlobsUrl,
    DatabaseUrl,
    FilePath,
    Grace,
    Labels,
    Name,
    Positive,
    Range,
    Sample,
    Size,
    ValueType,
    is_private,
    num_cores,
    parse_address,
)
from fedmerge.errors import InputError

if TYPE_CHECKING:
    from fedmerge.checks import ScreenPolicy
    from fedmerge.codec import Codec
    from fedmerge.merge import Recipe, Workers
    from fedmerge.regime import Uplink
    from fedmerge.search import SearchSettings
    from fedmerge.search.local import Evaluate
    from fedmerge.store.blobs import BlobStore
    from fedmerge.streaming import Fragments
    from fedmerge.tensors import Schema


class Federation(Section):
    """Who the federation is, and where its coordinator keeps things."""

    name: Name = Field(examples=["my-federation"])
    """Name of the federation: letters, digits, '-', '_' and '.'. It is signed into every statement."""
    state: FilePath = Path("state")
    """Folder of the ledger, the uploaded deltas and the published model versions."""
    key: FilePath = Path("coordinator.key")
    """The coordinator's private signing key; made on first start when there is none."""
    trusted: FilePath = Path("trusted")
    """Folder of the nodes' public keys, one NAME.pem each; fill it with: fedmerge keys trust."""


class Model(Section):
    """The model that every node starts from."""

    base: FilePath = Field(examples=["base-model"])
    """Folder of the base model, as Hugging Face saves it: config.json and safetensors weights."""
    name: str | None = Field(default=None, min_length=1, max_length=200, examples=["organisation/base-model"])
    """What the base model is called in public; model cards name it. Without it they say the folder's name."""
    labels: Labels = Field(default=None, examples=[["negative", "positive"]])
    """Makes a classification head for these labels on a plain encoder: a list of names, or the path of a text file
    with one name per line."""

    def label_names(self) -> tuple[str, ...] | None:
        """Return the label names, read from the file if they stand in one; raise `InputError` if it has no use."""
        if not isinstance(self.labels, Path):
            return self.labels
        try:
            names = tuple(line.strip() for line in self.labels.read_text(encoding="utf-8").splitlines() if line.strip())
        except (OSError, UnicodeDecodeError) as err:
            raise InputError(f"{self.labels}: can't be read ({getattr(err, 'strerror', None) or 'not text'})") from err
        if len(names) < 2 or len(set(names)) < len(names):
            raise InputError(f"{self.labels}: should hold two or more different label names, one per line")
        return names


class Server(Section):
    """The address nodes connect to, and what one of them may send."""

    listen: Address = "127.0.0.1:8700"
    """Address to listen on, host:port; port 0 takes any free one. "0.0.0.0:8700" listens on every interface."""
    tls_cert: FilePath | None = Field(default=None, examples=["server.crt"])
    """Certificate chain (PEM) of your own, together with tls_key. Without them a self-signed certificate is made."""
    tls_key: FilePath | None = Field(default=None, examples=["server.key"])
    """Private key (PEM) of tls_cert."""
    ca: FilePath | None = Field(default=None, examples=["ca"])
    """Folder of the federation's own certificate authority; make it with: fedmerge keys ca. It issues the coordinator's
    certificate, if there is no tls_cert, and those of nodes."""
    client_certificates: Literal["off", "required"] = "off"
    """Whether nodes must show a certificate of the authority in ca, or of client_ca, to connect at all."""
    client_ca: FilePath | None = Field(default=None, examples=["partners-ca.crt"])
    """Certificates (PEM) of other authorities whose client certificates are accepted."""
    certificate_hours: float = Field(default=24.0, gt=0, le=8760)
    """How long a node's certificate lasts; nodes renew it after half of that."""
    max_payload_bytes: Size = Field(default=2 << 30, examples=["2GiB"])
    """Largest delta a node may upload, in bytes or as "500MB", "2GiB"."""
    max_uploads: Positive = 32
    """Deltas that may stream in at once, one of each node; who finds no place is told to come back. Each takes about
    8 MiB of memory."""
    max_downloads: Positive = 128
    """Files that may stream out at once, one to each node; who finds no place is told to come back."""
    max_bytes_per_s: Size | None = Field(default=None, examples=["20MB"])
    """Bytes per second that a node may send, and as many that it may fetch; a faster one is slowed down."""
    idle_s: float = Field(default=60.0, gt=0)
    """Seconds for 1 MiB to arrive from a node, or to be taken by it; a slower or silent one loses its place, and
    resumes where it stood."""
    lease_s: float = Field(default=15.0, ge=1)
    """Seconds without a sign of life after which a coordinator that stands by, on the same database, takes over."""

    @field_validator("tls_key")
    @classmethod
    def _both_or_none(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        if "tls_cert" in info.data and (value is None) != (info.data["tls_cert"] is None):
            raise ValueError("tls_cert and tls_key go together: give both or neither")
        return value

    @field_validator("client_ca")
    @classmethod
    def _has_an_authority(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        if info.data.get("client_certificates") == "required" and value is None and info.data.get("ca") is None:
            raise ValueError('client_certificates = "required" needs ca or client_ca')
        return value

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of `listen`."""
        return parse_address(self.listen)

    @property
    def is_local(self) -> bool:
        """Whether nodes are near: `listen` is an address of a private network."""
        return is_private(self.address[0])


class Store(Section):
    """Where the coordinator keeps what it must not lose; by default all of it is in federation.state."""

    database: DatabaseUrl = Field(default=None, examples=["postgresql+psycopg://fedmerge@db.example.org/fedmerge"])
    """Database of the ledger: "sqlite:///FILE", or a PostgreSQL server's (needs the extra postgres). A password rather
    belongs in the environment: FEDMERGE_STORE__DATABASE or PGPASSWORD."""
    blobs: BlobsUrl = Field(default=None, examples=["s3://bucket/prefix"])
    """Where deltas, updates and steps lie: a folder, or a bucket of an object store that speaks S3 (needs the extra s3;
    credentials are taken from the environment, AWS_ACCESS_KEY_ID and so on)."""


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


_SCALAR: dict[str, Any] = {"type": ["number", "boolean", "string"]}
_DEPTH: dict[str, Any] = {"type": "array", "items": {"type": "number"}, "minItems": 1}
_NAMES: dict[str, Any] = {"type": "object", "additionalProperties": {"anyOf": [_SCALAR, _DEPTH]}, "minProperties": 1}


class _WithParameters(OpenSection):
    """A section whose further keys are parameters of a method, which may vary over layers."""

    model_config = ConfigDict(json_schema_extra={"additionalProperties": {"anyOf": [_SCALAR, _DEPTH, _NAMES]}})


class MergeStep(_WithParameters):
    """One step of several. Further keys are its parameters."""

    method: str = Field(min_length=1)
    """Name of the step."""


class Merge(_WithParameters):
    """How task vectors become one. Further keys are the method's own parameters, such as density for "ties": a value,
    or a list that runs over the layers, or a table by patterns of tensor names."""

    method: str = Field(default="fedavg", min_length=1)
    """Name of the merge method."""
    steps: Annotated[
        tuple[MergeStep, ...], Field(strict=False, examples=[[{"method": "dare"}, {"method": "elect"}]])
    ] = ()
    """Several steps instead of one method: what thins each task vector out, a method, and what averages over rounds."""
    scope: Literal["tensor", "model"] = "tensor"
    """What a method looks at, and what a density is a share of: each tensor, or the whole model flattened into one
    vector, as the authors of TIES and PCB have it, which takes memory for all deltas at once."""
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    """Seed of methods that draw random numbers; the same seed gives the same model, bit for bit."""
    threads: int = Field(default=0, ge=0, le=1024)
    """Tensors that are merged at once; 0 is one per core. The model has the same bits whatever it is."""
    memory_budget: Size = Field(default=2 << 30, examples=["2GiB"])
    """About how much memory the tensors that are merged at once may share, in bytes or as "500MB", "2GiB"."""


class Screen(Section):
    """Which deltas count, and for how much."""

    max_norm_ratio: float = Field(default=10.0, ge=1)
    """Leaves out a delta whose norm is over so many times the median norm, where there are three or more."""
    clip_norm_ratio: float | None = Field(default=None, gt=0, examples=[2.0])
    """Scales a delta down to so many times the median norm when it is longer."""
    clip_quantile: float = Field(default=0.0, ge=0, le=1)
    """Above 0, scales longer deltas down to a norm that starts at this quantile of the first round's norms, and follows
    it over the rounds, slowly, so that no single round sets it; 0.5 is the median."""
    clip_rate: float = Field(default=0.2, gt=0, le=1)
    """How fast that norm follows: by at most so much of itself in a round, about."""
    max_unchanged: float | None = Field(default=None, gt=0, le=1, examples=[0.9])
    """Leaves out a delta of which more than this share of the entries is zero, as of a node that did not train. With a
    sparsify of [delta], or frozen tensors, many are zero in every delta."""
    duplicates: Literal["reject", "accept"] = "reject"
    """What becomes of a delta that another node sent as well, entry for entry: one of them counts, or all."""
    max_overlap: float | None = Field(default=None, gt=0, le=1, examples=[0.95])
    """Leaves out a delta that agrees with another node's in the signs of more than this share of its entries: a copy,
    even if it was scaled or has noise. Honest nodes with alike data agree in 50 to 80 %."""
    probe: str | None = Field(default=None, min_length=1, examples=["python score.py {model}"])
    """A command of the coordinator's that prints the metrics of the model directory {model} as a JSON object. It scores
    the model with each delta alone, and without; no shell looks at it."""
    probe_metric: str = Field(default="auto", min_length=1)
    """Which of the metrics counts: its name, or -NAME where lower is better; "auto" is accuracy, else -loss."""
    probe_timeout_s: float = Field(default=3600.0, gt=0)
    """Seconds that the command may take for one model."""
    min_gain: float = 0.0
    """Leaves out a delta that adds less than this to the score; below 0 for nodes whose data are of another kind."""
    weighting: Literal["examples", "equal"] = "examples"
    """Weighs nodes by their number of training examples, or all the same."""
    max_weight_ratio: float = Field(default=3.0, ge=1)
    """Caps a node's weight at so many times the median weight, as the number of examples is the node's own claim."""
    max_weight_node: float = Field(default=1.0, gt=0, le=1)
    """Largest share of the whole weight that one node may have."""
    max_weight_org: float = Field(default=1.0, gt=0, le=1)
    """Largest share that all nodes of one organisation may have together."""
    robust: Literal["auto"] | list[str] = "auto"
    """Robust rules that the deltas go through before the merge: some of "arc", "nnm", "krum", "multi_krum", "bulyan",
    "centered_clip", "geometric_median" and "fltrust". "auto" takes ["arc", "nnm"], and the merge method "trimmed_mean",
    from a min_nodes of 5 up, where [merge] says nothing else and every entry travels; otherwise none."""
    max_bad: int = Field(default=1, ge=1)
    """How many nodes may be bad; each rule needs some number of good ones for it (`rounds.min_nodes`). With robust =
    "auto" it is 2 from a min_nodes of 9 up, if not more."""
    root: str = ""
    """Name, if any, of a node of the operator's own, on data beyond doubt: the rule "fltrust" holds the others' deltas
    against its, which is not merged. Trust its key before the coordinator starts; min_nodes does not count it."""


class Search(Section):
    """Instead of one merge, try many: nodes score candidates on their own test data, and the best is published. Nodes
    that fetch as many candidates as there are nodes can compute each other's task vectors from them."""

    strategy: Literal["none", "greedy_soup", "cma_es"] = "none"
    """No search ("none"); or which models to merge, added one by one unless that makes it worse ("greedy_soup"); or a
    factor on each node's weight and the parameters in vary, by an evolution strategy ("cma_es")."""
    evaluations: Positive = 50
    """Candidates after which no further generation begins; every node fetches and scores each of them."""
    metric: str = Field(default="auto", min_length=1)
    """Which of a node's metrics counts: its name, or -NAME where lower is better; "auto" is accuracy, else -loss."""
    deadline_s: float = Field(default=3600.0, gt=0)
    """Seconds that nodes have for one generation; who misses it has no say in the rest of the round's search."""
    vary: dict[str, Range] | None = Field(default=None, examples=[{"density": [0.1, 0.9]}])
    """Parameters of the merge method for "cma_es" to vary, each with its lowest and highest value."""
    layers: Positive = 1
    """Factors of "cma_es" for each node, spread over the model's depth; 1 is the same factor everywhere."""
    population: int = Field(default=0, ge=0)
    """Candidates in a generation of "cma_es"; 0 takes 4 + 3 ln D for D numbers to find."""
    step: float = Field(default=0.1667, gt=0, le=1)
    """First spread of "cma_es", as a share of each number's range."""

    def settings(self) -> SearchSettings | None:
        """Return how to search; None without a search. Raises `ConfigError` when keys do not go together."""
        if self.strategy == "none":
            return None
        from fedmerge.search import SearchSettings

        return SearchSettings(**self.model_dump() | {"vary": self.vary or {}})


class Outer(Section):
    """The optimizer that takes the merged task vector as its step."""

    name: Literal[
        "sgd",
        "momentum",
        "nesterov",
        "delayed_nesterov",
        "adam",
        "yogi",
        "adagrad",
        "flower_adam",
        "flower_yogi",
        "flower_adagrad",
    ] = "sgd"
    """The step: lr times the merged task vector ("sgd"), or with momentum across rounds, as in FedAvgM ("momentum") and
    DiLoCo ("nesterov"), for async_buffer moved once in so many rounds ("delayed_nesterov"), or adapted to each entry's
    past, as in FedAdam, FedYogi and FedAdagrad, by their paper, or as Flower has them ("flower_...")."""
    lr: float = Field(default=1.0, gt=0)
    """Learning rate. 1.0 with "sgd" adds the merged task vector as it is; DiLoCo takes 0.7 with "nesterov". Adaptive
    ones need about 0.01 or less: their steps do not grow with the task vectors."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Momentum of "momentum" and both kinds of Nesterov."""
    delay: Positive = 4
    """Rounds between two moves of the momentum in "delayed_nesterov": about the nodes over async_buffer."""
    activation: float = Field(default=0.0, ge=0, le=1)
    """Momentum's share of the steps in between: none (0), up to as much as in each of them (1)."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the mean of updates in "adam" and "yogi", in both forms, and "adagrad" (whose authors take 0)."""
    beta2: float = Field(default=0.99, ge=0, lt=1)
    """Decay of the mean of their squares in "adam" and "yogi", in both forms."""
    tau: float = Field(default=1e-3, gt=0)
    """How little the adaptive ones adapt: it is added to the root of the squares."""


# What each outer optimizer takes; here as well as in its signature, which would load torch.
_ADAPTIVE = {"lr", "beta1", "beta2", "tau"}
_OUTER_KEYS: dict[str, set[str]] = {
    "sgd": {"lr"},
    "momentum": {"lr", "momentum"},
    "nesterov": {"lr", "momentum"},
    "delayed_nesterov": {"lr", "momentum", "delay", "activation"},
    "adam": _ADAPTIVE,
    "yogi": _ADAPTIVE,
    "adagrad": _ADAPTIVE - {"beta2"},
    "flower_adam": _ADAPTIVE,
    "flower_yogi": _ADAPTIVE,
    "flower_adagrad": {"lr", "tau"},
}


class Streaming(Section):
    """Streaming DiLoCo: rounds that send a part of the model each, in turn, while nodes train all of it."""

    fragments: Positive = 1
    """Parts of the model, one of which travels in a round; 1 sends all of it in every round."""
    pattern: Literal["strided", "sequential"] = "strided"
    """Which layers are in a part: every so many-th ("strided"), or neighbours ("sequential")."""
    mixing: float = Field(default=0.0, ge=0, lt=1)
    """What a node keeps of its own values where new ones were published: nothing (0), or a share of them."""


class Publish(Section):
    """What stands beside a published model."""

    adapter_rank: int = Field(default=0, ge=0, le=4096)
    """Largest rank of a LoRA adapter that holds the model's change of the base; 0 publishes none. From the sum of the
    ranks that nodes trained, over all nodes and rounds, it is the same model; below that its card says what is kept."""


class Config(Section):
    """A whole fedmerge.toml: valid, with defaults filled in and paths resolved."""

    federation: Federation
    model: Model
    server: Server
    store: Store
    rounds: Rounds
    train: Train
    delta: Delta
    merge: Merge
    screen: Screen
    search: Search
    outer: Outer
    streaming: Streaming
    publish: Publish
    simulate: Simulate
    nodes: Annotated[tuple[SimulatedNode, ...], Field(strict=False)] = ()

    @field_validator("nodes")
    @classmethod
    def _names_differ(cls, nodes: tuple[SimulatedNode, ...]) -> tuple[SimulatedNode, ...]:
        names = [node.name for node in nodes]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two nodes are called {twice[0]!r}")
        return nodes

    def database_url(self) -> str:
        """Return the URL of the ledger's database."""
        return self.store.database or f"sqlite:///{self.federation.state / 'ledger.sqlite'}"

    def open_blobs(self, *, durable: bool = True) -> BlobStore:
        """Return the store of deltas, updates and steps. Raises `ResourceError` when it can't be opened.

        In a folder it is `durable` unless it is only for a simulation; a bucket always is.
        """
        from fedmerge.store.blobs import BlobStore

        directory, blobs = self.federation.state / "blobs", self.store.blobs
        if isinstance(blobs, str):
            from fedmerge.store.objects import ObjectShelf

            return BlobStore(directory, ObjectShelf(blobs, directory))
        from fedmerge.store.shelves import FolderShelf

        return BlobStore(directory, FolderShelf(blobs or directory, durable=durable))

    def train_settings(self) -> dict[str, Any]:
        """Return the trainer's name and settings, as a round's plan carries them."""
        return self.train.model_dump()

    def outer_settings(self) -> dict[str, Any]:
        """Return the outer optimizer's name and the parameters it takes, as a round's plan carries them."""
        return self.outer.model_dump(include={"name", *_OUTER_KEYS[self.outer.name]})

    def fragments(self) -> Fragments | None:
        """Return in which parts the model is sent; None where rounds send all of it."""
        if self.streaming.fragments == 1:
            return None
        from fedmerge.streaming import Fragments

        return Fragments(self.streaming.fragments, self.streaming.pattern, self.streaming.mixing)

    # The builders import late: they need torch, which a mistake in the file should not have to wait for.

    def uplink(self, schema: Schema) -> Uplink:
        """Return how nodes encode task vectors of this `schema`, chosen for them with "auto"."""
        from fedmerge.merge.methods import LINEAR
        from fedmerge.regime import Regime, Uplink, choose

        if self.delta.codec == "custom":
            return Uplink(self._codec(schema), self.delta.error_feedback, "as configured")
        lora_rank = self.train.extras.get("lora_rank", 0)
        recipe = self.recipe()
        return choose(
            Regime(
                schema=schema,
                num_rounds=self.rounds.num_rounds,
                lora_rank=lora_rank if isinstance(lora_rank, int) else 0,
                merge="+".join(step.name for step in recipe.steps),
                is_linear=recipe.method in LINEAR and not recipe.before and not self.robust_rules(),
                # An average over rounds carries the past on as momentum does.
                has_momentum=self.outer.name != "sgd" or bool(recipe.after),
                is_local=self.server.is_local,
            )
        )

    def takes_steps(self, schema: Schema) -> bool:
        """Return whether nodes fetch steps, of a base model of this `schema`, and not updates."""
        if self.delta.downlink != "auto":
            return self.delta.downlink == "steps"
        sizes = dict.fromkeys((True, False), 0)
        for spec in schema.values():
            sizes[spec.dtype in {"BF16", "F16"}] += spec.num_elements if spec.is_float else 0
        return sizes[True] > sizes[False]

    def downlink_codec(self, schema: Schema) -> Codec:
        """Return how the published update of a base model of this `schema` is encoded: with every element.

        Where nodes fetch steps it loses nothing, as only auditors read it.
        """
        values = "fp32" if self.takes_steps(schema) else self.delta.downlink.replace("auto", "int8")
        return self._codec(schema, sparsify="none", density=1.0, rank=0, values=values)

    def _codec(self, schema: Schema, **changes: Any) -> Codec:
        from fedmerge.codec import SAME, Codec
        from fedmerge.regime import with_small_values

        settings = self.delta.codec_settings() | changes
        if settings["small_values"] == "auto":
            return with_small_values(Codec(**settings | {"small_values": SAME}), schema)
        return Codec(**settings)

    def recipe(self) -> Recipe:
        """Return the merge method and its parameters; the seed stays in `merge.seed`."""
        from fedmerge.merge import Recipe

        if self.merge.steps:
            recipe = Recipe.from_steps([(step.method, step.extras) for step in self.merge.steps])
            return replace(recipe, scope=self.merge.scope)
        if self._is_hardened():
            # So much that floor(trimmed * nodes) is max_bad with the least number of them, in floating point.
            return Recipe("trimmed_mean", {"trimmed": round(self.max_bad() / self.rounds.min_nodes + 5e-5, 4)})
        return Recipe(self.merge.method, self.merge.extras, scope=self.merge.scope)

    def merge_workers(self) -> Workers:
        """Return on how many threads and in how much memory rounds are merged, which is not part of their plan."""
        from fedmerge.merge import Workers

        return Workers(self.merge.threads or num_cores(), self.merge.memory_budget)

    def search_settings(self) -> SearchSettings | None:
        """Return how to search for the merge; None without a search. Raises `ConfigError` when it can't be done."""
        settings = self.search.settings()
        if settings is not None:
            settings.check(self.recipe())
        return settings

    def probe(self) -> Evaluate | None:
        """Return what scores a model directory on the coordinator's data. Raises `ConfigError` for no such command."""
        if self.screen.probe is None:
            return None
        from fedmerge.search.local import evaluation_command

        timeout_s = self.screen.probe_timeout_s
        return evaluation_command(
            self.screen.probe, timeout_s=timeout_s, setting="screen.probe", more_time="screen.probe_timeout_s"
        )

    def robust_rules(self) -> tuple[str, ...]:
        """Return the robust rules before the merge, chosen for the federation with "auto"."""
        if isinstance(self.screen.robust, list):
            return tuple(self.screen.robust)
        return ("arc", "nnm") if self._is_hardened() else ()

    def max_bad(self) -> int:
        """Return how many bad nodes the robust rules are to hold against."""
        few = min(2, (self.rounds.min_nodes - 1) // 4) if self._is_hardened() else 1
        return max(self.screen.max_bad, few)

    def _is_hardened(self) -> bool:
        """Whether rounds are merged by ARC, NNM and the trimmed mean: by default, where these keep their promise.

        They look at every entry, so thinned deltas would be trimmed to nothing; and a search, and control variates,
        need to know whose delta is whose.
        """
        merge = self.merge
        return (
            self.screen.robust == "auto"
            and self.rounds.min_nodes >= 5
            and not (merge.steps or merge.extras or merge.model_fields_set & {"method", "scope"})
            and self.delta.codec == "custom"
            and self.delta.sparsify in {"none", "lowrank"}
            and self.search.strategy == "none"
            and not self.train.extras.get("scaffold")
        )

    def screen_policy(self, root: str | None = None) -> ScreenPolicy:
        """Return which deltas count, and for how much; `root` is the key id of the node that `screen.root` names."""
        from fedmerge.checks import ScreenPolicy

        local = {"probe", "probe_metric", "probe_timeout_s"}
        settings = self.screen.model_dump(exclude={"robust", "max_bad", "root", *local})
        settings["clip_quantile"] = self.screen.clip_quantile or None
        settings["min_gain"] = None if self.screen.probe is None else self.screen.min_gain
        return ScreenPolicy(**settings, robust=self.robust_rules(), max_bad=self.max_bad(), root=root)
