"""What sorting and comparing need of vectors: integers in the order of floating-point numbers, counts, distances."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from perturbcore.kernels.common.vector_numba_cpu import Vector, spread


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
