"""Small floating-point numbers, sixteen at a time: to codes by one addition, and back through half precision."""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir

from service.engine.backends.cpu_kernels.vector import F16, F32, I16, I32, I64, State, Vec, either
from service.engine.schemes.minifloat import E2M1, E4M3, E5M2, MiniFloat

#: Tables of levels as the kernels number them; none is that of the integers.
NO_TABLE, NF4 = 0, 1
ELEMENTS = {2: E2M1, 3: E4M3, 4: E5M2}
#: Bits of a float32: of the mantissa, and what is added to the exponent.
MANTISSA, BIAS = 23, 127
#: By which a number of E4M3 is more than the half that has its bits in the same places.
E4M3_OVER_HALF = 2.0**8
E4M3_NAN = 0x7F


def nearest(t: Vec, element: MiniFloat) -> tuple[Vec, Vec]:
    """Codes next to t, in the low bits of integers, and what they stand for: see `minifloat.round_to`.

    To a magnitude a number is added of which the last bit is worth a step of the codes about there.
    """
    drop = MANTISSA - element.mantissa
    smallest = (BIAS + element.smallest_exponent) << MANTISSA
    pattern = t.cast(I32)
    sign = pattern & pattern.const(-(1 << 31))
    size = t.abs().min(t.const(element.largest))
    exponent = (size.cast(I32) & pattern.const(0x7F800000)).largest(pattern.const(smallest), signed=True)
    adder = exponent.plus(pattern.const((drop << MANTISSA) | (1 << (MANTISSA - 1))))
    sum_ = size + adder.cast(F32)
    value = (sum_ - adder.cast(F32)).cast(I32) | sign
    steps = sum_.cast(I32).minus(adder)
    code = (exponent >> drop).plus(steps).minus(pattern.const(smallest >> drop))
    return code | (sign >> (32 - element.bits)), value.cast(F32)


def number_of(code: Vec, element: MiniFloat) -> Vec:
    """What codes of 32-bit lanes stand for."""
    if element is E2M1:
        return code.look_up(Vec(code.builder, ir.Constant(ir.VectorType(F32, code.type.count), E2M1.table.tolist())))
    if element is E5M2:
        return _half(code << 8)
    magnitude = code & code.const(E4M3_NAN)
    value = _half((magnitude << 7) | ((code & code.const(0x80)) << 8))
    is_number = magnitude.to_float(F32).differs(value.const(float(E4M3_NAN)))
    return is_number.select(value * value.const(E4M3_OVER_HALF), value.const(float("nan")))


def of_element(
    builder: ir.IRBuilder, table: ir.Value, body: Callable[[MiniFloat], State], numbers: tuple[int, ...] = (*ELEMENTS,)
) -> State:
    """`body` for the element that `table` says, as a branch."""
    if len(numbers) == 1:
        return body(ELEMENTS[numbers[0]])
    is_first = builder.icmp_signed("==", table, ir.Constant(I64, numbers[0]))

    def chosen(first: bool) -> State:
        return body(ELEMENTS[numbers[0]]) if first else of_element(builder, table, body, numbers[1:])

    return either(builder, is_first, chosen)


def _half(pattern: Vec) -> Vec:
    return pattern.narrow(I16).cast(F16).widen(F32)
