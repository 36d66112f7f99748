"""Triton's kernels against their twins in PyTorch, bit for bit: on a GPU, or else through Triton's interpreter."""

import math

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources

from quant.config import QuantConfig
from quant.integers import integer_product
from quant.kernels import fastest, products, rounding
from quant.linear import quantize_
from quant.rounding import (
    SMALLEST_GRADIENT,
    SMALLEST_SCALE,
    quantize_activation,
    quantize_rows,
)

if torch.cuda.is_available():
    pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = [(1, 1, 1), (3, 5, 7), (16, 64, 128), (17, 65, 129), (130, 70, 33), (5, 200, 300)]
if DEVICE.type == "cuda":
    SHAPES += [(4096, 2048, 8192), (8191, 2047, 5461)]


def normal(*shape: int, dtype: torch.dtype = torch.float32, size: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * size).to(DEVICE, dtype)


def codes(*shape: int, largest: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(-largest, largest + 1, shape, generator=generator, dtype=torch.int8).to(DEVICE)


@pytest.mark.parametrize(("M", "N", "K"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_exact(M: int, N: int, K: int, dtype: torch.dtype) -> None:
    a, b = codes(M, K, largest=127), codes(N, K, largest=1)
    rows, columns = normal(M, 1).abs(), normal(1, 1).abs()
    expected = (integer_product(a, b) * (rows * columns)).to(dtype)
    assert torch.equal(products.scaled_product(a, b, rows, columns, dtype), expected)


@pytest.mark.parametrize(
    ("way", "dtype"),
    [
        *((way, torch.bfloat16) for way in products.WAYS),
        *(pytest.param(way, torch.float32, marks=pytest.mark.slow) for way in products.WAYS),
    ],
)
def test_every_way_gives_the_same(way: products.Way, dtype: torch.dtype) -> None:
    for M, N, K in [(70, 304, 160), (130, 272, 400)] + ([] if DEVICE.type == "cpu" else [(4104, 2056, 1040)]):
        a, b = codes(M, K, largest=127), codes(N, K, largest=127)
        rows, columns = normal(M, 1), normal(N)
        expected = ((a.cpu().long() @ b.cpu().long().T).float().to(DEVICE) * (rows * columns)).to(dtype)
        try:
            found = products.scaled_product(a, b, rows, columns, dtype, way)
        except OutOfResources:
            pytest.skip("too large for this device")
        assert torch.equal(found, expected)


def test_operands_that_do_not_fit_or_are_not_in_one_piece_are_refused() -> None:
    a, b, one = codes(20, 33, largest=127).T, codes(40, 20, largest=127), torch.ones(1, 1, device=DEVICE)
    with pytest.raises(ValueError, match=r"must be in one piece"):
        products.scaled_product(a, b, one, one, torch.float32)
    with pytest.raises(ValueError, match="rows of 20 and of 33 codes cannot be multiplied"):
        products.scaled_product(b, a.T, one, one, torch.float32)


@pytest.mark.parametrize(("K", "N", "dtype"), [(24, 64, torch.float32), (32, 12, torch.bfloat16)])
def test_what_cannot_be_streamed_is_refused(K: int, N: int, dtype: torch.dtype) -> None:
    a, b, one = codes(8, K, largest=127), codes(N, K, largest=127), torch.ones(1, 1, device=DEVICE)
    assert not products.can_stream(a, b, dtype)
    with pytest.raises(ValueError, match="multiples of 16 bytes"):
        products.scaled_product(a, b, one, one, dtype, products.WAYS[-1])


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 200), (129, 64), (130, 127)])
def test_codes_are_turned_around(rows: int, width: int) -> None:
    x = codes(rows, width, largest=127)
    found = rounding.transposed(x)
    assert found.is_contiguous()
    assert torch.equal(found, x.T)


