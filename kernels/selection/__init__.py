"""Retrieval in batches, and a choice among what was retrieved that gradients pass through.

Of a query q, a bank of rows e_n, cells c_i, a perturbation p and its candidates k_j, with logistic noise g:

    cosine_topk     the K rows of largest <q, e_n> / (|q| |e_n|), ties to the lower n
    gumbel_sigmoid  1[z > 0] with the gradient of sigmoid(z / tau), z = logit + g: the binary case of Gumbel-softmax
                    (Jang et al., ICLR 2017; Maddison et al., ICLR 2017), whose two Gumbel numbers differ by g
    gumbel_select   x_ij = LN([c_i; p; k_j]),  s_ij = A2 GELU(A1 x_ij + a1) + a2,
                    w_ij = gumbel_sigmoid((s_ij1 - s_ij0) / scale),  context_i = sum_j w_ij (F x_ij + f)

The last is stage 2 of PT-RAG (arXiv 2603.07233). Its kernels factorise the affine map after LayerNorm: for M = A1 or F,
with W = M diag(ln_weight) = [W_c W_p W_k], mean mu and variance v of [c; p; k],

    M x + m = (W_c c + W_p p + W_k k - mu W 1) (v + 1e-5)^(-1/2) + (M ln_bias + m)

so that what depends on a cell, on the perturbation and on a candidate is computed once for each, and no array of cells
x candidates x features exists. LayerNorm does not see what is added to all of [c; p; k]; the mean of p is taken off
first, after which v, as a difference of mean squares, is at least a third of the larger one.

Noise of cell i of set b and candidate j has the logical index (b S + i, j) of ``kernels.common``. Dropout of the
scorer's H hidden features draws 16 bits for each pair of a candidate and a feature: a cell has a stream of its own,
counter (block, b S + i, 0, 1), and draw n = j H + h is the lower (n even) or upper half of word w of block m, where n =
2 (w M + m) + (n mod 2) and M = ceil(K H / 8) is the number of blocks.
"""
