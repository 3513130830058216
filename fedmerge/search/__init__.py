"""Merging with evaluation: propose merges, have them scored, and settle on the best.

Search(settings, recipe, num_models, seed).generation -> list[Candidate]; .tell(answers); .best()
score_of(metrics, metric) -> float | None
"""

from fedmerge.search.board import Answers, Board, score_of
from fedmerge.search.strategies import EXACT, STRATEGIES, Candidate, Search, SearchSettings

__all__ = ["EXACT", "STRATEGIES", "Answers", "Board", "Candidate", "Search", "SearchSettings", "score_of"]
