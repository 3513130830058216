"""The base model that a configuration asks for: a directory as it is, or an encoder with a head made from labels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from fedmerge.config import Config
from fedmerge.errors import ConfigError, InputError
from fedmerge.training import import_client


def prepare_base(config: Config) -> Path:
    """Return the base model's directory, making the classification head first where `model.labels` asks for one.

    The head is deterministic, and is made once: it stays in the state folder. Raises `InputError`, and `ConfigError`
    when the state folder has a head for other labels.
    """
    if not config.model.base.is_dir():
        raise InputError(
            f"{config.model.base}: no such directory", hint="model.base must be a Hugging Face model directory"
        )
    labels = config.model.label_names()
    if labels is None:
        return config.model.base
    target = config.federation.state / "base"
    if target.exists():
        _require_labels(target / "config.json", labels)
        return target
    from fedmerge.publishing.publish import appearing_whole
    from fedmerge.tensors import reporting_save_errors

    making = import_client("fedmerge_client.train.label_head", "a head for model.labels")
    with appearing_whole(target) as partial, reporting_save_errors(target):
        making.build_classifier(config.model.base, labels, partial)
    return target


def _require_labels(path: Path, labels: Sequence[str]) -> None:
    try:
        known = json.loads(path.read_bytes())["id2label"]
        found = [known[str(index)] for index in range(len(known))]
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise InputError(f"{path}: not the configuration of a classifier", hint=f"remove {path.parent}") from err
    if found != list(labels):
        raise ConfigError(
            f"{path.parent}: was made for other labels than model.labels names now",
            hint="choose another federation.state folder, or restore the labels it was made with",
        )
