"""Times one GGUF file in llama.cpp, for `gguf_files.py`: a script for the environment that has `llama-cpp-python`.

`python gguf_client.py FILE.gguf THREADS PROMPT_TOKENS NEW_TOKENS` prints JSON.
"""

import json
import sys
import time

from llama_cpp import Llama


def main(path: str, threads: int, prompt_tokens: int, new_tokens: int) -> None:
    llama = Llama(path, n_ctx=prompt_tokens + new_tokens, n_batch=512, n_threads=threads, n_threads_batch=threads,
                  verbose=False)  # fmt: skip
    prompt = [3 + 7 * place % 250 for place in range(prompt_tokens)]
    llama.eval(prompt[:16])  # the file's pages are read
    llama.reset()
    start = time.perf_counter()
    llama.eval(prompt)
    prompted = time.perf_counter()
    for place in range(new_tokens):
        llama.eval([3 + place % 250])
    ended = time.perf_counter()
    # Not getrusage: its peak begins with that of the process that started this one.
    (peak_kib,) = (int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))  # noqa: SIM115
    llama.close()
    numbers = {"prompt": prompt_tokens / (prompted - start), "decode": new_tokens / (ended - prompted)}
    print(json.dumps(numbers | {"memory_mb": peak_kib * 1024 / 1e6}))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
