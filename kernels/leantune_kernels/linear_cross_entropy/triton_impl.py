"""The elementwise part of linear_cross_entropy in Triton: one program a row, the softmax online.

A gradient needs its row's normaliser first. A row of at most BLOCK logits is held between its one read and its one
write; a longer one is read a second time, by the same program, so that it comes from the second-level cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from leantune_kernels.triton_runtime import on_device, power_of_two, refuses

__all__ = ["cross_entropy_rows", "distillation_rows", "refuses"]

BLOCK = 16384  # logits held at once, 64 KiB
LOWEST = tl.constexpr(-3.402823466e38)  # not -infinity: a block of masked (-infinity) logits must give 0, not NaN


@triton.jit
def _load(row_ptr, column, cols):
    return tl.load(row_ptr + column, mask=column < cols, other=float("-inf")).to(tl.float32)


@triton.jit
def _finite_sum(x, column, cols):
    return tl.sum(tl.where(column < cols, x, 0.0), axis=0)


@triton.jit
def _gradient(x, column, row_max, factor, uniform, target, at_target):
    """factor * exp(x - max) - uniform, and at the target less still."""
    return tl.exp(x - row_max) * factor - uniform - tl.where(column == target, at_target, 0.0)


@triton.jit(do_not_specialize=["scale", "label_smoothing", "z_loss"])
def _cross_entropy_kernel(
    logits_ptr, stride, targets_ptr, row_scale_ptr, losses_ptr, cols,
    scale: tl.float32, label_smoothing: tl.float32, z_loss: tl.float32,
    HAS_ROW_SCALE: tl.constexpr, NEED_GRADIENT: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride
    target = tl.load(targets_ptr + row)
    target_logit = tl.load(row_ptr + target)
    column = tl.arange(0, BLOCK)
    if WHOLE:
        x = _load(row_ptr, column, cols)
        row_max = tl.maximum(tl.max(x, axis=0), LOWEST)
        sum_exp = tl.sum(tl.exp(x - row_max), axis=0)
        sum_x = _finite_sum(x, column, cols)
    else:
        row_max = tl.full((), LOWEST, tl.float32)
        sum_exp = tl.zeros((), tl.float32)
        sum_x = tl.zeros((), tl.float32)
        for begin in range(0, cols, BLOCK):
            x = _load(row_ptr, begin + column, cols)
            now_max = tl.maximum(row_max, tl.max(x, axis=0))
            sum_exp = sum_exp * tl.exp(row_max - now_max) + tl.sum(tl.exp(x - now_max), axis=0)
            sum_x += _finite_sum(x, begin + column, cols)
            row_max = now_max
    lse = row_max + tl.log(sum_exp)
    loss = lse - (1 - label_smoothing) * target_logit + z_loss * lse * lse
    if label_smoothing != 0:  # a mean of masked logits is infinite
        loss -= label_smoothing * sum_x / cols
    tl.store(losses_ptr + row, loss.to(tl.float64))
    if NEED_GRADIENT:
        mine = scale
        if HAS_ROW_SCALE:
            mine = scale * tl.load(row_scale_ptr + row)
        factor = mine * (1 + 2 * z_loss * lse) / sum_exp
        uniform = mine * label_smoothing / cols
        at_target = mine * (1 - label_smoothing)
        if WHOLE:
            g = _gradient(x, column, row_max, factor, uniform, target, at_target)
            tl.store(row_ptr + column, g, mask=column < cols)
        else:
            for begin in range(0, cols, BLOCK):
                x = _load(row_ptr, begin + column, cols)
                g = _gradient(x, begin + column, row_max, factor, uniform, target, at_target)
                tl.store(row_ptr + begin + column, g, mask=begin + column < cols)


@triton.jit
def _weighted_gap(e, x, z, inverse):
    """Sum of e * (z - x) / T; where the teacher's probability is 0 (z = -infinity) it counts for nothing."""
    return tl.sum(e * ((tl.where(e == 0, 0.0, z) - tl.where(e == 0, 0.0, x)) * inverse), axis=0)


@triton.jit
def _pair_sums(x, z, inverse):
    """(max x, max z, sums of exp(x), exp(x / T), exp(z / T) and the weighted gaps), all relative to the maxima."""
    x_max, z_max = tl.maximum(tl.max(x, axis=0), LOWEST), tl.maximum(tl.max(z, axis=0), LOWEST)
    hard = tl.sum(tl.exp(x - x_max), axis=0)
    soft = tl.sum(tl.exp((x - x_max) * inverse), axis=0)
    e = tl.exp((z - z_max) * inverse)
    return x_max, z_max, hard, soft, tl.sum(e, axis=0), _weighted_gap(e, x, z, inverse)


