"""Bad nodes, for a simulation: which they are, and what they send in place of what they should.

One adversary has all of them. They take part as the others do, with keys that the coordinator trusts and deltas that it
can decode; only what they trained is changed, before it becomes a delta. So every merge rule meets what it would meet.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedmerge.config import Config, Simulate, SimulatedNode
from fedmerge.delta.adapter import open_tuned
from fedmerge.errors import ConfigError, InputError, reporting_os_errors
from fedmerge.models.versions import write_model
from fedmerge.seeds import derive_seed, fraction
from fedmerge.sim.partition import read_records, write_records
from fedmerge.sim.sites import node_home
from fedmerge.sim.trainers import Engine, Waiting
from fedmerge.tensors import Checkpoint, Computed, reporting_save_errors
from fedmerge.training import Trainer, TrainResult, TrainTask

FLIPPED = "flipped.jsonl"
# So many bad nodes at most train for the others to see: what an update looks like is known from few.
MOST_ACCOMPLICES = 8
# Those that collude add noise, as long as so much of what they send: no copies, which a coordinator would know.
DISGUISE = 0.01


@dataclass(frozen=True)
class Attack:
    """What a bad node sends: `craft(updates, strength, seed)`, for each tensor alone.

    `updates` (b, ...) are what b bad nodes would send if they were good, in fp32: where they collude those of all, else
    the node's own alone. `strength` is the usual one.
    """

    craft: Callable[[Tensor, float, int], Tensor]
    strength: float
    colludes: bool = False


def against(updates: Tensor, strength: float, seed: int) -> Tensor:
    """Go the other way (1811.03761; of the mean of many, inner product manipulation, 1903.03936)."""
    return -strength * updates.mean(0)


def scaled(updates: Tensor, strength: float, seed: int) -> Tensor:
    """Go further (1807.00459), as one does with a learning rate that is too large."""
    return strength * updates.mean(0)


def noise(updates: Tensor, strength: float, seed: int) -> Tensor:
    """Send normal noise (1703.02757), `strength` times as long as the update."""
    drawn = torch.randn(updates.shape[1:], generator=torch.Generator().manual_seed(seed))
    return strength * updates.square().mean().sqrt() * drawn


def little(updates: Tensor, strength: float, seed: int) -> Tensor:
    """Stay `strength` standard deviations from the mean, where others are as well: a little (1902.06156)."""
    return updates.mean(0) - strength * updates.std(0)


ATTACKS: dict[str, Attack] = {
    "sign_flip": Attack(against, 1.0),
    "scale": Attack(scaled, 10.0),
    "noise": Attack(noise, 10.0),
    "inner_product": Attack(against, 0.5, colludes=True),
    "little": Attack(little, 1.5, colludes=True),
}


def bad_nodes(settings: Simulate, names: Iterable[str]) -> list[str]:
    """Return which of the nodes are bad, sorted: those drawn first, so that with one more the others still are.

    Raises `ConfigError` when that is all.
    """
    order = sorted(names, key=lambda name: (fraction("simulate.bad", settings.seed, name), name))
    if settings.bad_nodes and settings.bad_nodes >= len(order):
        raise ConfigError(f"simulate.bad_nodes = {settings.bad_nodes} leaves none of the {len(order)} nodes good")
    return sorted(order[: settings.bad_nodes])


class Adversary:
    """An engine for bad nodes, `names`: another one trains them, and what they leave is changed.

    `trainers` are all nodes', by name. Raises `ConfigError` where bad nodes could not do what the configuration says.
    """

    def __init__(self, config: Config, trainers: Mapping[str, Trainer], engine: Engine) -> None:
        settings = config.simulate
        self.names = bad_nodes(settings, trainers)
        self._attack = ATTACKS.get(settings.attack) if self.names else None
        require_feasible(config, trainers)
        self._strength = settings.attack_strength
        self._seed = settings.seed
        colludes = self._attack is not None and self._attack.colludes
        self._accomplices = {name: trainers[name] for name in self.names[:MOST_ACCOMPLICES]} if colludes else {}
        self._engine = engine
        self._folder = config.federation.state.parent / "accomplices"
        self._round = self._num_conspiracies = 0
        self._waiting: list[Waiting] = []

    def submit(self, trainer: Trainer, method: str, *arguments: Any) -> Waiting:
        """Begin `trainer.method(*arguments)`; of what is trained, another model comes back."""
        waiting, attack = self._engine.submit(trainer, method, *arguments), self._attack
        if method != "train" or attack is None:
            return waiting
        task: TrainTask = arguments[0]
        self._conspire(task)
        return lambda: self._changed(attack, task, waiting())

    def close(self) -> None:
        """Delete what accomplices trained."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _conspire(self, task: TrainTask) -> list[Waiting]:
        """Have accomplices train for a round, unless they do; the same, whoever of them is asked first."""
        if not self._waiting or self._round != task.round:
            self.close()
            self._num_conspiracies += 1  # of the last one, somebody may still write into its folder
            self._round, self._waiting = task.round, []
            for name, trainer in self._accomplices.items():
                workspace = self._folder / str(self._num_conspiracies) / name
                with reporting_os_errors(workspace):
                    workspace.mkdir(parents=True, exist_ok=True)
                seed = derive_seed("simulate.accomplice", self._seed, task.round, name)
                own = replace(task, workspace=workspace, seed=seed, previous_state=None, progress=None)
                self._waiting.append(self._engine.submit(trainer, "train", own))
        return self._waiting

    def _changed(self, attack: Attack, task: TrainTask, result: TrainResult) -> TrainResult:
        before = Checkpoint(task.model_dir)
        results: list[TrainResult] = [waiting() for waiting in self._conspire(task)] or [result]
        tuned = [open_tuned(each.model_dir, before)[0] for each in results]
        strength = attack.strength if self._strength is None else self._strength

        def crafted(name: str) -> Tensor:
            start = before[name]
            if not start.is_floating_point():
                return start
            updates = torch.stack([model[name].float() - start.float() for model in tuned])
            seed = derive_seed("simulate.attack", task.seed, name)
            change = attack.craft(updates, strength, seed)
            if attack.colludes:
                change += noise(change[None], DISGUISE, seed)
            moved = start.float() + change
            limits = torch.finfo(start.dtype)
            return moved.clamp(limits.min, limits.max).to(start.dtype)

        directory = task.workspace / "attack"
        shutil.rmtree(directory, ignore_errors=True)
        with reporting_save_errors(directory):
            write_model(Computed(before.schema, crafted), before, directory)
        shutil.rmtree(result.model_dir, ignore_errors=True)
        return replace(result, model_dir=directory)


