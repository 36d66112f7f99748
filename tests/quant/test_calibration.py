"""Fitted codes against plain GPTQ, least squares and a search over all codes; and that layers compute with them."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from devices import CPU, every_device
from hypothesis import given, settings
from hypothesis import strategies as st
from minimal import only_problem
from torch import Tensor, nn

from quant.calibration import (
    calibrate,
    error_feedback,
    feedback_factor,
    fit_level,
    latent_of,
    output_errors,
    round_at,
    rounded,
)
from quant.config import PRESETS, CalibrationConfig, QuantConfig, calibration_problems
from quant.hadamard import rotate
from quant.linear import LEARNED_SCALE, QuantLinear, add_learned_scales_, quantize_, quantized_layers

SUPPORTED: dict[str, dict[str, Any]] = {
    "absmean": {"weights": "absmean"},
    "absmean by row": {"weights": "absmean", "granularity": "row"},
    "absmean by group": {"weights": "absmean", "granularity": "group", "group_size": 8},
    "gaussian": {},
    "gaussian by row": {"granularity": "row"},
    "gaussian by group": {"granularity": "group", "group_size": 8},
    "twn": {"weights": "twn"},
    "twn by row": {"weights": "twn", "granularity": "row"},
    "twn by group": {"weights": "twn", "granularity": "group", "group_size": 8},
    "trust, rotated": {"hadamard": "all", "gradient": "trust"},
    "rotated by row": {"hadamard": "all", "granularity": "row"},
    "learned": {"weights": "learned", "granularity": "row"},
}
METHODS = {
    "error-feedback": CalibrationConfig(sequences=1),
    "scales": CalibrationConfig(sequences=1, method="scales"),
}


def layer_and_inputs(seed: int, rows: int = 12, columns: int = 32, count: int = 200) -> tuple[Tensor, Tensor]:
    """A weight, and inputs of which some are related and of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    sizes = torch.rand(columns, generator=generator) * 3 + 0.05
    weight = torch.randn(rows, columns, generator=generator) * 0.03 * (torch.rand(rows, 1, generator=generator) + 0.5)
    return weight, torch.randn(count, columns, generator=generator) @ mixing * sizes


def moment_of(x_NI: Tensor) -> Tensor:
    return x_NI.double().T @ x_NI.double()


# Error feedback


def gptq_column_by_column(weight: Tensor, level: float, hessian: Tensor) -> np.ndarray:
    """Optimal brain quantization with a fixed order (arXiv 2210.17323, eq. 2 and 3): no Cholesky, no blocks."""
    rest, codes, inverse = weight.double().numpy().copy(), np.zeros(weight.shape), np.linalg.inv(hessian.numpy())
    for i in range(weight.shape[1]):
        codes[:, i] = np.clip(np.round(rest[:, i] / level), -1, 1)
        error = (rest[:, i] - codes[:, i] * level) / inverse[i, i]
        rest -= error[:, None] * inverse[i][None]
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return codes


def test_error_feedback_is_gptq() -> None:
    weight, x = layer_and_inputs(0, rows=7, columns=300, count=900)  # more than two blocks of columns
    moment, level = moment_of(x), 0.03
    damped = moment + 0.01 * moment.diagonal().mean() * torch.eye(300)
    found, values = error_feedback(weight.double(), torch.full((7, 300), level).double(), feedback_factor(moment, 0.01))
    expected = gptq_column_by_column(weight, level, damped)
    assert np.array_equal(found.numpy(), expected)
    assert torch.equal(found, round_at(values, torch.tensor(level)))
    assert (expected != np.clip(np.round(weight.double().numpy() / level), -1, 1)).mean() > 0.1


def test_damping_is_raised_until_the_factor_exists() -> None:
    moment = moment_of(torch.ones(3, 5))  # of rank 1
    assert feedback_factor(moment, 1e-300).isfinite().all()


# Levels


