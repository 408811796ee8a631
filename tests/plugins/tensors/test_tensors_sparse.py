"""Sparse tuning trains exactly the chosen values, and no bit of another one changes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the train extra is not installed")

from edged_plugins._tensors.sparse import Scores, SparseMask  # noqa: E402
from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from edged import ConfigError  # noqa: E402

Parameters = dict[str, torch.Tensor]
OPTIMIZERS: dict[str, Callable[[list[torch.Tensor]], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
}


def made(seed: int = 0) -> Parameters:
    drawn = np.random.default_rng(seed)
    shapes = {"0.lora_A": (4, 16), "0.lora_B": (16, 4), "1.lora_A": (4, 7)}
    return {n: torch.from_numpy(drawn.standard_normal(s)).requires_grad_() for n, s in shapes.items()}


def graded(parameters: Parameters, seed: int) -> None:
    """Gradients of a batch, and none for the parameter that the loss does not reach."""
    drawn = np.random.default_rng(1000 + seed)
    for name, parameter in parameters.items():
        grad = torch.from_numpy(drawn.standard_normal(tuple(parameter.shape)))
        parameter.grad = None if name == "1.lora_A" and seed % 2 else grad


def scores_of(parameters: Parameters, by: str = "gradient", batches: int = 3) -> Scores:
    scores = Scores(by)
    for seed in range(batches):
        graded(parameters, seed)
        scores.add(parameters)
    return scores


def joined(tensors: dict[str, torch.Tensor]) -> np.ndarray:
    return np.concatenate([tensor.detach().numpy().ravel() for tensor in tensors.values()])


@pytest.mark.parametrize("by", ["gradient", "weight"])
@given(fraction=st.floats(0.01, 1.0))
def test_exactly_the_values_with_the_best_scores_are_selected(by: str, fraction: float) -> None:
    parameters = made()
    mask = scores_of(parameters, by).choose(fraction)
    worth = np.zeros(156, np.float32)
    for seed in range(3):
        graded(parameters, seed)
        grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in parameters.items()}
        grad = joined(grads).astype(np.float32)
        worth += np.abs(grad * joined(parameters) if by == "weight" else grad).astype(np.float32)
    expected = np.zeros(156, bool)
    expected[np.argsort(-worth, kind="stable")[: round(fraction * 156)]] = True
    assert (joined(mask.state_dict()) == expected).all()
    assert mask.selected == round(fraction * 156)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_bit_of_an_unselected_value_changes(name: str) -> None:
    parameters = made()
    mask = scores_of(parameters).choose(0.1)
    optimizer = OPTIMIZERS[name](list(parameters.values()))
    graded(parameters, 7)
    optimizer.step()  # a step of all values before the mask leaves moments
    before = joined(parameters).copy()
    for seed in range(10):
        graded(parameters, seed)
        mask.step(optimizer, parameters)
    selected = joined(mask.state_dict())
    assert (joined(parameters)[~selected] == before[~selected]).all()
    assert (joined(parameters)[selected] != before[selected]).all()


def test_the_selected_values_take_the_steps_of_an_optimiser_that_has_only_them() -> None:
    parameters = made()
    mask = scores_of(parameters).choose(0.3)
    selected = joined(mask.state_dict())
    alone = torch.from_numpy(joined(parameters)[selected]).requires_grad_()
    optimizer, other = OPTIMIZERS["adamw"](list(parameters.values())), OPTIMIZERS["adamw"]([alone])
    for seed in range(0, 20, 2):
        graded(parameters, seed)
        alone.grad = torch.from_numpy(joined({n: p.grad for n, p in parameters.items()})[selected])
        mask.step(optimizer, parameters)
        other.step()
    np.testing.assert_allclose(joined(parameters)[selected], alone.detach().numpy(), rtol=1e-12)


def test_the_optimiser_keeps_nothing_for_unselected_values() -> None:
    parameters = made()
    mask = scores_of(parameters).choose(0.2)
    optimizer = OPTIMIZERS["adamw"](list(parameters.values()))
    for seed in range(4):
        graded(parameters, seed)
        mask.step(optimizer, parameters)
    for name, parameter in parameters.items():
        unselected = ~mask.state_dict()[name]
        assert not optimizer.state[parameter]["exp_avg"][unselected].any()
        assert not optimizer.state[parameter]["exp_avg_sq"][unselected].any()


def test_a_restored_mask_is_the_same() -> None:
    mask, restored = scores_of(made()).choose(0.2), SparseMask({})
    restored.load_state_dict(mask.state_dict())
    assert (joined(restored.state_dict()) == joined(mask.state_dict())).all()
    assert restored.selected == mask.selected == round(0.2 * 156)


def test_equal_scores_are_taken_in_order() -> None:
    parameters = {name: torch.zeros(3).requires_grad_() for name in "ba"}
    scores = Scores()
    scores.add(parameters)
    assert joined(scores.choose(0.6).state_dict()).tolist() == [True] * 4 + [False] * 2


def test_an_unselected_gradient_that_is_no_number_does_no_harm() -> None:
    parameters = made()
    mask = scores_of(parameters).choose(0.2)
    graded(parameters, 0)
    for name, chosen in mask.state_dict().items():
        parameters[name].grad[~chosen] = float("inf")
    mask.step(OPTIMIZERS["momentum"](list(parameters.values())), parameters)
    assert np.isfinite(joined(parameters)).all()


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.5, 0.001, float("nan")])
def test_a_fraction_that_selects_nothing_is_refused(fraction: float) -> None:
    with pytest.raises(ConfigError, match="fraction of 156"):
        scores_of(made()).choose(fraction)


def test_faults_are_named() -> None:
    parameters = made()
    with pytest.raises(ConfigError, match="magnitude"):
        Scores("magnitude")
    with pytest.raises(ConfigError, match="at least one batch"):
        Scores().choose(0.5)
    mask = scores_of(parameters).choose(0.5)
    optimizer = OPTIMIZERS["momentum"](list(parameters.values()))
    with pytest.raises(ConfigError, match="3 parameters"):
        mask.step(optimizer, {"0.lora_A": parameters["0.lora_A"]})
    graded(parameters, 0)
    parameters["0.lora_A"].grad[0, 0] = float("nan")
    scores = Scores()
    scores.add(parameters)
    with pytest.raises(ConfigError, match="finite"):
        scores.choose(0.5)
