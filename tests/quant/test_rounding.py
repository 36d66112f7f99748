"""The pure quantizers against oracles in float64 and against Transformers' BitNet layers."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.torchvision_repair import repair_torchvision
from quant.codes import pack_rows, unpack_rows
from quant.config import QuantConfig
from quant.hadamard import rotate
from quant.rounding import (
    SMALLEST_SCALE,
    Scale,
    absmean_scale,
    absmedian_scale,
    bf16_values,
    quantize_activation,
    quantize_weight,
    weight_codes,
)

QUANTIZERS = ("absmean", "absmedian")
INT8_LIMIT = 127
every_quantizer = pytest.mark.parametrize("quantizer", QUANTIZERS)


@st.composite
def matrices(draw, dtypes=(torch.float32, torch.bfloat16, torch.float64)):
    rows, columns, seed = draw(st.integers(1, 9)), draw(st.integers(1, 33)), draw(st.integers(0, 2**32 - 1))
    size = draw(st.sampled_from([1e-6, 0.02, 1.0, 300.0]))
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, columns, generator=generator) * size).to(draw(st.sampled_from(dtypes)))


def ternary(weight, quantizer):
    """Codes and the one level of the matrix."""
    codes, level = quantize_weight(weight, QuantConfig(weights=quantizer))
    assert level.shape == (1, 1)
    return codes, level[0, 0]


def as_float64(x):
    """The values that are quantized: those of the bf16 cast."""
    return x.bfloat16().double().numpy()


# Weights


@given(matrices(), st.sampled_from(QUANTIZERS))
def test_codes_are_ternary_and_everything_is_fp32(weight, quantizer):
    codes, scale = ternary(weight, quantizer)
    assert codes.dtype == scale.dtype == torch.float32
    assert codes.shape == weight.shape
    assert scale.shape == ()
    assert set(codes.unique().tolist()) <= {-1.0, 0.0, 1.0}
    assert scale >= np.float32(SMALLEST_SCALE)


@given(matrices())
def test_absmean_is_the_mean_magnitude(weight):
    expected = np.abs(as_float64(weight)).mean()
    assert absmean_scale(weight.bfloat16().float()).item() == pytest.approx(expected, rel=1e-6)


@given(matrices())
def test_absmedian_is_the_lower_median_magnitude(weight):
    magnitudes = np.sort(np.abs(as_float64(weight)).flatten())
    expected = magnitudes[(magnitudes.size - 1) // 2]
    assert absmedian_scale(weight.bfloat16().float()).item() == expected


def test_lower_median_of_an_even_number():
    assert absmedian_scale(torch.tensor([[1.0, -4.0, 2.0, -3.0]])) == 2.0


@given(matrices(), st.sampled_from(QUANTIZERS))
def test_each_code_is_the_nearest(weight, quantizer):
    """No other code is nearer to the weight by more than fp32 can tell."""
    codes, scale = ternary(weight, quantizer)
    values, step = as_float64(weight), scale.double().item()
    distances = np.abs(values[..., None] - step * np.array([-1.0, 0.0, 1.0]))
    ours = np.abs(values - step * codes.double().numpy())
    assert (ours <= distances.min(-1) + 1e-6 * step).all()


def test_ties_go_to_even():
    weight = torch.tensor([[0.5, -0.5, 1.5, -1.5, 0.498, 0.502, -0.502]])
    assert weight_codes(weight, Scale(torch.ones(1, 1)), QuantConfig()).tolist() == [[0, 0, 1, -1, 0, 1, -1]]


def test_the_bf16_cast_comes_first():
    """0.501 is above half of the scale, its bf16 cast 0.5 is not."""
    weight = torch.tensor([[0.501, 1.0]])
    assert (weight / 1.0).round().tolist() == [[1.0, 1.0]]
    assert weight_codes(weight, Scale(torch.ones(1, 1)), QuantConfig()).tolist() == [[0.0, 1.0]]


@given(matrices(dtypes=(torch.float32, torch.float64)), st.sampled_from(QUANTIZERS))
def test_a_master_weight_has_the_codes_of_its_bf16_copy(weight, quantizer):
    for ours, theirs in zip(ternary(weight, quantizer), ternary(weight.bfloat16(), quantizer), strict=True):
        assert torch.equal(ours, theirs)


def test_statistics_are_not_in_bf16():
    """bf16 would lose the small addends: its mean of these is another one."""
    weight = torch.full((64, 64), 0.0101)
    weight[0, 0] = 3.0
    expected = np.abs(as_float64(weight)).mean()
    assert absmean_scale(weight.bfloat16().float()).item() == pytest.approx(expected, rel=1e-6)
    assert absmean_scale(weight.bfloat16().float()).bfloat16().item() != pytest.approx(expected, rel=1e-6)


@every_quantizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_zeros_quantize_to_zeros(quantizer, dtype):
    codes, scale = ternary(torch.zeros(3, 4, dtype=dtype), quantizer)
    assert torch.equal(codes, torch.zeros(3, 4))
    assert scale == torch.tensor(SMALLEST_SCALE)


@given(matrices(), st.integers(1, 6), st.sampled_from(QUANTIZERS))
def test_powers_of_two_scale_the_scale_alone(weight, exponent, quantizer):
    codes, scale = ternary(weight * 256, quantizer)  # away from the floor
    larger_codes, larger_scale = ternary(weight * 256 * 2**exponent, quantizer)
    if scale > SMALLEST_SCALE:
        assert torch.equal(codes, larger_codes)
        assert larger_scale == scale * 2**exponent


@given(matrices(), st.sampled_from(QUANTIZERS))
def test_signs_are_symmetric(weight, quantizer):
    codes, scale = ternary(weight, quantizer)
    negative_codes, negative_scale = ternary(-weight, quantizer)
    assert torch.equal(codes, -negative_codes)
    assert scale == negative_scale


@every_quantizer
def test_the_scale_is_of_the_whole_matrix(quantizer):
    """Not of a row or a shard: a large row takes the codes of a small one."""
    weight = torch.cat((torch.full((2, 8), 0.01), torch.full((6, 8), 10.0)))
    assert torch.equal(ternary(weight, quantizer)[0][:2], torch.zeros(2, 8))
    assert torch.equal(ternary(weight[:2], quantizer)[0], torch.ones(2, 8))


# Activations


@given(matrices())
def test_int8_codes_and_scales(x):
    codes, scale = quantize_activation(x)
    assert codes.dtype == scale.dtype == torch.float32
    assert codes.shape == x.shape
    assert scale.shape == (*x.shape[:-1], 1)
    assert torch.equal(codes, codes.round())
    assert codes.abs().max() <= INT8_LIMIT
    values = x.double().numpy()
    largest = np.maximum(np.abs(values).max(-1, keepdims=True), SMALLEST_SCALE)
    np.testing.assert_allclose(scale.double().numpy(), largest / 127, rtol=1e-6)
    error = np.abs(values - (codes * scale).double().numpy())
    assert (error <= scale.double().numpy() * (0.5 + 1e-4)).all()


@given(matrices())
def test_the_largest_of_a_token_gets_the_largest_code(x):
    codes, _ = quantize_activation(x)
    for row, code in zip(x.float(), codes, strict=True):
        if row.abs().max() > SMALLEST_SCALE:
            where = row.abs().argmax()
            assert code[where] == INT8_LIMIT * row[where].sign()


def test_tokens_are_independent():
    x_BTD = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    codes, scale = quantize_activation(x_BTD)
    changed = x_BTD.clone()
    changed[1, 3] *= 1000
    changed_codes, changed_scale = quantize_activation(changed)
    others = torch.ones(2, 5, dtype=torch.bool)
    others[1, 3] = False
    assert torch.equal(codes[others], changed_codes[others])
    assert torch.equal(scale[others], changed_scale[others])
    for b in range(2):
        for t in range(5):
            assert torch.equal(quantize_activation(x_BTD[b, t])[0], codes[b, t])


def test_int8_ties_go_to_even():
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    assert quantize_activation(x)[0].tolist() == [[127, 0, 2, 2, 0, -2]]


def test_the_largest_magnitude_is_a_tie_of_127_5_and_128_is_clipped_where_it_is_positive():
    codes, scale = quantize_activation(torch.tensor([[-255.0, 2.0, 1.0, 3.0], [255.0, -1.0, 0.0, 253.0]]), "int8-127.5")
    assert scale.tolist() == [[2.0], [2.0]]
    assert codes.tolist() == [[-128, 1, 0, 2], [127, 0, 0, 126]]


def test_int8_of_a_zero_token():
    codes, scale = quantize_activation(torch.tensor([[0.0, 0.0], [1.0, -2.0]]))
    assert codes.tolist() == [[0, 0], [64, -127]]
    assert scale[0].item() == pytest.approx(SMALLEST_SCALE / INT8_LIMIT)


# Compiled


def test_compiled_code_rounds_where_eager_code_does():
    """Inductor would leave out a cast to bf16 whose result is cast to fp32 again."""

    def quantized(weight, unusual):  # one graph: each costs a run of the C++ compiler
        codes, level = quantize_weight(weight)
        packed = pack_rows(codes[:, :509])
        return codes, level, packed, unpack_rows(packed, 509), bf16_values(unusual)

    weight = 0.02 * torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    # Ties, both zeros, the largest numbers and infinities; NaN in several ways; one of each is in a vector's rest.
    numbers = [0x3F808000, 0x3F818000, 0x3F808001, 0, 1, 0x8000, 0x7F7FFFFF, 0x7F7F7FFF, 0x7F800000]
    bits = torch.tensor([*numbers, 0x7F800001, 0x7FC00000, 0x7FFF7FFF, 0x7FFF8000, 0x7FFFFFFF])
    unusual = torch.cat([bits, bits | 1 << 31]).to(torch.uint32).view(torch.float32)
    torch._dynamo.reset()
    operands = weight, torch.cat([unusual, unusual[:1]])
    # Translating torch's headers once takes as long as ten kernels gain by it.
    with torch._inductor.config.patch(cpp_cache_precompile_headers=False):
        codes, level, packed, unpacked, rounded = torch.compile(quantized, fullgraph=True)(*operands)
    expected, expected_level, expected_packed, _, expected_rounded = quantized(*operands)
    assert torch.equal(level, expected_level)
    assert torch.equal(codes, expected)
    assert not torch.equal((weight * level.reciprocal()).round().clamp(-1, 1), expected)
    assert torch.equal(packed, expected_packed)
    assert torch.equal(unpacked, expected[:, :509].to(torch.int8))
    torch.testing.assert_close(rounded, expected_rounded, rtol=0, atol=0, equal_nan=True)
    assert rounded.isnan().sum() == 10


@pytest.mark.slow
def test_compiled_code_rotates_as_eager_code_does():
    weight = 0.02 * torch.randn(512, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    torch._dynamo.reset()
    codes, level = torch.compile(lambda weight: quantize_weight(rotate(weight)), fullgraph=True)(weight)
    expected, expected_level = quantize_weight(rotate(weight))
    assert torch.equal(codes, expected)
    assert torch.equal(level, expected_level)


# Transformers' layers


@pytest.fixture(scope="module")
def bitnet():
    repair_torchvision()
    pytest.importorskip("transformers")
    from transformers.integrations import bitnet

    with torch.compiler.set_stance("force_eager"):
        yield bitnet


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", [0.02, 1.0, 30.0])
def test_weight_codes_are_those_of_transformers(bitnet, seed, size):
    weight = (torch.randn(96, 128, generator=torch.Generator().manual_seed(seed)) * size).bfloat16()
    codes, scale = ternary(weight, "absmean")
    theirs = bitnet.WeightQuant.apply(weight)
    assert torch.equal(theirs.sign().float(), codes)
    assert torch.equal(theirs, (codes * scale).bfloat16())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", [0.02, 1.0, 300.0])
def test_activation_codes_are_those_of_transformers(bitnet, seed, size):
    x = (torch.randn(64, 96, generator=torch.Generator().manual_seed(seed)) * size).bfloat16()
    codes, scale = quantize_activation(x)
    theirs = bitnet.ActQuant.apply(x)  # dequantized, in bf16: 8 bits of significand tell neighboring codes apart
    assert torch.equal((theirs.float() / scale).round(), codes)
