"""Check offline what a federation published or exported, without trusting whoever handed it over.

What is checked: the coordinator's signature, every file's digest, that the weights are the version they claim to be,
that each delta statement was signed by its node and each merge record follows from the one before. With the deltas at
hand, the whole history is computed again and compared bit for bit. A verification goes on after what does not hold:
`examine_...` functions note each check in a `Checklist`, `verify_...` functions raise the first failure.
"""

from fedmerge.verify.checks import Check, Checklist
from fedmerge.verify.directory import examine_directory, examine_local, is_local, verify_directory, verify_local
from fedmerge.verify.export import examine_export
from fedmerge.verify.history import History
from fedmerge.verify.replay import replay, replay_rounds

__all__ = [
    "Check",
    "Checklist",
    "History",
    "examine_directory",
    "examine_export",
    "examine_local",
    "is_local",
    "replay",
    "replay_rounds",
    "verify_directory",
    "verify_local",
]