@pytest.mark.parametrize(("shape", "groups"), [((1, 1), 1), ((12, 1), 1), ((12, 4), 4)])
def test_levels_are_those_of_least_squares(shape: tuple[int, int], groups: int) -> None:
    weight, x = (each.double() for each in layer_and_inputs(1))
    codes, level = round_at(weight, torch.tensor(0.02)).double(), torch.full(shape, 0.03, dtype=torch.float64)
    assert codes.view(12, groups, -1).any(-1).all()
    for _ in range(1 if groups == 1 else 300):  # groups are fitted in turns
        level = fit_level(weight, codes, level, moment_of(x))
    outputs = (x @ weight.T).numpy()
    parts = (codes.view(12, groups, -1)[:, :, None] * x.view(1, 1, -1, 32).view(1, -1, groups, 8 if groups == 4 else 32)
             .transpose(1, 2)).sum(-1).numpy()  # fmt: skip
    if shape == (1, 1):
        expected = np.linalg.lstsq(parts[:, 0].reshape(-1, 1), outputs.T.reshape(-1), rcond=None)[0][None]
    else:
        expected = np.stack([np.linalg.lstsq(parts[o].T, outputs[:, o], rcond=None)[0] for o in range(12)])
    np.testing.assert_allclose(level.numpy(), expected, rtol=1e-9)


# The whole


def best_of_all_codes(weight: Tensor, x: Tensor) -> float:
    """The least squared error of one row's outputs over all ternary codes, each at its best level."""
    outputs = (x.double() @ weight.double()).numpy()
    all_codes = np.array(list(itertools.product((-1, 0, 1), repeat=len(weight))), dtype=float)
    approximate = all_codes @ x.double().T.numpy()
    power = (approximate**2).sum(1)
    gain = np.maximum(approximate @ outputs, 0) ** 2 / np.where(power > 0, power, 1)
    return float((outputs**2).sum() - gain.max())


def test_most_of_what_any_codes_could_gain_over_plain_rounding_is_gained() -> None:
    config = QuantConfig(granularity="row", activations="none")
    shares: dict[str, list[float]] = {method: [] for method in METHODS}
    for seed in range(20):
        weight, x = layer_and_inputs(seed, rows=1, columns=8, count=40)
        best = best_of_all_codes(weight[0], x)
        for method, calibration in METHODS.items():
            plain, fitted, _ = calibrate(weight, moment_of(x), config, calibration).errors.tolist()
            assert fitted >= best * (1 - 1e-3)  # a latent weight has its level to a few digits
            assert fitted <= plain
            shares[method].append((plain - fitted) / (plain - best))
    assert np.mean(shares["error-feedback"]) > 0.6
    assert np.mean(shares["scales"]) > 0.3


def quantized(weight: Tensor, keys: dict[str, Any], alpha: Tensor | None = None) -> QuantLinear:
    """A layer that computes with this latent weight, in its dtype."""
    config = QuantConfig(**{"activations": "none", "include": "0"} | keys)
    model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False).to(weight.dtype))
    with torch.no_grad():
        model[0].weight.copy_(weight)
        if config.learned:
            add_learned_scales_(model, config)
            getattr(model[0], LEARNED_SCALE).copy_(weight.bfloat16().abs().amax(1) if alpha is None else alpha)
    quantize_(model, config)
    [layer] = quantized_layers(model).values()
    return layer


