"""Small graphs and values for the tests of the graph family."""

from __future__ import annotations

import torch
from inputs import normal

from perturbcore import ops

DTYPES = [torch.float32, torch.float64]


def csr(graph):
    return graph.rowptr, graph.col, graph.t_rowptr, graph.t_col, graph.t_perm


def random_graph(nodes, edges, seed=0, weighted=False):
    """Hubs, self edges, duplicates, and a last node that nothing enters."""
    generator = torch.Generator().manual_seed(seed)
    src = (torch.rand(edges, generator=generator) ** 3 * nodes).long()
    dst = (torch.rand(edges, generator=generator) ** 2 * max(nodes - 1, 1)).long()
    return ops.Graph.from_edges(src, dst, nodes, normal(edges) if weighted else None)


GRAPHS = {
    "no nodes": (0, 0),
    "one node, no edge": (1, 0),
    "self edges of one node": (1, 3),
    "isolated nodes": (9, 2),
    "odd": (67, 501),
    "hubs": (40, 1501),
}
