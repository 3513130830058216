"""Flower both ways on the server's side: fedmerge's merge methods as a Strategy, and its codec as a mod of a ClientApp.

    strategy = MergeStrategy(Recipe("ties", {"density": 0.2}))      # in a ServerApp, where FedAvg() was
    app = ClientApp(mods=[fedmerge_delta])                          # sends task vectors in few bits, if asked to

Needs the `flower` extra. The other way round, a Flower ClientApp as a node's trainer, is the trainer `flower` of
`fedmerge_client`.
"""

from fedmerge.interop.flower.mod import fedmerge_delta
from fedmerge.interop.flower.strategy import MergeStrategy

__all__ = ["MergeStrategy", "fedmerge_delta"]
