"""Vectors for Numba kernels: parts of rows held in registers, so that a sum over many rows touches memory once.

A loop that adds rows to a row reads and writes that row for each of them; no compiler keeps it in registers, because
its length is not known. A vector here has a length that is: 512 bytes (``wide``), 256 (``half``), or up to 64 at the
end of a row (``tail``). Code written for one fits all three: the type of a vector that is passed along decides.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

WORD, LANE = ir.IntType(64), ir.IntType(32)
# regrouped is only what `dot` adds up: elsewhere a compiled copy of a kernel might not have the bits of another
FLAGS = ("contract", "nsz")


class Vector(types.Type):
    """Some consecutive values of one row; ``partial`` where the row may end before the vector does."""

    def __init__(self, dtype: Any, size: int, partial: bool) -> None:
        self.dtype, self.lanes, self.partial = dtype, size * 8 // dtype.bitwidth, partial
        super().__init__(f"Vector({dtype}, {self.lanes}, {partial})")


@register_model(Vector)
class _Model(models.PrimitiveModel):
    def __init__(self, manager: Any, vector: Vector) -> None:
        real = {types.float32: ir.FloatType(), types.float64: ir.DoubleType()}
        element = real.get(vector.dtype) or ir.IntType(vector.dtype.bitwidth)
        super().__init__(manager, vector, ir.VectorType(element, vector.lanes))


def _zeros(size: int, partial: bool = False) -> Any:
    """Make the function that returns a vector of zeros, of so many bytes, for the values of an array."""

    @intrinsic
    def zeros(typingctx, array):
        vector = Vector(array.dtype, size, partial)

        def codegen(context, builder, signature, arguments):
            return ir.Constant(context.get_value_type(vector), [0.0] * vector.lanes)

        return vector(array), codegen

    return zeros


wide, half, tail = _zeros(512), _zeros(256), _zeros(64, partial=True)


def _address(context: Any, builder: Any, signature: Any, arguments: Any, vector: ir.VectorType) -> tuple[Any, Any]:
    """Return a pointer to ``array[row, at]`` and the number of values from there to the end of the row."""
    array, row, at = arguments
    struct = context.make_array(signature[0])(context, builder, array)
    row, at = (context.cast(builder, t, given, types.int64) for t, given in zip((row, at), signature[1:], strict=True))
    start = builder.add(builder.ptrtoint(struct.data, WORD), builder.mul(row, builder.extract_value(struct.strides, 0)))
    start = builder.add(start, builder.mul(at, WORD(signature[0].dtype.bitwidth // 8)))
    return builder.inttoptr(start, vector.as_pointer()), builder.sub(builder.extract_value(struct.shape, 1), at)


def _mask(builder: Any, left: Any, lanes: int) -> Any:
    """Return which lanes are among the ``left`` first."""
    left = builder.trunc(left, LANE)
    return builder.icmp_signed(
        "<", ir.Constant(ir.VectorType(LANE, lanes), list(range(lanes))), spread(builder, left, lanes)
    )


def spread(builder: Any, value: Any, lanes: int) -> Any:
    """Return a vector of one value."""
    undefined = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
    first = builder.insert_element(undefined, value, LANE(0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(LANE, lanes), [0] * lanes))


@intrinsic
def load(typingctx, like, array, row, at):
    """Return ``array[row, at:]`` of a C-contiguous array [rows, features], as far as a vector ``like`` this reaches."""

    def codegen(context, builder, signature, arguments):
        form, align = context.get_value_type(like), array.dtype.bitwidth // 8
        pointer, left = _address(context, builder, signature.args[1:], arguments[1:], form)
        if not like.partial:
            return builder.load(pointer, align=align)
        mask = _mask(builder, left, like.lanes)
        name = f"llvm.masked.load.v{like.lanes}f{array.dtype.bitwidth}.p0"
        function = ir.FunctionType(form, [pointer.type, LANE, mask.type, form])
        call = cgutils.get_or_insert_function(builder.module, function, name)
        return builder.call(call, [pointer, LANE(align), mask, ir.Constant(form, [0.0] * like.lanes)])

    return like(like, array, row, at), codegen


@intrinsic
def store(typingctx, vector, array, row, at):
    """Write a vector to ``array[row, at:]``, as far as the row reaches."""

    def codegen(context, builder, signature, arguments):
        value, align = arguments[0], array.dtype.bitwidth // 8
        pointer, left = _address(context, builder, signature.args[1:], arguments[1:], value.type)
        if vector.partial:
            mask = _mask(builder, left, vector.lanes)
            name = f"llvm.masked.store.v{vector.lanes}f{array.dtype.bitwidth}.p0"
            function = ir.FunctionType(ir.VoidType(), [value.type, pointer.type, LANE, mask.type])
            call = cgutils.get_or_insert_function(builder.module, function, name)
            builder.call(call, [value, pointer, LANE(align), mask])
        else:
            builder.store(value, pointer, align=align)
        return context.get_dummy_value()

    return types.void(vector, array, row, at), codegen


@intrinsic
def add_scaled(typingctx, total, scale, vector):
    """Return total + scale · vector."""

    def codegen(context, builder, signature, arguments):
        total, scale, vector = arguments
        scale = spread(builder, scale, vector.type.count)
        return builder.fadd(total, builder.fmul(scale, vector, flags=FLAGS), flags=FLAGS)

    return total(total, total.dtype, vector), codegen


@intrinsic
def add(typingctx, one, other):
    """Return the sum of two vectors."""

    def codegen(context, builder, signature, arguments):
        return builder.fadd(*arguments, flags=FLAGS)

    return one(one, other), codegen


@intrinsic
def dot(typingctx, one, other):
    """Return the inner product of two vectors."""

    def codegen(context, builder, signature, arguments):
        product = builder.fmul(*arguments, flags=FLAGS)
        number = product.type.element
        name = f"llvm.vector.reduce.fadd.v{one.lanes}f{one.dtype.bitwidth}"
        call = cgutils.get_or_insert_function(builder.module, ir.FunctionType(number, [number, product.type]), name)
        return builder.call(call, [number(0.0), product], fastmath=("reassoc", *FLAGS))

    return one.dtype(one, other), codegen


@intrinsic
def lanes(typingctx, vector):
    """Return how many values a vector has."""

    def codegen(context, builder, signature, arguments):
        return WORD(vector.lanes)

    return types.int64(vector), codegen
