"""Products of int8 codes by AVX2, and what makes such codes, as functions in C (`avx2.c`).

CPUs without VNNI use all of them, others the products of few rows.

gcc compiles them at their first call, in a second, because its OpenMP is torch's. They are kept for later processes, in
`~/.cache/tritrain` or below `XDG_CACHE_HOME`.

Dimensions: N and O rows, K terms of each.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

CPU_HAS_AVX2 = torch.cpu._is_avx2_supported()

SOURCE = Path(__file__).with_suffix(".c")
COMMAND = ("gcc", "-O3", "-mavx2", "-fopenmp", "-shared", "-fPIC")
LARGEST = 64
"""Code on the right in pairs, as in `avx2.c`."""
LEFT_PANEL, RIGHT_PANEL = 24, 16
"""Rows that are packed side by side, as in `avx2.c`."""
FEW_ROWS = 5
"""That are multiplied by packed bytes as these are read."""


class _Matrix(ctypes.Structure):
    _fields_ = (("codes", ctypes.c_void_p), *((name, ctypes.c_long) for name in ("by_row", "by_term", "rows")))


class _Task(ctypes.Structure):
    _fields_ = (
        ("left", _Matrix),
        ("right", _Matrix),
        ("terms", ctypes.c_long),
        *((name, ctypes.c_void_p) for name in ("left_packed", "right_packed", "left_sums", "result")),
    )


def product_in_pairs(codes_NK: Tensor, codes_OK: Tensor) -> Tensor | None:
    """``codes_NK @ codes_OK.T`` as fp32 [N, O], exact while sums stay below 2**24; None if nothing could be compiled.

    Args:
        codes_NK: int8.
        codes_OK: int8, at most 64.

    Raises:
        ValueError: the numbers of terms differ, or a code is larger.
    """
    return _in_pairs("product_in_pairs", codes_NK, _dense(codes_OK), len(codes_OK), packs=True)


def product_in_bits(codes_NK: Tensor, packed_RK: Tensor) -> Tensor | None:
    """`product_in_pairs` with the rows of `quant.codes.pack`, with `quant.integers.SIGN` flipped, fp32 [N, 4 * R]."""
    packs = len(codes_NK) > FEW_ROWS
    return _in_pairs("product_in_bits", codes_NK, packed_RK.contiguous(), 4 * len(packed_RK), packs=packs)


def _in_pairs(name: str, codes_NK: Tensor, right: Tensor, O: int, *, packs: bool) -> Tensor | None:  # noqa: E741
    functions = library()
    if functions is None:
        return None
    N, K = _terms_of(codes_NK, right)
    left = F.pad(codes_NK, (0, -K % 4)) if K % 4 else codes_NK.contiguous()
    result = codes_NK.new_empty(N, O, dtype=torch.float32)
    packed = _panels(right, O, RIGHT_PANEL, -(-K // 4)) if packs else None
    sums = codes_NK.new_empty(N, dtype=torch.int32)
    pointers = packed.data_ptr() if packed is not None else None, sums.data_ptr(), result.data_ptr()
    task = _Task(_matrix(left, N), _matrix(right, O), K, None, *pointers)
    largest = getattr(functions, name)(task, torch.get_num_threads())
    if largest > LARGEST:
        raise ValueError(f"a code is {largest} or its opposite; products in pairs have codes of at most {LARGEST}")
    return result


def product_in_words(codes_NK: Tensor, codes_OK: Tensor) -> Tensor | None:
    """``codes_NK @ codes_OK.T`` as int32 [N, O]; None if nothing could be compiled.

    Fastest if each matrix lies in memory the other way round, as the gradient of a weight has them.

    Args:
        codes_NK: int8.
        codes_OK: int8.

    Raises:
        ValueError: the numbers of terms differ.
    """
    functions = library()
    if functions is None:
        return None
    (N, K), O = _terms_of(codes_NK, codes_OK), len(codes_OK)  # noqa: E741
    left, right = _dense(codes_NK), _dense(codes_OK)
    result = left.new_empty(N, O, dtype=torch.int32)
    left_packed, right_packed = _panels(left, N, LEFT_PANEL, -(-K // 2)), _panels(right, O, RIGHT_PANEL, -(-K // 2))
    packed = left_packed.data_ptr(), right_packed.data_ptr()
    task = _Task(_matrix(left, N), _matrix(right, O), K, *packed, None, result.data_ptr())
    functions.product_in_words(task, torch.get_num_threads())
    return result


def quantize_columns(x_NO: Tensor, scale_N1: Tensor, smallest: float) -> tuple[Tensor, Tensor] | None:
    """Quantize the columns of ``x * scale`` to -127 to 127 by the largest magnitude of each.

    Args:
        x_NO: fp32, in one piece.
        scale_N1: fp32.
        smallest: floor of the largest magnitude.

    Returns:
        int8 codes [O, N], of which columns lie in one piece, and fp32 scales [O, 1]; None if nothing could be compiled.
    """
    functions = library()
    if functions is None:
        return None
    codes_NO, scale_O1 = x_NO.new_empty(x_NO.shape, dtype=torch.int8), x_NO.new_empty(x_NO.shape[1], 1)
    scale_N1 = scale_N1.contiguous()
    given = x_NO.data_ptr(), scale_N1.data_ptr(), *x_NO.shape, smallest
    functions.quantize_columns(*given, codes_NO.data_ptr(), scale_O1.data_ptr(), torch.get_num_threads())
    return codes_NO.T, scale_O1


def unpack_rows(packed_OJ: Tensor, width: int) -> Tensor | None:
    """`quant.codes.unpack_rows`; None if nothing could be compiled."""
    functions = library()
    if functions is None:
        return None
    packed_OJ, codes_OI = packed_OJ.contiguous(), packed_OJ.new_empty(len(packed_OJ), width, dtype=torch.int8)
    pointers = packed_OJ.data_ptr(), codes_OI.data_ptr()
    functions.unpack_rows(*pointers, *packed_OJ.shape, width, torch.get_num_threads())
    return codes_OI


def _terms_of(left: Tensor, right: Tensor) -> tuple[int, int]:
    """Rows of the left matrix, and the terms of both."""
    N, K = left.shape
    if right.shape[1] != K:
        raise ValueError(f"rows of {K} and of {right.shape[1]} codes cannot be multiplied")
    return N, K


def _panels(of: Tensor, rows: int, panel: int, words: int) -> Tensor:
    return of.new_empty(-(-rows // panel) * panel, words, dtype=torch.int32)


def _dense(codes: Tensor) -> Tensor:
    return codes if codes.T.is_contiguous() else codes.contiguous()


def _matrix(codes: Tensor, rows: int) -> _Matrix:
    return _Matrix(codes.data_ptr(), *codes.stride(), rows)


@cache
def library() -> ctypes.CDLL | None:
    """The compiled functions; None, with a warning, if that is not possible."""
    try:
        try:
            loaded = _kept()
        except (OSError, RuntimeError):  # no home, or none that can be written to
            with tempfile.TemporaryDirectory() as folder:
                loaded = ctypes.CDLL(str(_compiled(Path(folder, "products.so"))))
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or (error if shutil.which(COMMAND[0]) else "gcc is not installed")
        warnings.warn(f"functions that use AVX2 are not used, and others take longer: {reason}", stacklevel=2)
        return None
    pointer, size, number, threads = ctypes.c_void_p, ctypes.c_long, ctypes.c_float, ctypes.c_int
    for function in (loaded.product_in_pairs, loaded.product_in_bits, loaded.product_in_words):
        function.argtypes = ctypes.POINTER(_Task), threads
    loaded.product_in_words.restype = None
    columns, rows = loaded.quantize_columns, loaded.unpack_rows
    columns.argtypes, columns.restype = (pointer, pointer, size, size, number, pointer, pointer, threads), None
    rows.argtypes, rows.restype = (pointer, pointer, size, size, size, threads), None
    return loaded


def _kept() -> ctypes.CDLL:
    made_from = SOURCE.read_bytes() + " ".join(COMMAND).encode()
    name = f"products-{hashlib.sha256(made_from).hexdigest()[:16]}.so"
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tritrain" / name
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # several ranks may come here at once
            _compiled(Path(folder, name)).replace(path)
    return ctypes.CDLL(str(path))


def _compiled(path: Path) -> Path:
    command = [*COMMAND, str(SOURCE), "-o", str(path)]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    return path
