"""Hugging Face model directories: opened without network or pickle, tuned in fp32, and written again.

What the trainers share. A model to tune is opened in fp32 with dropout off, whatever it is stored in: in bf16, most of
AdamW's steps would be rounded away.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer
from transformers.utils import logging as _logging

from fedmerge.errors import ConfigError, InputError, ResourceError

transformers_logging: Any = _logging  # its functions have no types

TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model")

Device: TypeAlias = Literal["auto", "cpu", "cuda"]


def find_device(device: Device) -> torch.device:
    """Return where to train; "auto" is a CUDA device when there is one. Raises `ConfigError` when it is missing."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError('device = "cuda", but torch finds no CUDA device', hint='use device = "auto"')
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def open_model(
    auto_class: Any, model_dir: Path, device: torch.device, *, what: str, hint: str, as_stored: bool = False
) -> Any:
    """Return the model that transformers' `auto_class` opens, in fp32, with dropout off, on `device`.

    With `as_stored` it keeps the types it is stored in, which takes half the memory or less: for weights that are not
    trained. `what` says in errors what it should be, and `hint` where one comes from. Raises `InputError` when the
    directory is not such a model or lacks some of its tensors.
    """
    with quiet_transformers():
        try:
            model, loading = auto_class.from_pretrained(
                model_dir,
                local_files_only=True,
                use_safetensors=True,
                dtype="auto" if as_stored else torch.float32,
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as err:
            raise InputError(f"{model_dir}: not a {what} that transformers opens ({err})") from err
    if loading["missing_keys"]:
        # transformers would fill them with random numbers, other ones at every node.
        missing = sorted(loading["missing_keys"])
        raise InputError(
            f"{model_dir}: has no {missing[0]}" + (f" and {len(missing) - 1} more" if missing[1:] else ""), hint=hint
        )
    return model.eval().to(device)


def has_tokenizer(model_dir: Path) -> bool:
    """Return whether a model directory holds a tokenizer's files."""
    return any((model_dir / name).is_file() for name in TOKENIZER_FILES)


def open_tokenizer(model_dir: Path) -> Any:
    """Return the tokenizer of a model directory. Raises `InputError` when it has none, or it can't be read."""
    # Without these files transformers 5 makes up a tokenizer from config.json alone: every word is unknown to it.
    if not has_tokenizer(model_dir):
        raise InputError(
            f"{model_dir}: has no tokenizer",
            hint=f"save it beside the model; there is none of {', '.join(TOKENIZER_FILES)}",
        )
    with quiet_transformers():
        try:
            return AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
        except (OSError, ValueError, RuntimeError) as err:
            raise InputError(f"{model_dir}: not a tokenizer that transformers opens ({err})") from err


def save_model(model: Any, tokenizer: Any | None, directory: Path) -> Path:
    """Write a model, with its tokenizer if it has one, and return the directory. Raises `ResourceError`."""
    try:
        with quiet_transformers():
            model.save_pretrained(directory)
            if tokenizer is not None:
                tokenizer.save_pretrained(directory)
    except OSError as err:
        raise ResourceError(f"{directory}: could not write the fine-tune ({err})", hint="is the disk full?") from err
    return directory


def num_positions(model: Any) -> int:
    """Return how many tokens the model has positions for."""
    return int(getattr(model.config, "max_position_embeddings", None) or 512)


def freeze_parameters(model: torch.nn.Module, prefixes: Sequence[str]) -> Mapping[str, torch.nn.Parameter]:
    """Exclude tensors from training by name prefix and return the others by name.

    Raises `ConfigError` for a prefix that no tensor has, and when nothing is left.
    """
    parameters = dict(model.named_parameters())
    for prefix in prefixes:
        if not any(name.startswith(prefix) for name in parameters):
            raise ConfigError(
                f"[train]: freeze: no tensor of the model starts with {prefix!r}",
                hint=f"they are {next(iter(parameters))} and so on",
            )
    for name, parameter in parameters.items():
        parameter.requires_grad_(not name.startswith(tuple(prefixes)))
    trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    if not trained:
        raise ConfigError("[train]: freeze: leaves nothing to train")
    return trained


@contextlib.contextmanager
def limited_threads(num_threads: int) -> Iterator[None]:
    """Have torch use so many threads meanwhile; 0 leaves its own choice."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers from writing progress bars and advice to the terminal while models are opened."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
