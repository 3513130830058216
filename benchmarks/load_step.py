"""What stands for training where only the round around it is measured: a step that is drawn, in models of real shapes.

`fedmerge join --trainer torch` and Flower's ClientApp both call `add_step`, which says what it took.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

# Vocabulary, context, width and depth of MiniLM and of GPT-2.
SIZES = {"22M": (30_522, 512, 384, 6), "124M": (50_257, 1024, 768, 12)}
STEP, STEP_METRIC = 1e-3, "step_cpu_s"


def shapes(size: str) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a transformer of a `size`."""
    vocabulary, context, width, depth = SIZES[size]
    found: dict[str, tuple[int, ...]] = {"tokens": (vocabulary, width), "positions": (context, width)}
    for layer in range(depth):
        matrices = {"attention_in": 3 * width, "attention_out": width, "feed_in": 4 * width}
        found |= {f"layer{layer}_{name}": (rows, width) for name, rows in matrices.items()}
        found |= {f"layer{layer}_{name}_bias": (rows,) for name, rows in matrices.items()}
        found |= {f"layer{layer}_feed_out": (width, 4 * width), f"layer{layer}_feed_out_bias": (width,)}
        found |= {f"layer{layer}_norm{part}": (width,) for part in range(4)}
    return found


def first_model(size: str) -> dict[str, np.ndarray]:
    """Return the model that all begin with."""
    generator = np.random.Generator(np.random.SFC64(0))
    return {name: 0.02 * generator.standard_normal(shape, np.float32) for name, shape in shapes(size).items()}


def add_step(model: Mapping[str, np.ndarray], *seed: int) -> float:
    """Add a step drawn from the seed to a model in place; return the CPU seconds it took."""
    began_s, generator = time.thread_time(), np.random.Generator(np.random.SFC64(seed))
    for tensor in model.values():
        np.add(tensor, STEP * generator.standard_normal(tensor.shape, np.float32), out=tensor)
    return time.thread_time() - began_s


def module(size: str) -> Any:
    """Return a torch module with a model's tensors."""
    import torch

    made = torch.nn.Module()
    for name, shape in shapes(size).items():
        made.register_parameter(name, torch.nn.Parameter(torch.empty(shape)))
    return made


module_22m, module_124m = partial(module, "22M"), partial(module, "124M")


def train(trained: Any, work: Any) -> tuple[int, dict[str, float]]:
    """Be the function of the trainer `torch`."""
    arrays = {name: tensor.detach().numpy() for name, tensor in trained.named_parameters()}
    return 1, {STEP_METRIC: add_step(arrays, work.seed)}
