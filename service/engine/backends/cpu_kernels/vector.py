"""Sixteen lanes at a time: the few vector instructions that the kernels are written in.

Loops that Numba compiles from plain Python vectorise by luck: a minimum, a rounding or a packing
step often stays scalar, at a fifth of the speed. Here a kernel's inner loop is written as vectors
of LANES values, which LLVM maps to whatever the processor has. Nothing is fused or reordered
except where `fma` and `reduce` say so, so codes come out as NumPy's do.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.core.registry import cpu_target
from numba.extending import intrinsic

LANES = 16

F16, F32, F64 = ir.HalfType(), ir.FloatType(), ir.DoubleType()
I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))

State = list["Vec"]


@cache
def processor_has(feature: str) -> bool:
    """Whether code may use these instructions."""
    return f"+{feature}" in cpu_target.target_context.codegen().magic_tuple()[2].split(",")


def call(builder: ir.IRBuilder, name: str, returns: ir.Type, *args: ir.Value) -> ir.Value:
    """The value of an intrinsic of LLVM."""
    function = builder.module.globals.get(name)
    if function is None:
        function = ir.Function(builder.module, ir.FunctionType(returns, [a.type for a in args]), name)
    return builder.call(function, args)


class Vec:
    """A value in the code being emitted, a vector or a scalar; operators emit instructions."""

    __slots__ = ("builder", "value")

    def __init__(self, builder: ir.IRBuilder, value: ir.Value) -> None:
        self.builder = builder
        self.value = value

    @property
    def type(self) -> ir.Type:
        """LLVM type."""
        return self.value.type

    def _new(self, value: ir.Value) -> Vec:
        return Vec(self.builder, value)

    def _call(self, name: str, *args: Vec) -> Vec:
        name = f"llvm.{name}.{_mangled(self.type)}"
        return self._new(call(self.builder, name, self.type, *(a.value for a in args)))

    def __add__(self, other: Vec) -> Vec:
        return self._new(self.builder.fadd(self.value, other.value))

    def __sub__(self, other: Vec) -> Vec:
        return self._new(self.builder.fsub(self.value, other.value))

    def __mul__(self, other: Vec) -> Vec:
        return self._new(self.builder.fmul(self.value, other.value))

    def __truediv__(self, other: Vec) -> Vec:
        return self._new(self.builder.fdiv(self.value, other.value))

    def __or__(self, other: Vec) -> Vec:
        return self._new(self.builder.or_(self.value, other.value))

    def __and__(self, other: Vec) -> Vec:
        return self._new(self.builder.and_(self.value, other.value))

    def xor(self, other: Vec) -> Vec:
        """The bits in which integers differ."""
        return self._new(self.builder.xor(self.value, other.value))

    def __lshift__(self, bits: int) -> Vec:
        return self._new(self.builder.shl(self.value, ir.Constant(self.type, splat(self.type, bits))))

    def __rshift__(self, bits: int) -> Vec:
        return self._new(self.builder.lshr(self.value, ir.Constant(self.type, splat(self.type, bits))))

    def __gt__(self, other: Vec) -> Vec:
        return self._new(self.builder.fcmp_ordered(">", self.value, other.value))

    def __lt__(self, other: Vec) -> Vec:
        return self._new(self.builder.fcmp_ordered("<", self.value, other.value))

    def equals(self, other: Vec) -> Vec:
        """Whether lanes are the same number."""
        return self._new(self.builder.fcmp_ordered("==", self.value, other.value))

    def differs(self, other: Vec) -> Vec:
        """Whether lanes are different numbers."""
        return self._new(self.builder.fcmp_ordered("!=", self.value, other.value))

    def same(self, other: Vec) -> Vec:
        """Whether lanes are the same integer."""
        return self._new(self.builder.icmp_signed("==", self.value, other.value))

    def plus(self, other: Vec) -> Vec:
        """The sum of integers."""
        return self._new(self.builder.add(self.value, other.value))

    def minus(self, other: Vec) -> Vec:
        """The difference of integers."""
        return self._new(self.builder.sub(self.value, other.value))

    def times(self, other: Vec) -> Vec:
        """The product of integers."""
        return self._new(self.builder.mul(self.value, other.value))

    def shift_by(self, bits: Vec) -> Vec:
        """Integers shifted to the left, every lane by its own number of bits."""
        return self._new(self.builder.shl(self.value, bits.value))

    def shift_signed(self, bits: int) -> Vec:
        """Signed integers shifted to the right."""
        return self._new(self.builder.ashr(self.value, self.const(bits).value))

    def select(self, yes: Vec, no: Vec) -> Vec:
        """`yes` where this lane is true, else `no`."""
        return self._new(self.builder.select(self.value, yes.value, no.value))

    def min(self, other: Vec) -> Vec:
        """The smaller; `other` where self is a NaN."""
        return (self < other).select(self, other)

    def max(self, other: Vec) -> Vec:
        """The larger; `other` where self is a NaN."""
        return (self > other).select(self, other)

    def largest(self, other: Vec, *, signed: bool) -> Vec:
        """The larger integer of two."""
        compare = self.builder.icmp_signed if signed else self.builder.icmp_unsigned
        return self._new(compare(">", self.value, other.value)).select(self, other)

    def smallest(self, other: Vec) -> Vec:
        """The smaller signed integer of two."""
        return self._new(self.builder.icmp_signed("<", self.value, other.value)).select(self, other)

    def negative(self) -> Vec:
        """Whether the sign bit of integers is set."""
        return self._new(self.builder.icmp_signed("<", self.value, self.const(0).value))

    def abs(self) -> Vec:
        """Absolute value."""
        return self._call("fabs", self)

    def within(self, bound: Vec) -> Vec:
        """What is farther from 0 than `bound` at that distance; `bound` where self is a NaN."""
        if processor_has("avx512dq"):
            return self._range(self, bound, 0b0010)
        return self.max(self.const(0.0) - bound).min(bound)

    def largest_magnitude(self, other: Vec) -> Vec:
        """The larger of self, which is not negative, and |other|; self where other is a NaN."""
        if processor_has("avx512dq"):
            return self._range(self, other, 0b1011)
        return other.abs().max(self)

    def _range(self, a: Vec, b: Vec, choice: int) -> Vec:
        """One instruction for the smaller or larger magnitude (10 or 11), with the sign of `a` (00) or none (10)."""
        mask, rounding = ir.Constant(ir.IntType(LANES), -1), ir.Constant(I32, 4)
        values = a.value, b.value, ir.Constant(I32, choice), a.value, mask, rounding
        return self._new(call(self.builder, "llvm.x86.avx512.mask.range.ps.512", self.type, *values))

    def rint(self) -> Vec:
        """Nearest integer, half to even."""
        return self._call("nearbyint", self)

    def fma(self, factor: Vec, addend: Vec) -> Vec:
        """self * factor + addend, fused where the processor can: for sums, never for codes."""
        return self._call("fmuladd", self, factor, addend)

    def const(self, value: float) -> Vec:
        """A constant of this value's type."""
        return self._new(ir.Constant(self.type, splat(self.type, value)))

    def cast(self, element: ir.Type) -> Vec:
        """Bits reinterpreted as lanes of `element`, as many as fit."""
        lanes = self.type.count * _width(self.type.element) // _width(element)
        return self._new(self.builder.bitcast(self.value, ir.VectorType(element, lanes)))

    def widen(self, element: ir.Type) -> Vec:
        """Every lane in a wider type of its kind; integers are unsigned."""
        target = ir.VectorType(element, self.type.count)
        emit = self.builder.zext if isinstance(element, ir.IntType) else self.builder.fpext
        return self._new(emit(self.value, target))

    def widen_signed(self, element: ir.IntType) -> Vec:
        """Every lane as a wider signed integer."""
        return self._new(self.builder.sext(self.value, ir.VectorType(element, self.type.count)))

    def narrow(self, element: ir.IntType) -> Vec:
        """The low bits of every integer lane."""
        return self._new(self.builder.trunc(self.value, ir.VectorType(element, self.type.count)))

    def to_single(self) -> Vec:
        """Every float64 lane as the float32 next to it."""
        return self._new(self.builder.fptrunc(self.value, ir.VectorType(F32, self.type.count)))

    def to_int(self, element: ir.IntType) -> Vec:
        """Every float lane as a signed integer; what does not fit becomes anything."""
        return self._new(self.builder.fptosi(self.value, ir.VectorType(element, self.type.count)))

    def to_float(self, element: ir.Type) -> Vec:
        """Every unsigned integer lane as a float."""
        return self._new(self.builder.uitofp(self.value, ir.VectorType(element, self.type.count)))

    def signed_to_float(self, element: ir.Type) -> Vec:
        """Every signed integer lane as a float."""
        return self._new(self.builder.sitofp(self.value, ir.VectorType(element, self.type.count)))

    def lane(self, index: int) -> Vec:
        """One lane, a scalar."""
        return self._new(self.builder.extract_element(self.value, ir.Constant(I32, index)))

    def _bits(self, comparison: str, bound: int) -> Vec:
        kind = ir.IntType(self.type.count)
        bits = self.builder.bitcast(self.value, kind)
        return self._new(self.builder.icmp_signed(comparison, bits, ir.Constant(kind, bound)))

    def all(self) -> Vec:
        """Whether every lane of a comparison is true."""
        return self._bits("==", -1)

    def any(self) -> Vec:
        """Whether some lane of a comparison is true."""
        return self._bits("!=", 0)

    def reduce(self, combine: Callable[[Vec, Vec], Vec]) -> Vec:
        """All lanes folded into one by halves."""
        part = self
        while part.type.count > 1:
            half = part.type.count // 2
            low, high = (part.shuffle(range(i * half, (i + 1) * half)) for i in (0, 1))
            part = combine(low, high)
        return self._new(self.builder.extract_element(part.value, ir.Constant(I32, 0)))

    def shuffle(self, lanes: Sequence[int]) -> Vec:
        """The named lanes, in this order."""
        return self.mixed(self, lanes)

    def mixed(self, other: Vec, lanes: Sequence[int]) -> Vec:
        """The named lanes of self and, counted on, another."""
        mask = ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes))
        return self._new(self.builder.shuffle_vector(self.value, other.value, mask))

    def beside(self, other: Vec) -> Vec:
        """Its lanes, and those of another after them."""
        return self.mixed(other, range(2 * self.type.count))

    def splat(self, lanes: int = LANES) -> Vec:
        """A scalar in every lane."""
        vector = ir.VectorType(self.type, lanes)
        one = self.builder.insert_element(ir.Constant(vector, ir.Undefined), self.value, ir.Constant(I32, 0))
        return self._new(one).shuffle([0] * lanes)

    def look_up(self, table: Vec) -> Vec:
        """The lanes of a table, of LANES or twice as many, that the low bits of integers name."""
        count = table.type.count
        if processor_has("avx512f") and self.type.count == LANES:
            if count == LANES:
                return self._new(
                    call(self.builder, "llvm.x86.avx512.permvar.sf.512", table.type, table.value, self.value)
                )
            low, high = (table.shuffle(range(at, at + LANES)) for at in (0, LANES))
            values = low.value, self.value, high.value
            return self._new(call(self.builder, "llvm.x86.avx512.vpermi2var.ps.512", low.type, *values))
        kind = ir.VectorType(table.type.element, self.type.count)
        out, low = ir.Constant(kind, ir.Undefined), self & self.const(count - 1)
        for i in range(self.type.count):
            lane = ir.Constant(I32, i)
            index = self.builder.extract_element(low.value, lane)
            out = self.builder.insert_element(out, self.builder.extract_element(table.value, index), lane)
        return self._new(out)


