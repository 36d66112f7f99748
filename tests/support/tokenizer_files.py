"""Small files of tokenizers in the form of Hugging Face."""

from pathlib import Path


def write_bytes_tokenizer(path: Path, *special: str) -> Path:
    """Write a tokenizer of single bytes, 0 to 255, and of special tokens after them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(
        models.BPE({piece: n for n, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([*special, "<|endoftext|>"])
    tokenizer.save(str(path))
    return path
