"""What an operator may tell a coordinator between and during rounds. Each command is an event with its reason.

The commands only write to the journal; what follows from them is due as anything else is (`fedmerge.rounds.policy`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from fedmerge.errors import WrongPhase
from fedmerge.events import (
    DeadlineExtended,
    Event,
    RetryOrdered,
    RolledBack,
    RoundCutShort,
    RoundsPaused,
    RoundsResumed,
)
from fedmerge.rounds.journal import Journal
from fedmerge.rounds.policy import RoundPolicy, nodes_there
from fedmerge.rounds.state import Phase
from fedmerge.statements import Rollback

log = logging.getLogger(__name__)

BETWEEN_AND_OPEN = {Phase.PLANNED, Phase.OPEN, Phase.PUBLISHED, Phase.FAILED}


class Operator:
    """The commands to one federation. `fail` gives the open round up.

    Each returns the current round and raises `WrongPhase`, having changed nothing, when it does not fit.
    """

    def __init__(self, journal: Journal, policy: RoundPolicy, fail: Callable[[str], None]) -> None:
        self._journal = journal
        self._policy = policy
        self._fail = fail

    def pause(self, reason: str) -> int:
        """Open and close no rounds until `resume`. Deltas are still taken, and a merge under way is finished."""
        with self._journal.lock:
            if self._journal.state.paused_at_s is not None:
                raise WrongPhase("the rounds are paused already")
            return self._record(RoundsPaused(reason=reason))

    def resume(self, reason: str) -> int:
        """End a pause. The open round's deadline is as much later as the pause was long."""
        with self._journal.lock:
            if self._journal.state.paused_at_s is None:
                raise WrongPhase("the rounds are not paused")
            return self._record(RoundsResumed(reason=reason))

    def close(self, reason: str) -> int:
        """Seal the open round now, with the deltas that it has: of `min_nodes` nodes at least."""
        with self._journal.lock:
            self._require_open()
            state, needed = self._journal.state, self._policy.min_nodes
            if (found := len(nodes_there(state, self._policy))) < needed:
                raise WrongPhase(
                    f"round {state.round} has the deltas of {found} nodes, and needs those of {needed}",
                    hint="extend it, or lower rounds.min_nodes and start the coordinator again",
                )
            return self._record(RoundCutShort(round=state.round, reason=reason))

    def extend(self, extra_s: float, reason: str) -> int:
        """Move the open round's deadline by so many seconds, which may be less than 0."""
        with self._journal.lock:
            self._require_open()
            return self._record(DeadlineExtended(round=self._journal.state.round, extra_s=extra_s, reason=reason))

    def retry(self, reason: str) -> int:
        """Open a round that failed once more."""
        with self._journal.lock:
            state = self._journal.state
            if state.phase != Phase.FAILED or state.is_retried:
                raise WrongPhase(f"round {state.round} is {state.phase}: only a round that failed can be tried again")
            return self._record(RetryOrdered(round=state.round, reason=reason))

    def roll_back(self, to_round: int, reason: str) -> int:
        """Start the next round from the version of an earlier one, or from the base model, round 0.

        A round that is open is given up, and opened again from there. Late deltas are dropped: they were made from what
        is not to be built upon.
        """
        with self._journal.lock:
            state = self._journal.state
            if state.phase not in BETWEEN_AND_OPEN:
                raise WrongPhase(f"round {state.round} is {state.phase}", hint="wait until it is published")
            if state.phase == Phase.PUBLISHED and state.round >= self._policy.num_rounds:
                raise WrongPhase(
                    "the last round is over: none would start from there",
                    hint="raise rounds.num_rounds and start the coordinator again",
                )
            if to_round and to_round not in {merge.round for merge in state.merges}:
                raise WrongPhase(f"no version of round {to_round} was published", hint="fedmerge rounds lists them")
            model = self._journal.model_of(to_round)
            if model == self._journal.model():
                raise WrongPhase(f"the version of round {to_round} is the current one")
            statement = Rollback(
                federation=self._journal.created.federation,
                run=self._journal.created.run,
                round=state.round,
                to_round=to_round,
                version=model.digest,
                reason=reason,
            )
            if state.phase == Phase.OPEN:
                self._fail(f"rolled back to round {to_round}: {reason}")
            envelope = statement.sign(self._journal.key).decode()
            return self._record(
                RolledBack(round=state.round, to_round=to_round, version=model.digest, reason=reason, envelope=envelope)
            )

    def _require_open(self) -> None:
        state = self._journal.state
        if state.phase != Phase.OPEN:
            raise WrongPhase(f"round {state.round} is {state.phase}, not open")

    def _record(self, event: Event) -> int:
        self._journal.append(event)
        log.warning("operator: %s", event.model_dump_json(exclude={"envelope"}))
        return self._journal.state.round
