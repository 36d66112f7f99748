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
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    # mlx-lm writes the same under both names.
    of_mlx = "quantization" in config and quantization in (None, config["quantization"]) and method is None
    return PublishedFolder(location) if of_mlx or method == "compressed-tensors" else None
