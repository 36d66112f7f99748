"""Integer codes: their products, exact on every device, and the rounding of inputs and gradients to them.

Sums of int8 codes are exact, in int32 as in fp32 as long as they stay below 2**24, so that every engine, device, kernel
and export has the same integers, bit for bit. Scales are applied afterwards, once, in fp32. On GPUs kernels in Triton
(`quant.kernels`) do both at once, if Triton is there; the results are the same.

Dimensions: N rows (tokens), O output features, I input features.
"""

from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from quant.config import Activations
from quant.kernels import avx2
from quant.kernels.avx2 import CPU_HAS_AVX2
from quant.rounding import SMALLEST_GRADIENT, SMALLEST_SCALE, quantize_activation, quantize_rows
from quant.size import LONGEST_ROW

HAS_TRITON = find_spec("triton") is not None

CPU_HAS_INT8 = torch.cpu._is_vnni_supported()
"""Without VNNI, products of any two int8 codes on a CPU take longer than in fp32, and are computed so."""

CPU_HAS_PAIRS = CPU_HAS_AVX2 and not CPU_HAS_INT8
"""Whether products with a weight's codes, of at most 64, are those of `quant.kernels.avx2` that add up pairs in 16
bits: they take a third to a half of the time of fp32."""

CPU_HAS_WORDS = CPU_HAS_PAIRS and not torch.cpu._is_avx512_supported()
"""Whether products of any codes are those in 16 bits, in two thirds of the time of fp32, which AVX512 halves."""

SIGN = 128
"""The highest bit of a byte: with it flipped, an int8 is a uint8 that is larger by 128."""

LEAST_IN_PAIRS = 2**21
"""Products of two codes below which fp32 is faster, because the weight's are packed first."""

EXACT_IN_FP32 = 1032
"""Products of two int8 codes whose sum fp32 surely has: 1032 * 127 * 128 < 2**24; those of inputs may be -128."""

EXACT_IN_INT32 = 2**17
"""Products of two int8 codes whose sum surely fits int32."""


def integer_product(codes_NI: Tensor, codes_OI: Tensor) -> Tensor:
    """Sums of products of int8 codes, ``codes_NI @ codes_OI.T``, as fp32 [N, O].

    Exact while sums stay below 2**24: with 8-bit activations and ternary weights, up to 132,104 input features.

    Args:
        codes_NI: int8.
        codes_OI: int8, a weight's. Where `CPU_HAS_PAIRS`, at most 64; fastest then if none is larger than 1.
    """
    N, (O, I) = len(codes_NI), codes_OI.shape  # noqa: E741
    on_cpu = codes_NI.device.type == "cpu"
    if on_cpu and CPU_HAS_PAIRS and N * codes_OI.numel() >= LEAST_IN_PAIRS:
        return torch.ops.tritrain.product_in_pairs(codes_NI, codes_OI)
    if not (CPU_HAS_INT8 if on_cpu else _gpu_has_int8(O, I)):
        return F.linear(codes_NI.float(), codes_OI.float())
    if not on_cpu and N <= 16:  # cuBLAS takes more rows
        return torch._int_mm(F.pad(codes_NI, (0, 0, 0, 17 - N)), codes_OI.T)[:N].float()
    return torch._int_mm(codes_NI, codes_OI.T).float()


def _gpu_has_int8(*sizes: int) -> bool:
    """Whether cuBLAS multiplies int8 matrices of these sizes."""
    return all(size % 8 == 0 for size in sizes)


