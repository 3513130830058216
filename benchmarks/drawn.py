"""What a seed of `schedules.py` stands for: a federation, and what is to happen to it."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

LEASE_S = 30.0
POLICIES = {
    "everyone": (
        "min_nodes = {nodes}\ndeadline_s = 1e7",
        "[delta]\nsparsify = 'topk'\ndensity = 0.2\nerror_feedback = 0.9",
    ),
    "deadline": ("min_nodes = {nodes}\ndeadline_s = 120.0", ""),
    "quorum": ("min_nodes = {most}\ngrace_s = 10.0\ndeadline_s = 200.0", "[outer]\nname = 'nesterov'\nlr = 0.7"),
    "fraction": ("min_nodes = 1\nfraction = 0.6\ngrace_s = 'auto'\ndeadline_s = 200.0", "[merge]\nmethod = 'ties'"),
    "carry": ("min_nodes = 1\ngrace_s = 5.0\ndeadline_s = 200.0\nlate = 'carry'\nmax_staleness = 2", ""),
    "buffer": ("min_nodes = 1\nasync_buffer = 2\ndeadline_s = 200.0\nlate = 'carry'", "[outer]\nname = 'momentum'"),
    "sample": ("min_nodes = 1\nsample = {most}\ndeadline_s = 200.0", "[delta]\nvalues = 'fp32'"),
}
# Where a round can do without one of its nodes, if there are so many.
DISPENSABLE = {"quorum": 2, "fraction": 3, "carry": 2, "buffer": 2}


@dataclass(frozen=True)
class Schedule:
    """What a seed stands for. All rates are 0 in one without `faults`."""

    seed: int
    policy: str
    num_nodes: int
    num_rounds: int
    faults: bool = True
    num_coordinators: int = 1
    loss: float = 0.0
    doubling: float = 0.0
    slowest_s: float = 0.01
    num_kills: int = 0
    num_cuts: int = 0
    num_freezes: int = 0
    num_clock_steps: int = 0
    num_orders: int = 0
    cuts_power: bool = False
    vanishes: bool = False
    witnesses: bool = False
    cosignatures: int = 0
    evaluates: bool = False
    fetches_base: bool = False

    @property
    def variant(self) -> tuple[str, int, int]:
        """What the model depends on, beside whose deltas are merged."""
        return self.policy, self.num_nodes, self.num_rounds

    def undisturbed(self) -> Schedule:
        """The same federation, and nothing happens to it."""
        return Schedule(0, *self.variant, faults=False)

    def toml(self) -> str:
        """The federation's configuration."""
        rounds, further = POLICIES[self.policy]
        names = {"nodes": self.num_nodes, "most": max(1, self.num_nodes - 1)}
        lines = [
            "[federation]\nname = 'schedules'\nstate = '@HOST/state'\n[model]\nbase = 'base'",
            f"[server]\nlease_s = {LEASE_S}\n[train]\ntrainer = 'walk'",
            f"[rounds]\nnum_rounds = {self.num_rounds}\npublish_after_cosignatures = {self.cosignatures}",
            rounds.format(**names),
            "[store]\ndatabase = 'sqlite:///@SHARED/ledger.sqlite'\nblobs = '@SHARED/blobs'",
            further,
        ]
        if "[merge]" not in further:
            lines.append("[merge]\nmethod = 'fedavg'")
        return "\n".join(lines).replace("[merge]", "[merge]\nthreads = 1")


def draw(seed: int) -> Schedule:
    """Return the schedule of a seed. Each kind of fault is absent from some, so that others get further."""
    rng = Random(f"schedule {seed}")
    policy = rng.choice(list(POLICIES))
    witnesses = rng.random() < 0.3
    num_nodes = rng.choice([2, 2, 3, 3, 4])
    return Schedule(
        seed=seed,
        policy=policy,
        num_nodes=num_nodes,
        num_rounds=rng.choice([2, 2, 3]),
        num_coordinators=rng.choice([1, 1, 1, 2]),
        loss=rng.choice([0.0, 0.05, 0.2]),
        doubling=rng.choice([0.0, 0.1, 0.3]),
        slowest_s=rng.choice([0.01, 1.0, 10.0]),
        num_kills=rng.choice([0, 1, 2, 4, 6]),
        num_cuts=rng.choice([0, 0, 1, 3]),
        num_freezes=rng.choice([0, 0, 1]),
        num_clock_steps=rng.choice([0, 0, 0, 2]),
        num_orders=rng.choice([0, 0, 0, 3]),
        cuts_power=rng.random() < 0.3,
        vanishes=num_nodes >= DISPENSABLE.get(policy, 5) and rng.random() < 0.2,
        witnesses=witnesses,
        cosignatures=rng.choice([0, 1]) if witnesses else 0,
        evaluates=rng.random() < 0.2,
        fetches_base=rng.random() < 0.2,
    )
