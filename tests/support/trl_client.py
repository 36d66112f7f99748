"""Losses of TRL's trainers, example by example: a script for an environment that has TRL, which this one need not.

`python trl_client.py REQUEST.json ANSWER.json`; the request has `model` and `reference`, folders; `chats` and `pairs`,
records; and `losses`, a beta by each `loss_type` of `DPOTrainer`. The answer has, for `sft` and each loss, what the
trainer makes of the records (`rows`), the loss of `each`, and `loss` and `gradient_norm` of them all as one batch.
"""

import json
import sys
import tempfile

import torch


def losses(trainer):
    rows, model = list(trainer.train_dataset), trainer.model
    with torch.no_grad():
        each = [trainer.compute_loss(model, trainer.data_collator([row])).item() for row in rows]
    loss = trainer.compute_loss(model, trainer.data_collator(rows))
    loss.backward()
    squares = [parameter.grad.square().sum() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    return {"rows": rows, "each": each, "loss": loss.item(), "gradient_norm": sum(squares).sqrt().item()}


def main(request_path: str, answer_path: str) -> None:
    sys.modules["torchvision"] = None  # one that was built for another torch cannot be imported, and none is needed
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    with open(request_path) as file:
        request = json.load(file)
    model, reference = (
        AutoModelForCausalLM.from_pretrained(request[name], torch_dtype=torch.float32)
        for name in ("model", "reference")
    )
    tokenizer = AutoTokenizer.from_pretrained(request["model"])
    with tempfile.TemporaryDirectory() as folder:
        about = {
            "output_dir": folder, "report_to": "none", "use_cpu": True, "bf16": False, "max_length": None,
            "gradient_checkpointing": False,
        }  # fmt: skip
        chats, pairs = (Dataset.from_list(request[name]) for name in ("chats", "pairs"))
        config = SFTConfig(assistant_only_loss=True, **about)
        answer = {"sft": losses(SFTTrainer(model, config, train_dataset=chats, processing_class=tokenizer))}
        for loss_type, beta in request["losses"].items():
            config = DPOConfig(beta=beta, loss_type=[loss_type], **about)
            answer[loss_type] = losses(
                DPOTrainer(model, reference, config, train_dataset=pairs, processing_class=tokenizer)
            )
    with open(answer_path, "w") as file:
        json.dump(answer, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
