"""A round's search, as its signed statements tell it: what was proposed, what nodes answered, what follows.

The coordinator runs it to go on with a search, an auditor to check one. Both get the same from the same statements.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from fedmerge.merge import Recipe
from fedmerge.search import EXACT, Answers, Board, Candidate, Search, SearchSettings, score_of
from fedmerge.statements import Candidates, MetricsStatement, ProposedMerge, RoundSpec, SearchOutcome, digest_of

# Finds the metrics that a node signed for a candidate, by (candidate, node); None when it signed none.
FindMetrics = Callable[[str, str], MetricsStatement | None]


def proposed(proposals: Sequence[Candidates]) -> list[ProposedMerge]:
    """Return all candidates of a round, in order."""
    return [each for proposal in proposals for each in proposal.candidates]


def candidate_of(proposal: ProposedMerge) -> Candidate:
    """Return how a proposed merge is made."""
    return Candidate.from_dict({"factors": proposal.factors, "params": proposal.params})


def answers_to(spec: RoundSpec, proposal: Candidates, find: FindMetrics) -> list[Answers]:
    """Return the scores by node of each candidate of a generation. What a node could not measure counts as worst."""
    metric = SearchSettings.from_dict(spec.search).metric
    rows: list[Answers] = []
    for candidate in proposal.candidates:
        said = {node_id: find(candidate.digest, node_id) for node_id in proposal.judges}
        scores = {node_id: score_of(each.values, metric) for node_id, each in said.items() if each is not None}
        rows.append({node_id: -math.inf if score is None else score for node_id, score in scores.items()})
    return rows


def resume(spec: RoundSpec, num_nodes: int, proposals: Sequence[Candidates], find: FindMetrics) -> Search:
    """Return the round's search, told all that was answered so far. Raises what `Search` does."""
    settings = SearchSettings.from_dict(spec.search)
    search = Search(settings, Recipe.from_dict(spec.merge), num_nodes, spec.search_seed())
    for proposal in proposals:
        search.tell(answers_to(spec, proposal, find))
    return search


def is_as_planned(spec: RoundSpec, num_nodes: int, proposals: Sequence[Candidates], find: FindMetrics) -> bool:
    """Whether the plan's strategy, told the same answers, proposes these candidates and no others.

    Always True where candidates come out of a linear algebra library: they are good to 15 digits and no further.
    """
    if SearchSettings.from_dict(spec.search).strategy not in EXACT:
        return True
    search = resume(spec, num_nodes, [], find)
    for proposal in proposals:
        if [candidate_of(each) for each in proposal.candidates] != search.generation:
            return False
        search.tell(answers_to(spec, proposal, find))
    return not search.generation


def outcome(spec: RoundSpec, proposals: Sequence[Candidates], find: FindMetrics) -> SearchOutcome:
    """Return which candidate the answers lead to. Raises `InputError` when no node scored every candidate."""
    board = Board()
    for proposal in proposals:
        board.add(answers_to(spec, proposal, find))
    means = [board.mean(number) for number in range(len(board.rows))]
    return SearchOutcome(
        proposals=[digest_of(proposal.to_payload()) for proposal in proposals],
        panel=board.panel,
        scores=[mean if math.isfinite(mean) else None for mean in means],
        chosen=board.best(),
    )