@triton.jit
def _pair_sums_in_blocks(row_ptr, z_ptr, cols, inverse, BLOCK: tl.constexpr):
    """_pair_sums of rows that are longer than a block."""
    x_max = tl.full((), LOWEST, tl.float32)
    z_max = tl.full((), LOWEST, tl.float32)
    hard = tl.zeros((), tl.float32)
    soft = tl.zeros((), tl.float32)
    teacher = tl.zeros((), tl.float32)
    gap = tl.zeros((), tl.float32)
    for begin in range(0, cols, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        x, z = _load(row_ptr, column, cols), _load(z_ptr, column, cols)
        x_now = tl.maximum(x_max, tl.max(x, axis=0))
        z_now = tl.maximum(z_max, tl.max(z, axis=0))
        hard = hard * tl.exp(x_max - x_now) + tl.sum(tl.exp(x - x_now), axis=0)
        soft = soft * tl.exp((x_max - x_now) * inverse) + tl.sum(tl.exp((x - x_now) * inverse), axis=0)
        e = tl.exp((z - z_now) * inverse)
        shrink = tl.exp((z_max - z_now) * inverse)
        teacher = teacher * shrink + tl.sum(e, axis=0)
        gap = gap * shrink + _weighted_gap(e, x, z, inverse)
        x_max, z_max = x_now, z_now
    return x_max, z_max, hard, soft, teacher, gap


@triton.jit
def _store_mixed_gradient(
    row_ptr, x, z, column, cols, x_max, z_max, inverse, hard, soft, teacher, target, at_target, HARD: tl.constexpr
):
    g = tl.exp((x - x_max) * inverse) * soft - tl.exp((z - z_max) * inverse) * teacher
    if HARD:
        g += tl.exp(x - x_max) * hard - tl.where(column == target, at_target, 0.0)
    tl.store(row_ptr + column, g, mask=column < cols)


@triton.jit(do_not_specialize=["scale", "alpha", "temperature"])
def _distillation_kernel(
    logits_ptr, stride, teacher_ptr, teacher_stride, targets_ptr, row_scale_ptr, losses_ptr, cols,
    scale: tl.float32, alpha: tl.float32, temperature: tl.float32,
    HARD: tl.constexpr, HAS_ROW_SCALE: tl.constexpr, NEED_GRADIENT: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_ptr, z_ptr = logits_ptr + row * stride, teacher_ptr + row * teacher_stride
    target = tl.full((), -1, tl.int64)
    target_logit = tl.zeros((), tl.float32)
    if HARD:
        target = tl.load(targets_ptr + row)
        target_logit = tl.load(row_ptr + target)
    inverse = 1 / temperature
    column = tl.arange(0, BLOCK)
    if WHOLE:
        x, z = _load(row_ptr, column, cols), _load(z_ptr, column, cols)
        x_max, z_max, hard_sum, soft_sum, teacher_sum, gap = _pair_sums(x, z, inverse)
    else:
        x_max, z_max, hard_sum, soft_sum, teacher_sum, gap = _pair_sums_in_blocks(row_ptr, z_ptr, cols, inverse, BLOCK)
    divergence = gap / teacher_sum + (x_max - z_max) * inverse + tl.log(soft_sum) - tl.log(teacher_sum)
    loss = alpha * temperature * temperature * divergence
    if HARD:
        loss += (1 - alpha) * (x_max + tl.log(hard_sum) - target_logit)
    tl.store(losses_ptr + row, loss.to(tl.float64))
    if NEED_GRADIENT:
        mine = scale
        if HAS_ROW_SCALE:
            mine = scale * tl.load(row_scale_ptr + row)
        at_target, soft = mine * (1 - alpha), mine * alpha * temperature
        hard, soft, teacher = at_target / hard_sum, soft / soft_sum, soft / teacher_sum
        if WHOLE:
            _store_mixed_gradient(
                row_ptr, x, z, column, cols, x_max, z_max, inverse, hard, soft, teacher, target, at_target, HARD
            )
        else:
            for begin in range(0, cols, BLOCK):
                at = begin + column
                x, z = _load(row_ptr, at, cols), _load(z_ptr, at, cols)
                _store_mixed_gradient(
                    row_ptr, x, z, at, cols, x_max, z_max, inverse, hard, soft, teacher, target, at_target, HARD
                )


@on_device
def cross_entropy_rows(*, logits, targets, row_scale, scale, label_smoothing, z_loss, need_gradient):
    rows, cols = logits.shape
    losses = torch.empty(rows, dtype=torch.float64, device=logits.device)
    if rows:
        block = power_of_two(cols, at_most=BLOCK)
        _cross_entropy_kernel[(rows,)](
            logits_ptr=logits, stride=logits.stride(0), targets_ptr=targets,
            row_scale_ptr=losses if row_scale is None else row_scale, losses_ptr=losses, cols=cols, scale=scale,
            label_smoothing=label_smoothing, z_loss=z_loss, HAS_ROW_SCALE=row_scale is not None,
            NEED_GRADIENT=need_gradient, WHOLE=cols <= block, BLOCK=block, num_warps=_warps(block),
        )  # fmt: skip
    return losses


@on_device
def distillation_rows(*, logits, teacher, targets, alpha, temperature, row_scale, scale, need_gradient):
    rows, cols = logits.shape
    teacher = teacher if teacher.stride(1) == 1 else teacher.contiguous()
    losses = torch.empty(rows, dtype=torch.float64, device=logits.device)
    if rows:
        block = power_of_two(cols, at_most=BLOCK // 2)  # two rows are held
        _distillation_kernel[(rows,)](
            logits_ptr=logits, stride=logits.stride(0), teacher_ptr=teacher, teacher_stride=teacher.stride(0),
            targets_ptr=losses if targets is None else targets,
            row_scale_ptr=losses if row_scale is None else row_scale, losses_ptr=losses, cols=cols, scale=scale,
            alpha=alpha, temperature=temperature, HARD=alpha < 1, HAS_ROW_SCALE=row_scale is not None,
            NEED_GRADIENT=need_gradient, WHOLE=cols <= block, BLOCK=block, num_warps=_warps(2 * block),
        )  # fmt: skip
    return losses


def _warps(elements: int) -> int:
    """Enough warps that a thread holds at most 32 elements, four at least."""
    return max(4, min(16, elements // 1024))
