"""Cases of the graph family."""

from __future__ import annotations

from perturbcore.benches import graph_attention, graph_products

CASES = (*graph_products.CASES, *graph_attention.CASES)
