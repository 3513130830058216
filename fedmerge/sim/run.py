"""A whole simulation in one call: from a configuration, or the file that has it, to what came of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing, nullcontext
from pathlib import Path

from fedmerge.config import Config, load_config
from fedmerge.config.base import prepare_base
from fedmerge.coordinator.coordinator import Coordinator
from fedmerge.errors import ConfigError, RoundFailed
from fedmerge.node.events import NodeEvent
from fedmerge.sim.engines import open_engine
from fedmerge.sim.inline import play
from fedmerge.sim.results import FederationResult, result_of
from fedmerge.sim.settings import with_threads
from fedmerge.sim.sites import LocalLink
from fedmerge.sim.trainers import Engine
from fedmerge.sim.virtual import with_virtual_nodes
from fedmerge.sim.world import World
from fedmerge.training import Trainer, check_plan, load_trainer


def simulate(
    config: Config | Path | str,
    base_dir: Path | None = None,
    trainers: Mapping[str, Trainer] | None = None,
    *,
    world: World | None = None,
    engine: Engine | None = None,
    on_event: Callable[[str, NodeEvent], None] = lambda name, event: None,
    connect: Callable[[Coordinator, str], LocalLink] = LocalLink,
) -> FederationResult:
    """Run a federation to its end in this process, as `fedmerge simulate` does.

    `config` is a configuration, or the path of a fedmerge.toml, `base_dir` the directory of the base model, and
    `trainers` has one trainer by node name. What is not given follows from the configuration, and so does the `engine`
    that trains. `world` has the time at which to begin, and `connect` makes the link of a node, from the coordinator
    and the node's id. A simulation that was stopped goes on where it was. Raises `RoundFailed` when a round ends
    without a model, and `ConfigError`, `InputError` or `MissingExtra` before it begins, when what is to be simulated
    can't be.
    """
    if not isinstance(config, Config):
        config = load_config(Path(config))
    if trainers is None:
        config = with_virtual_nodes(config)
        trainers = load_trainers(config)
    else:
        for trainer in trainers.values():
            trainer.check()
    if base_dir is None:
        base_dir = prepare_base(config)
    config = with_threads(config)
    with nullcontext(engine) if engine is not None else closing(open_engine(config.simulate)) as running:
        try:
            play(config, base_dir, trainers, world=world or World(), engine=running, on_event=on_event, connect=connect)
            return result_of(config)
        except RoundFailed as err:
            raise RoundFailed(err.message, hint=err.hint or _no_time(config)) from err


def _no_time(config: Config) -> str | None:
    """Say what leaves no time to deliver, where that is what the nodes were supposed to be."""
    train_s, deadline_s = config.simulate.train_s, config.rounds.deadline_s
    if train_s < deadline_s / 2:
        return None
    return (
        f"a round lasts rounds.deadline_s = {deadline_s:g}, and to train takes simulate.train_s = {train_s:g} seconds"
    )


def load_trainers(config: Config) -> dict[str, Trainer]:
    """Return the trainers of a configuration's nodes, by name, all checked.

    Raises `ConfigError`, `InputError` or `MissingExtra` where there are none, or one can't train.
    """
    if not config.nodes:
        raise ConfigError(
            "there are no nodes to simulate",
            hint="add a [[nodes]] section for each, or set simulate.nodes and simulate.data",
        )
    if len(config.nodes) < config.rounds.min_nodes:
        raise ConfigError(f"rounds.min_nodes is more than the {len(config.nodes)} nodes there are")
    check_plan(config.train.trainer, config.train.extras)
    trainers = {
        node.name: load_trainer(config.train.trainer, node.model_dump(exclude={"name"}, exclude_none=True))
        for node in config.nodes
    }
    for trainer in trainers.values():
        trainer.check()
    return trainers
