"""Hugging Face's folders: of Transformers' making, of ours, and changed."""

import json
from dataclasses import replace

import torch
from models import VARIANTS, build, random_tokens
from safetensors.torch import load_file, save_file

from launcher.checkpoint.source import Source
from launcher.formats.hf_folder import write_hf
from launcher.formats.hf_source import HuggingFaceSource
from model.transformer import Transformer
from quant.codes import pack
from quant.config import QuantConfig
from quant.rounding import quantize_weight

DTYPES = (torch.float32, torch.bfloat16)


class ModelSource(Source):
    """The parameters of a module."""

    location = "a module"
    has_moments = False

    def __init__(self, model):
        self.tensors = dict(model.named_parameters())
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def read(self, kind, name, start, length):
        return self.tensors[name].detach().flatten()[start : start + length].float()

    def read_step(self, name):
        raise NotImplementedError


def logits_of(transformers, folder, dtype):
    """Logits of Transformers' model, which must have taken every tensor of the folder and lacked none."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, torch_dtype=dtype, attn_implementation="sdpa", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    with torch.no_grad():
        return model.eval()(random_tokens(3, 17)).logits


def whole(source, name):
    shape = source.shapes[name]
    return source.read("weight", name, 0, torch.Size(shape).numel()).view(shape)


def load(folder):
    source = HuggingFaceSource(folder)
    model = Transformer(source.model_config)
    model.load_state_dict({name: whole(source, name) for name in source.shapes})
    return model


def our_logits(folder, dtype):
    with torch.no_grad():
        return load(folder).to(dtype)(random_tokens(3, 17)).logits


def write_variant(folder, name="llama", *, vocab_size=None, **options):
    config = VARIANTS[name]
    model = build(replace(config, vocab_size=vocab_size or config.vocab_size))
    write_hf(ModelSource(model), model.config, folder, torch.float32, **options)
    return model


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def pack_folder(folder, linear_class, recipe=None, **quantization):
    """Put packed codes in the place of a folder's projections, in the convention of one of the linear classes."""
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        codes_OI, scale = quantize_weight(tensors[name].float(), recipe or QuantConfig())
        tensors[name] = pack(codes_OI)
        tensors[f"{name}_scale"] = (scale if linear_class == "autobitlinear" else 1 / scale).reshape(1)
    save_file(tensors, folder / "model.safetensors")
    edit_config(folder, quantization_config={"quant_method": "bitnet", "linear_class": linear_class, **quantization})
