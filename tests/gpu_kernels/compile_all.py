"""Compiles every GPU kernel for a GPU that need not be here: `python compile_all.py 80`.

Run in a process of its own, because the tests' process interprets kernels. Prints a line for each
kernel that does not compile, or that keeps registers in memory.
"""

from __future__ import annotations

import sys
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nearfar.gpu_kernels import (
    code_scores,
    coded_keys,
    decode_attention,
    embed,
    fetch_attention,
    hash_codes,
    key_weights,
    matvec,
    merge,
    place_tokens,
    prefill_attention,
    rotated_query_planes,
    stamp,
    weighted_draw,
)

F32, F16, BF16 = "*fp32", "*fp16", "*bf16"
I8, U8, I16, I32, I64 = "*i8", "*u8", "*i16", "*i32", "*i64"
INT, LONG, REAL = "i32", "i64", "fp32"
TABLE = {"addresses": I64, "head_strides": I64, "lengths": I32}
Kernel = tuple[Any, dict[str, str], dict[str, Any], int]


def attention() -> list[Kernel]:
    parts = {"out": F32, "lse": F32}
    decode = {"query": BF16, **TABLE, **parts, "scale": REAL}
    sizes = {"Hkv": 8, "G": 4, "D": 128, "S": 4, "SPLITS": 4, "FIRST": 0}
    sizes |= {"ROW_TYPE": tl.bfloat16}
    prompt = dict.fromkeys(("queries", "keys", "values", "out"), BF16) | {"lse": F32}
    prompt |= dict.fromkeys(("T", "N"), INT) | {"scale": REAL}
    strides = [f"{name}_{kind}" for name in "qkvo" for kind in ("head_stride", "stride")]
    prompt |= dict.fromkeys(strides, LONG)
    merged = {"near_out": F32, "near_lse": F32, "far_out": F32, "far_lse": F32, "out": BF16}
    pair = {"out": BF16, "lse": F32, "other": BF16, "other_lse": F32, "T": INT}
    pair |= dict.fromkeys(("out_head_stride", "out_stride", "other_head_stride"), LONG)
    pair |= dict.fromkeys(("other_stride", "lse_stride", "other_lse_stride"), LONG)
    blocks = {"G": 4, "D": 128, "DIMS": 128, "BLOCK_T": 128, "BLOCK_N": 64}
    return [
        (decode_attention._attend, decode, sizes | {"HEADS": 16, "DIMS": 128, "BLOCK": 64}, 4),
        (prefill_attention._attend, prompt, blocks | {"CAUSAL": True}, 8),
        (merge._merge, merged, _merged(near=4, far=2), 4),
        (merge._merge, merged, _merged(near=33, far=0), 4),
        (merge._merge_pair, pair, {"D": 128, "DIMS": 128, "BLOCK": 32}, 4),
    ]


def _merged(near: int, far: int) -> dict[str, int]:
    up = {1: 1, 2: 2, 4: 4, 33: 64, 0: 0}
    sizes = {"D": 128, "S": near, "F": far, "Gr": 4, "DIMS": 128}
    return sizes | {"NEAR": up[near], "FAR": up[far]}


