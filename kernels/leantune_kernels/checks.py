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
    """ValueError that names the argument unless `value` is of this shape, dtype and device; TypeError if no tensor.

    `written`: a kernel writes to it where it lies, so that its last dimension must be contiguous too.
    """
    expect_tensor(name, value)
    strided = written and value.shape[-1:] > (1,) and value.stride(-1) != 1
    if value.shape != shape or value.dtype != dtype or value.device != device or strided:
        raise ValueError(
            f"{name} is {value.dtype} with shape {tuple(value.shape)} and strides {value.stride()} on "
            f"{value.device}; it must be {dtype} {tuple(shape)} on {device}"
            + (" with its last dimension contiguous" if written else conversion(name, value, dtype))
        )


def expect_dims(name: str, value: torch.Tensor, *dims: str) -> None:
    """ValueError that names the argument unless `value` has the dimensions `dims`; TypeError if it is no tensor."""
    expect_tensor(name, value)
    if value.dim() != len(dims):
        raise ValueError(f"{name} has shape {tuple(value.shape)}; it must be [{', '.join(dims)}]")


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """`x` [..., H] as [T, H]; a scalar as [1, 1], and what has no element (H = 0 too) as no rows."""
    columns = x.shape[-1] if x.dim() else 1
    return x.reshape(x.numel() // max(1, columns), columns)


def changed(*tensors: torch.Tensor | None) -> None:
    """Counts a write to each tensor, as PyTorch's own functions that work in place do.

    A backward pass that needs what a tensor held before then raises. In a graph the copy back counts.
    """
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version([t for t in tensors if t is not None])


def expect_rows(name: str, value: torch.Tensor, columns: str = "H") -> None:
    """ValueError that names the argument unless `value` is [..., columns] and of FLOATS; TypeError if no tensor."""
    expect_float(name, value)
    if value.dim() == 0:
        raise ValueError(f"{name} has no dimensions; it must be [..., {columns}]")


def expect_float(name: str, value: torch.Tensor) -> None:
    """ValueError that names the argument unless its dtype is one of FLOATS; TypeError if it is no tensor."""
    expect_tensor(name, value)
    if value.dtype not in FLOATS:
        raise ValueError(f"{name} is {value.dtype}; it must be one of {', '.join(map(str, FLOATS))}")


def expect_tensor(name: str, value: torch.Tensor) -> None:
    """TypeError that names the argument and what it is, unless it is a tensor."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} is {kind(value)}; pass a torch.Tensor")


def kind(value: object) -> str:
    """What `value` is, for a message: "a numpy.ndarray", "None"."""
    if value is None:
        return "None"
    of = type(value)
    return f"a {of.__qualname__}" if of.__module__ == "builtins" else f"a {of.__module__}.{of.__qualname__}"


def conversion(name: str, value: torch.Tensor, dtype: torch.dtype) -> str:
    """How a message about a wrong dtype ends: with the conversion, where there is one."""
    integers = {torch.int32: f"{name}.int()", torch.int64: f"{name}.long()"}
    if value.dtype in integers and dtype in integers and value.dtype != dtype:
        return f"; use {integers[dtype]}"
    if value.dtype in FLOATS and dtype in FLOATS and value.dtype != dtype:
        return f"; use {name}.to({dtype})"
    return ""


def can_read(value: torch.Tensor) -> bool:
    """Whether a check may look at the elements: on a device the host would wait for them, in a graph there are none."""
    return value.device.type == "cpu" and not torch.compiler.is_compiling()


def rows(x: torch.Tensor) -> torch.Tensor:
    """`x` [..., H] as kernels take it: last dimension contiguous, rows any distance apart. Copies only if it must."""
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def out_or_new(out: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """`out`, or new memory for a result of like's shape and dtype."""
    return torch.empty(like.shape, dtype=like.dtype, device=like.device) if out is None else out
