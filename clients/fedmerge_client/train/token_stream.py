"""Texts as one long row of tokens, cut into windows: what a causal language model trains on.

Documents follow each other, each behind a separator, so that a window may hold the end of one and the beginning of the
next. A model directory without a tokenizer is read as a byte-level model: a token is a byte of UTF-8.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedmerge.errors import InputError
from fedmerge.seeds import derive_seed
from fedmerge_client.train.huggingface import quiet_transformers

NUM_BYTE_TOKENS = 256
NEWLINE = 10
NO_TARGET = -100  # what torch's cross-entropy leaves out


@dataclass(frozen=True)
class TokenStream:
    """The tokens of a file's documents (T,) int32, and the bytes of UTF-8 that its targets stand for, but separators.

    `targets` (T,) are the tokens that are to be predicted, and `NO_TARGET` in place of others. Conversations have each
    document's place in `documents`, and those of the targets of each reply in `replies`.
    """

    tokens: Tensor
    num_bytes: int
    targets: Tensor
    documents: tuple[slice, ...] = ()
    replies: tuple[slice, ...] = ()

    def windows(self, length: int) -> list[slice]:
        """Return where to cut into windows of `length` + 1 tokens, the last of which may be shorter.

        Each window begins with the token that the one before ends with. Taking all but the last token of each as inputs
        and all but the first as targets, every token but the first of all is a target once.
        """
        return _cut(slice(0, self.tokens.numel()), length)

    def document_windows(self, length: int) -> list[slice]:
        """Return where to cut so that a window begins with each document, if they are known; else as `windows`."""
        if not self.documents:
            return self.windows(length)
        return [window for document in self.documents for window in _cut(document, length)]

    def num_targets(self, window: slice) -> int:
        """Return how many tokens are to be predicted in a window, whose first is given."""
        return int((self.targets[window][1:] != NO_TARGET).sum())


def _cut(whole: slice, length: int) -> list[slice]:
    last = whole.stop - 1
    return [slice(start, min(start + length, last) + 1) for start in range(whole.start, last, length)]


def token_stream(path: Path, texts: Sequence[str], tokenizer: Any | None, vocab_size: int) -> TokenStream:
    """Return the documents `texts` of the file `path` as tokens below `vocab_size`.

    Without a `tokenizer` they are bytes of UTF-8, separated by newlines; with one by its end-of-text token, or if it
    has none its beginning-of-text token, or nothing. Raises `InputError` when the model lacks tokens for them, or there
    are fewer than two.
    """
    encoded = [text.encode("utf-8", "replace") for text in texts]
    if tokenizer is None:
        if vocab_size < NUM_BYTE_TOKENS:
            raise InputError(
                f"the model has neither a tokenizer nor the {NUM_BYTE_TOKENS} tokens of a byte-level model",
                hint="save its tokenizer beside it",
            )
        separator: list[int] = [NEWLINE]
        documents = [np.frombuffer(document, np.uint8) for document in encoded]
    else:
        separator_id = next((i for i in (tokenizer.eos_token_id, tokenizer.bos_token_id) if i is not None), None)
        separator = [] if separator_id is None else [separator_id]
        with quiet_transformers():  # else it advises against texts that are longer than a window
            documents = [np.asarray(row) for row in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]
    parts = [part for document in documents for part in (separator, document) if len(part)]
    tokens = torch.from_numpy(np.concatenate([np.asarray(part, np.int32) for part in parts] or [np.zeros(0, np.int32)]))
    require_vocabulary(path, tokens, vocab_size)
    return TokenStream(tokens, sum(map(len, encoded)), tokens)


def require_vocabulary(path: Path, tokens: Tensor, vocab_size: int) -> None:
    """Raise `InputError` when there are fewer than two tokens, or any that the model does not have."""
    if tokens.numel() < 2:
        raise InputError(f"{path}: has fewer than two tokens of text")
    if int(tokens.max()) >= vocab_size:
        raise InputError(f"{path}: the tokenizer makes token {int(tokens.max())}, and the model has {vocab_size}")


def shuffled(num_windows: int, seed: int, start: int) -> Iterator[int]:
    """Yield windows for ever, epoch after epoch, each in an order of its own, from the `start`-th window taken on."""
    epoch, place = divmod(start, num_windows)
    while True:
        generator = torch.Generator().manual_seed(derive_seed(seed, epoch) % 2**63)
        yield from torch.randperm(num_windows, generator=generator).tolist()[place:]
        epoch, place = epoch + 1, 0
