"""What every op asks of its tensors before a kernel sees their addresses; a few hundred nanoseconds a tensor."""

from __future__ import annotations

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def expect(
    name: str,
    value: torch.Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    written: bool = False,
) -> None:
    """ValueError that names the argument unless `value` is of this shape, dtype and device.

    `written`: a kernel writes to it where it lies, so that its last dimension must be contiguous too.
    """
    strided = written and value.shape[-1:] > (1,) and value.stride(-1) != 1
    if value.shape != shape or value.dtype != dtype or value.device != device or strided:
        raise ValueError(
            f"{name} is {value.dtype} with shape {tuple(value.shape)} and strides {value.stride()} on "
            f"{value.device}; it must be {dtype} {tuple(shape)} on {device}"
            + (" with its last dimension contiguous" if written else "")
        )


def expect_dims(name: str, value: torch.Tensor, *dims: str) -> None:
    """ValueError that names the argument unless `value` has as many dimensions as `dims` describes."""
    if value.dim() != len(dims):
        raise ValueError(f"{name} has shape {tuple(value.shape)}; it must be [{', '.join(dims)}]")


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """`x` [..., H] as [T, H]; a scalar as [1, 1], and what has no element (H = 0 too) as no rows."""
    columns = x.shape[-1] if x.dim() else 1
    return x.reshape(x.numel() // max(1, columns), columns)


def can_read(value: torch.Tensor) -> bool:
    """Whether a check may look at the elements: on a device the host would wait for them, in a graph there are none."""
    return value.device.type == "cpu" and not torch.compiler.is_compiling()


def rows(x: torch.Tensor) -> torch.Tensor:
    """`x` [..., H] as kernels take it: last dimension contiguous, rows any distance apart. Copies only if it must."""
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def out_or_new(out: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """`out`, or new memory for a result of like's shape and dtype."""
    return torch.empty(like.shape, dtype=like.dtype, device=like.device) if out is None else out
