"""Mutation testing: how many small changes to the code make a test fail.

    python benchmarks/mutants.py nearfar/lsh/tables.py=25 nearfar/runtime/engine/sampling.py=25
    python benchmarks/mutants.py nearfar/lsh/tables.py=25:0/2    # every second of them

From each file the given number of places is drawn, always the same ones. At each place one operator
of cosmic-ray (`pip install cosmic-ray==8.7.0`, in a separate environment that can import this one's
packages) changes the code, or a statement is left out. Every change runs against the file's own
tests, in a fork of a process that has imported everything. Prints a line for each change that no
test notices, and a count.
"""

from __future__ import annotations

import ast
import importlib
import os
import pkgutil
import random
import signal
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

os.environ.update(TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
ROOT = Path(__file__).parents[1]
SEED = 15
ENGINE, SAVED, LSH, POLICIES, KERNELS = (
    f"tests/{room}/test_"
    for room in ("runtime/engine", "runtime/saved", "lsh", "policies", "cpu_kernels")
)
TESTS = {
    "runtime/engine/sampling": [f"{ENGINE}sampling.py"],
    "runtime/saved/container": [f"{SAVED}container.py"],
    "runtime/saved/layout": [f"{SAVED}container.py", f"{SAVED}writing.py"],
    "runtime/saved/writing": [f"{SAVED}container.py", f"{SAVED}writing.py"],
    "runtime/saved/rows": [f"{SAVED}rows.py"],
    "runtime/engine/document_cache": [f"{ENGINE}document_cache.py"],
    "runtime/saved/facts": [f"{SAVED}facts.py"],
    "runtime/saved/read_document": [f"{SAVED}documents.py"],
    "runtime/saved/opened": [f"{SAVED}opened.py", f"{SAVED}documents.py"],
    "runtime/saved/write_document": [f"{SAVED}documents.py"],
    "runtime/saved/replacing": [f"{SAVED}replacing.py"],
    "runtime/saved/conversation_file": [f"{ENGINE}conversation.py"],
    "lsh/tables": [f"{LSH}tables.py"],
    "lsh/tables_state": [f"{LSH}tables_state.py"],
    "lsh/sketch": [f"{LSH}sketch.py", f"{LSH}sketch_state.py"],
    "lsh/sampling": [f"{LSH}sampling_law.py", f"{POLICIES}sketch_policy.py"],
    "lsh/rotation": [f"{LSH}rotation.py"],
    "lsh/near_sketch": [f"{POLICIES}sketch_policy.py", "tests/gpu_kernels/test_coded_keys.py"],
    "lsh/probability": [f"{LSH}probability.py"],
    "lsh/projections": [f"{LSH}projections.py"],
    "lsh/clustering": [f"{LSH}clustering.py", f"{POLICIES}clusters.py"],
    "lsh/error_bound": [f"{LSH}error_bound.py"],
    "cpu_kernels/attend": [
        f"{KERNELS}attend.py",
        "-k",
        "interpreted_kernel or shares_are or empty_rows or weights_count or "
        "(any_number_of_keys and not 1000000)",
    ],
    "cpu_kernels/attend_tile": [
        f"{KERNELS}attend.py",
        "-k",
        "(selected_equals and (3-1-33 or 6-2-128) and (float32 or bfloat16)) or weights_count or "
        "logit_spread",
    ],
}
ATTEND = "nearfar/cpu_kernels/attend.py"
Change = tuple[str, int]  # an operator and which of its places


def statements(source: str) -> list[ast.stmt]:
    """The statements of functions and classes that can be left out."""
    return [
        node
        for node in ast.walk(ast.parse(source))
        if (isinstance(node, ast.Assign | ast.AugAssign | ast.Raise) and node.col_offset > 0)
        or (
            isinstance(node, ast.Expr)
            and node.col_offset > 0
            and not isinstance(node.value, ast.Constant)
        )
    ]


def places(source: str, unions: bool) -> dict[Any, list[Change]]:
    """The changes at each place; without ``unions`` none of `|`, which is mostly in types."""
    import parso
    from cosmic_ray.ast import ast_nodes
    from cosmic_ray.plugins import get_operator, operator_names

    found: dict[Any, list[Change]] = defaultdict(list)
    tree = parso.parse(source)
    for name in sorted(operator_names()):
        operator = get_operator(name)
        if operator.arguments() or ("BitOr_" in name and not unions):
            continue
        spans = [each for node in ast_nodes(tree) for each in operator().mutation_positions(node)]
        for i, (start, stop) in enumerate(spans):
            found[name.split("_")[0], (start, stop)].append((name, i))
    for i, node in enumerate(statements(source)):
        span = ((node.lineno, node.col_offset), (node.end_lineno, 0))
        found["delete", span].append(("delete", i))
    return found


def changed(source: str, name: str, occurrence: int) -> str | None:
    """``source`` after one change."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    if name != "delete":
        made: str | None = mutate_code(source, get_operator(name)(), occurrence)
        return made
    node, lines = statements(source)[occurrence], source.splitlines(keepends=True)
    lines[node.lineno - 1 : node.end_lineno] = [" " * node.col_offset + "pass\n"]
    return "".join(lines)


def load(path: str, code: str) -> None:
    """Run a module again and replace its old definitions wherever they were imported."""
    name = path.removesuffix(".py").replace("/", ".")
    module = importlib.import_module(name)
    old = dict(vars(module))
    exec(compile(code, path, "exec"), module.__dict__)
    new = {
        id(value): vars(module)[key]
        for key, value in old.items()
        if not key.startswith("__") and getattr(value, "__module__", name) == name
    }
    for other in list(sys.modules.values()):
        if getattr(other, "__name__", "").startswith("nearfar"):
            for key, value in list(vars(other).items()):
                if id(value) in new:
                    setattr(other, key, new[id(value)])


def put(path: str, code: str) -> None:
    """Replace a module by ``code``; `attend` is interpreted, so that nothing is compiled."""
    from nearfar.cpu_kernels import compile as compiling

    def interpreted(function: Any) -> Any:
        function.py_func = function
        return function

    if path.startswith("nearfar/cpu_kernels") and path != ATTEND:
        cache, compiling._cache = compiling._cache, None
        load(path, code)
        compiling._cache, path, code = cache, ATTEND, (ROOT / ATTEND).read_text()
    if path == ATTEND:
        compiling.kernel = compiling.serial = interpreted
    load(path, code)


def outcome(path: str, code: str, limit_seconds: float) -> int:
    """The exit code of pytest with this code: 0 if no test fails, -9 if it was killed."""
    child = os.fork()
    if child == 0:
        os.setsid()
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        result = 99
        try:
            import pytest

            put(path, code)
            tests = TESTS[path.removeprefix("nearfar/").removesuffix(".py")]
            options = ["-x", "-q", "-p", "no:cacheprovider", "-m", "not model", "-o", "addopts="]
            result = int(pytest.main([*options, *tests]))
        finally:
            os._exit(result)
    end = time.monotonic() + limit_seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.1)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -9


def measure(path: str, count: int, part: slice) -> None:
    """Draw ``count`` places of a file, try those in ``part``, and print unnoticed changes."""
    source = (ROOT / path).read_text()
    found = places(source, unions="cpu_kernels" in path)
    rng = random.Random(f"{SEED} {path.removeprefix('nearfar/')}")
    drawn = rng.sample(sorted(found), min(count, len(found)))
    changes = [(place[1][0][0], *rng.choice(found[place])) for place in drawn]
    began = time.monotonic()
    if outcome(path, source, 900) != 0:
        raise SystemExit(f"the tests of {path} fail as they are")
    limit_seconds = 30 + 4 * (time.monotonic() - began)
    tried = survived = 0
    for line, name, occurrence in sorted(changes)[part]:
        code = changed(source, name, occurrence)
        if code is None or code == source:
            continue
        tried += 1
        if outcome(path, code, limit_seconds) == 0:
            survived += 1
            print(f"  {path}:{line} {name} {source.splitlines()[line - 1].strip()}", flush=True)
    print(f"{path}: {len(found)} places, {tried} changed, {tried - survived} noticed", flush=True)


def main() -> None:
    """Measure the files that the command line names."""
    os.chdir(ROOT)
    sys.path[:0] = [str(ROOT / part) for part in ("", "tests", "tests/runtime")]
    import nearfar

    for found in pkgutil.walk_packages(nearfar.__path__, "nearfar."):
        if not found.name.endswith("__main__"):
            importlib.import_module(found.name)
    for argument in sys.argv[1:]:
        path, _, wanted = argument.partition("=")
        count, _, part = wanted.partition(":")
        first, _, step = part.partition("/")
        measure(path, int(count or 10**6), slice(int(first or 0), None, int(step or 1)))


if __name__ == "__main__":
    main()