def sketch(bits: int) -> list[Kernel]:
    P = 8 // bits
    W = max(16, 128 // P)
    C = max(32, W)
    write = {"keys": BF16, "mean": F32, "rotation": F32, "codes": U8, "factors": F16}
    write |= {"n": INT, "first": INT, "key_head_stride": LONG, "key_stride": LONG}
    write |= {"code_head_stride": LONG, "factor_head_stride": LONG, "width": REAL}
    written = {"D": 128, "DIMS": 128, "W": W, "BITS": bits, "P": P, "COLUMNS": W, "BLOCK": 64}
    turn = {"query": F32, "rotation": F32, "planes": I8, "sums": F32, "middle": REAL, "full": REAL}
    turned = {"G": 4, "D": 128, "DIMS": 128, "P": P, "C": C, "HEADS": 4}
    score = {"planes": I8, "sums": F32, "lengths": I32, "scores": F16, "peaks": F32}
    score |= {
        f"{name}_{kind}": I64 for name in ("code", "factor") for kind in ("addresses", "strides")
    }
    score |= {"capacity": INT, "segments": INT, "temper": REAL}
    scored = {"Hkv": 8, "G": 4, "W": W, "C": C, "P": P, "HEADS": 4, "SEGMENT": 1024}
    scored |= {"BLOCK": 128, "FOLD": 4, "STAGES": 3, "INTERPRETED": False}
    return [
        (coded_keys._write, write, written | {"PRECISION": "tf32"}, 4),
        (rotated_query_planes._turn, turn, turned, 4),
        (code_scores._score, score, scored, 2),
    ]


def drawing(segment: int) -> list[Kernel]:
    law = {"budget_curve": I64, "lengths": I32, "wanted": I32, "weights": F32}
    sizes = {"capacity": INT, "segments": INT}
    units = {"CURVE_POINTS": 16, "UNIT": 2.0**-32, "SHARE": 1, "ROWS": 8, "SEGMENT": segment}
    weigh = law | sizes | {"scores": F16, "peaks": F32, "temper": REAL}
    weighed = units | {"G": 4, "TILE": min(segment, 2048), "PEAKS": 128, "HEADS": 4}
    weighed |= {"INTERPRETED": False}
    draw = law | sizes | {"steps": I32, "seed": INT, "layer": INT, "chosen": I64, "counts": I32}
    draw |= {"readable_tokens": I32, "fetching": I32, "fetched": I64, "fetched_counts": I32}
    drawn = units | {"ROOM": segment // 2, "SHARE_UNIT": 256}
    return [
        (key_weights._weigh, weigh, weighed, 4 if segment <= 1024 else 8),
        (weighted_draw._draw, draw, drawn, 4 if segment <= 2048 else 8),
    ]


def fetching(stored: Any, scale_bits: int) -> Kernel:
    attend = {"query": BF16, **TABLE, "fetched": I64, "counts": I32, "out": F32, "lse": F32}
    attend |= {"scale": REAL, "segments": INT}
    sizes = {"ROWS": 8, "Hq": 32, "Hkv": 8, "D": 128, "S": 16, "FIRST": 1, "SEGMENT": 1024}
    sizes |= {"ROOM": 512, "RUN": 16, "ROW_TYPE": stored, "MATH_TYPE": tl.bfloat16}
    sizes |= {"SCALE_BITS": scale_bits, "HEADS": 16, "DIMS": 128, "BLOCK": 32}
    return fetch_attention._attend, attend, sizes, 4


def others() -> list[Kernel]:
    hashed = {"keys": BF16, "centre": F32, "planes": F32, "codes": I16, "n": INT, "tables": INT}
    hashed |= {"key_head_stride": LONG, "key_stride": LONG}
    hashing = {"D": 128, "DIMS": 128, "BITS": 10, "COLUMNS": 16, "BLOCK": 64}
    linear = dict.fromkeys(("x", "weight", "bias", "norm", "out"), BF16) | {"N": INT, "eps": REAL}
    forms = {"NORM": True, "BIAS": False, "GATED": True, "ADD": False, "WHOLE": True}
    gated = {"K": 4096, "BLOCK_N": 1, "BLOCK_K": 1024} | forms
    odd = {"K": 75, "BLOCK_N": 64, "BLOCK_K": 128} | dict.fromkeys(forms, False)
    place = dict.fromkeys(("qkv", "q_norm", "k_norm", "query"), BF16)
    place |= dict.fromkeys(("cos", "sin", "asked", "told"), F32)
    place |= {"addresses": I64, "head_strides": I64, "slots": I32}
    place |= {"T": INT, "scale": REAL, "eps": REAL}
    heads = {"Hq": 32, "Hkv": 8, "D": 128, "HALF": 64, "ROW_TYPE": tl.bfloat16, "NORM": True}
    one = heads | {"BLOCK": 1, "EACH": True, "ASKED": True, "TOLD": True}
    many = heads | {"BLOCK": 32, "EACH": False, "ASKED": False, "TOLD": False}
    return [
        (hash_codes._hash, hashed, hashing, 4),
        (matvec._matvec, linear, gated, 8),
        (matvec._matvec, linear, odd, 4),
        (matvec._gate, {"gate_up": BF16, "out": BF16, "N": INT}, {"BLOCK": 1024}, 4),
        (place_tokens._place, place, one, 1),
        (place_tokens._place, place, many, 4),
        (embed._embed, {"table": BF16, "indices": I32, "out": BF16, "H": INT}, {"BLOCK": 1024}, 4),
        (stamp._stamp, {"times": I64, "slot": INT}, {}, 4),
    ]


def compiled(kernel: Kernel, capability: int) -> Any:
    function, signature, constants, warps = kernel
    names = list(function.arg_names)
    types = {name: "constexpr" if name in constants else signature[name] for name in names}
    fixed = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=function, signature=types, constexprs=fixed)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_warps": warps})


def main() -> None:
    capability = int(sys.argv[1])
    kernels = [*attention(), *others(), fetching(tl.bfloat16, 0), fetching(tl.int8, 16)]
    kernels += [k for bits in (1, 2, 4) for k in sketch(bits)]
    kernels += [k for segment in (1024, 4096) for k in drawing(segment)]
    for kernel in kernels:
        name = f"{kernel[0].__module__}.{kernel[0].__name__}"
        try:
            compiled(kernel, capability)
        except Exception as error:
            sys.stdout.write(f"{name}: {str(error)[-500:]}\n")
    sys.stdout.write(f"{len(kernels)} kernels\n")


if __name__ == "__main__":
    main()
