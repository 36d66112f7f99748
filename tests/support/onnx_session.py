"""Exported folders in ONNX Runtime."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from model.config import ModelConfig


def onnx_logits(
    folder: Path, config: ModelConfig, tokens_BT: Tensor, cut: int | None = None, padding: int = 0
) -> Tensor:
    """Logits of a folder's graph, [B, T, V].

    Args:
        folder: exported.
        config: of its model.
        tokens_BT: int64.
        cut: tokens of a first call; the others follow in a second one, with its keys and values.
        padding: of the first tokens, how many are masked; their positions are 0.
    """
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install onnxruntime")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options)
    B, T = tokens_BT.shape
    mask_BT = (np.arange(T) >= padding).astype(np.int64)[None].repeat(B, 0)
    positions_BT = np.maximum(np.arange(T) - padding, 0)[None].repeat(B, 0)
    names = [output.name for output in session.get_outputs()]
    past: dict[str, Any] = {
        each.name: np.zeros((B, config.kv_heads, 0, config.head_width), np.float32)
        for each in session.get_inputs()
        if each.name.startswith("past_key_values")
    }
    logits = []
    for start, end in ((0, T),) if cut is None else ((0, cut), (cut, T)):
        inputs = {
            "input_ids": tokens_BT[:, start:end].numpy(),
            "attention_mask": mask_BT[:, :end],
            "position_ids": positions_BT[:, start:end],
        }
        answer = dict(zip(names, session.run(None, inputs | past), strict=True))
        logits.append(torch.from_numpy(answer["logits"]))
        past = {name.replace("present", "past_key_values"): answer[name] for name in names if name != "logits"}
    return torch.cat(logits, 1)
