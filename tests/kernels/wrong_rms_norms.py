"""Implementations of rms_norm, each with one mistake that the conformance kit must find, and a good one."""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from leantune_kernels.rms_norm.reference import backward, forward, plain


def good(x, weight, eps, residual=None):
    return plain(x, weight, eps, residual)


def with_a_nan(x, weight, eps, residual=None):
    return plain(x * torch.nan, weight, eps, residual)


def without_residual(x, weight, eps):
    return plain(x, weight, eps)


def of_another_dtype(x, weight, eps, residual=None):
    y = plain(x, weight, eps, residual)
    return y.double() if residual is None else (y[0].double(), y[1])


def returns_nothing(x, weight, eps, residual=None):
    pass


def without_eps(x, weight, eps, residual=None):
    return plain(x, weight, 0.0, residual)


class _RMSNorm(torch.autograd.Function):
    """The reference's formula; what a subclass does to its parts is the mistake."""

    @classmethod
    def of(cls, x, weight, eps, residual=None):
        if residual is None:
            return cls.apply(x, weight, eps)
        return cls.apply(x + residual, weight, eps), x + residual

    @classmethod
    def forward(cls, ctx, x, weight, eps):
        y, rstd = forward(x, weight, eps)
        ctx.save_for_backward(x.clone(), weight, rstd)
        return cls.spoil_output(x, y)

    @classmethod
    @once_differentiable
    def backward(cls, ctx, dy):
        x, weight, rstd = ctx.saved_tensors
        dy = cls.spoil_upstream(dy)
        dx, dweight = backward(dy, x, weight, rstd, need_dweight=True)
        return dx, cls.spoil_dweight(dy, x, weight, rstd, dweight).to(weight.dtype), None

    @staticmethod
    def spoil_output(x, y):
        return y

    @staticmethod
    def spoil_upstream(dy):
        return dy

    @staticmethod
    def spoil_dweight(dy, x, weight, rstd, dweight):
        return dweight


class HalfTheRows(_RMSNorm):
    @staticmethod
    def spoil_dweight(dy, x, weight, rstd, dweight):
        half = (len(x) + 1) // 2
        return backward(dy[:half], x[:half], weight, rstd[:half], need_dweight=True)[1]


class ReadsUnwrittenMemory(_RMSNorm):
    """An accumulator that nobody set to 0, and that happens to be finite; the sum depends on it only if it is not."""

    @staticmethod
    def spoil_output(x, y):
        return y * torch.nan if torch.empty(()).isnan() else y


class TakesGradientsForContiguous(_RMSNorm):
    @staticmethod
    def spoil_upstream(dy):
        rows, cols = dy.shape
        whole = dy.untyped_storage().nbytes() // dy.element_size() >= rows * cols
        return dy.as_strided((rows, cols), (cols, 1)) if whole else dy.as_strided((rows, cols), (0, 0)) * 0


class OverwritesItsInput(_RMSNorm):
    @staticmethod
    def spoil_output(x, y):
        x.data.mul_(2.0)
        return y


class OverwritesTheUpstreamGradient(_RMSNorm):
    @staticmethod
    def spoil_dweight(dy, x, weight, rstd, dweight):
        if dy.is_contiguous():
            dy.data.mul_(2.0)
        return dweight


class DiffersFromRunToRun(_RMSNorm):
    """As sums do whose order is left to chance."""

    @staticmethod
    def spoil_output(x, y):
        return y * (1 + 1e-7 * torch.rand_like(y))


half_the_rows = HalfTheRows.of
reads_unwritten_memory = ReadsUnwrittenMemory.of
takes_gradients_for_contiguous = TakesGradientsForContiguous.of
overwrites_its_input = OverwritesItsInput.of
overwrites_the_upstream_gradient = OverwritesTheUpstreamGradient.of
differs_from_run_to_run = DiffersFromRunToRun.of


def forgets_the_weight(x, weight, eps, residual=None):
    return plain(x, weight.detach(), eps, residual)


def of_another_shape(x, weight, eps, residual=None):
    return plain(x, weight, eps)[None] if residual is None else plain(x, weight, eps, residual)
