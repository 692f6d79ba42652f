"""Distances between clouds of cells: optimal transport, exact, entropic and along one axis, and the energy distance.

Clouds x [B, n, D] and y [B, m, D] have uniform weights a = 1/n and b = 1/m. With C_ij = |x_i - y_j|^p

    emd                  min over plans P >= 0, P 1 = a, P' 1 = b, of <P, C>
    OT_eps               the same of <P, C> + eps KL(P | a b'), reached by P_ij = a_i b_j exp((f_i + g_j - C_ij) / eps)
                         with f_i = -eps log sum_j b_j exp((g_j - C_ij) / eps) and the like for g (Sinkhorn's updates)
    sinkhorn_divergence  OT_eps(x, y) - OT_eps(x, x) / 2 - OT_eps(y, y) / 2  (Feydy et al., AISTATS 2019)
    wasserstein_1d       integral of |F^-1(q) - G^-1(q)|^p over 0 < q < 1, F^-1 and G^-1 the quantiles of a coordinate
    energy_distance      2 E|x - y| - E|x - x'| - E|y - y'|  (Szekely and Rizzo, 2013)
"""
