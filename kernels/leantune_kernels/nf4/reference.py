"""NF4 in plain PyTorch, in fp32; `plain` is the product with the quantised weight in its input's dtype."""

from __future__ import annotations

import functools

import torch

BLOCK = 64  # weights that share an absolute maximum
GROUP = 256  # blocks whose absolute maxima share a scale
SMALLEST = torch.finfo(torch.float32).tiny  # below it, 1 / absmax overflows: such a block is stored as zeros

# Appendix E of the paper: quantiles of the normal distribution, 8 below and 9 above zero, scaled to [-1, 1].
CODE_BOOK = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip


@functools.cache
def dynamic_map() -> torch.Tensor:
    """The 256 ascending values of the signed 8-bit dynamic code book (LT_DYNAMIC_MAP in csrc/common/dynamic_map.h)."""
    edges = [torch.linspace(0.1, 1, 2**i + 1) for i in range(7)]
    positive = torch.cat([(e[:-1] + e[1:]) / 2 * 10.0 ** (i - 6) for i, e in enumerate(edges)]).sort().values
    return torch.cat((-positive.flip(0), torch.zeros(1), positive, torch.ones(1)))


@functools.cache
def tables(device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The code book [16], its midpoints [15], the dynamic map [256] and its midpoints [255] on `device`."""
    both = (CODE_BOOK.to(device), dynamic_map().to(device))
    first, second = ((values[:-1] + values[1:]) / 2 for values in both)
    return both[0], first, both[1], second


def plain(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, double_quant: bool) -> torch.Tensor:
    """x W^T + bias with W the quantised `weight`; any float dtype, float64 included."""
    from leantune_kernels import nf4

    w = nf4.quantise(weight.detach().float(), double_quant)
    return torch.nn.functional.linear(x, _values(w).to(x.dtype), bias)


def refuses(x: torch.Tensor) -> str | None:
    return None


def quantise(weight, codes, absmax):  # type: ignore[no-untyped-def]
    blocks = _blocks(weight.float(), BLOCK)
    largest = _largest(blocks)
    absmax.copy_(largest)
    normed = blocks * _inverse(largest)[:, None]
    code = torch.bucketize(normed, tables(weight.device)[1])  # right=False: of a tie, the lower code
    code = code.masked_fill(normed.isnan(), 0).to(torch.uint8).flatten()[: 2 * codes.numel()]
    codes.copy_(code[::2] << 4 | code[1::2])


def quantise_absmax(absmax, offset, codes, scales):  # type: ignore[no-untyped-def]
    groups = _blocks(absmax - offset, GROUP)
    largest = _largest(groups)
    scales.copy_(largest)
    normed = groups * _inverse(largest)[:, None]
    code = torch.bucketize(normed, tables(absmax.device)[3])
    codes.copy_(code.masked_fill(normed.isnan(), 0).flatten()[: codes.numel()])


def dequantise(w, out, reused):  # type: ignore[no-untyped-def]
    out.copy_(_values(w))


def linear(x, w, bias, y):  # type: ignore[no-untyped-def]
    y.copy_(torch.nn.functional.linear(x.float(), _values(w), None if bias is None else bias.float()))


def _blocks(x: torch.Tensor, size: int) -> torch.Tensor:
    """`x` [n] as [ceil(n / size), size], filled up with zeros."""
    return torch.nn.functional.pad(x, (0, -x.numel() % size)).view(-1, size)


def _largest(blocks: torch.Tensor) -> torch.Tensor:
    """Largest magnitude of each row; NaN where a row has a NaN or an infinity, 0 where it is below SMALLEST."""
    largest = blocks.abs().amax(1)
    return torch.where(largest < SMALLEST, 0.0, torch.where(largest.isfinite(), largest, torch.nan))


def _inverse(largest: torch.Tensor) -> torch.Tensor:
    return torch.where(largest > 0, 1 / largest, 0.0)


def _values(w):  # type: ignore[no-untyped-def]
    """The weight in fp32."""
    codes = torch.stack((w.codes >> 4, w.codes & 15), 1).flatten()[: w.numel].long()
    return (tables(codes.device)[0][codes] * _absmax(w).repeat_interleave(BLOCK)[: w.numel]).view(w.shape)


def _absmax(w) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """The absolute maxima [blocks] in fp32; those in 8 bits are map[code] * scale + offset, rounded once."""
    if w.scales is None:
        return w.absmax
    scales = w.scales.repeat_interleave(GROUP)[: w.absmax.numel()]
    return (tables(w.absmax.device)[2][w.absmax.long()].double() * scales + w.offset.double()).float()
