"""Arrays of any library as the C interface takes them: an address, a shape and strides, checked by name.

`take` reads an argument and `result` finds or makes the array that a kernel writes to. Both understand `__dlpack__`
(NumPy, JAX, PyTorch, ...) and the buffer protocol (array.array, memoryview, mmap, ...). Nothing here needs PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from leantune_kernels import _native

CODES = {"float32": 0, "bfloat16": 1, "float16": 2}  # enum lt_dtype
FLOATS = tuple(CODES)
INTEGERS = ("int64", "int32")
KINDS = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 6: "bool"}  # DLPack's type codes
CPU, PINNED = 1, 3  # DLPack's device types of memory that the host reads


class View:
    """One array: where its elements lie. It keeps their memory alive, and `source` is what the caller gave."""

    def __init__(
        self,
        name: str,
        source: Any,
        owner: Any,
        address: int,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        dtype: str,
        writable: bool,
    ) -> None:
        self.name, self.source, self.owner = name, source, owner
        self.address, self.shape, self.strides = address, shape, strides  # strides in elements
        self.dtype, self.writable = dtype, writable

    @property
    def code(self) -> int:
        """The dtype as the C interface names it."""
        return CODES[self.dtype]

    @property
    def row(self) -> int:
        """Distance between rows."""
        return self.strides[0]

    @property
    def rows_are_contiguous(self) -> bool:
        return self.shape[-1:] <= (1,) or self.strides[-1] == 1

    @property
    def is_dense(self) -> bool:
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size > 1 and stride != expected:
                return 0 in self.shape
            expected *= size
        return True

    @property
    def __array_interface__(self) -> dict[str, Any]:
        """So that np.asarray(view) is an array on the same memory; bfloat16 as its 16-bit words."""
        words = np.dtype("uint16" if self.dtype == "bfloat16" else self.dtype)
        strides = tuple(stride * words.itemsize for stride in self.strides)
        data = (self.address, not self.writable)
        return {"version": 3, "typestr": words.str, "shape": self.shape, "strides": strides, "data": data}

    def copy(self, dtype: str | None = None) -> View:
        """A dense copy, of an integer array in another integer type where `dtype` says so."""
        copied = view(self.name, np.array(self, dtype=dtype, order="C"))
        copied.source, copied.dtype = self.source, dtype or self.dtype
        return copied

    def only(self, chosen: np.ndarray) -> View:
        """A dense copy of the rows that are True in `chosen`."""
        copied = view(self.name, np.asarray(self)[chosen])
        copied.source, copied.dtype = self.source, self.dtype
        return copied


def view(name: str, x: Any, dtype: str = "float32") -> View:
    """`x` as it lies in memory. TypeError or ValueError that names the argument if no kernel can read it there.

    `dtype` is one that x may have, for the message.
    """
    found = _native.look_into_buffer(x)
    if found is not None:
        return _described(name, x, found)
    if isinstance(x, np.ndarray):
        return _of_numpy(name, x, x)
    if hasattr(x, "__dlpack__"):
        return _of_dlpack(name, x)
    raise TypeError(
        f"{name} is a {type(x).__name__}, without __dlpack__ or a buffer of numbers; pass an array, such as "
        f"numpy.asarray(..., dtype=numpy.{dtype})"
    )


def take(
    name: str, x: Any, shape: Sequence[int | str], dtypes: str | tuple[str, ...] = FLOATS, dense: bool = False
) -> View:
    """Argument `name` of this shape (words stand for any size) and one of these dtypes, to be read.

    It is copied where its last dimension is not contiguous; with `dense`, where anything is not.
    """
    found = view(name, x, dtypes if isinstance(dtypes, str) else dtypes[0])
    _check(found, shape, dtypes)
    return found if (found.is_dense if dense else found.rows_are_contiguous) else found.copy()


def indices(name: str, x: Any, shape: Sequence[int | str]) -> View:
    """Argument `name` as dense int64; int32 (JAX's default) is converted."""
    found = take(name, x, shape, INTEGERS, dense=True)
    return found if found.dtype == "int64" else found.copy("int64")


def result(
    name: str, out: Any, shape: tuple[int, ...], dtype: str, like: View | None = None, dense: bool = False
) -> View:
    """`out` if it can take the result, else a new NumPy array (its `source` either way).

    `like` is the argument whose own bfloat16 type a new array takes on, since NumPy has none.
    """
    if out is None:
        made = np.empty(shape, _numpy_type(name, dtype, like))
        return view(name, made)
    found = view(name, out)
    _check(found, shape, dtype)
    if not found.writable:
        raise ValueError(
            f"{name} is a read-only {type(out).__module__}.{type(out).__name__}; pass a writable numpy array there, or "
            "leave it out and take the array that is returned (JAX arrays cannot be changed)"
        )
    if not (found.is_dense if dense else found.rows_are_contiguous):
        wanted = "contiguous" if dense else "contiguous in its last dimension"
        raise ValueError(f"{name} has shape {found.shape} and strides {found.strides}; it must be {wanted}")
    return found


def address(x: View | None) -> int:
    """Where an argument lies that may be left out."""
    return 0 if x is None else x.address


def copied(x: View, out: Any, name: str = "out", dense: bool = False) -> View:
    """`out` or a new array, holding x's elements; nothing is copied where it is x itself."""
    y = result(name, out, x.shape, x.dtype, x, dense)
    if y.address != x.address or y.strides != x.strides:
        np.copyto(np.asarray(y), np.asarray(x))
    return y


def apart(y: View, *inputs: View | None) -> None:
    """ValueError where the result has an element in common with an input, which is read until the end."""
    for x in inputs:
        if x is not None and _overlap(x, y):
            how = f"is {x.name} itself" if _same(x, y) else f"overlaps {x.name}"
            raise ValueError(f"{y.name} {how}, which is read until the end; pass another array")


def same_or_apart(y: View, *inputs: View | None) -> None:
    """ValueError where the result has elements in common with an input, but not all of them in the same place."""
    for x in inputs:
        if x is not None and not _same(x, y) and _overlap(x, y):
            raise ValueError(f"{y.name} overlaps {x.name}; pass {x.name} itself or another array")


def _overlap(x: View, y: View) -> bool:
    return np.shares_memory(np.asarray(x), np.asarray(y))


def _same(x: View, y: View) -> bool:
    steps = [[stride for size, stride in zip(z.shape, z.strides, strict=True) if size > 1] for z in (x, y)]
    return (x.address, x.shape, x.dtype) == (y.address, y.shape, y.dtype) and steps[0] == steps[1]


def within(name: str, numbers: View, end: int, what: str, chosen: np.ndarray | None = None) -> None:
    """ValueError unless all of these, or those that are True in `chosen`, are in [0, end)."""
    values = np.asarray(numbers)
    wrong = (values < 0) | (values >= end)
    if chosen is not None:
        wrong &= chosen
    if wrong.any():
        at = int(wrong.argmax())
        raise ValueError(f"{name}[{at}]={values[at]} is outside [0, {end}), {what}")


def _check(found: View, shape: Sequence[int | str], dtypes: str | tuple[str, ...]) -> None:
    allowed = (dtypes,) if isinstance(dtypes, str) else dtypes
    fits = len(found.shape) == len(shape) and all(
        isinstance(want, str) or want == size for want, size in zip(shape, found.shape, strict=True)
    )
    if not fits or found.dtype not in allowed:
        wanted = ", ".join(str(size) for size in shape)
        raise ValueError(
            f"{found.name} is {found.dtype} of shape {list(found.shape)}; it must be {' or '.join(allowed)} of shape "
            f"[{wanted}]"
        )


def _described(name: str, source: Any, found: tuple[Any, ...]) -> View:
    address, shape, strides, kind, bits, _, writable, owner = found
    dtype = f"{KINDS.get(kind, f'type {kind} of ')}{bits}"
    return View(name, source, owner, address, shape, strides, dtype, writable)


def _of_numpy(name: str, x: np.ndarray, source: Any) -> View:
    """An array whose elements the buffer protocol has no word for: ml_dtypes' bfloat16."""
    if x.dtype.name != "bfloat16" or not x.flags.aligned:
        raise ValueError(f"{name} has dtype {x.dtype!r} and strides {x.strides}; pass plain numbers in native layout")
    words: View = view(name, x.view(np.uint16))
    words.source, words.dtype = source, x.dtype.name
    return words


def _of_dlpack(name: str, x: Any) -> View:
    try:
        device = int(x.__dlpack_device__()[0])
        if device not in (CPU, PINNED):
            raise BufferError(f"its device is of DLPack type {device}; move it to the host's memory (type {CPU})")
        try:
            capsule = x.__dlpack__(max_version=(1, 0))
        except TypeError:  # a library from before DLPack 1.0
            capsule = x.__dlpack__()
        found = _native.look_into_dlpack(capsule)
    except (
        BufferError,
        RuntimeError,
        TypeError,
        AttributeError,
    ) as error:  # such as: inside jax.jit there is nothing to read yet
        raise ValueError(f"{name} cannot be read through DLPack: {error}") from error
    return _described(name, x, found)


def _numpy_type(name: str, dtype: str, like: View | None) -> Any:
    if dtype != "bfloat16":
        return dtype
    own = getattr(like.source, "dtype", None) if like is not None else None
    if isinstance(own, np.dtype) and own.name == dtype:  # ml_dtypes, which JAX brings
        return own
    raise ValueError(f"the result is bfloat16, which numpy has no type for; pass an array of that type as {name}")
