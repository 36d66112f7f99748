"""The average of the weights: the sum of its definition as the oracle, the same bits however weights are cut."""

from typing import Any

import pytest
import torch
from engines import ENGINES, build, gathered, step_once
from ranks import run_group
from torch import Tensor

from launcher.engine.averaging import Average
from launcher.training.averaging import averaged_weights

TOKENS, HALF_LIFE = [100, 100, 250, 250, 30, 30, 30, 400], 500
SKIPPED = [0, 0, 1, 0, 0, 1, 0, 0]
CPU = torch.device("cpu")


def drawn(step: int, size: int = 1003) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(step))


def defined(values: list[Tensor], tokens: list[int], half_life: int) -> Tensor:
    """The average by its definition, in fp64: each step's weights count by the integral of its tokens' decay."""
    total, factors = 0.0, torch.zeros_like(values[0], dtype=torch.float64)
    for index, (value, count) in enumerate(zip(values, tokens, strict=True)):
        later = sum(tokens[index + 1 :])
        factor = 2.0 ** (-later / half_life) - 2.0 ** (-(later + count) / half_life)
        factors, total = factors + factor * value.double(), total + factor
    return factors / total


def averaged(values: list[Tensor], cuts: list[int] | None = None) -> tuple[list[Tensor], int]:
    """The average after each step, of weights that lie in one piece or in several."""
    weights = dict(enumerate(values[0].clone().tensor_split(cuts or [])))
    average = Average(weights, HALF_LIFE, CPU)  # type: ignore[arg-type]
    found = []
    for value, tokens, skipped in zip(values[1:], TOKENS, SKIPPED, strict=True):
        for part, new in zip(weights.values(), value.tensor_split(cuts or []), strict=True):
            part.copy_(new)
        average.update_(weights, tokens, torch.tensor(float(skipped)))  # type: ignore[arg-type]
        found.append(torch.cat([average.tensors[name] for name in weights]))  # type: ignore[index]
    return found, int(average.tokens)


def test_the_average_is_that_of_its_definition() -> None:
    values = [drawn(step) for step in range(len(TOKENS) + 1)]
    found, tokens = averaged(values)
    taken = [index for index, skipped in enumerate(SKIPPED) if not skipped]
    assert tokens == sum(TOKENS[index] for index in taken)
    for index, average in enumerate(found):
        before = [each for each in taken if each <= index]
        expected = defined([values[each + 1] for each in before], [TOKENS[each] for each in before], HALF_LIFE)
        assert torch.allclose(average.double(), expected, rtol=0, atol=1e-6)
    assert torch.equal(found[0], values[1]), "the average of one step is its weights"
    assert torch.equal(found[2], found[1]), "a skipped step does not count"


def test_steps_of_another_size_give_the_same_average() -> None:
    # Eight steps of 50 tokens with the same weights in pairs, and four of 100.
    values = [drawn(step) for step in range(4)]
    halves = defined([each for value in values for each in (value, value)], [50] * 8, HALF_LIFE)
    assert torch.allclose(halves, defined(values, [100] * 4, HALF_LIFE), rtol=0, atol=1e-12)


@pytest.mark.parametrize("cuts", [[1], [17, 500], [0, 3, 3, 999]])
def test_an_average_has_the_same_bits_however_weights_are_cut(cuts: list[int]) -> None:
    values = [drawn(step) for step in range(len(TOKENS) + 1)]
    whole, parts = averaged(values)[0], averaged(values, cuts)[0]
    assert all(torch.equal(one, other) for one, other in zip(whole, parts, strict=True))


def test_a_first_step_that_is_skipped_leaves_nothing() -> None:
    weights = {"w": drawn(0)}
    average = Average(weights, HALF_LIFE, CPU)
    average.update_(weights, 100, torch.tensor(1.0))
    assert int(average.tokens) == 0
    assert torch.equal(average.tensors["w"], torch.zeros(1003))
    average.update_(weights, 100, torch.tensor(0.0))
    assert torch.equal(average.tensors["w"], weights["w"])


def trained(name: str, dtype_name: str) -> dict[str, Any]:
    """Losses of two equal engines, of which one has an average that is measured on the way; what it then holds."""
    dtype, losses, nll = getattr(torch, dtype_name), {}, []
    tokens = torch.arange(32)[None].expand(2, 32)
    history: list[dict[str, Tensor]] = []
    for has_average in (False, True):
        engine = build(name, dtype)
        if has_average:
            engine.average = Average(engine.weights(), HALF_LIFE, engine.device)
        found = []
        for step in range(6):
            poison = torch.inf if step == 3 else 1.0
            loss, _, skipped = step_once(engine, step, poison)
            found.append(loss)
            if engine.average is not None:
                engine.average.update_(engine.weights(), 100, torch.tensor(skipped))
                if not skipped:
                    history.append(gathered(engine, "weight"))
                before = engine.token_nll(tokens, tokens).clone()
                with averaged_weights(engine):
                    nll.append(bool((engine.token_nll(tokens, tokens) != before).any()))
                assert torch.equal(engine.token_nll(tokens, tokens), before)
        losses[str(has_average)] = found
    return {
        "losses": losses,
        "differs": nll,
        "history": history,
        "average": gathered(engine, "average"),
        "weights": gathered(engine, "weight"),
    }


def check_engine(world_size: int, name: str, dtype: str) -> dict[str, Tensor]:
    found = run_group(world_size, trained, name, dtype)[0]
    assert found["losses"]["True"] == found["losses"]["False"]
    assert found["differs"] == [False, True, True, True, True, True], "of one step the average is the weights"
    assert len(found["history"]) == 5
    for key, average in found["average"].items():
        assert torch.equal(found["weights"][key], found["history"][-1][key])
        expected = defined([weights[key] for weights in found["history"]], [100] * 5, HALF_LIFE)
        assert torch.allclose(average.double(), expected, rtol=0, atol=5e-7), key  # a rounding for each step
    return found["average"]


@pytest.mark.parametrize(
    ("world_size", "name", "dtype"),
    [(1, "fsdp2", "float32"), pytest.param(2, "zero-3", "bfloat16", marks=pytest.mark.slow)],
)
def test_the_average_is_beside_training(world_size: int, name: str, dtype: str) -> None:
    check_engine(world_size, name, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_engine_averages(world_size: int, name: str, dtype: str) -> None:
    check_engine(world_size, name, dtype)
