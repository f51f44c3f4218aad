"""The measured peak memory of contexts beside the memory plan.

    python benchmarks/memory_peaks.py --tokens 8192 --policies sketch h2o --formats bfloat16 kivi-2

Each policy and format has a process of its own, with random weights. It first reads, asks and
decodes a short context, so that kernels are compiled and libraries are loaded. Then the system
counts the peak resident memory of three phases, less the resident memory before them: *read* a
context, *ask* a question after it and decode an answer, and *extend* it by a quarter. Freed memory
is returned to the system at once (MALLOC_MMAP_THRESHOLD_) and huge pages are off, so that only
memory in use is counted. Weights are loaded before and are not in the plans. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

KIB = 2**10
QUESTION_TOKENS, ANSWER_TOKENS = 64, 8
MAPPED_BYTES = 65536  # larger allocations are mapped, and returned when they are freed
THP_DISABLE = 41  # of prctl
CHILD_SECONDS = 900
SHAPE = {"layers": 4, "hidden": 256, "inner": 512, "heads": 4, "kv_heads": 2, "head_dim": 64}
SPECS = {"less": "less:maps=random", "lococo": "lococo:maps=random"}  # maps fit no random weights


def main() -> None:
    """Measure in new processes and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--dtype", default="float32", help="of weights and near rows")
    parser.add_argument("--policies", nargs="+")
    parser.add_argument("--formats", nargs="+", help="of far rows, for policies that keep any")
    parser.add_argument("--threads", type=int, default=1)
    for name, size in SHAPE.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=size)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        policy, far_dtype = arguments.child
        print(json.dumps(_measured(policy, far_dtype, arguments)))
        return
    rows = [_run(*case) for case in _cases(arguments.policies, arguments.formats)]
    print(json.dumps(rows))


def _cases(policies: list[str] | None, formats: list[str] | None) -> list[tuple[str, str]]:
    from nearfar.policies.registry import create_policy, usable_names
    from nearfar.storage import FORMATS

    cases = []
    for name in policies or usable_names():
        spec = SPECS.get(name, name)
        known = formats or list(FORMATS)
        keeps_far = create_policy(spec).traits.keeps_far
        cases += [(spec, far_dtype) for far_dtype in (known if keeps_far else known[:1])]
    return cases


def _run(policy: str, far_dtype: str) -> dict[str, Any]:
    """One case in its own process, printed at once."""
    command = [sys.executable, __file__, *sys.argv[1:], "--child", policy, far_dtype]
    mapped = {"MALLOC_MMAP_THRESHOLD_": str(MAPPED_BYTES), "MALLOC_TOP_PAD_": "0"}
    done = subprocess.run(
        command,
        env=os.environ | mapped,
        stdout=subprocess.PIPE,
        text=True,
        timeout=CHILD_SECONDS,
        check=True,
    )
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    phases = []
    for phase, (planned, peak) in row["phases"].items():
        ratio = planned / peak if peak else float("inf")
        phases.append(f"{phase} {planned / KIB:9,.0f} / {peak / KIB:9,.0f} = {ratio:5.2f}")
    print(f"{policy:20} {far_dtype:9} {'   '.join(phases)}", flush=True)
    return row


def _measured(policy: str, far_dtype: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Planned and peak bytes of each phase."""
    import ctypes

    ctypes.CDLL(None).prctl(THP_DISABLE, 1, 0, 0, 0)
    import torch

    from nearfar.config import EngineConfig
    from nearfar.runtime.engine.engine import Engine

    settings = EngineConfig(
        policy=policy,
        far_dtype=far_dtype,
        dtype=arguments.dtype,
        device="cpu",
        threads=arguments.threads,
    )
    engine = Engine.random(_model(arguments), settings)
    torch.set_num_threads(arguments.threads)
    count = arguments.tokens
    ids = torch.randint(engine.model_config.vocab_size, (count + count // 4,)).tolist()
    _phases(engine, ids[: min(count, 2400)], lambda act: act())
    peaks: list[int] = []

    def note(act: Callable[[], None]) -> None:
        peaks.append(_peak_bytes(act))

    before = _resident("VmRSS")
    _phases(engine, ids, note)
    plans = _plans(engine, count)
    names = ("read", "ask", "extend")
    phases = {n: (p, peak - before) for n, p, peak in zip(names, plans, peaks, strict=True)}
    return {"policy": policy, "far_dtype": far_dtype, "tokens": count, "phases": phases}


def _model(arguments: argparse.Namespace) -> Any:
    from nearfar.runtime.checkpoints.model_config import parse_config

    config = {
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": arguments.hidden,
        "intermediate_size": arguments.inner,
        "num_hidden_layers": arguments.layers,
        "num_attention_heads": arguments.heads,
        "num_key_value_heads": arguments.kv_heads,
        "head_dim": arguments.head_dim,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2 * arguments.tokens,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "eos_token_id": 2,
    }
    return parse_config(config, "memory_peaks.py")


def _plans(engine: Any, tokens: int) -> list[int]:
    """The planned bytes of each phase, without weights."""
    from nearfar.runtime.engine.planning.memory_plan import plan_extended
    from nearfar.runtime.engine.planning.memory_setup import MemorySetup

    place = (engine.decoder.dtype, engine.decoder.device)
    setup = MemorySetup(engine.model_config, engine.config, engine.policy, *place)
    plan, more = engine.plan(tokens), plan_extended(setup, tokens, tokens + tokens // 4)
    stays = plan.near_kv_bytes + plan.host_bytes
    extends = max(more.prefill_bytes, more.asking_bytes) + more.near_kv_bytes + more.host_bytes
    held = stays + setup.mark_bytes(tokens)
    return [stays + plan.prefill_bytes, stays + plan.asking_bytes, held + extends]


def _phases(engine: Any, ids: list[int], note: Callable[[Callable[[], None]], None]) -> None:
    """Read all but the last fifth of ``ids``, ask, and extend by that fifth."""
    from nearfar.progress import silent

    sequence = engine.new_sequence()
    count = len(ids) * 4 // 5
    note(lambda: engine.read_ids(sequence, ids[:count], silent))
    mark = sequence.mark()

    def ask() -> None:
        engine.read_ids(sequence, ids[:QUESTION_TOKENS], silent)
        for token in ids[:ANSWER_TOKENS]:
            engine.step([sequence], [token])
        sequence.rewind(mark)

    note(ask)

    def extend() -> None:
        nonlocal mark
        engine.read_ids(sequence, ids[count:], silent)
        mark = sequence.mark()

    note(extend)
    sequence.close()


def _peak_bytes(act: Callable[[], None]) -> int:
    """Peak resident bytes of this process during ``act``."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    act()
    return _resident("VmHWM")


def _resident(name: str) -> int:
    (kib,) = re.findall(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.M)
    return int(kib) * KIB


if __name__ == "__main__":
    main()
