"""Sorting networks over rows of keys: every lane of a row is a column of its own, a comparator a vector min and max.

A row of keys is 64 bytes, of int32 or int64. Columns are sorted in place, as they lie: nothing is transposed and
nothing depends on the data. Runs of 16 rows are sorted by Batcher's odd-even network, then merged by the bitonic one in
the form whose comparators all send the larger key down: rows that would fill up the last run are larger than any key,
never move, and are passed over. A pass holds up to 16 rows in registers, for four stages of comparators.
Source: Batcher, AFIPS 1968.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from perturbcore.kernels.common.numba_cpu import LINE, inner

RUN = 16  # rows
CHUNK = 256  # rows that are sorted before others are looked at: half of what the first cache holds
WORD = ir.IntType(64)

Comparators = list[tuple[int, int]]


def odd_even(size: int) -> Comparators:
    """Return Batcher's odd-even merge sort, whose comparators (i, j), i < j, leave the smaller key at i."""
    pairs, p = [], 1
    while p < size:
        k = p
        while k:
            for start in range(k % p, size - k, 2 * k):
                pairs += [
                    (i, i + k) for i in range(start, min(start + k, size - k)) if i // (2 * p) == (i + k) // (2 * p)
                ]
            k //= 2
        p *= 2
    return pairs


def half_cleaners(size: int) -> Comparators:
    """Return the stages of a bitonic merge, at distances size / 2, size / 4, … 1."""
    distances = [size >> s for s in range(1, size.bit_length())]
    return [(i, i + d) for d in distances for i in range(size) if not i & d]


def mirrored(size: int) -> Comparators:
    """Return the stages that merge two sorted halves: the first compares with the mirror image."""
    return [(i, size - 1 - i) for i in range(size // 2)] + half_cleaners(size)[size // 2 :]


def _network(name: str, size: int, comparators: Comparators, two_ended: bool) -> Any:
    """Make the function that applies comparators to ``size`` rows of ``keys``.

    They are the rows ``first``, ``first + step``, …; where ``two_ended``, the second half of them ends with ``last``.
    It is not inlined, which would compile it anew for every caller.
    """

    def define(module, bits):
        vector = ir.VectorType(ir.IntType(bits), 512 // bits)
        function = ir.Function(module, ir.FunctionType(ir.VoidType(), [WORD] * 4), f"perturbcore_{name}_{bits}")
        function.linkage = "linkonce_odr"
        function.attributes.add("noinline")
        function.attributes.add("nounwind")
        builder = ir.IRBuilder(function.append_basic_block())
        base, first, last, step = function.args
        starts = [(first, i) for i in range(size)]
        if two_ended:
            starts[size // 2 :] = [(last, i - size + 1) for i in range(size // 2, size)]
        pointers = []
        for start, steps in starts:
            row = builder.add(start, builder.mul(step, WORD(steps)))
            pointers.append(builder.inttoptr(builder.add(base, builder.mul(row, WORD(LINE))), vector.as_pointer()))
        rows = [builder.load(pointer, align=bits // 8) for pointer in pointers]
        for i, j in comparators:
            less = builder.icmp_signed("<", rows[i], rows[j])
            rows[i], rows[j] = builder.select(less, rows[i], rows[j]), builder.select(less, rows[j], rows[i])
        for row, pointer in zip(rows, pointers, strict=True):
            builder.store(row, pointer, align=bits // 8)
        builder.ret_void()
        return function

    @intrinsic
    def apply(typingctx, keys, first, last, step):
        def codegen(context, builder, signature, arguments):
            base = builder.ptrtoint(context.make_array(keys)(context, builder, arguments[0]).data, WORD)
            numbers = [
                context.cast(builder, number, given, types.int64)
                for number, given in zip(arguments[1:], signature.args[1:], strict=True)
            ]
            bits = keys.dtype.bitwidth
            function = builder.module.globals.get(f"perturbcore_{name}_{bits}") or define(builder.module, bits)
            builder.call(function, [base, *numbers])
            return context.get_dummy_value()

        return types.void(keys, first, last, step), codegen

    return apply


sort16 = _network("sort16", RUN, odd_even(RUN), False)
clean2, clean4, clean8, clean16 = (_network(f"clean{size}", size, half_cleaners(size), False) for size in (2, 4, 8, 16))
mirror8, mirror16 = (_network(f"mirror{size}", size, mirrored(size), True) for size in (8, 16))


@inner
def _stages(left):
    """Return how many of the stages that are left the next pass does, so that passes are few and none is small."""
    if left % 3 == 1 or (left >= 8 and left % 3 == 2):
        return 4
    return min(left, 3)


@inner
def _merge(keys, begin, end, rows, size):
    """Merge the sorted halves of every ``size`` rows from ``begin`` to ``end``; those from ``rows`` on are empty."""
    left = 0
    while 1 << left < size:
        left += 1
    stages = _stages(left)
    step = size >> stages
    for start in range(begin, min(end, rows), size):
        for t in range(max(0, start + size // 2 + step - rows), step):
            if stages == 4:
                mirror16(keys, start + t, start + size - 1 - t, step)
            else:
                mirror8(keys, start + t, start + size - 1 - t, step)
    left -= stages
    while left > 0:
        stages, size = _stages(left), 1 << left
        step = size >> stages
        for start in range(begin, min(end, rows), size):
            for t in range(start, start + min(step, rows - start - step)):
                if stages == 4:
                    clean16(keys, t, 0, step)
                elif stages == 3:
                    clean8(keys, t, 0, step)
                elif stages == 2:
                    clean4(keys, t, 0, step)
                else:
                    clean2(keys, t, 0, step)
        left -= stages


@inner
def padded(rows):
    """Return how many rows ``sort_keys`` works on: a power of two, RUN at least."""
    size = RUN
    while size < rows:
        size *= 2
    return size


@inner
def sort_keys(keys, rows):
    """Sort every lane of the first ``rows`` rows of ``keys``; those up to ``padded(rows)`` are overwritten."""
    size = padded(rows)
    largest = keys.dtype.type(2 ** (8 * keys.itemsize - 1) - 1)
    for i in range(rows, size):
        for lane in range(keys.shape[1]):
            keys[i, lane] = largest
    chunk = min(size, CHUNK)
    for begin in range(0, size, chunk):
        end = begin + chunk
        for start in range(begin, min(end, rows), RUN):
            sort16(keys, start, 0, 1)
        run = 2 * RUN
        while run <= size and end % run == 0:
            _merge(keys, min(begin, end - run), end, rows, run)
            run *= 2
