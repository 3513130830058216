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


@dataclass(frozen=True)
class TokenStream:
    """The tokens of a file's documents (T,) int32, and the bytes of UTF-8 that they stand for, separators left out."""

    tokens: Tensor
    num_bytes: int

    def windows(self, length: int) -> list[slice]:
        """Return where to cut into windows of `length` + 1 tokens, the last of which may be shorter.

        Each window begins with the token that the one before ends with. Taking all but the last token of each as inputs
        and all but the first as targets, every token but the first of all is a target once.
        """
        last = self.tokens.numel() - 1
        return [slice(start, min(start + length, last) + 1) for start in range(0, last, length)]


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
    if tokens.numel() < 2:
        raise InputError(f"{path}: has fewer than two tokens of text")
    if int(tokens.max()) >= vocab_size:
        raise InputError(f"{path}: the tokenizer makes token {int(tokens.max())}, and the model has {vocab_size}")
    return TokenStream(tokens, sum(map(len, encoded)))


def shuffled(num_windows: int, seed: int, start: int) -> Iterator[int]:
    """Yield windows for ever, epoch after epoch, each in an order of its own, from the `start`-th window taken on."""
    epoch, place = divmod(start, num_windows)
    while True:
        generator = torch.Generator().manual_seed(derive_seed(seed, epoch) % 2**63)
        yield from torch.randperm(num_windows, generator=generator).tolist()[place:]
        epoch, place = epoch + 1, 0
