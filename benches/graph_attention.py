"""Cases of attention and gated pooling. Peers get their indices ready made, and the noise of gated_pool too."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import leaky_relu
from torch.utils.checkpoint import checkpoint

from perturbcore import ops
from perturbcore.benches.case import Case, Outputs, Problem, Work
from perturbcore.benches.graph_inputs import EAGER, on_lattice, with_gradients
from perturbcore.kernels.common.reference import logistic


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


def top_edges(num_nodes: int, num_edges: int, generator: torch.Generator) -> tuple[ops.Graph, Tensor, Tensor]:
    """Return a graph of nodes with a loop and about as many other edges each, some sources being hubs; its ends."""
    loops = torch.arange(num_nodes)
    skewed = (torch.rand(num_edges, generator=generator, dtype=torch.float64) ** 2 * num_nodes).long()
    src = torch.cat([torch.randperm(num_nodes, generator=generator)[skewed], loops])
    dst = torch.cat([torch.arange(num_edges) % num_nodes, loops])
    graph = ops.Graph.from_edges(src, dst, num_nodes)
    return graph, src[graph.perm], dst[graph.perm]


def eager_attention(src: Tensor, dst: Tensor, u: Tensor, v: Tensor, att: Tensor) -> Tensor:
    """Return what ``ops.gatv2`` does, one tensor per edge at a time."""
    sent = u[src]  # [E, H, C]
    score = (leaky_relu(sent + v[dst], 0.2) * att).sum(-1)
    top = score.new_full(u.shape[:2], -math.inf)
    top = top.scatter_reduce(0, dst[:, None].expand_as(score), score.detach(), "amax")
    power = (score - top[dst]).exp()
    total = torch.zeros_like(top).index_add(0, dst, power)
    return torch.zeros_like(u).index_add(0, dst, sent * (power / total[dst])[..., None])


def build_gatv2(num_nodes: int, num_edges: int, heads: int, channels: int, backward: bool) -> Problem:
    """One layer without its projections."""
    generator = torch.Generator().manual_seed(0)
    graph, src, dst = top_edges(num_nodes, num_edges, generator)
    u, v, grad = (torch.randn(num_nodes, heads, channels, generator=generator) for _ in range(3))
    att = torch.randn(heads, channels, generator=generator) / math.sqrt(channels)
    inputs = (on_lattice(u), on_lattice(v, 1 / 512), att)

    def ours(u: Tensor, v: Tensor, att: Tensor) -> Tensor:
        return ops.gatv2(graph, u, v, att)

    eager = functools.partial(eager_attention, src, dst)

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


def build_encoder(num_nodes: int, num_edges: int, width: int, heads: int, channels: int, layers: int) -> Problem:
    """AdaPert's graph encoder: attention with its projections, skips by concatenation, a last projection.

    Gradients are compared of the parameters, and of the features as a sum over nodes: float32 and float64 see different
    sides of some kinks, which shows in the gradient of a single node.
    """
    generator = torch.Generator().manual_seed(0)
    graph, src, dst = top_edges(num_nodes, num_edges, generator)
    inner = heads * channels
    widths = [width + i * inner for i in range(layers + 1)]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / math.sqrt(shape[-1])

    inputs = [torch.randn(num_nodes, width, generator=generator), normal(width, widths[-1])]
    for size in widths[:-1]:
        inputs += [normal(inner, size), normal(inner, size), normal(heads, channels)]
    grad = torch.randn(num_nodes, width, generator=generator)

    def encode(attend: Callable[..., Tensor], x: Tensor, out: Tensor, *parameters: Tensor) -> Tensor:
        for source, target, att in zip(*(parameters[i::3] for i in range(3)), strict=True):
            u, v = ((x @ weight.T).view(num_nodes, heads, channels) for weight in (source, target))
            x = leaky_relu(torch.cat([attend(u, v, att).flatten(1), x], 1), 0.2)
        return x @ out.T

    def call(attend: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Outputs:
        y, grad_x, *others = with_gradients(functools.partial(encode, attend), inputs, grad)
        return y, grad_x.sum(0), *others

    eager = functools.partial(eager_attention, src, dst)

    def lean(u: Tensor, v: Tensor, att: Tensor) -> Tensor:
        return checkpoint(eager, u, v, att, use_reentrant=False)  # in float64 what four layers keep is some 10 GB

    # forward, and twice that backward: two projections of each layer, and the last
    flops = 6.0 * num_nodes * (2 * inner * sum(widths[:-1]) + width * widths[-1])
    row_bytes = 4 * inner
    return Problem(
        ours=functools.partial(
            with_gradients, functools.partial(encode, functools.partial(ops.gatv2, graph)), inputs, grad
        ),
        peers={EAGER: functools.partial(with_gradients, functools.partial(encode, eager), inputs, grad)},
        expected=lambda: with_gradients(functools.partial(encode, lean), [t.double() for t in inputs], grad),
        work=Work(4.0 * layers * graph.num_edges * row_bytes, num_nodes, row_bytes, flops),
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
        build=functools.partial(build_gatv2, 18216, 182_000, 2, 128, backward),
        peers=(EAGER,),
        floors={EAGER: floor},
        memory_floors={EAGER: 20} if backward else {},
    )


CASES = (
    gated_pool_case(16, 12),
    gated_pool_case(64, 30),
    gatv2_case("gatv2", 10, backward=True),
    gatv2_case("gatv2/fwd", 20, backward=False),
    Case(
        name="gatv2/encoder",
        family="graph",
        shape="N=18216 E≈189000 H=2 C=128, 4 layers 128→384→640→896→1152→128 with projections, fwd+bwd",
        build=functools.partial(build_encoder, 18216, 171_000, 128, 2, 128, 4),
        peers=(EAGER,),
        floors={EAGER: 3},
        # Some sums of gradients nearly cancel, over four layers: in float32 torch eager errs by 4.4e-3 too. That each
        # op is exact to 1e-5 is checked by its own cases.
        tolerance=1e-2,
    ),
)
