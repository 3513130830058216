"""How one tensor becomes sections and comes back: steps 2 and 3, put together as the plan's codec says.

Which encoding a tensor gets is the sender's choice among those that the plan allows for its shape: dense or thinned,
and for two reasons another one.

- A `seeded` mask of density p adds noise of `sqrt(1/p - 1)` times the task vector's norm. It is harmless only while it
  is small against the weights: of what two fine-tunes of an encoder had gained, noise of 5 % of the weights' norm cost
  2 %, of 8 % 6 %, of 15 % a quarter, of 25 % over half, and of 46 % more than all (docs/log.md). So it is compared,
  tensor by tensor: each layer works with its own weights, and a small one that has changed much does not show in the
  norm of a model. A tensor with more noise than the plan allows travels dense instead.
- With `lowrank`, a matrix travels as the factors that it is known by, or as the nearest ones of the plan's rank where
  those are smaller than the matrix.

Shapes: N elements of the tensor, M of them kept.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedmerge.delta.codec import EXACT, EXACT_VALUES, LOWRANK, REFUSE, Codec, Encoding
from fedmerge.delta.lowrank import Factors, product, truncate
from fedmerge.delta.planes import Bytes, Sections
from fedmerge.delta.quantize import QUANTIZERS
from fedmerge.delta.sparsify import SPARSIFIERS, Kept, Sparse
from fedmerge.errors import InputError, InvalidDelta
from fedmerge.tensors import TensorSpec


class Encoded(NamedTuple):
    """A tensor as sections, and what choosing the encoding has shown: a mask's noise ratio, or the energy kept."""

    encoding: Encoding
    sections: Sections
    noise_ratio: float | None = None
    energy: float | None = None


def noise_ratio(values: Tensor, base: Tensor, density: float) -> float:
    """Return the noise that a mask of `density` adds to `values`, as a share of the norm of the weights `base`.

    That is `|values| * sqrt(1 / density - 1) / |base|`, infinite where the weights are all zero.
    """
    size = float(values.double().norm()) * math.sqrt(1 / density - 1)
    weights = float(base.double().norm())
    return size / weights if weights > 0 else math.inf if size > 0 else 0.0


def encode(
    values: Tensor,
    spec: TensorSpec,
    codec: Codec,
    seed: int,
    *,
    factors: Factors | None = None,
    base: Tensor | None = None,
) -> Encoded:
    """Encode fp32 `values` (N,), finite and not all zero, of a tensor of shape `spec`.

    `factors` are those that the tensor is known by, `base` the weights that it is to be added to. Raises `InputError`
    when a mask would make too much noise and the plan has no fallback.
    """
    if spec_rank := codec.most_rank(spec):
        if factors is not None and factors.rank <= spec_rank:
            return _encode_factors(factors, codec)
        if spec_rank * sum(spec.shape) < spec.num_elements:
            truncated, energy = truncate(values.view(spec.shape), spec_rank, seed)
            return _encode_factors(truncated, codec)._replace(energy=energy)
    encoding = codec.encoding(spec)
    ratio = None
    if encoding.sparsifier == "seeded" and base is not None:
        ratio = noise_ratio(values, base, codec.density)
        if ratio > codec.max_noise_ratio:
            encoding = _quiet(spec, codec, ratio)
        else:
            ratio = None
    kept = SPARSIFIERS[encoding.sparsifier].sparsify(values, seed, codec.density)
    quantized = QUANTIZERS[encoding.values].quantize(kept.values, codec.block_size)
    return Encoded(encoding, {**kept.indices, **quantized}, noise_ratio=ratio)


def _quiet(spec: TensorSpec, codec: Codec, ratio: float) -> Encoding:
    fallback = codec.fallback_encoding(spec)
    if fallback is None:
        raise InputError(
            f"a mask of density {codec.density:g} would add noise of {ratio:.3g} times the weights, "
            f"above max_noise_ratio = {codec.max_noise_ratio:g}",
            hint="the model has moved far: raise the density, train for less long or at a lower learning rate, "
            f'or let such tensors travel dense, with a fallback other than "{REFUSE}"',
        )
    return fallback


def _encode_factors(factors: Factors, codec: Codec) -> Encoded:
    values = _exact_values(factors) if codec.factors == EXACT else codec.factors
    sections: dict[str, Bytes] = {"scale": np.array([factors.scale], dtype="<f8").view(np.uint8)}
    for side, factor in {"left": factors.left, "right": factors.right}.items():
        flat = factor.to(torch.float32).contiguous().view(-1)
        quantized = QUANTIZERS[values].quantize(flat, codec.block_size)
        sections |= {f"{side}_{kind}": section for kind, section in quantized.items()}
    return Encoded(Encoding(LOWRANK, values, factors.rank), sections)


