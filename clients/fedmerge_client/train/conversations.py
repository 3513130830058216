"""Conversations as tokens, written out by the model's own chat template, of which only replies are to be learnt.

A template's text for the messages before a reply, with its prompt for one, has to be the beginning of its text for the
messages up to and with the reply: what lies between is the reply, with the mark of its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fedmerge.errors import InputError
from fedmerge_client.train.datasets import Conversation
from fedmerge_client.train.huggingface import quiet_transformers
from fedmerge_client.train.token_stream import NO_TARGET, TokenStream, require_vocabulary


def conversation_stream(
    path: Path, conversations: Sequence[Conversation], tokenizer: Any | None, vocab_size: int
) -> TokenStream:
    """Return the conversations of the file `path` as tokens below `vocab_size`; the targets are those of replies.

    Raises `InputError` without a tokenizer that has a chat template, and for a conversation that the template does not
    take or writes otherwise once there are more messages.
    """
    if tokenizer is None or not tokenizer.chat_template or not tokenizer.is_fast:
        raise InputError(
            f"{path}: the model has no fast tokenizer with a chat template, which conversations need",
            hint="take an instruction-tuned base, or set chat_template in its tokenizer's files",
        )
    tokens: list[int] = []
    targets: list[int] = []
    documents: list[slice] = []
    replies: list[slice] = []
    num_bytes = 0
    for conversation in conversations:
        text, spans = _written(conversation, tokenizer, where=f"{path}:{conversation.line}")
        num_bytes += sum(len(text[span].encode("utf-8", "replace")) for span in spans)
        with quiet_transformers():  # else it advises against texts that are longer than a window
            encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        start = len(tokens)
        tokens += encoded["input_ids"]
        targets += [NO_TARGET] * len(encoded["input_ids"])
        documents.append(slice(start, len(tokens)))
        for span in spans:
            inside = [
                start + place
                for place, (first, end) in enumerate(encoded["offset_mapping"])
                if span.start <= first < span.stop and end > first
            ]
            for place in inside:
                targets[place] = tokens[place]
            if inside:
                replies.append(slice(inside[0], inside[-1] + 1))
    stream = TokenStream(
        torch.tensor(tokens, dtype=torch.int32),
        num_bytes,
        torch.tensor(targets, dtype=torch.int32),
        tuple(documents),
        tuple(replies),
    )
    require_vocabulary(path, stream.tokens, vocab_size)
    return stream


def _written(conversation: Conversation, tokenizer: Any, *, where: str) -> tuple[str, list[slice]]:
    """Return a conversation's text, and where in it the replies are, with the marks of their ends."""

    def write(number: int, *, prompt: bool = False) -> str:
        messages = conversation.messages[:number]
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))

    try:
        text = write(len(conversation.messages))
        spans = []
        for number, message in enumerate(conversation.messages):
            if message["role"] == "assistant":
                before, after = write(number, prompt=True), write(number + 1)
                if not (text.startswith(after) and after.startswith(before)):
                    raise InputError(
                        f"{where}: the chat template writes message {number + 1} otherwise once there are more",
                        hint="cut the conversation into one for each reply, so that each one ends with its reply",
                    )
                spans.append(slice(len(before), len(after)))
    except InputError:
        raise
    except Exception as err:  # a template is a program
        raise InputError(f"{where}: the model's chat template does not take this conversation ({err})") from err
    return text, spans
