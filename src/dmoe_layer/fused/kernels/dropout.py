"""Dropout's bits: drawn once in forward, and read by every kernel that drops.

They are stored, a bit for each entry of a row of the sorted order: 4 bytes for 32 columns. At
D = 24 to read them is 4 of the 108 bytes of a row in backward, 5 us of an H200 for 4.7 million
rows. To draw them again takes 200 instructions for each 4 bytes, 40 us, in each of three passes.
"""

import triton
import triton.language as tl

from .common import random_words


@triton.jit(do_not_specialize=["seed", "threshold", "n_words"])
def draw_kept_kernel(
    kept_ptr, seed, threshold, n_words, OFFSET: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes ``n_words`` words of 32 bits, each 1 where the entry is kept.

    An entry is kept if its 16-bit random number u >= threshold. Bit i of the 32 numbers of a word
    is random word i, and they are compared from the lowest bit on: by their own bit where it is
    not the threshold's, else as what is below it. So each of 16 words is one instruction, and the
    bits are packed from the start.
    """
    word = tl.program_id(0).to(OFFSET) * BLOCK + tl.arange(0, BLOCK)
    kept = tl.full([BLOCK, 1], 0xFFFFFFFF, tl.uint32)
    for i in tl.static_range(4):
        a, b, c, d = random_words(seed, word, tl.full([1], i, tl.int32), 1)
        kept = _at_least(a, threshold >> (4 * i), kept)
        kept = _at_least(b, threshold >> (4 * i + 1), kept)
        kept = _at_least(c, threshold >> (4 * i + 2), kept)
        kept = _at_least(d, threshold >> (4 * i + 3), kept)
    # A threshold of 2**16 is above all.
    kept = tl.where(threshold >> 16 != 0, 0, kept).to(tl.int32, bitcast=True)
    tl.store(kept_ptr + word[:, None], kept, mask=(word < n_words)[:, None])


@triton.jit
def _at_least(u, threshold, below):
    """u >= threshold by their highest bit so far, each of u's 32; ``below`` by those under it."""
    ones = tl.where(threshold & 1 != 0, 0, 0xFFFFFFFF).to(tl.uint32)
    # The majority of the three.
    return (u & ones) | (u & below) | (ones & below)


@triton.jit
def load_kept(kept_ptr, row_R, live_R, first_word, WORDS: tl.constexpr, COLUMNS: tl.constexpr):
    """Which of COLUMNS entries are kept, from the row's word ``first_word`` on: [R, COLUMNS]."""
    column = tl.arange(0, COLUMNS)
    # One for each row, because Triton 3.9's interpreter cannot join a scalar to a mask.
    word_R = first_word + tl.zeros_like(row_R)
    at = kept_ptr + row_R * WORDS + word_R
    words = tl.load(at, mask=live_R & (word_R < WORDS), other=0)[:, None]
    for i in tl.static_range(1, (COLUMNS + 31) // 32):
        more = tl.load(at + i, mask=live_R & (word_R + i < WORDS), other=0)[:, None]
        words = tl.where((column < 32 * i)[None, :], words, more)
    return ((words >> (column % 32)[None, :]) & 1) != 0
