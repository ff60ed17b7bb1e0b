"""Philox4x32-10 in Triton, word by word what csrc/common/philox.h gives; Triton's own rounds, our counters and order.

A counter is (low and high word of a 64-bit number, third, fourth): (0, 0) behind for dropout, (tensor, step) for
stochastic rounding. `seed`: an integer of 64 bits, signed or not.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def philox(counter, third, fourth, seed):
    """The four words (uint32) at every 64-bit number in the block `counter`; third and fourth are 32-bit scalars."""
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    third, fourth = tl.to_tensor(third).to(tl.uint32), tl.to_tensor(fourth).to(tl.uint32)
    return tl.philox(seed, low, high, zero + third, zero + fourth)


@triton.jit
def philox_words(first, COUNTERS: tl.constexpr, third, fourth, seed):
    """[4 * COUNTERS] uint32: the words of counters first, first + 1 and so on, in order."""
    counter = tl.to_tensor(first).to(tl.int64) + tl.arange(0, COUNTERS)
    w0, w1, w2, w3 = philox(counter, third, fourth, seed)
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))


@triton.jit
def philox_halves(first, COUNTERS: tl.constexpr, third, fourth, seed):
    """[8 * COUNTERS] uint32 below 2^16: the low half, then the high half of each word of philox_words."""
    words = philox_words(first, COUNTERS, third, fourth, seed)
    return tl.interleave(words & 0xFFFF, words >> 16)