@torch.no_grad()
def error_of(layer: QuantLinear, weight: Tensor, x: Tensor) -> float:
    return float((layer(x.to(layer.weight.dtype)).double() - x.double() @ weight.double().T).square().sum())


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 10**6),
    st.sampled_from(sorted(SUPPORTED)),
    st.sampled_from(sorted(METHODS)),
    st.sampled_from([0.1, 1.0, 30.0]),
)
def test_a_layer_computes_with_the_fitted_codes_in_fp32_and_bf16(
    seed: int, recipe: str, method: str, size: float
) -> None:
    weight, x = layer_and_inputs(seed)
    weight *= size
    config = QuantConfig(**{"activations": "none"} | SUPPORTED[recipe])
    rotated = config.hadamard == "all"
    fit = calibrate(weight, moment_of(rotate(x) if rotated else x), config, METHODS[method], rotated=rotated)
    is_new = (fit.weight != weight).any(1)
    layer = quantized(fit.weight, SUPPORTED[recipe], fit.alpha)
    low = quantized(fit.weight.bfloat16(), SUPPORTED[recipe], fit.alpha)
    codes, level = layer.weight_codes()
    codes_in_bf16, level_in_bf16 = low.weight_codes()
    assert torch.equal(codes[is_new], codes_in_bf16[is_new])
    half_step = 2**-8 if config.learned else 0  # of bf16; the others round the same values
    torch.testing.assert_close(level, level_in_bf16, rtol=half_step, atol=0)
    plain, fitted, power = fit.errors.tolist()
    assert fitted <= plain
    assert error_of(layer, weight, x) == pytest.approx(fitted, rel=2e-3)
    assert error_of(quantized(weight, SUPPORTED[recipe]), weight, x) == pytest.approx(plain, rel=2e-3)
    assert power == pytest.approx(float((x.double() @ weight.double().T).square().sum()), rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("weights", ["absmean", "gaussian"])
def test_a_row_that_is_far_larger_than_the_others_before_it_is_rotated(weights: str, method: str) -> None:
    """Rounded to bf16 and rotated, it has other codes than were fitted; the errors count those that it has."""
    weight, x = layer_and_inputs(0, rows=24, columns=256)
    weight[0] *= 20
    keys = {"weights": weights, "hadamard": "all"}
    config = QuantConfig(**{"activations": "none"} | keys)
    fit = calibrate(weight, moment_of(rotate(x)), config, METHODS[method], rotated=True)
    plain, fitted, _ = fit.errors.tolist()
    assert fitted < plain
    assert error_of(quantized(fit.weight.bfloat16(), keys), weight, x) == pytest.approx(fitted, rel=1e-2)
    assert error_of(quantized(fit.weight, keys), weight, x) < plain


@pytest.mark.parametrize("recipe", [name for name in SUPPORTED if "rotated" not in name and name != "learned"])
def test_a_latent_weight_has_any_codes_and_level_that_it_is_given(recipe: str) -> None:
    generator = torch.Generator().manual_seed(3)
    config = QuantConfig(**SUPPORTED[recipe])
    for share in (0.1, 0.5, 0.9):  # of zeros
        weight = torch.randn(16, 32, generator=generator).double()
        codes = torch.randint(0, 2, (16, 32), generator=generator) * 2 - 1
        codes = (codes * (torch.rand(16, 32, generator=generator) >= share)).double()
        codes[:, ::8] = 1  # no block is without one
        shape = {"matrix": (1, 1), "row": (16, 1), "group": (16, 4)}[config.granularity]
        level = torch.rand(shape, generator=generator).double() + 0.5
        found_codes, found_level = rounded(latent_of(weight, codes, level, config).float(), None, config)
        assert torch.equal(found_codes, codes.float())
        torch.testing.assert_close(found_level.double(), level, rtol=2**-8, atol=0)  # half a step of bf16


@pytest.mark.parametrize("recipe", SUPPORTED)
def test_inputs_and_rows_that_are_0(recipe: str) -> None:
    config = QuantConfig(**SUPPORTED[recipe])
    weight, x = layer_and_inputs(5)
    weight[3] = 0
    x[:, 10:20] = 0
    rotated = config.hadamard == "all"
    fit = calibrate(weight, moment_of(x), config, METHODS["error-feedback"], rotated=rotated)
    assert fit.weight.isfinite().all()
    assert fit.errors[1] < fit.errors[0]
    assert quantized(fit.weight, SUPPORTED[recipe], fit.alpha).weight_codes()[0][3].count_nonzero() == 0
    if not rotated:
        nothing = calibrate(weight, torch.zeros(32, 32, dtype=torch.float64), config, METHODS["error-feedback"])
        assert torch.equal(nothing.weight, weight)
        assert nothing.errors.tolist() == [0, 0, 0]


def test_a_group_that_would_have_no_code_is_left_as_it_is() -> None:
    """Its statistic would be that of whatever is in it, and give it some."""
    generator = torch.Generator().manual_seed(0)
    config = QuantConfig(granularity="group", group_size=2, activations="none")
    weight, x = torch.randn(64, 8, generator=generator), torch.randn(50, 8, generator=generator)
    x[:, 1::2] = x[:, ::2] + 0.1 * x[:, 1::2]  # so that a column alone makes up for its neighbor
    weight[:32, 1] = -weight[:32, 0]
    fit = calibrate(weight, moment_of(x), config, METHODS["error-feedback"])
    assert fit.errors[1] < fit.errors[0]
    changed = (fit.weight != weight).any(1)
    assert 0 < changed.sum() < 64


def test_what_changes_the_output_by_nothing_costs_nothing() -> None:
    _, x = layer_and_inputs(6)
    x[:, 16:] = 0
    change = torch.zeros(2, 32).double()
    change[:, 16:] = 1
    assert output_errors(change, moment_of(x)).tolist() == [0, 0]


# Configuration


def test_recipes_that_can_be_calibrated() -> None:
    assert {name: set(calibration_problems(config)) for name, config in PRESETS.items()} == {
        "bitnet-b1.58": set(),
        "nielsen-2025": {"weights", "fused"},
        "paretoq": set(),
        "bitnet-v2": set(),
        "quest": set(),
    }
    assert all(calibration_problems(QuantConfig(**keys)) == {} for keys in SUPPORTED.values())


@pytest.mark.parametrize(
    ("keys", "path", "said"),
    [
        ({"sequences": 0}, "transition.calibration.sequences", "is 0; must be 1 or more"),
        ({"sequences": 1, "damping": 0.0}, "transition.calibration.damping", "is 0.0; must be above 0"),
        ({"quantization": {"weights": "absmedian"}}, "quantization.weights", "is absmedian; a calibration needs absm"),
        ({"quantization": {"levels": "int4"}}, "quantization.levels", "is int4; a calibration needs ternary, because"),
        ({"quantization": {"fused": True}}, "quantization.fused", "is True; a calibration needs False, because each"),
        ({"quantization": {"dead_zone_bias": 1e-3}}, "quantization.dead_zone_bias", "is 0.001; a calibration needs"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(keys: dict[str, Any], path: str, said: str) -> None:
    quantization = keys.get("quantization", {})
    overrides = [f"phases.1.quantization.{key}={value}" for key, value in quantization.items()]
    calibration = {"sequences": 8} | {key: value for key, value in keys.items() if key != "quantization"}
    overrides += [f"phases.1.transition.calibration.{key}={value}" for key, value in calibration.items()]
    found, problem = only_problem(*overrides)
    assert (found, problem[: len(said)]) == (f"phases.1.{path}", said)


@every_device
@pytest.mark.parametrize("calibration", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("keys", SUPPORTED.values(), ids=SUPPORTED)
def test_every_device_fits_the_same(keys: dict[str, Any], calibration: CalibrationConfig, device: torch.device) -> None:
    config, (weight, x) = QuantConfig(**keys), layer_and_inputs(3)
    expected, found = (
        calibrate(weight.to(where), moment_of(x).to(where), config, calibration, rotated="hadamard" in keys)
        for where in (CPU, device)
    )
    assert found.weight.device.type == found.errors.device.type == device.type
    torch.testing.assert_close(found.errors.cpu(), expected.errors, rtol=1e-2, atol=0)
    assert (found.weight.cpu() - expected.weight).abs().gt(1e-5).float().mean() < 0.02
