"""Times one export in the program that it is for, for `formats.py`, which starts it in that program's environment.

`python formats_client.py RUNTIME PATH THREADS NEW_TOKENS SECONDS` prints JSON: seconds from opening the model to its
first token, tokens per second after that, and the process's peak memory. It stops after SECONDS of decoding.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

PROMPT = [3 + 7 * place % 250 for place in range(16)]

Step = Callable[[list[int]], object]
"""Computes the next tokens of the text that it has seen."""


def llama(path: str, threads: int, length: int) -> Callable[[], Step]:
    from llama_cpp import Llama

    def load() -> Step:
        model = Llama(path, n_ctx=length, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False)
        return model.eval

    return load


def transformers(path: str, threads: int, length: int) -> Callable[[], Step]:
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    import torch

    from data.torchvision_repair import repair_torchvision

    repair_torchvision()
    from transformers import AutoModelForCausalLM, DynamicCache

    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)

    def load() -> Step:
        model, cache = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval(), DynamicCache()
        return lambda tokens: (
            model(torch.tensor([tokens]), past_key_values=cache, use_cache=True).logits[0, -1].sum().item()
        )

    return load


def mlx(path: str, threads: int, length: int) -> Callable[[], Step]:
    from pathlib import Path

    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_model

    def load() -> Step:
        model, _ = load_model(Path(path))
        cache = make_prompt_cache(model)
        return lambda tokens: mx.eval(model(mx.array([tokens]), cache=cache))

    return load


def onnx(path: str, threads: int, length: int) -> Callable[[], Step]:
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3

    def load() -> Step:
        session = onnxruntime.InferenceSession(f"{path}/model.onnx", options)
        names = [each.name for each in session.get_outputs()]
        state: dict[str, Any] = {
            each.name: np.zeros((1, each.shape[1], 0, each.shape[3]), np.float32)
            for each in session.get_inputs()
            if each.name.startswith("past_key_values")
        }
        seen = [0]

        def step(tokens: list[int]) -> None:
            start, end = seen[0], seen[0] + len(tokens)
            positions = np.arange(start, end, dtype=np.int64)[None]
            inputs = {"input_ids": np.array([tokens], np.int64), "attention_mask": np.ones((1, end), np.int64)}
            answer = dict(zip(names, session.run(None, inputs | {"position_ids": positions} | state), strict=True))
            seen[0] = end
            for name in names:
                if name != "logits":
                    state[name.replace("present", "past_key_values")] = answer[name]

        return step

    return load


def main(runtime: str, path: str, threads: int, num_tokens: int, seconds: float) -> None:
    runtimes = {"llama.cpp": llama, "Transformers": transformers, "mlx-lm": mlx, "ONNX Runtime": onnx}
    load = runtimes[runtime](path, threads, len(PROMPT) + num_tokens)
    start = time.perf_counter()
    step = load()
    step(PROMPT)
    loaded = time.perf_counter()
    done = 0
    while done < num_tokens and time.perf_counter() - loaded < seconds:
        step([3 + done % 250])
        done += 1
    ended = time.perf_counter()
    # Not getrusage: its peak begins with that of the process that started this one.
    (peak_kib,) = (int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))  # noqa: SIM115
    numbers = {"load_seconds": loaded - start, "decode": done / (ended - loaded), "memory_mb": peak_kib * 1024 / 1e6}
    print(json.dumps(numbers), flush=True)
    os._exit(0)  # some of these take long to end


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5]))
