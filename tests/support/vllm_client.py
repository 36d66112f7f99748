"""Runs a folder in vLLM: a script for an environment that has it, which this one need not.

`python vllm_client.py FOLDER REQUEST.json ANSWER.json`; the request has `prompts`, lists of tokens that are continued
greedily by `num_tokens`. The answer has `tokens` that were chosen, and `logprobs` of each.
"""

import json
import sys

from vllm import LLM, SamplingParams


def main(folder: str, request_path: str, answer_path: str) -> None:
    with open(request_path) as file:
        request = json.load(file)
    llm = LLM(
        model=folder, skip_tokenizer_init=True, dtype="bfloat16", max_model_len=256, enforce_eager=True,
        gpu_memory_utilization=0.5, seed=0,
    )  # fmt: skip
    sampling = SamplingParams(
        temperature=0, max_tokens=request["num_tokens"], ignore_eos=True, detokenize=False, logprobs=1
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in request["prompts"]]
    answer = {"tokens": [], "logprobs": []}
    for output in llm.generate(prompts, sampling, use_tqdm=False):
        [completion] = output.outputs
        tokens = list(completion.token_ids)
        answer["tokens"].append(tokens)
        places = zip(tokens, completion.logprobs, strict=True)
        answer["logprobs"].append([found[token].logprob for token, found in places])
    with open(answer_path, "w") as file:
        json.dump(answer, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
