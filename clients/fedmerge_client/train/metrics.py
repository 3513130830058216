"""Scores of a classifier beyond its accuracy: F1 by scikit-learn, and calibration."""

from __future__ import annotations

import torch
from sklearn.metrics import f1_score
from torch import Tensor

NUM_BINS = 15


def classification_metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Return `accuracy`, `macro_f1` and `ece`, each from 0 to 1, of logits (N, classes) on labels (N,), N > 0.

    Macro F1 is the mean over the classes that are labels or predictions. The expected calibration error
    (arXiv 1706.04599) is the gap between confidence and accuracy in 15 bins of confidence, each weighing its examples.
    """
    confidence, predicted = logits.double().softmax(-1).max(-1)
    correct = (predicted == labels).double()
    bins = (confidence * NUM_BINS).ceil().clamp(1, NUM_BINS).long() - 1
    gaps = torch.zeros(NUM_BINS, dtype=torch.float64).index_add_(0, bins, confidence - correct)
    return {
        "accuracy": float(correct.mean()),
        "macro_f1": float(f1_score(labels.numpy(), predicted.numpy(), average="macro", zero_division=0)),
        "ece": float(gaps.abs().sum() / len(labels)),
    }
