"""A classifier from a plain encoder, with a head that is made from the labels' names instead of learnt.

A random head has to be learnt first, and while it is, every partner pulls the encoder somewhere else. A head of label
embeddings (zero-shot classification, arXiv 1909.00161; as CLIP does for images, arXiv 2103.00020) puts all partners
in one space from the start. The result is an ordinary BertForSequenceClassification: transformers alone runs it.

Sentence encoders are trained to be averaged over tokens, but BERT's classifier reads the first token, through a dense
layer and tanh. So the dense layer is set to the ridge regression from the first token's state to the normalised
average, fitted on made-up word sequences; its outputs are small, where tanh is nearly the identity. Row l of the
classifier is the centred embedding of label l's name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoConfig, AutoModel, BertForSequenceClassification

from fedmerge.errors import InputError, ResourceError
from fedmerge_client.train.huggingface import open_tokenizer, quiet_transformers

LOGIT_SCALE = 20.0  # of cosines; the inverse temperature that sentence encoders are trained with
RIDGE = 1.0
MAX_LABEL_TOKENS = 64


def build_classifier(
    encoder_dir: Path, labels: Sequence[str], out_dir: Path, *, num_probes: int = 2000, seed: int = 0
) -> None:
    """Write a text classifier over `labels` to `out_dir`, made from the BERT encoder in `encoder_dir`.

    `num_probes` is the number of word sequences that the pooler is fitted on, drawn by `seed` from the tokenizer's
    vocabulary. The same inputs give the same weights on the same machine. Raises `InputError` when the directory is
    not a BERT encoder with its tokenizer or the labels are not distinct, `ResourceError` when it can't be written.
    """
    if len(labels) < 2 or len(set(labels)) != len(labels) or not all(label_words(label) for label in labels):
        raise InputError("a classifier needs at least two labels, distinct and made of words")
    with quiet_transformers():
        try:
            config = AutoConfig.from_pretrained(encoder_dir, local_files_only=True)
            if config.model_type != "bert":
                raise InputError(f"{encoder_dir}: a {config.model_type} model; only BERT encoders get a label head")
            tokenizer = open_tokenizer(encoder_dir)
            encoder = AutoModel.from_pretrained(
                encoder_dir, local_files_only=True, use_safetensors=True, dtype=torch.float32
            ).eval()
        except (OSError, ValueError, RuntimeError, SafetensorError) as err:
            raise InputError(f"{encoder_dir}: not a model directory that transformers opens ({err})") from err

        _, names = _embed(encoder, tokenizer, [label_words(label) for label in labels])  # (labels, hidden)
        rows = normalize(names - names.mean(0), dim=-1)
        weight, bias = _fit_pooler(*_embed(encoder, tokenizer, _probe_texts(tokenizer, num_probes, seed)))

        config.num_labels = len(labels)
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: index for index, label in enumerate(labels)}
        config.problem_type = "single_label_classification"
        classifier: Any = BertForSequenceClassification(config)
        classifier.bert.load_state_dict(
            {
                **{name: value for name, value in encoder.state_dict().items() if not name.startswith("pooler.")},
                "pooler.dense.weight": weight,
                "pooler.dense.bias": bias,
            }
        )
        with torch.no_grad():
            classifier.classifier.weight.copy_(LOGIT_SCALE * rows)
            classifier.classifier.bias.zero_()
        try:
            classifier.save_pretrained(out_dir)
            tokenizer.save_pretrained(out_dir)
        except OSError as err:
            raise ResourceError(f"{out_dir}: could not write the model ({err})") from err


def label_words(label: str) -> str:
    """Return a label as words: dots, slashes, dashes and underscores become spaces."""
    return " ".join(re.split(r"[\W_]+", label)).strip()


def _probe_texts(tokenizer: Any, num_probes: int, seed: int) -> list[str]:
    """Return made-up texts of three to eight words of the vocabulary."""
    words = sorted(word for word in tokenizer.get_vocab() if word.isalpha() and len(word) > 2)
    if not words:
        raise InputError("the tokenizer's vocabulary has no whole words to fit the classifier's pooler on")
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(words), (num_probes, 8), generator=generator).tolist()
    return [" ".join(words[index] for index in row[: 3 + number % 6]) for number, row in enumerate(drawn)]


def _embed(encoder: Any, tokenizer: Any, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return of each text the first token's last state and the normalised average over tokens: each (texts, hidden)."""
    firsts, means = [], []
    for start in range(0, len(texts), 64):
        batch = tokenizer(
            list(texts[start : start + 64]),
            padding=True,
            truncation=True,
            max_length=MAX_LABEL_TOKENS,
            return_tensors="pt",
        )
        with torch.inference_mode():
            states: Tensor = encoder(**batch).last_hidden_state  # (batch, tokens, hidden)
        mask = batch["attention_mask"].unsqueeze(-1).to(states.dtype)
        firsts.append(states[:, 0])
        means.append(normalize((states * mask).sum(1), dim=-1))
    return torch.cat(firsts), torch.cat(means)


def _fit_pooler(states: Tensor, averages: Tensor) -> tuple[Tensor, Tensor]:
    """Return weight (hidden, hidden) and bias (hidden,) of the ridge regression from first-token states to averages."""
    inputs, targets = states.double(), averages.double()
    input_mean, target_mean = inputs.mean(0), targets.mean(0)
    inputs, targets = inputs - input_mean, targets - target_mean
    gram = inputs.T @ inputs + RIDGE * torch.eye(inputs.shape[1], dtype=torch.float64)
    weight = torch.linalg.solve(gram, inputs.T @ targets).T
    bias = target_mean - weight @ input_mean
    return weight.float(), bias.float()