def _width(element: ir.Type) -> int:
    return {F16: 16, F32: 32, F64: 64}.get(element) or element.width


def _mangled(kind: ir.Type) -> str:
    lanes, element = (f"v{kind.count}", kind.element) if isinstance(kind, ir.VectorType) else ("", kind)
    return f"{lanes}f{_width(element)}"


def splat(kind: ir.Type, value: float) -> Any:
    """`value` as the argument of an `ir.Constant` of this type."""
    return [value] * kind.count if isinstance(kind, ir.VectorType) else value


def zeros(builder: ir.IRBuilder, element: ir.Type = F32, lanes: int = LANES) -> Vec:
    """A vector of zeros."""
    kind = ir.VectorType(element, lanes)
    return Vec(builder, ir.Constant(kind, splat(kind, 0)))


class Memory:
    """Elements of one type from an address on; vectors need not be aligned."""

    def __init__(self, builder: ir.IRBuilder, address: ir.Value, element: ir.Type) -> None:
        self.builder = builder
        self.element = element
        self.address = builder.inttoptr(address, element.as_pointer()) if address.type == I64 else address

    def _pointer(self, index: ir.Value, kind: ir.Type) -> ir.Value:
        where = self.builder.gep(self.address, [index], source_etype=self.element)
        return self.builder.bitcast(where, kind.as_pointer())

    def load(self, index: ir.Value, lanes: int = LANES) -> Vec:
        """`lanes` elements from `index` on; a scalar for one."""
        kind = ir.VectorType(self.element, lanes) if lanes > 1 else self.element
        return Vec(self.builder, self.builder.load(self._pointer(index, kind), align=1, typ=kind))

    def prefetch(self, index: ir.Value, ahead: int) -> None:
        """Have the cache fetch the line `ahead` bytes after an element; harmless past the end."""
        byte = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, I32, I32, I32])
        module = self.builder.module
        function = module.globals.get("llvm.prefetch.p0") or ir.Function(module, kind, "llvm.prefetch.p0")
        where = self.builder.gep(self._pointer(index, I8), [ir.Constant(I64, ahead)], source_etype=I8)
        read, keep, data = (ir.Constant(I32, n) for n in (0, 3, 1))
        self.builder.call(function, [where, read, keep, data])

    def store(self, index: ir.Value, value: Vec) -> None:
        """Write a vector or scalar from `index` on."""
        self.builder.store(value.value, self._pointer(index, value.type), align=1)

    def stream(self, index: ir.Value, value: Vec) -> None:
        """Write a vector past the cache, which need not fetch what is overwritten; its address is a multiple of 64."""
        store = self.builder.store(value.value, self._pointer(index, value.type), align=64)
        store.set_metadata("nontemporal", self.builder.module.add_metadata([ir.Constant(I32, 1)]))


