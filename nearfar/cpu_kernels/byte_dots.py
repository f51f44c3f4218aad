"""Sums of four products of bytes, in the instructions that this CPU has for them.

Every lane adds the products of its four unsigned bytes, which stay below 16, with four signed ones.
Without such an instruction the bytes are unpacked. Where an instruction adds pairs of products in
16 bits, sums stay in 16 bits for some steps: widening takes as long as a step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from llvmlite import ir

from nearfar.cpu_kernels.compile import cpu_features
from nearfar.cpu_kernels.vectors import INT8, INT16, INT32, INTS, LANES, Emitter, ints

NARROW_LEVELS = 127  # a sum of so many, twice and times 128, is below 2^15
_BYTES = ir.VectorType(INT8, 4 * LANES)
_SHORTS = ir.VectorType(INT16, 2 * LANES)


class ByteDots(NamedTuple):
    """A way to do it: (emitter, sums, bytes, signed bytes), vectors of int32 -> new sums.

    With ``widen`` (emitter, sums, narrow sums) -> new sums, ``add`` is of narrow sums, as bits of
    int32, until the largest bytes of the steps add up to NARROW_LEVELS.
    """

    name: str
    add: Callable[[Emitter, ir.Value, ir.Value, ir.Value], ir.Value]
    widen: Callable[[Emitter, ir.Value, ir.Value], ir.Value] | None = None


def _vnni(emit: Emitter, sums: ir.Value, low: ir.Value, signed: ir.Value) -> ir.Value:
    return emit.call(f"llvm.x86.avx512.vpdpbusd.{32 * LANES}", INTS, sums, low, signed)


def _pairs(emit: Emitter, sums: ir.Value, low: ir.Value, signed: ir.Value) -> ir.Value:
    name = "avx2.pmadd.ub.sw" if LANES == 8 else "avx512.pmaddubs.w.512"
    b = emit.builder
    both = b.bitcast(low, _BYTES), b.bitcast(signed, _BYTES)
    products = emit.call(f"llvm.x86.{name}", _SHORTS, *both)
    return b.bitcast(b.add(b.bitcast(sums, _SHORTS), products), INTS)


def _widen_pairs(emit: Emitter, sums: ir.Value, narrow: ir.Value) -> ir.Value:
    name = "avx2.pmadd.wd" if LANES == 8 else "avx512.pmaddw.d.512"
    b, ones = emit.builder, ir.Constant(_SHORTS, [1] * 2 * LANES)
    return b.add(sums, emit.call(f"llvm.x86.{name}", INTS, b.bitcast(narrow, _SHORTS), ones))


def _neon(emit: Emitter, sums: ir.Value, low: ir.Value, signed: ir.Value) -> ir.Value:
    b, four, sixteen = emit.builder, ir.VectorType(INT32, 4), ir.VectorType(INT8, 16)
    parts = []
    for first in range(0, LANES, 4):
        lanes = range(first, first + 4)
        own, left, right = (emit.shuffle(x, x, lanes) for x in (sums, low, signed))
        left, right = b.bitcast(left, sixteen), b.bitcast(right, sixteen)
        parts.append(emit.call("llvm.aarch64.neon.sdot.v4i32.v16i8", four, own, left, right))
    return emit.shuffle(parts[0], parts[1], range(8))


def _plain(emit: Emitter, sums: ir.Value, low: ir.Value, signed: ir.Value) -> ir.Value:
    b = emit.builder
    for byte in range(4):
        level = b.and_(b.lshr(low, ints(8 * byte)), ints(0xFF))
        factor = b.ashr(b.shl(signed, ints(24 - 8 * byte)), ints(24))
        sums = b.add(sums, b.mul(level, factor))
    return sums


def _choose(features: frozenset[str]) -> ByteDots:
    if "avx512vnni" in features and ("avx512f" in features or "avx512vl" in features):
        return ByteDots("avx512vnni", _vnni)
    if "avx512bw" in features if LANES == 16 else "avx2" in features:
        return ByteDots("pmaddubsw", _pairs, _widen_pairs)
    if "dotprod" in features and LANES == 8:
        return ByteDots("sdot", _neon)
    return ByteDots("plain", _plain)


BYTE_DOTS = _choose(cpu_features())