def scaled_product(
    codes_NI: Tensor, codes_OI: Tensor, scale_N1: Tensor, level: Tensor, dtype: torch.dtype, *, small: bool = True
) -> Tensor:
    """``(codes_NI @ codes_OI.T) * (scale_N1 * level.T)``, [N, O].

    Args:
        codes_NI: int8.
        codes_OI: int8.
        scale_N1: fp32.
        level: fp32, [1, 1] or [O, 1].
        dtype: of the result.
        small: whether the second codes are a weight's, so that sums stay below 2**24.
    """
    if _has_kernels(codes_NI):
        # Here, where a compiler makes them in one piece; what reads integers reads no other layout.
        codes_NI, codes_OI = codes_NI.contiguous(), codes_OI.contiguous()
        return torch.ops.tritrain.scaled_product(codes_NI, codes_OI, scale_N1, level, dtype, small)
    return _by_library(codes_NI, codes_OI, scale_N1, level, dtype)


def _by_library(codes_NI: Tensor, codes_OI: Tensor, scale_N1: Tensor, level: Tensor, dtype: torch.dtype) -> Tensor:
    return (integer_product(codes_NI, codes_OI) * (scale_N1 * level[:, 0])).to(dtype)


def integer_sums(codes_ON: Tensor, codes_NI: Tensor) -> Tensor:
    """Sums over tokens of products of int8 codes, ``codes_ON @ codes_NI``, rounded once to fp32 [O, I]."""
    (O, N), I = codes_ON.shape, codes_NI.shape[1]  # noqa: E741
    on_cpu = codes_NI.device.type == "cpu"
    pieces = _pieces(codes_ON, codes_NI, EXACT_IN_INT32)
    if CPU_HAS_INT8 if on_cpu else _gpu_has_int8(O, I, N):
        products = [torch._int_mm(left_ON.contiguous(), right_NI) for left_ON, right_NI in pieces]
    elif on_cpu and CPU_HAS_WORDS and O * N * I >= LEAST_IN_PAIRS:
        products = [torch.ops.tritrain.sums_in_words(left_ON, right_NI) for left_ON, right_NI in pieces]
    else:
        products = _in_fp32(codes_ON, codes_NI)
    if len(products) == 1:
        return products[0].float()
    return torch.stack([product.long() for product in products]).sum(0).float()


def _in_fp32(codes_ON: Tensor, codes_NI: Tensor) -> list[Tensor]:
    """Sums over pieces of the tokens, exact."""
    return [left_ON.float() @ right_NI.float() for left_ON, right_NI in _pieces(codes_ON, codes_NI, EXACT_IN_FP32)]


def _pieces(codes_ON: Tensor, codes_NI: Tensor, longest: int) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(codes_ON.split(longest, 1), codes_NI.split(longest), strict=True)


def activation_codes(x: Tensor, activations: Activations) -> tuple[Tensor, Tensor]:
    """`quantize_activation` with codes as int8."""
    if activations == "int8" and _in_one_kernel(x):
        return _rows_in_one_kernel(x, SMALLEST_SCALE)
    codes, scale = quantize_activation(x, activations)
    return codes.to(torch.int8), scale


def gradient_codes(grad_NO: Tensor) -> tuple[Tensor, Tensor]:
    """`quantize_rows`."""
    return _rows_in_one_kernel(grad_NO, SMALLEST_GRADIENT) if _in_one_kernel(grad_NO) else quantize_rows(grad_NO)


def summed_product(grad_NO: Tensor, codes_NI: Tensor, scale_N1: Tensor) -> Tensor:
    """``grad.T @ (codes * scale)`` of gradients whose columns are rounded to int8, [O, I] in the gradients' dtype."""
    if not len(grad_NO):
        return grad_NO.new_zeros(grad_NO.shape[1], codes_NI.shape[1])
    if _has_kernels(grad_NO) and len(grad_NO) <= EXACT_IN_INT32:
        codes_ON, scale_O1 = torch.ops.tritrain.quantize_columns(grad_NO.contiguous(), scale_N1)
        # Compilers put a copy that turns a matrix around into other kernels, which then write it element by element.
        codes_IN = torch.ops.tritrain.transposed(codes_NI.contiguous())
        return scaled_product(codes_ON, codes_IN, scale_O1, _one(grad_NO), grad_NO.dtype, small=False)
    if grad_NO.device.type == "cpu" and CPU_HAS_WORDS and grad_NO.dtype != torch.float64:
        # A compiler would read a column at a time, which takes a CPU's caches three times as long.
        codes_ON, scale_O1 = torch.ops.tritrain.quantize_columns(grad_NO.float().contiguous(), scale_N1)
    else:
        codes_ON, scale_O1 = quantize_rows((grad_NO * scale_N1).T)
    return (integer_sums(codes_ON, codes_NI) * scale_O1).to(grad_NO.dtype)


