"""Runs folders in MLX: a script, because mlx-lm lowers the process's limit of open files when it is imported.

`python mlx_client.py TOKENS.npy ANSWER.npz FOLDER...` writes the logits of each folder's model, [batch, tokens,
vocabulary], and, by their names after a colon, the weights that its quantized layers compute with.
"""

import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.utils import load_model


def main(tokens_path: str, answer_path: str, *folders: str) -> None:
    tokens, answer = mx.array(np.load(tokens_path)), {}
    for folder in folders:
        model, _ = load_model(Path(folder))
        answer[folder] = np.array(model(tokens).astype(mx.float32))
        for name, layer in model.named_modules():
            if isinstance(layer, nn.QuantizedLinear):
                weight = mx.dequantize(layer.weight, layer.scales, layer.biases, layer.group_size, layer.bits)
                answer[f"{folder}:{name}"] = np.array(weight.astype(mx.float32))
    np.savez(answer_path, **answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
