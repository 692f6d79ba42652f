"""Rows as 16-bit codes on CPU, and products of codes: integers throughout, so that nothing is rounded while summing.

The product of two pairs of codes, added to a 32-bit sum, is one instruction for 16 rows where there is AVX-512 (VNNI),
and few elsewhere; it is written as arithmetic on vectors, which LLVM turns into what the processor has.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import njit, prange, types
from numba.extending import intrinsic

from perturbcore.kernels.common.numba_cpu import inner, kernel
from perturbcore.kernels.common.vector_numba_cpu import LANE, WORD, spread
from perturbcore.kernels.selection.topk_shapes import PANEL, STEPS

# queries whose sums the registers hold: one register for 16 rows with AVX-512, else two or four
ABREAST = 16 if binding.get_host_cpu_features().get("avx512bw") else 4


# reassociation would multiply the power by itself, or by what is as large
@njit(fastmath={"contract"}, error_model="numpy", cache=True)
def _rescaled(row):
    """Return a row times a power of two that brings its largest number near 1, and the power."""
    largest = 0.0
    for d in range(row.size):
        largest = max(largest, abs(np.float64(row[d])))
    power = math.ldexp(1.0, -min(max(math.frexp(largest)[1], -1000), 1000))
    scaled = np.empty(row.size, row.dtype)
    for d in range(row.size):
        scaled[d] = row[d] * power
    return scaled, power


@inner
def _square(row):
    total = 0.0
    for d in range(row.size):
        total += np.float64(row[d]) * np.float64(row[d])
    return total


@inner
def measured(row):
    """Return a row, or it times a power of two where squares would overflow or vanish, its norm, and the power."""
    square, power = _square(row), 1.0
    if not 1e-280 < square < 1e280:
        row, power = _rescaled(row)
        square = _square(row)
    return row, math.sqrt(square), power


@kernel
def direct(rows, unit):
    """Write the directions of rows, float64; a row of zeros has none, and stays."""
    for i in prange(rows.shape[0]):
        row, norm, _ = measured(rows[i])
        for d in range(row.size):
            unit[i, d] = np.float64(row[d]) / (norm if norm > 0 else 1.0)


@kernel
def encode(bank, codes, norm):
    """Write the codes of a bank, see ``reference.prepare_bank``, and a norm of each row: 0, finite or not."""
    rows, features = bank.shape
    pairs = codes.shape[1]
    for panel in prange(codes.shape[0]):
        first, out = np.int64(panel) * PANEL, codes[panel]
        block = np.zeros((PANEL, 2 * pairs), np.int16)
        for r in range(PANEL):
            norm[first + r] = 0
            if first + r < rows:
                row, length, _ = measured(bank[first + r])
                norm[first + r] = length
                steps, line = STEPS / length if 0 < length < np.inf else 0.0, block[r]
                if steps > 0:
                    for d in range(features):
                        value = np.float64(row[d]) * steps
                        line[d] = np.int32(value + 0.5 if value >= 0 else value - 0.5)
        beside = block.view(np.int32)
        for pair in range(pairs):
            line32 = out[pair]
            for r in range(PANEL):
                line32[r] = beside[r, pair]


@intrinsic
def products(typingctx, codes, panel, asked, tile, bar, product):
    """Write the products of 16 rows of codes and 16 that are asked about, and return for which any is above its bar.

    ``product`` [16 asked, 16 rows], int32; ``bar`` int32, for all that are asked about; → a bit for each of the 16.
    """

    def codegen(context, builder, signature, arguments):
        wide, narrow = ir.VectorType(ir.IntType(16), 2 * PANEL), ir.VectorType(LANE, PANEL)
        sums, step = ir.VectorType(LANE, 2 * PANEL), WORD(4 * PANEL)
        halves = [ir.Constant(narrow, list(range(part, 2 * PANEL, 2))) for part in (0, 1)]
        arrays = {i: context.make_array(signature.args[i])(context, builder, arguments[i]) for i in (0, 2, 4, 5)}
        begin = {i: builder.ptrtoint(array.data, WORD) for i, array in arrays.items()}
        panel, tile = (context.cast(builder, arguments[i], signature.args[i], types.int64) for i in (1, 3))
        pairs = builder.extract_value(arrays[0].shape, 1)
        rows_from = builder.add(begin[0], builder.mul(builder.mul(panel, pairs), step))
        asked_from = builder.add(begin[2], builder.mul(builder.mul(tile, pairs), step))
        bar_from = builder.add(begin[4], builder.mul(tile, step))

        def load(kind: Any, address: Any) -> Any:
            return builder.load(builder.inttoptr(address, kind.as_pointer()), align=2)

        above = LANE(0)
        for group in range(0, PANEL, ABREAST):
            before, body = builder.block, builder.append_basic_block("pair")
            builder.branch(body)
            builder.position_at_end(body)
            pair, totals, grown = builder.phi(WORD), [builder.phi(narrow) for _ in range(ABREAST)], []
            offset = builder.mul(pair, step)
            rows = builder.sext(load(wide, builder.add(rows_from, offset)), sums)
            for i, total in enumerate(totals):
                two = load(LANE, builder.add(builder.add(asked_from, offset), WORD(4 * (group + i))))
                multiplied = builder.mul(rows, builder.sext(builder.bitcast(spread(builder, two, PANEL), wide), sums))
                even, odd = (builder.shuffle_vector(multiplied, multiplied, half) for half in halves)
                grown.append(builder.add(total, builder.add(even, odd)))
            following = builder.add(pair, WORD(1))
            starts = [WORD(0), *[narrow(None)] * ABREAST]
            for phi, start, value in zip([pair, *totals], starts, [following, *grown], strict=True):
                phi.add_incoming(start, before)
                phi.add_incoming(value, body)
            after = builder.append_basic_block("summed")
            builder.cbranch(builder.icmp_signed("<", following, pairs), body, after)
            builder.position_at_end(after)
            for i, value in enumerate(grown, group):
                address = builder.add(begin[5], WORD(4 * PANEL * i))
                builder.store(value, builder.inttoptr(address, narrow.as_pointer()), align=4)
                least = spread(builder, load(LANE, builder.add(bar_from, WORD(4 * i))), PANEL)
                lanes = builder.bitcast(builder.icmp_signed(">", value, least), ir.IntType(PANEL))
                any_lane = builder.zext(builder.icmp_unsigned("!=", lanes, ir.IntType(PANEL)(0)), LANE)
                above = builder.or_(above, builder.shl(any_lane, LANE(i)))
        return above

    return types.int32(codes, panel, asked, tile, bar, product), codegen
