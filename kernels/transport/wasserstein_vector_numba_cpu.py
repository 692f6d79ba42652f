"""What sorting and comparing need of vectors: integers in the order of floating-point numbers, counts, distances."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from perturbcore.kernels.common.vector_numba_cpu import Vector, spread

AHEAD = 32  # rows to ``fetch`` before they are needed: they lie pages apart, where no hardware looks ahead


def _integers(vector: Vector) -> Vector:
    return Vector(types.Integer.from_bitwidth(vector.dtype.bitwidth, signed=True), 64, False)


def _alike(vector: ir.VectorType, value: Any) -> ir.Constant:
    return ir.Constant(vector, [value] * vector.count)


def _in_order(builder: Any, bits: Any) -> Any:
    """Flip the lower bits of negative numbers: the bits of floats, read as integers, then rise with the floats."""
    width = bits.type.element.width
    sign = builder.ashr(bits, _alike(bits.type, width - 1))
    return builder.xor(bits, builder.and_(sign, _alike(bits.type, 2 ** (width - 1) - 1)))


@intrinsic
def keys_of(typingctx, vector):
    """Return integers in the order of the values: both zeros are 0, and NaN, whatever its sign, is above all."""
    keys = _integers(vector)

    def codegen(context, builder, signature, arguments):
        (value,), form = arguments, context.get_value_type(keys)
        order = _in_order(builder, builder.bitcast(value, form))
        minus_zero = builder.icmp_signed("==", order, _alike(form, -1))  # fast mathematics would drop a sum with 0
        order = builder.select(minus_zero, _alike(form, 0), order)
        quiet = (0x7FC << (form.element.width - 12)) if form.element.width == 32 else (0x7FF8 << 48)
        return builder.select(builder.fcmp_unordered("uno", value, value), _alike(form, quiet), order)

    return keys(vector), codegen


@intrinsic
def values_of(typingctx, keys, like):
    """Return the values of which these are the keys, as a vector ``like`` this."""

    def codegen(context, builder, signature, arguments):
        return builder.bitcast(_in_order(builder, arguments[0]), arguments[1].type)

    return like(keys, like), codegen


@intrinsic
def no_keys(typingctx, like):
    """Return a vector of zeros for the keys of a vector ``like`` this."""
    keys = _integers(like)

    def codegen(context, builder, signature, arguments):
        return _alike(context.get_value_type(keys), 0)

    return keys(like), codegen


@intrinsic
def fetch(typingctx, array, row, at):
    """Bring 64 bytes from ``array[row, at]`` on towards the first cache; any place is harmless."""

    def codegen(context, builder, signature, arguments):
        struct, word, byte = context.make_array(array)(context, builder, arguments[0]), ir.IntType(64), ir.IntType(8)
        row, at = (
            context.cast(builder, t, k, types.int64) for t, k in zip(arguments[1:], (row_type, at_type), strict=True)
        )
        start = builder.add(
            builder.ptrtoint(struct.data, word), builder.mul(row, builder.extract_value(struct.strides, 0))
        )
        start = builder.add(start, builder.mul(at, word(array.dtype.bitwidth // 8)))
        flag, pointer = ir.IntType(32), byte.as_pointer()
        function = builder.module.declare_intrinsic(
            "llvm.prefetch", [pointer], ir.FunctionType(ir.VoidType(), [pointer, *[flag] * 3])
        )
        for offset in (0, 63):  # they may lie on two lines
            address = builder.inttoptr(builder.add(start, word(offset)), pointer)
            builder.call(function, [address, flag(0), flag(3), flag(1)])
        return context.get_dummy_value()

    row_type, at_type = row, at
    return types.void(array, row, at), codegen


def _counter(relation: str) -> Any:
    @intrinsic
    def count(typingctx, counts, keys):
        def codegen(context, builder, signature, arguments):
            counts, keys = arguments
            holds = builder.icmp_signed(relation, keys, _alike(keys.type, 0))
            return builder.sub(counts, builder.sext(holds, counts.type))

        return counts(counts, keys), codegen

    return count


count_negative, count_positive = _counter("<"), _counter(">")


@intrinsic
def largest(typingctx, counts):
    """Return the largest of a vector of integers."""

    def codegen(context, builder, signature, arguments):
        form = arguments[0].type
        name = f"llvm.vector.reduce.smax.v{form.count}i{form.element.width}"
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(form.element, [form]), name)
        return (
            builder.sext(builder.call(function, arguments), ir.IntType(64))
            if form.element.width < 64
            else (builder.call(function, arguments))
        )

    return types.int64(counts), codegen


def _arithmetic(operation: str) -> Any:
    @intrinsic
    def combine(typingctx, one, other):
        def codegen(context, builder, signature, arguments):
            return getattr(builder, operation)(*arguments)

        return one(one, other), codegen

    return combine


subtract, multiply = _arithmetic("fsub"), _arithmetic("fmul")


@intrinsic
def absolute(typingctx, vector):
    """Return the absolute values."""

    def codegen(context, builder, signature, arguments):
        form = arguments[0].type
        name = f"llvm.fabs.v{form.count}f{vector.dtype.bitwidth}"
        return builder.call(
            cgutils.get_or_insert_function(builder.module, ir.FunctionType(form, [form]), name), arguments
        )

    return vector(vector), codegen


@intrinsic
def scaled(typingctx, vector, number):
    """Return the values times one number."""

    def codegen(context, builder, signature, arguments):
        return builder.fmul(arguments[0], spread(builder, arguments[1], arguments[0].type.count))

    return vector(vector, vector.dtype), codegen


@intrinsic
def power(typingctx, vector, exponent):
    """Return each value to the power of one exponent."""

    def codegen(context, builder, signature, arguments):
        form = arguments[0].type
        name = f"llvm.pow.v{form.count}f{vector.dtype.bitwidth}"
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(form, [form, form]), name)
        return builder.call(function, [arguments[0], spread(builder, arguments[1], form.count)])

    return vector(vector, vector.dtype), codegen


@intrinsic
def sign(typingctx, vector):
    """Return 1, 0 or −1 for each value, and 0 for NaN."""

    def codegen(context, builder, signature, arguments):
        (value,) = arguments
        zero = _alike(value.type, 0.0)
        negative = builder.select(builder.fcmp_ordered("<", value, zero), _alike(value.type, -1.0), zero)
        return builder.select(builder.fcmp_ordered(">", value, zero), _alike(value.type, 1.0), negative)

    return vector(vector), codegen


def _halves(size: int) -> list[list[int]]:
    return [list(range(size // 2)), list(range(size // 2, size))]


@intrinsic
def store_pairs(typingctx, keys, row, pairs):
    """Write keys of 32 bits to ``pairs[:, row]``, [2, rows, 8] of int64: above the row, half of the lanes each."""

    def codegen(context, builder, signature, arguments):
        value, row, array = arguments
        row = context.cast(builder, row, signature.args[1], types.int64)
        half = ir.VectorType(ir.IntType(64), keys.lanes // 2)
        for part, lanes in enumerate(_halves(keys.lanes)):
            mask = ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), lanes)
            key = builder.sext(builder.shuffle_vector(value, value, mask), half)
            pair = builder.or_(builder.shl(key, _alike(half, 32)), spread(builder, row, half.count))
            builder.store(pair, _part(context, builder, pairs, array, part, row, half), align=8)
        return context.get_dummy_value()

    return types.void(keys, row, pairs), codegen


@intrinsic
def split_pairs(typingctx, pairs, row, keys, rows):
    """Write the keys and rows of ``pairs[:, row]`` to ``keys[row]`` and ``rows[row]``, int32 both."""

    def codegen(context, builder, signature, arguments):
        array, row = arguments[0], context.cast(builder, arguments[1], signature.args[1], types.int64)
        half = ir.VectorType(ir.IntType(64), pairs.dtype.bitwidth // 8)
        short = ir.VectorType(ir.IntType(32), half.count)
        both = ir.Constant(ir.VectorType(ir.IntType(32), 2 * half.count), list(range(2 * half.count)))
        halves = [builder.load(_part(context, builder, pairs, array, i, row, half), align=8) for i in range(2)]
        above = [builder.trunc(builder.lshr(pair, _alike(half, 32)), short) for pair in halves]
        below = [builder.trunc(pair, short) for pair in halves]
        for kind, out, parts in ((keys, arguments[2], above), (rows, arguments[3], below)):
            struct = context.make_array(kind)(context, builder, out)
            start = builder.add(builder.ptrtoint(struct.data, ir.IntType(64)), builder.mul(row, ir.IntType(64)(64)))
            whole = builder.shuffle_vector(parts[0], parts[1], both)
            builder.store(whole, builder.inttoptr(start, whole.type.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(pairs, row, keys, rows), codegen


def _part(context: Any, builder: Any, kind: Any, array: Any, part: int, row: Any, form: ir.VectorType) -> Any:
    """Return a pointer to ``array[part, row]`` of an array [2, rows, 8] of int64."""
    struct = context.make_array(kind)(context, builder, array)
    start = builder.add(builder.ptrtoint(struct.data, ir.IntType(64)), builder.mul(row, ir.IntType(64)(64)))
    offset = builder.mul(builder.extract_value(struct.strides, 0), ir.IntType(64)(part))
    return builder.inttoptr(builder.add(start, offset), form.as_pointer())
