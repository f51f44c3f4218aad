"""The same results on CPUs with narrower vectors or fewer instructions than this one has."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from limits import LIMIT_SECONDS

import nearfar
from nearfar.cpu_kernels.compile import cpu_features

AVX2 = "+sse4.2,+ssse3,+avx,+avx2,+fma,+f16c,+bmi,+bmi2"
AVX512 = "+avx512f,+avx512bw,+avx512dq,+avx512vl,+avx512cd"


@pytest.mark.slow
@pytest.mark.parametrize(
    (
        "cpu",
        "features",
        "expected",
    ),  # lanes, whether float16 is converted, how bytes are multiplied
    [
        ("skylake-avx512", f"{AVX2},{AVX512}", "16 1 pmaddubsw"),
        ("haswell", AVX2, "8 1 pmaddubsw"),
        ("nehalem", "+sse4.2", "8 0 plain"),
    ],
)
def test_older_cpus(cpu: str, features: str, expected: str, tmp_path: Path) -> None:
    missing = {name[1:] for name in features.split(",")} - cpu_features()
    if missing:
        pytest.skip(f"this CPU cannot run code made for one with {missing}")
    environment = {
        "NUMBA_CPU_NAME": cpu,
        "NUMBA_CPU_FEATURES": features,
        "NEARFAR_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": str(Path(nearfar.__file__).parents[1]),
    }
    script = Path(__file__).with_name("other_cpu.py")
    command = [sys.executable, str(script), *expected.split()]
    done = subprocess.run(
        command,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT_SECONDS,
    )
    assert done.returncode == 0, done.stderr
