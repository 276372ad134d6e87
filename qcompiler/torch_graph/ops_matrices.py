"""Matrix products."""

import torch
from torch import Tensor

from qcompiler.torch_graph.registry import MICROSOFT, Call, op


@op("MatMul")
def _mat_mul(_: Call, x: Tensor, y: Tensor) -> Tensor:
    return torch.matmul(x, y)


@op(
    "FusedMatMul",
    domain=MICROSOFT,
    knows="alpha transA transB transBatchA transBatchB",
    only={"transBatchA": (0,), "transBatchB": (0,)},
)
def _fused_mat_mul(call: Call, x: Tensor, y: Tensor) -> Tensor:
    x = x.mT if call.get("transA", 0) and x.ndim > 1 else x
    y = y.mT if call.get("transB", 0) and y.ndim > 1 else y
    return torch.matmul(x, y) * call.get("alpha", 1.0)


@op("Gemm", since=7)
def _gemm(call: Call, x: Tensor, y: Tensor, bias: Tensor | None = None) -> Tensor:
    alpha, beta = call.get("alpha", 1.0), call.get("beta", 1.0)
    x = x.T if call.get("transA", 0) else x
    y = y.T if call.get("transB", 0) else y
    product = torch.matmul(x, y)
    if alpha != 1:
        product = (product * alpha).to(x.dtype)
    if bias is None:
        return product
    return product + (bias if beta == 1 else (bias * beta).to(x.dtype))


@op("Einsum")
def _einsum(call: Call, *inputs: Tensor) -> Tensor:
    return torch.einsum(call.get("equation"), *inputs)


@op("Det")
def _det(_: Call, x: Tensor) -> Tensor:
    result = torch.linalg.det(x)
    singular = result.detach() == 0
    if not x.requires_grad or not bool(singular.any()):
        return result
    # There torch's own gradient is zero; the true one is the matrix of cofactors.
    return torch.where(singular, ((x - x.detach()) * _cofactors(x.detach())).sum((-2, -1)), result)


def _cofactors(x: Tensor) -> Tensor:
    """Those of square matrices [..., N, N]: of U diag(s) V they are det(U) det(V) U diag(products of the other s) V."""
    u, s, v = torch.linalg.svd(x)
    others = s.unsqueeze(-2).masked_fill(torch.eye(s.shape[-1], dtype=torch.bool), 1).prod(-1)
    return (torch.linalg.det(u) * torch.linalg.det(v))[..., None, None] * (u * others.unsqueeze(-2)) @ v
