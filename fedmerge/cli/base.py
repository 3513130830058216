"""The base model that a configuration asks for: a directory as it is, or an encoder with a head made from labels."""

from __future__ import annotations

from pathlib import Path

from fedmerge.config import Config
from fedmerge.errors import InputError


def prepare_base(config: Config) -> Path:
    """Return the base model's directory, making the classification head first where `model.labels` asks for one.

    The head is deterministic, and is made once: it stays in the state folder. Raises `InputError`.
    """
    if not config.model.base.is_dir():
        raise InputError(
            f"{config.model.base}: no such directory", hint="model.base must be a Hugging Face model directory"
        )
    labels = config.model.label_names()
    if labels is None:
        return config.model.base
    from fedmerge_client.train.label_head import build_classifier

    target = config.federation.state / "base"
    if not target.exists():
        partial = target.with_suffix(".partial")
        partial.mkdir(parents=True, exist_ok=True)
        build_classifier(config.model.base, labels, partial)
        partial.rename(target)
    return target
