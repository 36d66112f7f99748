"""Sizes of what is stored and sent of ternary weights; needs no torch."""

CODES_PER_BYTE = 4
"""Codes of 2 bits that a byte holds."""

NUM_MAGNITUDES = 2**15
"""Magnitudes that bf16 has."""

LONGEST_ROW = 2**15
"""Elements of a row that a kernel of `quant.kernels.rounding` holds at once."""
