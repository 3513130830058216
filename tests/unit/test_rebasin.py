"""Aligning models: permutations change no output, and the one that a model was shuffled by is found again."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
)

from fedmerge.errors import InputError, ModelMismatch
from fedmerge.rebasin import Axis, Group, groups_of, mlp_groups, permuted, weight_matching
from fedmerge.tensors import schema_of
from tests.vectors.test_vectors import HERE

SIZES: dict[str, Any] = {
    "vocab_size": 90,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "initializer_range": 0.3,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES, num_key_value_heads=2),
    "qwen2": Qwen2Config(**SIZES, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=16),
    "bert": BertConfig(**SIZES, num_labels=3),
    "roberta": RobertaConfig(**SIZES, num_labels=3),
}


def shuffles(groups: list[Group], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {group.name: torch.randperm(group.num_units, generator=generator) for group in groups}


def transformer(name: str) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """Return a random model and its tensors as they are saved, norms and biases random as well."""
    config = CONFIGS[name]
    kind = AutoModelForSequenceClassification if "bert" in name else AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = kind.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.3 * torch.randn(parameter.shape))
    return model, {key: tensor.detach().clone() for key, tensor in model.named_parameters()}


def outputs(model: PreTrainedModel, tensors: dict[str, Tensor]) -> Tensor:
    model.load_state_dict(tensors, strict=False)
    model.tie_weights()
    tokens = torch.arange(24).view(2, 12) % 50 + 5
    with torch.inference_mode():
        logits: Tensor = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
    return logits


@pytest.mark.parametrize("name", CONFIGS)
def test_a_permuted_transformer_computes_the_same(name: str) -> None:
    model, tensors = transformer(name)
    groups = groups_of(schema_of(tensors), CONFIGS[name].to_dict())
    assert {group.name.partition(".")[0] for group in groups} >= {"heads", "hidden"}
    # The head of a RoBERTa classifier is not in the tables: what reaches it stays.
    assert ("residual" in {group.name for group in groups}) == (name != "roberta")
    expected = outputs(model, tensors)
    for group in groups:
        # One group at a time, so that no error hides behind another.
        moved = dict(permuted(tensors, groups, shuffles(groups, 1) | unmoved(groups, but=group.name)))
        assert any(not torch.equal(moved[key], tensors[key]) for key in tensors)
        torch.testing.assert_close(outputs(model, moved), expected, atol=1e-4, rtol=1e-4)


def unmoved(groups: list[Group], but: str) -> dict[str, Tensor]:
    return {group.name: torch.arange(group.num_units) for group in groups if group.name != but}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_a_transformer_that_was_shuffled_is_put_in_order_again(name: str, noise: float) -> None:
    _, tensors = transformer(name)
    groups = groups_of(schema_of(tensors), CONFIGS[name].to_dict())
    generator = torch.Generator().manual_seed(4)
    noisy = {key: tensor + noise * torch.randn(tensor.shape, generator=generator) for key, tensor in tensors.items()}
    shuffled = dict(permuted(noisy, groups, shuffles(groups, 2)))
    aligned = permuted(shuffled, groups, weight_matching(tensors, shuffled, groups))
    assert all(torch.equal(aligned[key], noisy[key]) for key in noisy)


def mlp(*sizes: int, seed: int = 0, bias: bool = True) -> nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, hidden in pairwise(sizes):
        layers += [nn.Linear(inputs, hidden, bias=bias), nn.ReLU()]
    for parameter in (found := nn.Sequential(*layers[:-1])).parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return found


@pytest.mark.parametrize("bias", [True, False])
def test_a_permuted_mlp_computes_the_same_and_is_put_in_order_again(bias: bool) -> None:
    model = mlp(20, 30, 40, 30, 7, bias=bias)
    tensors = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    groups = groups_of(schema_of(tensors), {})
    assert [group.num_units for group in groups] == [30, 40, 30]
    inputs = torch.randn(5, 20, generator=torch.Generator().manual_seed(1))
    expected = model(inputs)
    shuffled = dict(permuted(tensors, groups, shuffles(groups, 5)))
    model.load_state_dict(shuffled)
    torch.testing.assert_close(model(inputs), expected, atol=1e-3, rtol=1e-4)
    aligned = permuted(shuffled, groups, weight_matching(tensors, shuffled, groups))
    assert all(torch.equal(aligned[key], tensors[key]) for key in tensors)


def test_matching_brings_models_of_different_origin_closer_and_repeats() -> None:
    one, other = (dict(mlp(20, 30, 40, 7, seed=seed).state_dict()) for seed in (0, 1))
    groups = mlp_groups(schema_of(one))

    def distance(model: Any) -> float:
        return sum(float((one[key] - model[key]).square().sum()) for key in one)

    found = weight_matching(one, other, groups, seed=3)
    again = weight_matching(one, other, groups, seed=3)
    assert all(torch.equal(found[name], again[name]) for name in found)
    assert all(sorted(permutation.tolist()) == list(range(len(permutation))) for permutation in found.values())
    aligned = permuted(other, groups, found)
    assert distance(aligned) < 0.95 * distance(other)
    # The best of several orders is no worse than the first of them.
    first, best = (weight_matching(one, other, groups, seed=3, num_orders=number) for number in (1, 8))
    assert distance(permuted(other, groups, best)) <= distance(permuted(other, groups, first)) + 1e-6
    # Nothing moves in a model that is its own target.
    still = weight_matching(one, one, groups)
    assert all(torch.equal(still[group.name], torch.arange(group.num_units)) for group in groups)


def test_a_recorded_matching_of_the_authors_is_reproduced() -> None:
    recorded = load_file(HERE / "rebasin_weight_matching_1hidden_random.safetensors")
    one, other, expected = (
        {key.partition(".")[2]: tensor for key, tensor in recorded.items() if key.startswith(f"{model}.")}
        for model in ("A", "B", "out")
    )
    # Their kernels are (in, out).
    axes = (Axis("Dense_0.kernel", 1), Axis("Dense_0.bias", 0), Axis("Dense_1.kernel", 0))
    groups = [Group("P_0", 10, axes)]
    found = weight_matching(one, other, groups)
    assert torch.equal(found["P_0"], recorded["perm.P_0"])
    aligned = permuted(other, groups, found)
    for key in expected:
        torch.testing.assert_close(aligned[key], expected[key], atol=1e-12, rtol=0)


def test_what_is_not_known_is_refused() -> None:
    with pytest.raises(InputError, match="not a chain"):
        groups_of(schema_of({"a.weight": torch.ones(3, 4), "b.weight": torch.ones(3, 4)}), {"model_type": "made-up"})
    with pytest.raises(InputError, match="not a chain"):
        mlp_groups(schema_of({"0.kernel": torch.ones(3, 4)}))
    with pytest.raises(InputError, match="has a name that is known"):
        groups_of(schema_of({"0.weight": torch.ones(3, 4)}), {"model_type": "llama"})
    _, tensors = transformer("bert")
    with pytest.raises(InputError, match="equal parts"):
        groups_of(schema_of(tensors), {"model_type": "bert", "num_attention_heads": 5})
    groups = groups_of(schema_of(tensors), CONFIGS["bert"].to_dict())
    name = groups[0].axes[0].tensor
    with pytest.raises(ModelMismatch, match="another shape"):
        weight_matching(tensors, tensors | {name: torch.ones(2, 2)}, groups)
    with pytest.raises(ModelMismatch, match="not in both"):
        weight_matching(tensors, {}, groups)
