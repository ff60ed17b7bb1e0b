"""RMSNorm: the raw forms refuse what the kernels would read or write wrongly."""

import pytest
import torch
from torch.nn import functional as F

from helpers_kernels import each_of
from leantune_kernels import rms_norm

implementation = each_of("cpu", "reference", "triton", "cuda", autouse=True)


def test_raw_forms_name_what_does_not_fit():
    x, weight = torch.randn(4, 6), torch.ones(6)
    bad_rows = x.bfloat16(), x[:3], x[:, :5], x.to("meta")
    strided = torch.empty(6, 4).t()
    for bad in (*bad_rows, strided):
        with pytest.raises(ValueError, match="out is"):
            rms_norm.forward(x, weight, 1e-5, bad)
    for bad in (weight[:5], weight.double(), weight[None]):
        with pytest.raises(ValueError, match="weight is"):
            rms_norm.forward(x, bad, 1e-5)
    with pytest.raises(ValueError, match=r"x has shape \(6,\)"):
        rms_norm.forward(weight, weight, 1e-5)
    _, rstd = rms_norm.forward(x, weight, 1e-5)
    right = {"dy": x, "x": x, "weight": weight, "rstd": rstd, "residual": x, "out": x.clone()}
    for name, bad in [
        *((name, bad) for name in ("dy", "residual", "out") for bad in bad_rows),
        ("out", strided),
        ("rstd", rstd[:3]),
        ("rstd", rstd.double()),
    ]:
        with pytest.raises(ValueError, match=f"{name} is"):
            rms_norm.backward(**{**right, name: bad})


@pytest.mark.parametrize("shape", [(4, 0), (0, 0), (2, 0, 0), (2, 0, 3), (0,)])
def test_no_columns_or_no_rows_as_pytorch_has_it(shape):
    x = torch.randn(shape, requires_grad=True)
    weight = torch.ones(shape[-1], requires_grad=True)
    wanted = F.rms_norm(x, (shape[-1],), weight)
    for y in (rms_norm.rms_norm(x, weight), rms_norm.add_rms_norm(x, x, weight)[0]):
        assert y.shape == wanted.shape
        dx, dweight = torch.autograd.grad(y.sum(), (x, weight))
        assert dx.shape == x.shape and torch.equal(dweight, torch.zeros(shape[-1]))


def test_a_statistic_of_any_stride():
    x, weight = torch.randn(4, 6), torch.ones(6)
    _, rstd = rms_norm.forward(x, weight, 1e-5)
    every_other = torch.stack((rstd, -rstd), 1)[:, 0]
    assert torch.equal(rms_norm.backward(x, x, weight, every_other)[0], rms_norm.backward(x, x, weight, rstd)[0])
