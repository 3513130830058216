"""The sections of fedmerge.toml on merging: the method, what is screened, the search, the step, what is published."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import ConfigDict, Field

from fedmerge.config.section import OpenSection, Section
from fedmerge.config.values import (
    Positive,
    Range,
    Size,
)

if TYPE_CHECKING:
    from fedmerge.search import SearchSettings


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

    method: str = Field(default="auto", min_length=1)
    """Name of the merge method. "auto" is "fedavg", or, from a min_nodes of 5 up, the default protection against bad
    nodes: see robust under [screen]."""
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
    """Tensors that are merged at once, and deltas that are decoded at once on arrival; 0 is one per core. The model has
    the same bits whatever it is."""
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
    """Robust rules that the deltas go through before the merge: some of "spectral", "nnm", "arc", "krum",
    "multi_krum", "bulyan", "centered_clip", "geometric_median" and "fltrust". "auto" takes ["spectral"], and the merge
    method "trimmed_mean", from a min_nodes of 5 up, where the method of [merge] is "auto" and every entry
    travels; otherwise none."""
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
OUTER_KEYS: dict[str, set[str]] = {
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


class Publish(Section):
    """What stands beside a published model, and how long."""

    adapter_rank: int = Field(default=0, ge=0, le=4096)
    """Largest rank of a LoRA adapter that holds the model's change of the base; 0 publishes none. From the sum of the
    ranks that nodes trained, over all nodes and rounds, it is the same model; below that its card says what is kept."""
    keep_rounds: int = Field(default=0, ge=0, le=1_000_000)
    """Keeps the models of so many rounds, the last ones, and of those before only the signed lineage; 0 keeps all.
    Simulated nodes keep their deltas as long."""
