"""Cross-entropy and distillation of hidden @ weight^T (+ bias): neither the logits [N, V] nor their gradient exist.

After Cut Cross-Entropy (arXiv:2411.09009) and Liger Kernel (arXiv:2410.10989): rows without a label are left
out first, the others pass in chunks through one buffer of logits, whose gradient takes their place and is
multiplied on at once. The products are PyTorch's: their last bits may depend on its number of threads, but
not on the run.

Shapes: N rows (tokens), H columns (hidden size), V vocabulary. With x a row's logits and lse =
log(sum(exp(x))): loss = lse - (1 - label_smoothing) * x[target] - label_smoothing * mean(x) + z_loss * lse^2.
"""

from __future__ import annotations

import torch

from leantune_kernels.linear_cross_entropy import chunked
from leantune_kernels.linear_cross_entropy.chunked import OP, LossAndGradients, Settings, per_row, reduced
from leantune_kernels.linear_cross_entropy.targets import Labels, SoftLabels, Teacher

__all__ = ["OP", "LossAndGradients", "forward", "linear_cross_entropy", "linear_distillation", "per_row", "reduced"]


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk_rows: int = 384,
    workspace: torch.Tensor | None = None,
) -> torch.Tensor:
    """Loss of predicting `targets` [N] int64 from `hidden` [N, H] by the head `weight` [V, H] and `bias` [V].

    Returns fp32: a scalar for reduction "mean" (over the rows that have a label; 0 if none has) and "sum",
    [N] with 0 at ignored rows for "none". Differentiable once in hidden, weight and bias. hidden, weight and
    bias: float32, bfloat16 or float16, each its own, any strides; logits, softmax and sums over rows are fp32
    (loss sums fp64). Memory beyond the results: about chunk_rows * V * 4 bytes, which is `workspace` where given,
    fp32 [min(chunk_rows, N) or more, V]: whoever calls again and again spares new memory's page faults. Gradients
    of "mean" and "sum" are computed together with the loss; "none" computes the logits again in its backward pass
    (in the workspace, too). Raises ValueError for shapes that do not fit and for the first target that is neither
    `ignore_index` nor in [0, V).
    """
    labels = Labels(targets, ignore_index, label_smoothing, z_loss)
    return chunked.loss(hidden, weight, bias, Settings(labels, chunk_rows, workspace), reduction)


def linear_distillation(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    teacher: Teacher,
    targets: torch.Tensor | None = None,
    *,
    bias: torch.Tensor | None = None,
    probabilities: bool = False,
    alpha: float = 0.5,
    temperature: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    chunk_rows: int = 384,
    workspace: torch.Tensor | None = None,
) -> torch.Tensor:
    """Loss of `hidden` [N, H] under the head `weight` [V, H] and `bias` [V] against a teacher, and labels where given.

    After Hinton, Vinyals and Dean (2015, arXiv:1503.02531). A row's loss, with x its logits, z the teacher's and T the
    temperature, is alpha * T^2 * KL(softmax(z / T) || softmax(x / T)) + (1 - alpha) * (lse - x[target]). `teacher` is
    one of: logits [N, V]; with `probabilities`, the distributions [N, V] themselves, already at the temperature (rows
    are brought to sum 1); a pair (its hidden states [N, K], its head [V, K]), whose logits exist a chunk at a time like
    the student's. float32, bfloat16 or float16; it gets no gradient, and its chunk takes another chunk_rows * V
    elements. `targets` [N] int64 are the labels, and rows of `ignore_index` are left out altogether; None, which takes
    all rows, needs alpha=1. The other arguments, the result, its gradients and errors are those of
    linear_cross_entropy; ValueError also for an alpha outside [0, 1] and a temperature that is not positive.
    """
    soft = SoftLabels(teacher, probabilities, targets, ignore_index, alpha, temperature)
    return chunked.loss(hidden, weight, bias, Settings(soft, chunk_rows, workspace), reduction)


def forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    grad_scale: float = 1.0,
    need_dhidden: bool = True,
    need_dweight: bool = False,
    chunk_rows: int = 384,
    workspace: torch.Tensor | None = None,
) -> LossAndGradients:
    """(loss_sum, label_count, dhidden, dweight, dbias): summed loss and gradients of grad_scale * loss_sum.

    loss_sum: fp32 scalar, unscaled. dhidden [N, H] in hidden's dtype (fp32 where that is float16), 0 at ignored rows.
    dweight [V, H] and dbias [V] are fp32; dbias comes with dweight where there is a bias. What was not asked for is
    None. `workspace` is as in linear_cross_entropy; its contents are lost.
    """
    settings = Settings(Labels(targets, ignore_index, label_smoothing, z_loss), chunk_rows, workspace)
    needs = (need_dhidden, need_dweight, need_dweight and bias is not None)
    return chunked.run(hidden, weight, bias, settings, grad_scale, None, needs)[0]
