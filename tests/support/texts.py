"""Texts that tokenizers stumble over."""

from data.quickstart_corpus import read_standard_library

TEXTS = [text for path, text in read_standard_library() if path.startswith(("json/", "email/"))]
SPECIAL = ["", " ", "\n", "\t", "  a  b ", "\r\n\r\n", "é😀", "👩\u200d👩\u200d👧", "\u2581", " \u2581\u2581x \u2581",
           "</s><s><unk>", "<0x0A>", "\0", "\ufeffa", "\u2585\u2047", "123 456", "\u00a0\u3000"]  # fmt: skip
