"""fedmerge: model merging as the communication step between organisations."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedmerge.sim import simulate as simulate

__all__ = ["simulate"]


def __getattr__(name: str) -> Any:
    # Only when it is asked for: it takes PyTorch, which most of the package's users do without.
    if name != "simulate":
        raise AttributeError(f"module 'fedmerge' has no attribute {name!r}")
    from fedmerge.sim import simulate

    return simulate
