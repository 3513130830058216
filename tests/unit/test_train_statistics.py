"""Statistics that trainers compute, against closed forms."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from fedmerge.errors import ConfigError
from fedmerge.merge.statistics import first_problem
from fedmerge.tensors import schema_of
from fedmerge_client.train.statistics import collect, diagonal_fisher, gram_matrices, output_moments, spread


class Classifier(nn.Module):
    """Two linear layers with a tanh between, or the second alone."""

    def __init__(self, *, hidden: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Linear(5, 4) if hidden else nn.Identity()
        self.last = nn.Linear(4, 3)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)

    def forward(self, inputs: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.last(torch.tanh(self.first(inputs))))


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def test_fisher_information_of_a_softmax_is_what_algebra_says() -> None:
    model, inputs = Classifier(hidden=False), normal(6, 1, 4)
    features = torch.tanh(inputs[:, 0])
    probabilities = model.last(features).softmax(-1)
    variance = probabilities * (1 - probabilities)  # of the gradient with respect to a logit, p - onehot(y)
    expected = (variance[:, :, None] * features[:, None, :] ** 2).mean(0)
    found = diagonal_fisher(model, ({"inputs": inputs[i % 6]} for i in range(3000)), seed=3)
    torch.testing.assert_close(found["last.weight"], expected, rtol=0.15, atol=1e-3)
    torch.testing.assert_close(found["last.bias"], variance.mean(0), rtol=0.15, atol=1e-3)


def test_fisher_information_repeats_with_its_seed_and_leaves_nothing_behind() -> None:
    model = Classifier(hidden=True)
    examples = [{"inputs": normal(1, 5)}] * 8
    state = torch.get_rng_state()
    one, again, other = (diagonal_fisher(model, examples, seed) for seed in (1, 1, 2))
    assert one.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["last.weight"], other["last.weight"])
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_moments_are_those_of_all_outputs() -> None:
    model, inputs = Classifier(hidden=True), normal(7, 3, 5)
    found = output_moments(model, ({"inputs": rows} for rows in inputs), seed=0)
    outputs = model.first(inputs.reshape(21, 5))
    assert found.keys() == {"first.weight", "last.weight"}
    torch.testing.assert_close(found["first.weight"], torch.stack([outputs.mean(0), outputs.std(0, correction=0)]))


def test_gram_matrices_are_the_mean_outer_products_of_inputs() -> None:
    model, inputs = Classifier(hidden=True), normal(7, 3, 5)
    found = gram_matrices(model, ({"inputs": rows} for rows in inputs), seed=0)
    rows = inputs.reshape(21, 5)
    hidden = torch.tanh(model.first(rows)).detach()
    torch.testing.assert_close(found["first.weight"], rows.T @ rows / 21)
    torch.testing.assert_close(found["last.weight"], hidden.T @ hidden / 21)
    model(inputs)  # no hook is left to be called


def test_inputs_that_are_next_to_nothing_do_not_spoil_a_gram_matrix() -> None:
    model, inputs = Classifier(hidden=True), normal(7, 3, 5)
    inputs[..., 1] *= 1e-22  # of which the square is a denormal number, or zero
    inputs[..., 2] *= 1e-30
    found = gram_matrices(model, ({"inputs": rows} for rows in inputs), seed=0)
    assert not found["first.weight"][1:3].any()
    assert not found["first.weight"][:, 1:3].any()
    assert first_problem(found, "gram") is None


def test_only_parameters_that_are_saved_have_statistics() -> None:
    model = Classifier(hidden=True)
    schema = schema_of({"last.weight": model.last.weight.detach(), "other": torch.ones(2)})
    assert collect("gram", model, [{"inputs": normal(1, 5)}], schema, seed=0).keys() == {"last.weight"}
    with pytest.raises(ConfigError, match="entropy") as caught:
        collect("entropy", model, [], schema, seed=0)
    assert caught.value.hint == "one of fisher, gram, moments"


@pytest.mark.parametrize(("num_examples", "most", "expected"), [(3, 5, [0, 1, 2]), (10, 4, [0, 2, 5, 7]), (0, 4, [])])
def test_examples_are_spread_over_the_file(num_examples: int, most: int, expected: list[int]) -> None:
    assert list(spread(num_examples, most)) == expected
