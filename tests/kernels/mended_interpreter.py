"""Makes Triton's interpreter trustworthy in bfloat16, whose products and sums it computes on raw bits.

``tests/conftest.py`` calls ``mend`` where TRITON_INTERPRET=1 is set. Every operation on bfloat16 is done in float32 and
rounded to nearest even, as a GPU does.
"""

from __future__ import annotations

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

TensorHandle, Builder = interpreter.TensorHandle, interpreter.InterpreterBuilder
COMPARISONS = {np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal}


def widen(bits):
    """float32 of bfloat16 kept as uint16."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values):
    """uint16 bits of the bfloat16 nearest to float32 ``values``, ties to even, NaN kept."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded).reshape(values.shape)


def is_bfloat16(handle):
    return handle.dtype.scalar == tl.bfloat16


def up(handle):
    return TensorHandle(widen(handle.data), tl.float32) if is_bfloat16(handle) else handle


def mend():
    """Replace the operations of the interpreter that read bfloat16."""
    dot, cast, convert = Builder.create_dot, Builder.cast_impl, Builder.create_fp_to_fp
    binary, unary = Builder.binary_op, Builder.unary_op

    def create_dot(self, a, b, d, *rest):
        return dot(self, up(a), up(b), d, *rest)

    def cast_impl(self, source, to):
        if is_bfloat16(source) and to.scalar != tl.bfloat16:
            return up(source) if to.scalar == tl.float32 else cast(self, up(source), to)
        if to.scalar == tl.bfloat16 and not is_bfloat16(source):
            return TensorHandle(narrow(source.data.astype(np.float32)), tl.bfloat16)
        return cast(self, source, to)

    def create_fp_to_fp(self, source, to, mode):
        pair = (source.dtype.scalar, to.scalar)
        if tl.bfloat16 in pair and all(t.primitive_bitwidth > 8 for t in pair):
            return cast_impl(self, source, to)
        return convert(self, source, to, mode)

    def binary_op(self, left, right, op):
        if not (is_bfloat16(left) and is_bfloat16(right)):
            return binary(self, left, right, op)
        result = binary(self, up(left), up(right), op)
        if op in COMPARISONS or result.data.dtype == np.bool_:
            return result
        return TensorHandle(narrow(result.data), tl.bfloat16)

    def unary_op(self, value, op):
        if is_bfloat16(value):
            return TensorHandle(narrow(unary(self, up(value), op).data), tl.bfloat16)
        return unary(self, value, op)

    def erf(self, value):  # a thousand times as fast as its element by element
        result = torch.erf(torch.from_numpy(np.ascontiguousarray(value.data))).numpy()
        return TensorHandle(result, value.dtype.scalar)

    Builder.create_dot, Builder.cast_impl, Builder.create_fp_to_fp = create_dot, cast_impl, create_fp_to_fp
    Builder.binary_op, Builder.unary_op, Builder.create_erf = binary_op, unary_op, erf
    for name in ("si_to_fp", "ui_to_fp", "fp_to_si", "fp_to_ui", "fp_ext", "fp_trunc"):
        setattr(Builder, f"create_{name}", cast_impl)
