"""What every outer optimizer promises, and that each is what torch.optim calls by that name."""

import inspect
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, Metadata, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedYogi
from torch import Tensor

from fedmerge.aggregation.outer import OUTER, parameters
from fedmerge.errors import ConfigError, InputError

each_optimizer = pytest.mark.parametrize("name", OUTER)


def gradients(num_steps: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(6, 4, generator=generator, dtype=torch.float64).to(dtype) for _ in range(num_steps)]


def run(name: str, start: Tensor, pseudo_gradients: list[Tensor], **params: Any) -> Tensor:
    """Return the parameter after a round per pseudo-gradient."""
    parameter, state = start, OUTER[name].init(start)
    for pseudo_gradient in pseudo_gradients:
        step, state = OUTER[name].update(pseudo_gradient, state, **params)
        parameter = parameter + step
    return parameter


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("name", "params", "torch_params"),
    [
        ("sgd", {"lr": 0.3}, {"lr": 0.3}),
        ("momentum", {"lr": 0.3, "momentum": 0.8}, {"lr": 0.3, "momentum": 0.8}),
        ("nesterov", {"lr": 0.7, "momentum": 0.9}, {"lr": 0.7, "momentum": 0.9, "nesterov": True}),
        ("nesterov", {"lr": 0.4, "momentum": 0.5}, {"lr": 0.4, "momentum": 0.5, "nesterov": True}),
    ],
)
def test_agrees_with_torch(name: str, params: dict[str, Any], torch_params: dict[str, Any], dtype: torch.dtype) -> None:
    start = torch.linspace(-1, 1, 24, dtype=dtype).view(6, 4)
    theirs = start.clone().requires_grad_()
    optimizer = torch.optim.SGD([theirs], **torch_params)
    for gradient in gradients(6, dtype):
        theirs.grad = gradient.clone()
        optimizer.step()
    torch.testing.assert_close(run(name, start, gradients(6, dtype), **params), theirs.detach())


def by_algorithm_2(
    name: str, deltas: list[Tensor], *, lr: float, beta1: float, tau: float, beta2: float = 0.0
) -> list[float]:
    """The server's loop of arXiv 2003.00295, entry by entry."""
    moved = []
    for entries in torch.stack(deltas).flatten(1).T.tolist():
        x, m, v = 0.0, 0.0, tau**2
        for delta in entries:
            m = beta1 * m + (1 - beta1) * delta
            if name == "adagrad":
                v = v + delta**2
            elif name == "yogi":
                v = v - (1 - beta2) * delta**2 * (1 if v > delta**2 else -1 if v < delta**2 else 0)
            else:
                v = beta2 * v + (1 - beta2) * delta**2
            x += lr * m / (v**0.5 + tau)
        moved.append(x)
    return moved


@pytest.mark.parametrize("name", ["adam", "yogi", "adagrad"])
@pytest.mark.parametrize("tau", [1e-3, 0.5])
def test_adaptive_ones_are_their_paper(name: str, tau: float) -> None:
    params = {"lr": 0.02, "beta1": 0.8, "tau": tau} | ({} if name == "adagrad" else {"beta2": 0.95})
    found = run(name, torch.zeros(6, 4, dtype=torch.float64), gradients(12, torch.float64), **params)
    deltas = [-gradient for gradient in gradients(12, torch.float64)]
    expected = by_algorithm_2(name, deltas, **params)
    torch.testing.assert_close(found.flatten(), torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "params", "options"),
    [
        ("flower_adam", {"lr": 0.02, "beta1": 0.8, "beta2": 0.95}, {"eta": 0.02, "beta_1": 0.8, "beta_2": 0.95}),
        ("flower_adam", {}, {}),
        ("flower_yogi", {"lr": 0.02, "beta1": 0.8, "beta2": 0.95}, {"eta": 0.02, "beta_1": 0.8, "beta_2": 0.95}),
        ("flower_yogi", {}, {}),
        ("flower_adagrad", {"lr": 0.03, "tau": 0.1}, {"eta": 0.03, "tau": 0.1}),
        ("flower_adagrad", {}, {}),
    ],
)
def test_flowers_are_what_flower_does(name: str, params: dict[str, Any], options: dict[str, Any]) -> None:
    strategies = {"flower_adam": FedAdam, "flower_yogi": FedYogi, "flower_adagrad": FedAdagrad}
    strategy = strategies[name](**options)
    theirs = torch.linspace(-1, 1, 24, dtype=torch.float64).view(6, 4)
    ours, state = theirs.clone(), OUTER[name].init(theirs)
    for server_round, gradient in enumerate(gradients(12, torch.float64), start=1):
        strategy.current_arrays = {"w": theirs.numpy()}
        arrays = ArrayRecord({"w": Array((theirs - gradient).numpy())})
        content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 3})})
        reply = Message(content, metadata=Metadata(0, "", 1, 0, "", "", 0.0, 60.0, "train"))
        stepped, _ = strategy.aggregate_train(server_round, [reply])
        assert stepped is not None
        theirs = torch.from_numpy(stepped["w"].numpy().copy())
        step, state = OUTER[name].update(gradient, state, **params)
        ours = ours + step
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
        paper, _ = OUTER[name.removeprefix("flower_")].update(gradient, {}, lr=0.02)
        if server_round == 1:
            assert (paper - step).abs().max() > 1e-5