def rounded_product(grad_NO: Tensor, codes_OI: Tensor, dtype: torch.dtype) -> Tensor:
    """``grad @ codes`` of gradients whose rows are rounded to int8, [N, I]."""
    codes_NO, scale_N1 = gradient_codes(grad_NO)
    return scaled_product(codes_NO, codes_OI.T, scale_N1, _one(grad_NO), dtype)


def _one(like: Tensor) -> Tensor:
    return torch.ones(1, 1, dtype=torch.float32, device=like.device)


def _has_kernels(x: Tensor) -> bool:
    return x.device.type == "cuda" and HAS_TRITON


def _in_one_kernel(x: Tensor) -> bool:
    """Whether rows are rounded by our own kernel: what is compiled is one already, with what comes before it."""
    fits = x.numel() > 0 and x.shape[-1] <= LONGEST_ROW and x.dtype != torch.float64
    return fits and _has_kernels(x) and not torch.compiler.is_compiling()


def _rows_in_one_kernel(x: Tensor, smallest: float) -> tuple[Tensor, Tensor]:
    from quant.kernels.rounding import quantize_rows

    with torch.cuda.device_of(x):  # Triton takes the current one
        codes_NI, scale_N1 = quantize_rows(x.reshape(-1, x.shape[-1]).contiguous(), smallest)
    return codes_NI.view(x.shape), scale_N1.view(*x.shape[:-1], 1)


_OPERATORS = torch.library.Library("tritrain", "FRAGMENT")
"""Defined by hand: called some hundred times a step, those of `torch.library.custom_op` keep a GPU waiting."""
_TAGS = (torch.Tag.pt2_compliant_tag,)
_OPERATORS.define(
    "scaled_product(Tensor codes_NI, Tensor codes_OI, Tensor scale_N1, Tensor level, ScalarType dtype, bool small) "
    "-> Tensor",
    tags=_TAGS,
)
_OPERATORS.define("product_in_pairs(Tensor codes_NI, Tensor codes_OI) -> Tensor", tags=_TAGS)
_OPERATORS.define("sums_in_words(Tensor codes_ON, Tensor codes_NI) -> Tensor", tags=_TAGS)
_OPERATORS.define("quantize_columns(Tensor x_NO, Tensor scale_N1) -> (Tensor, Tensor)", tags=_TAGS)
_OPERATORS.define("transposed(Tensor codes_NI) -> Tensor", tags=_TAGS)


@torch.library.impl(_OPERATORS, "scaled_product", "CUDA")
def _scaled_product(
    codes_NI: Tensor, codes_OI: Tensor, scale_N1: Tensor, level: Tensor, dtype: torch.dtype, small: bool
) -> Tensor:
    from quant.kernels import products
    from quant.kernels.fastest import Way, cuda_seconds, fastest

    def in_bf16(codes_NI: Tensor, codes_OI: Tensor, scale_N1: Tensor, level: Tensor) -> Tensor:
        left, right = codes_NI.to(torch.bfloat16), codes_OI.T.to(torch.bfloat16)
        return (torch.mm(left, right, out_dtype=torch.float32) * (scale_N1 * level[:, 0])).to(dtype)

    def ways() -> dict[str, Way]:
        found: dict[str, Way] = {}
        if small or _gpu_has_int8(*codes_OI.shape):  # else it adds up in fp32
            found["torch's product in int8"] = partial(_by_library, dtype=dtype)
        if small:  # codes and sums are exact in it
            found["torch's product in bf16"] = in_bf16
        for way in products.WAYS:
            if streamed or not way.streamed:
                found[f"Triton's product by {way}"] = partial(products.scaled_product, dtype=dtype, way=way)
        return found

    with torch.cuda.device_of(codes_NI):
        streamed = products.can_stream(codes_NI, codes_OI, dtype)
        key = *codes_NI.shape, len(codes_OI), dtype, small, streamed, codes_NI.device
        return fastest(key, ways, (codes_NI, codes_OI, scale_N1, level), cuda_seconds)