def loop(
    builder: ir.IRBuilder, stop: ir.Value, step: int | ir.Value, state: State, body: Callable[[ir.Value, State], State]
) -> State:
    """Emit `for i in range(0, stop, step): state = body(i, state)` and return the state after it."""
    before = builder.block
    head, inside, after = (builder.append_basic_block(name) for name in ("head", "inside", "after"))
    builder.branch(head)
    builder.position_at_end(head)
    index = builder.phi(I64)
    index.add_incoming(ir.Constant(I64, 0), before)
    phis = [builder.phi(s.type) for s in state]
    for phi, s in zip(phis, state, strict=True):
        phi.add_incoming(s.value, before)
    builder.cbranch(builder.icmp_signed("<", index, stop), inside, after)
    builder.position_at_end(inside)
    following = body(index, [Vec(builder, phi) for phi in phis])
    stride = ir.Constant(I64, step) if isinstance(step, int) else step
    index.add_incoming(builder.add(index, stride), builder.block)
    for phi, s in zip(phis, following, strict=True):
        phi.add_incoming(s.value, builder.block)
    builder.branch(head)
    builder.position_at_end(after)
    return [Vec(builder, phi) for phi in phis]


def either(
    builder: ir.IRBuilder, condition: ir.Value, body: Callable[[bool], State], likely: bool | None = None
) -> State:
    """Emit `body(True) if condition else body(False)` as a branch, and return what the one taken gives."""
    with builder.if_else(condition, likely=likely) as (then, otherwise):
        with then:
            found, last = body(True), builder.block
        with otherwise:
            others, other_last = body(False), builder.block
    merged = []
    for value, other in zip(found, others, strict=True):
        phi = builder.phi(value.type)
        phi.add_incoming(value.value, last)
        phi.add_incoming(other.value, other_last)
        merged.append(Vec(builder, phi))
    return merged


Emitter = Callable[..., "Vec | tuple[Vec, ...] | None"]


def emitted(returns: types.Type, *parameters: types.Type) -> Callable[[Emitter], Any]:
    """Make a function that Numba code calls from `emit(builder, *values)`.

    Addresses are `types.intp`. Numba converts the arguments to `parameters`.
    """

    def decorate(emit: Emitter) -> Any:
        signature = returns(*parameters)

        def codegen(context: Any, builder: ir.IRBuilder, _: Any, args: Sequence[ir.Value]) -> ir.Value:
            result = emit(builder, *args)
            if result is None:
                return context.get_dummy_value()
            if isinstance(result, tuple):
                return context.make_tuple(builder, returns, [r.value for r in result])
            return result.value

        def typing(_context: Any, *_types: types.Type) -> Any:
            return signature, codegen

        # Numba asks a function for its parameters by name.
        typing.__signature__ = inspect.signature(emit)  # type: ignore[attr-defined]
        typing.__name__ = emit.__name__
        return intrinsic(typing)

    return decorate
