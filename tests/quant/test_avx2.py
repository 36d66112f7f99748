"""Functions in C against sums in int64 and against torch, and how they are compiled."""

import multiprocessing
import os
import shutil
import subprocess
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quant import integers
from quant.codes import pack, pack_rows
from quant.kernels import avx2
from quant.rounding import SMALLEST_GRADIENT, quantize_rows

pytestmark = pytest.mark.skipif(
    not torch.cpu._is_avx2_supported() or shutil.which("gcc") is None, reason="needs a CPU with AVX2, and gcc"
)
NONE = [(4, 16, 0), (0, 3, 4), (3, 0, 4)]
SHAPES = [(1, 1, 1), (5, 3, 7), (6, 16, 4), (24, 16, 256), (97, 33, 1029), (25, 40, 4099), *NONE]
"""N, O and K: less than a panel or a word, whole ones, one more; several blocks of rows and of words; none."""


def codes(rows: int, terms: int, largest: int) -> Tensor:
    """Random, with both extremes."""
    found = torch.randint(-largest, largest + 1, (rows, terms), generator=torch.Generator().manual_seed(rows))
    found[:, : terms // 3] = largest
    found[:, terms // 3 : terms // 2] = -largest
    return found.clamp(-128, 127).to(torch.int8)


def both_ways(matrix: Tensor) -> list[Tensor]:
    """The same matrix, with either dimension dense in memory, and with neither."""
    spread = torch.zeros(len(matrix), 2 * matrix.shape[1], dtype=matrix.dtype)
    spread[:, ::2] = matrix
    return [matrix, matrix.T.contiguous().T, spread[:, ::2]]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("largest", [1, 2, 3, 5, 7, 64])
def test_products_in_pairs_are_exact(shape: tuple[int, int, int], largest: int) -> None:
    """At 65 a pair would not fit 16 bits: 128 * 65 * 2 * 2 is above 2**15."""
    (N, O, K), expected = shape, None  # noqa: E741
    for left in both_ways(codes(N, K, 128)):
        for right in both_ways(codes(O, K, largest)):
            expected = (left.long() @ right.long().T).float() if expected is None else expected
            found = avx2.product_in_pairs(left, right)
            assert found is not None
            assert torch.equal(found, expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_products_in_words_are_exact(shape: tuple[int, int, int]) -> None:
    (N, O, K), expected = shape, None  # noqa: E741
    for left in both_ways(codes(N, K, 128)):
        for right in both_ways(codes(O, K, 127)):
            expected = left.long() @ right.long().T if expected is None else expected
            found = avx2.product_in_words(left, right)
            assert found is not None
            assert found.dtype == torch.int32
            assert torch.equal(found.long(), expected)


@pytest.mark.parametrize("num_rows", [0, 1, 5, 6, 30])
@pytest.mark.parametrize(("O", "K"), [(4, 1), (36, 31), (24, 32), (100, 2085), (64, 4096)])
def test_products_with_packed_bytes_are_exact(num_rows: int, O: int, K: int) -> None:  # noqa: E741
    """Also where all codes are the largest, so that sums in 16 bits are as far from 0 as they get."""
    for right in (codes(O, K, 1), torch.ones(O, K).char(), -torch.ones(O, K).char()):
        for left in (codes(num_rows, K, 128), torch.full((num_rows, K), -128).char()):
            found = avx2.product_in_bits(left, pack(right) ^ integers.SIGN)
            assert found is not None
            assert torch.equal(found, (left.long() @ right.long().T).float())


def test_a_sum_may_fill_int32() -> None:
    terms = 2**17 - 1
    found = avx2.product_in_words(torch.full((1, terms), -128).char(), torch.full((1, terms), -128).char())
    assert found is not None
    assert found.item() == 128 * 128 * terms


@pytest.mark.parametrize("num_threads", [1, 2, 3, 8])
def test_any_number_of_threads_gives_the_same(num_threads: int) -> None:
    left, right, before = codes(200, 300, 128), codes(70, 300, 1), torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        in_pairs, in_words = avx2.product_in_pairs(left, right), avx2.product_in_words(left, right)
    finally:
        torch.set_num_threads(before)
    assert in_pairs is not None
    assert in_words is not None
    expected = left.long() @ right.long().T
    assert torch.equal(in_pairs.long(), expected)
    assert torch.equal(in_words.long(), expected)


@pytest.mark.parametrize("shape", [(1, 1), (3, 64), (200, 67), (4000, 300), (5, 0)])
def test_columns_are_rounded_as_rows_of_the_transposed(shape: tuple[int, int]) -> None:
    """Also those of zeros, of the smallest numbers, and with what is halfway between two codes.

    Of a million numbers, some ten are so close to it that the order of the operations decides.
    """
    (N, O), generator = shape, torch.Generator().manual_seed(0)  # noqa: E741
    x_NO, scale_N1 = torch.randn(N, O, generator=generator), torch.rand(N, 1, generator=generator)
    x_NO[:, ::5], x_NO[:, 1::5] = 0, 1e-38
    x_NO[:, 2::5] = torch.arange(N)[:, None] % 127 + 0.5
    x_NO[0, 2::5], scale_N1[: N // 2 + 1] = 127, 1
    found = avx2.quantize_columns(x_NO, scale_N1, SMALLEST_GRADIENT)
    assert found is not None
    assert all(map(torch.equal, found, quantize_rows((x_NO * scale_N1).T)))


@pytest.mark.parametrize("broken", [float("inf"), float("nan")])
def test_what_is_not_finite_spoils_its_whole_column(broken: float) -> None:
    x_NO = torch.ones(40, 70)
    x_NO[7, 3] = broken
    found = avx2.quantize_columns(x_NO, torch.ones(40, 1), SMALLEST_GRADIENT)
    assert found is not None
    codes_ON, scale_O1 = found
    is_finite_O = scale_O1.isfinite()[:, 0]
    assert is_finite_O.tolist() == [column != 3 for column in range(70)]
    assert (codes_ON[is_finite_O] == 127).all()


@pytest.mark.parametrize(("O", "width"), [(1, 1), (3, 5), (8, 256), (7, 1021), (0, 8)])
def test_rows_are_unpacked(O: int, width: int) -> None:  # noqa: E741
    codes_OI = codes(O, width, 1)
    found = avx2.unpack_rows(pack_rows(codes_OI), width)
    assert found is not None
    assert torch.equal(found, codes_OI)


def test_matrices_of_different_widths_are_refused() -> None:
    """Where one ended, C would read on."""
    for product, right in (
        (avx2.product_in_pairs, codes(64, 512, 1)),
        (avx2.product_in_words, codes(64, 512, 127)),
        (avx2.product_in_bits, pack(codes(64, 512, 1)) ^ integers.SIGN),
    ):
        for width in (256, 768):
            with pytest.raises(ValueError, match=f"rows of {width} and of 512 codes cannot be multiplied"):
                product(codes(64, width, 128), right)


@pytest.mark.parametrize("largest", [65, -65, -128])
def test_codes_that_are_too_large_for_pairs_are_refused(largest: int) -> None:
    right = torch.full((70, 256), largest, dtype=torch.int8)
    with pytest.raises(ValueError, match=f"a code is {abs(largest)} or its opposite; .* at most 64"):
        avx2.product_in_pairs(codes(100, 256, 128), right)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_results_do_not_depend_on_torch_s_default_dtype(dtype: torch.dtype) -> None:
    """C writes fp32 into them."""
    left, right, packed = codes(64, 64, 128), codes(48, 64, 1), pack(codes(48, 64, 1)) ^ integers.SIGN
    x_NO, scale_N1 = torch.randn(64, 48), torch.rand(64, 1)

    def made() -> list[Tensor | None]:
        rounded = avx2.quantize_columns(x_NO, scale_N1, SMALLEST_GRADIENT)
        assert rounded is not None
        return [avx2.product_in_pairs(left, right), avx2.product_in_bits(left, packed), *rounded]

    expected, before = made(), torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        found = made()
    finally:
        torch.set_default_dtype(before)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours is not None
        assert theirs is not None
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


def test_it_compiles_without_a_warning(tmp_path: Path) -> None:
    command = [*avx2.COMMAND, "-Wall", "-Wextra", "-Werror", str(avx2.SOURCE), "-o", str(tmp_path / "products.so")]
    assert subprocess.run(command, capture_output=True, text=True, check=False).stderr == ""


def load(folder: str) -> bool:
    os.environ["XDG_CACHE_HOME"] = folder
    avx2.library.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return avx2.library() is not None


def test_processes_that_begin_at_once_keep_one(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        assert pool.map(load, [str(tmp_path)] * 3) == [True] * 3
    (kept,) = (tmp_path / "tritrain").iterdir()
    written = kept.stat().st_mtime_ns
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(load, [str(tmp_path)]) == [True]
    assert kept.stat().st_mtime_ns == written


@pytest.fixture
def fresh_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """As in a process that has compiled nothing, with a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    avx2.library.cache_clear()
    yield
    avx2.library.cache_clear()


@pytest.mark.usefixtures("fresh_library")
def test_without_a_folder_to_keep_it_in_it_is_compiled_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "tritrain").write_text("in the way")
    assert avx2.library() is not None


@pytest.mark.usefixtures("fresh_library")
def test_a_damaged_file_is_not_used(tmp_path: Path) -> None:
    assert avx2.library() is not None
    (kept,) = (tmp_path / "tritrain").iterdir()
    kept.unlink()
    kept.write_bytes(b"")
    avx2.library.cache_clear()
    assert avx2.library() is not None


@pytest.mark.usefixtures("fresh_library")
@pytest.mark.parametrize(("command", "reason"), [("no-gcc", "gcc is not installed"), ("false", "returned non-zero")])
def test_where_nothing_can_be_compiled_fp32_gives_the_same(
    command: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(avx2, "COMMAND", (command,))
    left, right = codes(8, 64, 128), codes(5, 64, 1)
    monkeypatch.setattr(integers, "CPU_HAS_INT8", False)
    monkeypatch.setattr(integers, "CPU_HAS_PAIRS", True)
    monkeypatch.setattr(integers, "CPU_HAS_WORDS", True)
    monkeypatch.setattr(integers, "LEAST_IN_PAIRS", 0)
    with pytest.warns(UserWarning, match=f"functions that use AVX2 are not used, and others take longer: .*{reason}"):
        found = integers.integer_product(left, right)
    expected = (left.long() @ right.long().T).float()
    assert torch.equal(found, expected)
    assert torch.equal(integers.integer_sums(left, right.T), expected)
    x_NO, scale_N1 = torch.randn(8, 5), torch.rand(8, 1)
    rounded = torch.ops.tritrain.quantize_columns(x_NO, scale_N1)
    assert all(map(torch.equal, rounded, quantize_rows((x_NO * scale_N1).T)))


def test_the_operators_keep_their_contracts() -> None:
    left, right = codes(8, 64, 128), codes(5, 64, 1)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.tritrain.product_in_pairs.default, (left, right), test_utils=tests)
    torch.library.opcheck(torch.ops.tritrain.sums_in_words.default, (left, right.T), test_utils=tests)
    columns = torch.ops.tritrain.quantize_columns.default
    torch.library.opcheck(columns, (torch.randn(8, 5), torch.rand(8, 1)), test_utils=tests)
