"""Lists of tensors in Triton: one launch for all, a program for each piece; addresses come from rows of lt_parameter.

bfloat16 is handled as bits, so that its rounding is the same everywhere, the interpreter included.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from leantune_kernels import tensor_list
from leantune_kernels.tensor_list import Grads, ParameterTable
from leantune_kernels.triton_philox import philox_halves

BLOCK = 1024  # elements at a time; a multiple of the eight that share a counter and of the 256 that share a maximum

PIECE = tl.constexpr(tensor_list.PIECE)
FIELDS = tl.constexpr(tensor_list.FIELDS)
SIZE = tl.constexpr(tensor_list.SIZE)
DATA = tl.constexpr(tensor_list.DATA)
MASTER = tl.constexpr(tensor_list.MASTER)
GRAD = tl.constexpr(tensor_list.GRAD)
STATES = tl.constexpr(tensor_list.STATES)
LR = tl.constexpr(tensor_list.LR)
WEIGHT_DECAY = tl.constexpr(tensor_list.WEIGHT_DECAY)
DTYPE = tl.constexpr(tensor_list.DTYPE)
GRAD_DTYPE = tl.constexpr(tensor_list.GRAD_DTYPE)

_ADDRESSES = [tensor_list.DATA, tensor_list.MASTER, tensor_list.GRAD, *range(tensor_list.STATES, tensor_list.LR)]


def aligned(rows: torch.Tensor) -> bool:
    """Whether all addresses of a list are multiples of 16 bytes, which PyTorch's own allocations are."""
    return not bool((rows[:, _ADDRESSES] & 15).any())


def launch(table: ParameterTable, grads: Grads, lr: list[float], weight_decay: list[float], seed: int):
    """(grid, arguments by name) with which every optimizer's kernel starts."""
    rows, pieces = table.rows(grads, lr, weight_decay), table.pieces()
    arguments = {"rows": rows.to(pieces.device, non_blocking=True), "pieces": pieces}
    signed_seed = seed - 2**64 if seed >= 2**63 else seed
    return (len(pieces),), arguments | {"seed": signed_seed, "BLOCK": BLOCK, "ALIGNED": aligned(rows)}


@triton.jit
def locate(rows, pieces):
    """(row of the program's tensor, its number, first element, elements left in the piece)."""
    program = tl.program_id(0).to(tl.int64)
    tensor = tl.load(pieces + 2 * program)
    begin = tl.multiple_of(tl.load(pieces + 2 * program + 1), 1024)
    row = rows + tensor * FIELDS
    return row, tensor, begin, tl.minimum(tl.load(row + SIZE) - begin, PIECE)


@triton.jit
def span(left, TAIL: tl.constexpr, BLOCK: tl.constexpr):
    """Where a piece's whole blocks start and end, or with TAIL the rest, which alone needs a mask.

    A kernel's body stands in `for TAIL in tl.static_range(2)`: without a mask accesses are of 16 bytes.
    """
    whole = left // BLOCK * BLOCK
    return (whole, left) if TAIL else (whole * 0, whole)


@triton.jit
def elements(begin, start, left, TAIL: tl.constexpr, BLOCK: tl.constexpr):
    """(offsets in the tensor, mask) of the block at `start` of the piece."""
    inside = start + tl.arange(0, BLOCK)
    mask = inside < left if TAIL else tl.full([BLOCK], True, tl.int1)
    return begin + inside, mask


@triton.jit
def load_double(row, FIELD: tl.constexpr):
    return tl.load(row + FIELD).to(tl.float64, bitcast=True)


@triton.jit
def typed(address, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """`address`, an integer, as a pointer."""
    pointer = address.to(tl.pointer_type(TYPE))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def load_as_float(address, code, offset, mask, ALIGNED: tl.constexpr):
    """float32 of elements in the storage type `code` (LT_F32, LT_BF16, LT_F16)."""
    if code == 0:
        x = tl.load(typed(address, tl.float32, ALIGNED) + offset, mask, other=0.0)
    elif code == 1:
        bits = tl.load(typed(address, tl.uint16, ALIGNED) + offset, mask, other=0)
        x = (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        x = tl.load(typed(address, tl.float16, ALIGNED) + offset, mask, other=0.0).to(tl.float32)
    return x


@triton.jit
def store_nearest(address, code, x, offset, mask, ALIGNED: tl.constexpr):
    if code == 0:
        tl.store(typed(address, tl.float32, ALIGNED) + offset, x, mask)
    elif code == 1:
        bits = ordered_bits(x)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        tl.store(typed(address, tl.uint16, ALIGNED) + offset, bits.to(tl.uint16), mask)
    else:
        tl.store(typed(address, tl.float16, ALIGNED) + offset, x.to(tl.float16), mask)


@triton.jit
def ordered_bits(x):
    """The bits of x, with one NaN for all, so that adding to them never overflows."""
    return tl.where(x != x, 0x7FC00000, x.to(tl.uint32, bitcast=True))


@triton.jit
def load_value(row, offset, mask, ALIGNED: tl.constexpr):
    """The parameter in float32: its master where it has one."""
    master = tl.load(row + MASTER)
    if master != 0:
        x = load_as_float(master, 0, offset, mask, ALIGNED)
    else:
        x = load_as_float(tl.load(row + DATA), tl.load(row + DTYPE), offset, mask, ALIGNED)
    return x


@triton.jit
def store_value(row, x, tensor, first, offset, mask, step, seed, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """Writes the updated parameter back, as its storage asks; `first` is the block's first element."""
    data = tl.load(row + DATA)
    master = tl.load(row + MASTER)
    code = tl.load(row + DTYPE)
    if master != 0:
        store_nearest(master, 0, x, offset, mask, ALIGNED)
        store_nearest(data, code, x, offset, mask, ALIGNED)
    elif code == 1:
        noise = philox_halves(first // 8, BLOCK // 8, tensor, step, seed)
        bits = (ordered_bits(x) + noise) >> 16
        tl.store(typed(data, tl.uint16, ALIGNED) + offset, bits.to(tl.uint16), mask)
    else:
        store_nearest(data, code, x, offset, mask, ALIGNED)


@triton.jit
def load_state(row, NUMBER: tl.constexpr, offset, mask, ALIGNED: tl.constexpr):
    return tl.load(typed(tl.load(row + STATES + NUMBER), tl.float32, ALIGNED) + offset, mask, other=0.0)


@triton.jit
def store_state(row, NUMBER: tl.constexpr, x, offset, mask, ALIGNED: tl.constexpr):
    tl.store(typed(tl.load(row + STATES + NUMBER), tl.float32, ALIGNED) + offset, x, mask)
