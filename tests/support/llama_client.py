"""Runs a GGUF file in llama.cpp: a script for the environment that has `llama-cpp-python`, which this one need not.

`python llama_client.py FILE.gguf REQUEST.json ANSWER.npz`; a request has any of the keys `texts` (to be tokenized; with
`special`, names of special tokens in them become these), `sequences` (of token ids; their logits, [tokens, vocabulary]
each) and `prompts` with `num_tokens` (to be continued greedily, without stopping).
"""

import json
import sys
from itertools import islice

import numpy as np
from llama_cpp import Llama


def main(path: str, request_path: str, answer_path: str) -> None:
    with open(request_path) as file:
        request = json.load(file)
    sequences, prompts = request.get("sequences", []), request.get("prompts", [])
    only_vocabulary = not (sequences or prompts)
    llama = Llama(path, n_ctx=512, n_batch=512, n_threads=1, logits_all=True, verbose=False, vocab_only=only_vocabulary)
    answer = {"bos_eos": np.array([llama.token_bos(), llama.token_eos()])}
    special = request.get("special", False)
    texts = [llama.tokenize(text.encode(), add_bos=False, special=special) for text in request.get("texts", [])]
    answer["text_tokens"] = np.array([token for tokens in texts for token in tokens], np.int64)
    answer["text_lengths"] = np.array([len(tokens) for tokens in texts], np.int64)
    logits = []
    for tokens in sequences:
        llama.reset()
        llama.eval(tokens)
        logits.append(llama.scores[: len(tokens)].copy())
    answer["logits"] = np.array(logits, np.float32)
    continuations = []
    for prompt in prompts:
        llama.reset()
        continuations.append(list(islice(llama.generate(prompt, temp=0, repeat_penalty=1.0), request["num_tokens"])))
    answer["continuations"] = np.array(continuations, np.int64)
    llama.close()
    np.savez(answer_path, **answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
