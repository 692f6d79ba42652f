"""Sparse perturbation-conditioned message passing.

A graph is stored by destination (CSR): the edges entering node ``i`` are ``col[rowptr[i]:rowptr[i + 1]]``,
each an edge ``col[e] -> i``. Backward passes walk the transposed structure, so no pass needs an atomic.
"""
