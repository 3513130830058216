"""What all sections of fedmerge.toml have in common: one class each, the keys, their defaults, and what they mean.

The docstring below each field is its only documentation: `fedmerge init` and `fedmerge schema` print it.
Only what one value can show to be wrong is checked here; that a path exists is checked when it is used.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """What all sections have in common."""

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        frozen=True,
        validate_default=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


class OpenSection(Section):
    """A section that takes further keys, checked by whoever they are for."""

    model_config = ConfigDict(extra="allow")

    @property
    def extras(self) -> dict[str, Any]:
        """The further keys and their values, as they stand in the file."""
        return dict(self.model_extra or {})
