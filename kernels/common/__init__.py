"""What more than one kernel family needs: the counter-based random numbers.

Every backend draws the same numbers. The word of the logical index (row ``i``, column ``j``) is word ``j % 4`` of
Philox4x32-10 (Salmon et al., SC 2011) with counter ``(j // 4, i, 0, 0)`` and key ``(seed low 32 bits, seed high 32
bits)``, the layout of ``triton.language.philox``. Its upper 24 bits ``m`` stand for the uniform number ``u = (m + 1/2)
/ 2**24``, open at both ends, and for the logistic number ``log u - log(1 - u)``, which is computed as ``log(n / (2**25
- n))`` with the odd integer ``n = 2m + 1``: exact at both ends in float32, where ``u`` itself would round to 1.
"""
