"""Whose a federation's state is: one coordinator's at a time, of the federation that it was made for, under its key."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path

from fedmerge.config import Config
from fedmerge.delta.task_vector import delta_schema
from fedmerge.errors import ConfigError
from fedmerge.events import FederationCreated
from fedmerge.rounds.journal import Journal, own_keys
from fedmerge.rounds.state import FederationState, replay
from fedmerge.store.seat import Seat
from fedmerge.tensors import Checkpoint, model_digest, schema_digest
from fedmerge.trust.sign import SigningKey


def open_seat(config: Config, clock: Callable[[], float], *, durable: bool = True) -> Seat:
    """Return the seat of a federation's coordinator, not taken yet. Raises what `Seat` raises.

    Only a simulation asks for one that is not `durable`, as in `Database`.
    """
    state_dir, lease_s = config.federation.state, config.server.lease_s
    return Seat(state_dir, config.database_url(), lease_s=lease_s, clock=clock, durable=durable)


def create_or_check(journal: Journal, config: Config, base: Checkpoint) -> None:
    """Begin an empty journal with a new federation. Raises `ConfigError` when it has another, base model or key."""
    present = _identity(config, journal.key, base)
    if journal.state.created is None:
        journal.append(present)
    else:
        _require_same(config, journal.state, present)


def check_standby(config: Config, base_dir: Path, seat: Seat) -> SigningKey:
    """Raise now what would keep a coordinator that stands by from taking over, see `Coordinator`; return its key."""
    key = SigningKey.load_or_create(config.federation.key)
    present = _identity(config, key, Checkpoint(base_dir))
    state = replay(seat.open_ledger().entries)
    if state.created is not None:
        _require_same(config, state, present)
    return key


def _identity(config: Config, key: SigningKey, base: Checkpoint) -> FederationCreated:
    return FederationCreated(
        federation=config.federation.name,
        run=secrets.token_hex(16),
        base_digest=model_digest(Checkpoint(base.directory)),  # mapped anew: what is read now is not wanted soon
        schema_digest=schema_digest(delta_schema(base.schema)),
        coordinator_key=key.public.pem(),
    )


def _require_same(config: Config, state: FederationState, present: FederationCreated) -> None:
    assert state.created is not None
    *given_up, current = own_keys(state).values()
    recorded = state.created.model_copy(update={"coordinator_key": current.pem()})
    if present.coordinator_key in {key.pem() for key in given_up}:
        raise ConfigError(
            f"{config.federation.key}: was handed over, to key {current.short}",
            hint="put that key into its place; where a hand-over was interrupted, fedmerge keys handover does so",
        )
    for what in ("federation", "base_digest", "coordinator_key"):
        if getattr(recorded, what) != getattr(present, what):
            raise ConfigError(
                f"{config.federation.state}: holds the state of another federation ({what} is not the same)",
                hint="choose another federation.state folder, or restore the configuration it was made with",
            )