@torch.library.register_fake("tritrain::scaled_product", lib=_OPERATORS)
def _(codes_NI: Tensor, codes_OI: Tensor, scale_N1: Tensor, level: Tensor, dtype: torch.dtype, small: bool) -> Tensor:
    return codes_NI.new_empty(len(codes_NI), len(codes_OI), dtype=dtype)


@torch.library.impl(_OPERATORS, "product_in_pairs", "CPU")
def _product_in_pairs(codes_NI: Tensor, codes_OI: Tensor) -> Tensor:
    product_NO = avx2.product_in_pairs(codes_NI, codes_OI)
    return F.linear(codes_NI.float(), codes_OI.float()) if product_NO is None else product_NO


@torch.library.register_fake("tritrain::product_in_pairs", lib=_OPERATORS)
def _(codes_NI: Tensor, codes_OI: Tensor) -> Tensor:
    return codes_NI.new_empty(len(codes_NI), len(codes_OI), dtype=torch.float32)


@torch.library.impl(_OPERATORS, "sums_in_words", "CPU")
def _sums_in_words(codes_ON: Tensor, codes_NI: Tensor) -> Tensor:
    sums_OI = avx2.product_in_words(codes_ON, codes_NI.T)
    if sums_OI is None:
        sums_OI = torch.stack([product.int() for product in _in_fp32(codes_ON, codes_NI)]).sum(0, dtype=torch.int32)
    return sums_OI


@torch.library.register_fake("tritrain::sums_in_words", lib=_OPERATORS)
def _(codes_ON: Tensor, codes_NI: Tensor) -> Tensor:
    return codes_ON.new_empty(len(codes_ON), codes_NI.shape[1], dtype=torch.int32)


@torch.library.impl(_OPERATORS, "quantize_columns", "CUDA")
def _quantize_columns(x_NO: Tensor, scale_N1: Tensor) -> tuple[Tensor, Tensor]:
    from quant.kernels.rounding import quantize_columns

    with torch.cuda.device_of(x_NO):
        return quantize_columns(x_NO, scale_N1, SMALLEST_GRADIENT)


@torch.library.impl(_OPERATORS, "quantize_columns", "CPU")
def _(x_NO: Tensor, scale_N1: Tensor) -> tuple[Tensor, Tensor]:
    rounded = avx2.quantize_columns(x_NO, scale_N1, SMALLEST_GRADIENT)
    return quantize_rows((x_NO * scale_N1).T) if rounded is None else rounded


@torch.library.register_fake("tritrain::quantize_columns", lib=_OPERATORS)
def _(x_NO: Tensor, scale_N1: Tensor) -> tuple[Tensor, Tensor]:
    N, O = x_NO.shape  # noqa: E741
    codes_ON = x_NO.new_empty(N, O, dtype=torch.int8).T
    if x_NO.device.type != "cpu":
        codes_ON = codes_ON.contiguous()
    return codes_ON, x_NO.new_empty(O, 1, dtype=torch.float32)


@torch.library.impl(_OPERATORS, "transposed", "CUDA")
def _transposed(codes_NI: Tensor) -> Tensor:
    from quant.kernels.rounding import transposed

    with torch.cuda.device_of(codes_NI):
        return transposed(codes_NI)


@torch.library.register_fake("tritrain::transposed", lib=_OPERATORS)
def _(codes_NI: Tensor) -> Tensor:
    return codes_NI.new_empty(codes_NI.shape[1], codes_NI.shape[0])
