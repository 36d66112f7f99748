"""The codes and levels in exported folders, taken apart by what the formats' own documentation says."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from coded_folders import Array
from safetensors.numpy import load_file


def words_of(words_OW: Array, bits: int = 2) -> Array:
    """Unsigned integers of 2 bits from the low bits of 32-bit words up, [O, 16 W]."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    return ((words_OW.view(np.uint32)[..., None] >> shifts) & 3).reshape(len(words_OW), -1).astype(np.int64)


def bitnet_codes(tensors: dict[str, Array], name: str, width: int) -> tuple[Array, Array]:
    packed = tensors[f"{name}.weight"]
    return np.concatenate([(packed >> 2 * part & 3).astype(np.int64) - 1 for part in range(4)]), 1 / tensors[
        f"{name}.weight_scale"
    ].reshape(1, 1)


def compressed_codes(tensors: dict[str, Array], name: str, width: int) -> tuple[Array, Array]:
    assert tensors[f"{name}.weight_shape"].tolist() == [len(tensors[f"{name}.weight_packed"]), width]
    assert tensors[f"{name}.weight_packed"].dtype == np.int32
    bits = words_of(tensors[f"{name}.weight_packed"])
    assert not bits[:, width:].any()
    return bits[:, :width] - 2, tensors[f"{name}.weight_scale"]


def mlx_codes(tensors: dict[str, Array], name: str, width: int) -> tuple[Array, Array]:
    assert tensors[f"{name}.weight"].dtype == np.uint32
    scales = tensors[f"{name}.scales"]
    assert np.array_equal(tensors[f"{name}.biases"], -scales)
    return words_of(tensors[f"{name}.weight"]) - 1, scales


def onnx_codes(tensors: dict[str, Array], name: str, width: int) -> tuple[Array, Array]:
    packed = tensors[f"{name}.weight"]
    bits = (packed[..., None] >> np.array([0, 2, 4, 6], np.uint8) & 3).reshape(len(packed), -1).astype(np.int64)
    assert not bits[:, width:].any()
    return bits[:, :width] - 2, tensors[f"{name}.weight_scale"]


READERS: dict[str, Callable[[dict[str, Array], str, int], tuple[Array, Array]]] = {
    "packed": bitnet_codes,
    "compressed-tensors": compressed_codes,
    "mlx": mlx_codes,
    "onnx": onnx_codes,
}


def tensors_of(folder: Path) -> dict[str, Array]:
    if (folder / "model.safetensors").exists():
        return load_file(folder / "model.safetensors")
    import onnx

    onnx.checker.check_model(folder / "model.onnx")
    graph = onnx.load(folder / "model.onnx").graph
    return {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