def by_algorithm_3(gradients: list[Tensor], *, lr: float, beta: float, n: int, c: float) -> list[Tensor]:
    """The server's loop of arXiv 2401.09135's delayed Nesterov."""
    theta = m = buffer = torch.zeros(6, 4, dtype=torch.float64)
    seen = []
    for t, g in enumerate(gradients):
        buffer = buffer + g
        if (t + 1) % n == 0:
            m = beta * m + buffer / n
            theta = theta - lr * ((1 - c * n + c) * beta * m + g / n)
            buffer = torch.zeros_like(g)
        else:
            theta = theta - lr * (c * beta * m + g / n)
        seen.append(theta)
    return seen


@pytest.mark.parametrize(("n", "activation"), [(1, 0.0), (1, 1.0), (3, 0.0), (4, 0.5), (5, 1.0)])
def test_delayed_nesterov_is_its_paper(n: int, activation: float) -> None:
    given = gradients(13, torch.float64)
    parameter = torch.zeros(6, 4, dtype=torch.float64)
    state = OUTER["delayed_nesterov"].init(parameter)
    expected = by_algorithm_3(given, lr=0.3, beta=0.8, n=n, c=activation / n)
    for gradient, theta in zip(given, expected, strict=True):
        step, state = OUTER["delayed_nesterov"].update(
            gradient, state, lr=0.3, momentum=0.8, delay=n, activation=activation
        )
        parameter = parameter + step
        torch.testing.assert_close(parameter, theta, rtol=1e-9, atol=1e-12)
    if n == 1:
        nesterov = run("nesterov", torch.zeros(6, 4, dtype=torch.float64), given, lr=0.3, momentum=0.8)
        torch.testing.assert_close(parameter, nesterov)


def test_plain_sgd_adds_the_merged_task_vector() -> None:
    base, merged = torch.zeros(3), torch.tensor([1.0, -2.0, 3.0])
    assert torch.equal(run("sgd", base, [-merged]), merged)


def test_nesterov_accumulates_a_constant_update_to_its_known_gain() -> None:
    merged = torch.ones(1, dtype=torch.float64)
    state = OUTER["nesterov"].init(merged)
    first, state = OUTER["nesterov"].update(-merged, state, lr=0.7, momentum=0.9)
    assert first.item() == pytest.approx(0.7 * 1.9)
    for _ in range(500):
        last, state = OUTER["nesterov"].update(-merged, state, lr=0.7, momentum=0.9)
    assert last.item() == pytest.approx(0.7 / 0.1)


@each_optimizer
def test_updates_are_pure(name: str) -> None:
    parameter, gradient = torch.ones(6, 4), gradients(1)[0]
    _, state = OUTER[name].update(gradient, OUTER[name].init(parameter))
    kept_gradient, kept_state = gradient.clone(), {key: tensor.clone() for key, tensor in state.items()}
    once, _ = OUTER[name].update(gradient, state)
    again, _ = OUTER[name].update(gradient, state)
    assert torch.equal(once, again)
    assert torch.equal(gradient, kept_gradient)
    assert state.keys() == kept_state.keys()
    assert all(torch.equal(state[key], kept_state[key]) for key in state)
    assert torch.equal(parameter, torch.ones(6, 4))


@each_optimizer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_steps_and_state_are_in_working_precision(name: str, dtype: torch.dtype) -> None:
    state = OUTER[name].init(torch.ones(6, 4, dtype=dtype))
    step, state = OUTER[name].update(gradients(1, dtype)[0], state)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert {step.dtype, *(tensor.dtype for tensor in state.values())} == {expected}
    assert step.shape == (6, 4)


@each_optimizer
def test_no_update_from_rest_is_no_step(name: str) -> None:
    step, _ = OUTER[name].update(torch.zeros(4), OUTER[name].init(torch.ones(4)))
    assert not step.any()


@each_optimizer
def test_the_signature_is_the_configuration(name: str) -> None:
    arguments = inspect.signature(OUTER[name].update).parameters
    assert list(parameters(name)) == list(arguments)[2:]
    assert all(parameter.doc.endswith(".") for parameter in parameters(name).values())


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'nesterov'"):
        parameters("nestrov")
    for state in ({}, OUTER["nesterov"].init(torch.ones(5))):
        with pytest.raises(InputError, match="momentum"):
            OUTER["nesterov"].update(torch.ones(4), state)
    _, state = OUTER["adam"].update(torch.ones(5), {})
    with pytest.raises(InputError, match="mean"):
        OUTER["adam"].update(torch.ones(4), state)
