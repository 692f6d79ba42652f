"""Cases of the graph family. Peers get their indices ready made, and the noise of gated_pool too."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec

import scipy.sparse
import torch
from torch import Tensor
from torch.nn.functional import leaky_relu

from perturbcore import ops
from perturbcore.benches.case import Case, Outputs, Problem, Work
from perturbcore.kernels.common.reference import logistic

EAGER = "torch eager"


def with_gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor) -> Outputs:
    """Return the value of ``function`` and its gradients with respect to every input."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    y = function(*leaves)
    return y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))


def random_edges(num_nodes: int, num_edges: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return distinct edges (src, dst) sorted by destination, uniform destinations and a few sources that are hubs."""
    src = (torch.rand(num_edges, generator=generator) ** 3 * num_nodes).long()
    dst = torch.randint(num_nodes, (num_edges,), generator=generator)
    key = torch.unique(dst * num_nodes + src)
    return key % num_nodes, key // num_nodes


def on_lattice(values: Tensor, offset: float = 0.0) -> Tensor:
    """Round to multiples of 1/256, plus ``offset``.

    Two tensors whose offsets differ by 1/512 have sums that are exact and never 0, so float32 and float64 see the same
    side of leaky_relu's kink.
    """
    return torch.round(values * 256) / 256 + offset


def build_spmm(num_nodes: int, num_edges: int, batch: int, features: int, backward: bool) -> Problem:
    """One weight per edge and batch element. The peers without a batch multiply by the block-diagonal matrix."""
    generator = torch.Generator().manual_seed(0)
    src, dst = random_edges(num_nodes, num_edges, generator)
    graph = ops.Graph.from_edges(src, dst, num_nodes)
    edges, nodes = graph.num_edges, batch * num_nodes
    x, grad = (torch.randn(batch, num_nodes, features, generator=generator) for _ in range(2))
    weight = torch.rand(batch, edges, generator=generator)

    copy = torch.arange(batch)[:, None]
    rowptr = torch.cat([(graph.rowptr[:-1] + copy * edges).flatten(), torch.tensor([batch * edges])])
    col, row = (src + copy * num_nodes).flatten(), (dst + copy * num_nodes).flatten()

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return ops.spmm(graph, x, weight)

    def gather(x: Tensor, weight: Tensor) -> Tensor:
        return torch.zeros_like(x).index_add(1, dst, x[:, src] * weight[..., None])

    def torch_csr(x: Tensor, weight: Tensor) -> Tensor:
        with warnings.catch_warnings():  # that the format is young
            warnings.simplefilter("ignore", UserWarning)
            matrix = torch.sparse_csr_tensor(rowptr, col, weight.flatten(), (nodes, nodes))
        return torch.sparse.mm(matrix, x.reshape(nodes, features)).view_as(x)

    def scipy_csr(x: Tensor, weight: Tensor) -> Tensor:
        matrix = scipy.sparse.csr_array((weight.flatten().numpy(), col32, rowptr32), shape=(nodes, nodes))
        return torch.from_numpy(matrix @ x.reshape(nodes, features).numpy()).view_as(x)

    col32, rowptr32 = col.int().numpy(), rowptr.int().numpy()
    peers = {"gather + index_add": gather}
    if not backward:
        peers |= {"torch.sparse CSR": torch_csr, "scipy CSR": scipy_csr}
    if find_spec("torch_sparse"):
        import torch_sparse  # noqa: F401, for its operators

        csr2csc = (graph.t_perm + copy * edges).flatten().long()
        colptr = torch.cat([(graph.t_rowptr[:-1] + copy * edges).flatten(), rowptr[-1:]])

        def torch_sparse_spmm(x: Tensor, weight: Tensor) -> Tensor:
            spmm_sum = torch.ops.torch_sparse.spmm_sum
            return spmm_sum(row, rowptr, col, weight.flatten(), colptr, csr2csc, x.reshape(nodes, features)).view_as(x)

        peers["torch_sparse"] = torch_sparse_spmm

    def call(function: Callable[..., Tensor], *inputs: Tensor) -> Outputs:
        if backward:
            return with_gradients(function, inputs, grad)
        with torch.no_grad():
            return (function(*inputs),)

    gathered = 4.0 * batch * edges * features * (2 if backward else 1)  # x forward, the gradient of y backward
    return Problem(
        ours=functools.partial(call, ours, x, weight),
        peers={name: functools.partial(call, peer, x, weight) for name, peer in peers.items()},
        expected=functools.partial(call, gather, x.double(), weight.double()),
        work=Work(gathered, num_nodes, 4 * features),
    )


def build_gated_pool(num_nodes: int, batch: int, hidden: int, features: int) -> Problem:
    """All nodes are candidates. At the seed chosen no noisy score is near enough to 0 for float32 to flip its gate."""
    generator = torch.Generator().manual_seed(0)
    h = 0.2 * torch.randn(num_nodes, features, generator=generator)
    a, q = (on_lattice(torch.randn(rows, hidden, generator=generator)) for rows in (num_nodes, batch))
    w = torch.randn(hidden, generator=generator) / math.sqrt(hidden)
    bias = on_lattice(0.1 * torch.randn(hidden, generator=generator), 1 / 512)
    grad = torch.randn(batch, features, generator=generator)
    tau, inputs = 0.7, (a, q, w, h, bias)

    with torch.no_grad():
        score = torch.cat([leaky_relu(a.double() + p, 0.2) @ w.double() for p in (q + bias).double().split(1)])
    score = score.view(batch, num_nodes)
    pairs = torch.arange(batch)[:, None], torch.arange(num_nodes)
    seed = next(s for s in range(100) if (score + logistic(s, *pairs, torch.float64)).abs().min() > 2e-6)
    noise = logistic(seed, *pairs, torch.float64)

    def ours(a: Tensor, q: Tensor, w: Tensor, h: Tensor, bias: Tensor) -> Tensor:
        return ops.gated_pool(a, q, w, h, bias=bias, tau=tau, seed=seed, pool="sum").pooled

    def eager(noise: Tensor, a: Tensor, q: Tensor, w: Tensor, h: Tensor, bias: Tensor) -> Tensor:
        score = leaky_relu(a + (q + bias)[:, None], 0.2) @ w  # [B, N]
        soft = torch.sigmoid((score + noise) / tau)
        gate = (soft > 0.5).to(soft.dtype) + (soft - soft.detach())
        return (gate * torch.sigmoid(score)) @ h

    peer = functools.partial(eager, noise.float())
    right = functools.partial(eager, noise)
    # per pair and hidden feature 3 vector instructions forward and 5 backward, each in the place of an fma; 3 products
    flops = 2.0 * batch * num_nodes * (8 * hidden + 3 * features)
    return Problem(
        ours=functools.partial(with_gradients, ours, inputs, grad),
        peers={EAGER: functools.partial(with_gradients, peer, inputs, grad)},
        expected=lambda: with_gradients(right, [t.double() for t in inputs], grad),
        work=Work(flops=flops),
    )


def build_gatv2(num_nodes: int, degree: int, heads: int, channels: int, backward: bool) -> Problem:
    """Every node has ``degree`` incoming edges and a loop; a few sources are hubs."""
    generator = torch.Generator().manual_seed(0)
    loops = torch.arange(num_nodes)
    skewed = (torch.rand(num_nodes * degree, generator=generator, dtype=torch.float64) ** 2 * num_nodes).long()
    src = torch.cat([torch.randperm(num_nodes, generator=generator)[skewed], loops])
    dst = torch.cat([loops.repeat_interleave(degree), loops])
    graph = ops.Graph.from_edges(src, dst, num_nodes)
    src, dst = src[graph.perm], dst[graph.perm]
    u, v, grad = (torch.randn(num_nodes, heads, channels, generator=generator) for _ in range(3))
    att = torch.randn(heads, channels, generator=generator) / math.sqrt(channels)
    inputs = (on_lattice(u), on_lattice(v, 1 / 512), att)

    def ours(u: Tensor, v: Tensor, att: Tensor) -> Tensor:
        return ops.gatv2(graph, u, v, att)

    def eager(u: Tensor, v: Tensor, att: Tensor) -> Tensor:
        sent = u[src]  # [E, H, C]
        score = (leaky_relu(sent + v[dst], 0.2) * att).sum(-1)
        top = score.new_full((num_nodes, heads), -math.inf)
        top = top.scatter_reduce(0, dst[:, None].expand_as(score), score.detach(), "amax")
        power = (score - top[dst]).exp()
        total = torch.zeros_like(top).index_add(0, dst, power)
        return torch.zeros_like(u).index_add(0, dst, sent * (power / total[dst])[..., None])

    def call(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Outputs:
        if backward:
            return with_gradients(function, inputs, grad)
        with torch.no_grad():
            return (function(*inputs),)

    row_bytes = 4 * heads * channels
    passes = 4 if backward else 1  # forward u; backward u by destination, then the gradient and v by source
    return Problem(
        ours=functools.partial(call, ours, inputs),
        peers={EAGER: functools.partial(call, eager, inputs)},
        expected=lambda: call(eager, [t.double() for t in inputs]),
        work=Work(float(passes * graph.num_edges * row_bytes), num_nodes, row_bytes),
    )


def spmm_case(name: str, floor: float | None, num_nodes: int, num_edges: int, batch: int, features: int) -> Case:
    """A row for :func:`build_spmm`; a floor goes with forward and backward together."""
    direction, peers = ("fwd+bwd", ()) if floor else ("fwd", ("torch.sparse CSR", "scipy CSR"))
    return Case(
        name=name,
        family="graph",
        shape=f"N={num_nodes} E≈{num_edges} B={batch} D={features}, a weight per edge and batch element, {direction}",
        build=functools.partial(build_spmm, num_nodes, num_edges, batch, features, floor is not None),
        peers=("gather + index_add", *peers, "torch_sparse"),
        floors={"gather + index_add": floor} if floor else {},
    )


def gated_pool_case(batch: int, floor: float) -> Case:
    """A row for :func:`build_gated_pool` on the nodes of AdaPert's graph."""
    return Case(
        name=f"gated_pool/b{batch}",
        family="graph",
        shape=f"N=18216 k=D=128 B={batch}, all nodes candidates, fwd+bwd",
        build=functools.partial(build_gated_pool, 18216, batch, 128, 128),
        peers=(EAGER,),
        floors={EAGER: floor},
        memory_floors={EAGER: 20},
    )


def gatv2_case(name: str, floor: float, backward: bool) -> Case:
    """A row for :func:`build_gatv2` on AdaPert's graph."""
    return Case(
        name=name,
        family="graph",
        shape=f"N=18216 E≈200000 H=2 C=128, {'fwd+bwd' if backward else 'fwd'}",
        build=functools.partial(build_gatv2, 18216, 10, 2, 128, backward),
        peers=(EAGER,),
        floors={EAGER: floor},
        memory_floors={EAGER: 20} if backward else {},
    )


CASES = (
    spmm_case("spmm/5k", 30, 5_000, 100_000, 8, 64),
    spmm_case("spmm/10k", 30, 10_000, 400_000, 2, 128),
    spmm_case("spmm/5k-fwd", None, 5_000, 100_000, 8, 64),
    spmm_case("spmm/10k-fwd", None, 10_000, 400_000, 2, 128),
    gated_pool_case(16, 12),
    gated_pool_case(64, 30),
    gatv2_case("gatv2", 10, backward=True),
    gatv2_case("gatv2/fwd", 20, backward=False),
)