def _exact_values(factors: Factors) -> str:
    """Return the narrowest type of values that holds `factors` as they are."""

    def holds(name: str, factor: Tensor) -> bool:
        flat, quantizer = factor.to(torch.float32).contiguous().view(-1), QUANTIZERS[name]
        return torch.equal(quantizer.dequantize(quantizer.quantize(flat, 1), flat.numel(), 1), flat)

    return next(name for name in EXACT_VALUES if holds(name, factors.left) and holds(name, factors.right))


def num_values(encoding: Encoding, spec: TensorSpec, codec: Codec) -> int:
    """Return M, which follows from what both ends know; for factors, the number of elements that both have."""
    if encoding.rank:
        return encoding.rank * sum(spec.shape)
    return SPARSIFIERS[encoding.sparsifier].num_kept(spec.num_elements, codec.density)


def section_bytes(encoding: Encoding, spec: TensorSpec, codec: Codec) -> dict[str, int]:
    """Return the length of each section of a tensor of this `spec`."""
    quantizer = QUANTIZERS[encoding.values]
    if encoding.rank:
        sizes = {"scale": 8}
        for side, size in zip(("left", "right"), spec.shape, strict=True):
            parts = quantizer.section_bytes(encoding.rank * size, codec.block_size)
            sizes |= {f"{side}_{kind}": num_bytes for kind, num_bytes in parts.items()}
        return sizes
    indices = SPARSIFIERS[encoding.sparsifier].index_bytes(spec.num_elements, codec.density)
    return indices | quantizer.section_bytes(num_values(encoding, spec, codec), codec.block_size)


def most_bytes(spec: TensorSpec, codec: Codec) -> int:
    """Return how long the sections of a tensor of this `spec` can be, whatever its sender chose."""
    candidates = [codec.encoding(spec), codec.fallback_encoding(spec)]
    if rank := codec.most_rank(spec):
        candidates += [Encoding(LOWRANK, values, rank) for values in codec.factor_values()]
    sizes = [section_bytes(found, spec, codec) for found in candidates if found is not None]
    return max(sum(parts.values()) for parts in sizes)


def decode(sections: Sections, encoding: Encoding, spec: TensorSpec, codec: Codec, *, seed: int) -> Tensor:
    """Return the tensor of shape `spec`, fp32, that `sections` of the right lengths stand for.

    Raises `InvalidDelta` for sections that no sender makes, and for values that are not finite.
    """
    if encoding.rank:
        dense = product(decode_factors(sections, encoding, spec, codec, seed=seed))
        _require_finite(dense)
    else:
        sparsifier, kept = SPARSIFIERS[encoding.sparsifier], _dequantize(sections, encoding, spec, codec)
        dense = sparsifier.scatter(kept, spec.num_elements, seed, codec.density)
        if sparsifier.rescales:
            _require_finite(dense)
    return dense.reshape(spec.shape)


def decode_sparse(sections: Sections, encoding: Encoding, spec: TensorSpec, codec: Codec, *, seed: int) -> Sparse:
    """Return the entries that `decode` puts into zeros, where a sparsifier left some out. Raises as `decode`."""
    sparsifier, kept = SPARSIFIERS[encoding.sparsifier], _dequantize(sections, encoding, spec, codec)
    found = sparsifier.locate(kept, spec.num_elements, seed, codec.density)
    if sparsifier.rescales:
        _require_finite(found.values)
    return found


def _dequantize(sections: Sections, encoding: Encoding, spec: TensorSpec, codec: Codec) -> Kept:
    quantizer = QUANTIZERS[encoding.values]
    values = quantizer.dequantize(sections, num_values(encoding, spec, codec), codec.block_size)
    if not quantizer.is_bounded:
        _require_finite(values)
    return Kept(sections, values)


def _require_finite(values: Tensor) -> None:
    if values.numel() and not all(math.isfinite(bound.item()) for bound in torch.aminmax(values)):
        raise InvalidDelta(f"{int((~torch.isfinite(values)).sum())} values are NaN or infinite")


def decode_factors(sections: Sections, encoding: Encoding, spec: TensorSpec, codec: Codec, *, seed: int) -> Factors:
    """Return the factors that a matrix travelled as; they may be other than finite. `seed` has no part in it."""
    factors = []
    for side, size in zip(("left", "right"), spec.shape, strict=True):
        prefix = f"{side}_"
        own = {kind.removeprefix(prefix): part for kind, part in sections.items() if kind.startswith(prefix)}
        factors.append(QUANTIZERS[encoding.values].dequantize(own, encoding.rank * size, codec.block_size))
    scale = float(sections["scale"].view("<f8")[0])
    return Factors(factors[0].view(-1, encoding.rank), factors[1].view(encoding.rank, -1), scale)
