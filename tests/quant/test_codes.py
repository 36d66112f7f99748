"""The 2-bit layout against Transformers' own functions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.torchvision_repair import repair_torchvision
from quant.codes import pack, pack_rows, unpack, unpack_block, unpack_rows

DTYPES = (torch.int8, torch.float32, torch.bfloat16)


@st.composite
def codes(draw):
    shape = 4 * draw(st.integers(1, 6)), draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    return torch.randint(-1, 2, shape, generator=generator).to(draw(st.sampled_from(DTYPES)))


@given(codes())
def test_codes_survive(codes_OI):
    before = codes_OI.clone()
    packed_RI = pack(codes_OI)
    assert (packed_RI.dtype, len(packed_RI)) == (torch.uint8, len(codes_OI) // 4)
    assert unpack(packed_RI).dtype == torch.int8
    assert torch.equal(unpack(packed_RI), before.to(torch.int8))
    assert torch.equal(codes_OI, before)


def test_bytes_are_those_of_transformers():
    repair_torchvision()
    bitnet = pytest.importorskip("transformers.integrations.bitnet")
    codes_OI = torch.randint(-1, 2, (24, 7), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    packed_RI = bitnet.pack_weights(codes_OI.clone())
    assert torch.equal(pack(codes_OI), packed_RI)
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(unpack(packed_RI), bitnet.unpack_weights(packed_RI, dtype=torch.int8))


@given(codes(), st.data())
def test_a_range_needs_only_its_own_bytes(codes_OI, data):
    packed, size = pack(codes_OI).flatten(), codes_OI.numel() // 4
    block = data.draw(st.integers(0, 3))
    start = data.draw(st.integers(0, size))
    end = data.draw(st.integers(start, size))
    expected = codes_OI.flatten()[block * size + start : block * size + end].to(torch.int8)
    assert torch.equal(unpack_block(packed[start:end], block), expected)


def test_what_is_no_code_is_refused():
    with pytest.raises(ValueError, match="6 rows cannot be packed; the number must be a multiple of 4"):
        pack(torch.zeros(6, 3))
    for value in (2.0, 0.5, torch.nan):
        with pytest.raises(ValueError, match="codes must be -1, 0"):
            pack(torch.full((4, 2), value))
    with pytest.raises(ValueError, match="a code other than"):
        unpack(torch.tensor([[0b10_01_11_00]], dtype=torch.uint8))


@pytest.mark.parametrize("width", [1, 8, 509])
def test_the_operator_for_compiled_code_takes_rows_apart_too(width):
    codes_OI = torch.randint(-1, 2, (5, width), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    packed_OJ, operator = pack_rows(codes_OI), torch.ops.tritrain.unpack_rows.default
    assert torch.equal(operator(packed_OJ, width), codes_OI)
    assert torch.equal(unpack_rows(packed_OJ, width), codes_OI)
    torch.library.opcheck(operator, (packed_OJ, width), test_utils=("test_schema", "test_faketensor"))