@pytest.mark.parametrize("width", [1, 2, 31, 64, 1000, 2049])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_rows_are_rounded_as_in_torch(width: int, dtype: torch.dtype, size: float) -> None:
    x = normal(5, width, dtype=dtype, size=size)
    x[1] = 0
    expected, scale = quantize_activation(x)
    found = rounding.quantize_rows(x, SMALLEST_SCALE)
    assert torch.equal(found[0], expected.to(torch.int8))
    assert torch.equal(found[1], scale)
    for ours, twin in zip(rounding.quantize_rows(x, SMALLEST_GRADIENT), quantize_rows(x), strict=True):
        assert torch.equal(ours, twin)


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 130), (700, 65), (129, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-32, 1.0, 1e12])
def test_columns_are_rounded_as_in_torch(rows: int, width: int, dtype: torch.dtype, size: float) -> None:
    x, scale = normal(rows, width, dtype=dtype, size=size), normal(rows, 1).abs()
    x[:, width // 2] = 0
    expected, expected_scale = quantize_rows((x * scale).T)
    found, found_scale = rounding.quantize_columns(x, scale, SMALLEST_GRADIENT)
    assert found.is_contiguous()
    assert torch.equal(found, expected)
    assert torch.equal(found_scale, expected_scale)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_spoils_its_column(bad: float) -> None:
    x = normal(40, 3)
    x[7, 1] = bad
    codes_ON, scale_O1 = rounding.quantize_columns(x, normal(40, 1).abs(), SMALLEST_GRADIENT)
    assert not (codes_ON * scale_O1)[1].isfinite().any()
    assert (codes_ON * scale_O1)[[0, 2]].isfinite().all()


def test_ties_go_to_the_even_code() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 63.5]], device=DEVICE)
    assert rounding.quantize_rows(x, SMALLEST_SCALE)[0].tolist() == [[127, 0, 2, 2, 0, -2, -2, 64]]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_spoils_its_row(bad: float) -> None:
    x = normal(3, 40)
    x[1, 7] = bad
    codes_NI, scale_N1 = rounding.quantize_rows(x, SMALLEST_SCALE)
    assert not (codes_NI * scale_N1)[1].isfinite().any()
    assert (codes_NI * scale_N1)[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_that_are_not_compiled_round_with_it(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.ModuleDict({"down_proj": torch.nn.Linear(48, 24)}).to(DEVICE, dtype)
    quantize_(model, QuantConfig(include="", backward="int8-input"))
    x, grad = normal(3, 7, 48, dtype=dtype), normal(3, 7, 24, dtype=dtype)

    def results() -> list[Tensor]:
        inputs = x.clone().requires_grad_()
        y = model["down_proj"](inputs)
        y.backward(grad)
        return [y.detach(), inputs.grad]

    monkeypatch.setattr("quant.integers._in_one_kernel", lambda x: False)
    expected = results()
    calls, theirs = [], rounding.quantize_rows
    monkeypatch.setattr(rounding, "quantize_rows", lambda *operands: calls.append(1) or theirs(*operands))
    monkeypatch.setattr("quant.integers._in_one_kernel", lambda x: True)
    found = results()
    assert len(calls) == 2
    assert all(torch.equal(ours, twin) for ours, twin in zip(found, expected, strict=True))


def test_the_fastest_way_with_the_same_bits_is_taken() -> None:
    calls: list[str] = []

    def way(name: str, result: float) -> fastest.Way:
        def product(x: Tensor) -> Tensor:
            calls.append(name)
            if name == "broken":
                raise RuntimeError("no such instruction")
            if name == "too large":
                raise OutOfResources(2, 1, "shared memory")
            return x * result

        return product

    results = {"reference": 2.0, "wrong": 3.0, "broken": 2.0, "too large": 2.0, "right": 2.0, "slow": 2.0}
    ways = {name: way(name, result) for name, result in results.items()}
    seconds = {"reference": 2.0, "wrong": 0.1, "broken": 0.1, "too large": 0.1, "right": 1.0, "slow": 3.0}
    names = {product: name for name, product in ways.items()}
    for key in ("a", "b"):
        with pytest.warns(
            UserWarning, match=r"(wrong gives other bits|broken fails for .*: no such instruction)"
        ) as said:
            found = fastest.fastest(key, lambda: ways, (torch.ones(3),), lambda product, _: seconds[names[product]])
        assert len(said) == 2
        assert found.tolist() == [2.0] * 3
        calls.clear()
        assert fastest.fastest(key, lambda: ways, (torch.ones(3),), lambda *_: 0.0).tolist() == [2.0] * 3
        assert calls == ["right"]
    spoiled = torch.tensor([1.0, torch.nan, torch.inf])
    del ways["wrong"], ways["broken"], ways["too large"]
    fastest.fastest("spoiled", lambda: ways, (spoiled,), lambda product, _: seconds[names[product]])
    calls.clear()
    assert fastest.fastest("spoiled", lambda: ways, (spoiled,), lambda *_: 0.0)[0] == 2
    assert calls == ["right"]  # as of the same bits, for all that they are no numbers
