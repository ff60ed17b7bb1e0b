"""Row-wise int8 in plain PyTorch, in fp32; `plain` is the product with the quantised weight in its input's dtype."""

from __future__ import annotations

import torch

SMALLEST = 2.0**-119  # below it absmax / 127 is subnormal: such a row is stored as zeros


def plain(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x W^T + bias with W the quantised `weight`; any float dtype, float64 included."""
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    quantise(weight.detach().float(), codes, scales)
    return torch.nn.functional.linear(x, (codes.float() * scales[:, None]).to(x.dtype), bias)


def refuses(x: torch.Tensor) -> str | None:
    return None


def quantise(x, codes, scales):  # type: ignore[no-untyped-def]
    x = x.float()
    absmax = x.abs().amax(1) if x.shape[1] else x.new_zeros(x.shape[0])
    most = absmax.new_tensor(127.0)  # a tensor, as a division with a number may become a product with its inverse
    scales.copy_(torch.where(absmax < SMALLEST, 0.0, torch.where(absmax.isfinite(), absmax / most, torch.nan)))
    inverse = torch.where(scales > 0, most / absmax, 0.0)
    codes.copy_((x * inverse[:, None]).round().nan_to_num(0.0))


def dequantise(codes, scales, out, reused):  # type: ignore[no-untyped-def]
    out.copy_(codes.float() * scales[:, None])


def linear(x, codes, scales, bias, y):  # type: ignore[no-untyped-def]
    weight = codes.float() * scales[:, None]
    y.copy_(torch.nn.functional.linear(x.float(), weight, None if bias is None else bias.float()))
