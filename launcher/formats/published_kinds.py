"""Tell the formats of other programs apart."""

from pathlib import Path

from launcher.formats.hf_source import CONFIG, is_hf, read_json
from launcher.formats.published import Published
from launcher.formats.published_folder import PublishedFolder
from launcher.formats.published_gguf import PublishedGGUF, is_gguf
from launcher.formats.published_onnx import PublishedONNX, is_onnx


def published_at(location: Path) -> Published | None:
    """The model in a GGUF file, or in a folder for compressed-tensors, MLX or ONNX Runtime; None if it is another kind.

    Raises:
        CheckpointError: `config.json` is damaged.
        ConfigError: a package that the format needs is missing.
    """
    if is_gguf(location):
        return PublishedGGUF(location)
    if is_onnx(location):
        return PublishedONNX(location)
    if not is_hf(location):
        return None
    config = read_json(location / CONFIG)
    quantization = config.get("quantization_config")
    compressed = isinstance(quantization, dict) and quantization.get("quant_method") == "compressed-tensors"
    return PublishedFolder(location) if compressed or (quantization is None and "quantization" in config) else None
