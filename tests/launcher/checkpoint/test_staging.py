"""Copies in host memory: the values, the places that stay, and how much memory they take."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from launcher.checkpoint.staging import ALIGNMENT, Staging

DTYPES = (torch.float32, torch.bfloat16, torch.int64)
shapes = st.lists(st.tuples(st.integers(0, 50), st.integers(1, 50), st.sampled_from(DTYPES)), max_size=30)


def slabs(copies: dict[str, Tensor]) -> dict[int, int]:
    """Bytes of each piece of memory that was asked for, by its address."""
    return {copy.untyped_storage().data_ptr(): copy.untyped_storage().nbytes() for copy in copies.values()}


@given(shapes)
def test_copies_are_the_tensors_and_lie_apart(shapes: list[tuple[int, int, torch.dtype]]) -> None:
    tensors = {str(n): torch.randint(0, 100, (a, b)).to(dtype) for n, (a, b, dtype) in enumerate(shapes)}
    copies = Staging(pinned=False).copy(tensors)
    assert copies.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert copies[key].dtype == tensor.dtype
        assert torch.equal(copies[key], tensor)
        assert copies[key].data_ptr() % ALIGNMENT == 0 or not tensor.numel()


def test_a_copy_goes_to_the_place_of_the_one_before() -> None:
    staging = Staging(pinned=False)
    first = staging.copy({"a": torch.zeros(100), "b": torch.ones(7)})
    second = staging.copy({"a": torch.full((100,), 2.0), "c": torch.ones(3)})
    assert second["a"].data_ptr() == first["a"].data_ptr()
    assert second.keys() == {"a", "c"}
    assert (first["a"] == 2).all()
    third = staging.copy({"a": torch.zeros(100), "b": torch.full((7,), 5.0)})
    assert (first["b"] == 1).all()  # given up, and not written to again
    assert (third["b"] == 5).all()


def test_memory_is_asked_for_in_powers_of_two_that_hold_little_else() -> None:
    """A rank's eighth of a model of 40 blocks: weights and two moments; each would be rounded up on its own."""
    hidden, inner = 512, 1382
    shapes = [(hidden, hidden)] * 4 + [(hidden, inner)] * 3 + [(hidden,)] * 2
    tensors = {
        f"{kind}/{block}/{index}": torch.empty(torch.Size(shape).numel() // 8)
        for kind in range(3)
        for block in range(40)
        for index, shape in enumerate(shapes)
    }
    sizes = slabs(Staging(pinned=False).copy(tensors)).values()
    assert all(size.bit_count() == 1 for size in sizes)
    needed = sum(tensor.nbytes for tensor in tensors.values())
    assert sum(sizes) <= 1.05 * needed
    assert sum(2 ** (tensor.nbytes - 1).bit_length() for tensor in tensors.values()) > 1.3 * needed