def with_flipped_labels(config: Config) -> Config:
    """Return the configuration with other data for its bad nodes, where the attack is "label_flip".

    Of the labels that all nodes' data have, sorted, each becomes the one half of them further on (2007.08432). Raises
    `InputError` when a row has no label, or all have the same.
    """
    settings = config.simulate
    if settings.attack != "label_flip" or not settings.bad_nodes:
        return config
    bad = set(bad_nodes(settings, [node.name for node in config.nodes]))
    if any(node.data == node_home(config, node.name) / FLIPPED for node in config.nodes):
        return config  # they are
    sources = [settings.data] if settings.nodes else [node.data for node in config.nodes]
    labels = sorted({label for source in sources if source for label in _labels(source, settings.by)}, key=_order)
    if len(labels) < 2:
        raise InputError(f'simulate.attack = "label_flip" needs two values of {settings.by!r} in the data at least')
    flipped = {label: labels[(rank + len(labels) // 2) % len(labels)] for rank, label in enumerate(labels)}

    def turned(node: SimulatedNode) -> SimulatedNode:
        path = node_home(config, node.name) / FLIPPED
        if node.name not in bad or node.data is None:
            return node
        rows = [{**row, settings.by: flipped[row[settings.by]]} for row in read_records(node.data)]
        with reporting_os_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_records(path, rows)
        return node.model_copy(update={"data": path})

    return config.model_copy(update={"nodes": tuple(turned(node) for node in config.nodes)})


def require_feasible(config: Config, names: Iterable[str]) -> None:
    """Raise `ConfigError` where bad nodes, of those called `names`, could not do what the configuration says."""
    bad, attack = bad_nodes(config.simulate, names), ATTACKS.get(config.simulate.attack)
    if not bad:
        return
    data = {node.name: node.data for node in config.nodes}
    for name in bad if attack is None else ():
        if data.get(name) != node_home(config, name) / FLIPPED:
            raise ConfigError(
                f'simulate.attack = "label_flip" changes data files, and {name} has none of those',
                hint="leave the trainers to simulate, or make them by load_trainers(with_virtual_nodes(config))",
            )
    if attack is ATTACKS["little"] and len(bad) < 2:
        raise ConfigError(
            'simulate.attack = "little" needs two bad nodes at least, to see how far updates are apart',
            hint="bad_nodes = 2, or another attack",
        )
    # There each node goes on from a model of its own, or takes steps of its own number.
    unlike = "[streaming]" if config.streaming.fragments > 1 else "rounds.dynamic_steps"
    if attack is not None and attack.colludes and (config.streaming.fragments > 1 or config.rounds.dynamic_steps < 1):
        raise ConfigError(
            f"simulate.attack = {config.simulate.attack!r} does not go together with {unlike}",
            hint=f"one of {', '.join(name for name, each in ATTACKS.items() if not each.colludes)}",
        )


def _labels(source: Path, by: str) -> set[Any]:
    labels = set()
    for record in read_records(source):
        label = record.get(by)
        if not isinstance(label, str | int | float):
            raise InputError(
                f'{source}: a row without a label in {by!r}, which simulate.attack = "label_flip" needs',
                hint="simulate.by says which column has the labels",
            )
        labels.add(label)
    return labels


def _order(label: Any) -> tuple[bool, Any]:
    return isinstance(label, str), label
