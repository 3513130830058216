"""What a round's signed spec says: the plan that nodes, the merge and auditors follow.

It comes from the configuration, the base model, who is trusted now, and the rounds before.
"""

from __future__ import annotations

import logging
import secrets

from fedmerge.config import Config
from fedmerge.delta.task_vector import delta_schema
from fedmerge.errors import ConfigError
from fedmerge.merge import Plan
from fedmerge.models.versions import model_files
from fedmerge.rounds.journal import Journal
from fedmerge.rounds.pace import dynamic_steps
from fedmerge.rounds.policy import RoundPolicy
from fedmerge.rounds.state import Phase
from fedmerge.search import Search
from fedmerge.seeds import derive_seed
from fedmerge.statements import RoundSpec
from fedmerge.tensors import Checkpoint
from fedmerge.trust.keys import TrustStore

log = logging.getLogger(__name__)


class Planner:
    """Plans the rounds of one federation. Raises `ConfigError` for a configuration that no round can be planned by.

    `policy` says when rounds open and close, `schema` which tensors their deltas have, and `base_files` what a node
    fetches that has no base model.
    """

    def __init__(self, config: Config, base: Checkpoint, trust: TrustStore) -> None:
        self._config, self._trust = config, trust
        self._root = self._root_key()
        if config.screen.root and self._root is None:
            raise ConfigError(
                f"screen.root: no trusted node is called {config.screen.root!r}",
                hint=f"make its key, and trust it: fedmerge keys trust FILE --name {config.screen.root}",
            )
        self.policy = RoundPolicy(
            num_rounds=config.rounds.num_rounds,
            min_nodes=config.rounds.min_nodes + (self._root is not None),
            deadline_s=config.rounds.deadline_s,
            grace_s=config.rounds.grace_s,
            fraction=config.rounds.fraction,
            sample=config.rounds.sample,
            max_staleness=config.rounds.staleness_limit,
            async_buffer=config.rounds.async_buffer,
            scoring_s=config.search.deadline_s,
            cosignatures=config.rounds.publish_after_cosignatures,
        )
        self.schema = delta_schema(base.schema)
        recipe = config.recipe()
        Plan(recipe, [], self.schema)  # what fits no tensor is reported now, not in every round
        if recipe.caution:
            log.warning("%s", recipe.caution)
        if search := config.search_settings():
            Search(search, recipe, num_models=2, seed=0)  # so is a library that is not installed
        if fragments := config.fragments():
            fragments.names(self.schema)  # so are more fragments than the model has layers
        self._uplink = config.uplink(self.schema)
        if config.delta.codec == "auto":
            log.info("codec: %s", self._uplink)
        self.base_files = model_files(base.directory)

    def next_spec(self, journal: Journal) -> RoundSpec:
        """Return the spec of the next round, or of the same one again after a failure."""
        config, state, created = self._config, journal.state, journal.created
        again = state.phase == Phase.FAILED
        round_number = state.round if again else state.round + 1
        sample: list[str] = []
        if self.policy.sample is not None:
            seed = derive_seed(config.merge.seed, round_number, state.attempt + 1 if again else 1)
            sample = self.policy.sampled(self._trust.keys(), seed)
        self._root = self._root_key() or self._root  # it may have a new key
        if sample and self._root is not None:
            sample = sorted({*sample, self._root})
        return RoundSpec(
            federation=created.federation,
            run=created.run,
            round=round_number,
            num_rounds=self.policy.num_rounds,
            nonce=secrets.token_hex(32),
            model=journal.model(),
            schema_digest=created.schema_digest,
            base_files=self.base_files,
            train=config.train_settings(),
            codec=self._uplink.codec.to_dict(),
            error_feedback=self._uplink.error_feedback,
            downlink=config.downlink_codec(self.schema).to_dict(),
            merge=config.recipe().to_dict(),
            merge_seed=config.merge.seed,
            screen=config.screen_policy(root=self._root).to_dict(),
            search=search.to_dict() if (search := config.search_settings()) else {},
            outer=config.outer_settings(),
            streaming=fragments.to_dict() if (fragments := config.fragments()) else {},
            min_nodes=config.rounds.min_nodes,
            sample=sample,
            max_staleness=self.policy.max_staleness,
            steps=self._dynamic_steps(journal),
            deadline_s=self.policy.deadline_s,
            max_payload_bytes=config.server.max_payload_bytes,
            publish_after_cosignatures=self.policy.cosignatures,
        )

    def _dynamic_steps(self, journal: Journal) -> dict[str, int]:
        """Return the steps of nodes that are to take fewer than the plan's, if it says so."""
        least_share, num_steps = self._config.rounds.dynamic_steps, self._config.train.extras.get("steps")
        if least_share == 1 or not isinstance(num_steps, int):
            return {}
        return dynamic_steps(journal.ledger.entries, journal.spec_in, self._trust.keys(), num_steps, least_share)

    def _root_key(self) -> str | None:
        """Return the key id of the node that is the root of trust; None without one, or while it is not trusted."""
        name = self._config.screen.root
        return next((key_id for key_id, known in sorted(self._trust.names().items()) if known == name), None)
