"""What the tests of the Triton kernels share: tiny inputs, and the comparison with the reference in float64."""

import torch

from perturbcore import ops

DTYPES = [torch.float32, torch.float64]


def random_graph(num_nodes, num_edges, seed=0):
    generator = torch.Generator().manual_seed(seed)
    src, dst = (torch.randint(max(num_nodes, 1), (num_edges,), generator=generator) for _ in range(2))
    dst[: num_edges // 2] = 0  # a row of several blocks of edges; most rows stay empty
    return ops.Graph.from_edges(src, dst, num_nodes)


def csr(graph):
    return {name: getattr(graph, name) for name in ("rowptr", "col", "t_rowptr", "t_col", "t_perm")}


def normals(*shapes):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]


def agrees_with_the_reference(op, inputs, dtype):
    """Compare results and gradients of an op with those of the reference in float64."""

    def pulled(backend, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in inputs]
        with ops.backend(backend):
            results = op(*leaves)
            results = results if isinstance(results, tuple) else (results,)
            loss = sum((r * torch.linspace(-1, 2, r.numel(), dtype=dtype).view(r.shape)).sum() for r in results)
            return *results, *torch.autograd.grad(loss, leaves)

    for result, right in zip(pulled("triton", dtype), pulled("reference", torch.float64), strict=True):
        assert result.dtype == dtype
        assert result.shape == right.shape
        scale = float(right.detach().abs().max().clamp(min=0.1)) if right.numel() else 0.0
        torch.testing.assert_close(
            result.double(), right, rtol=0, atol=scale * (1e-5 if dtype == torch.float32 else 1e-12)
        )
