"""Policies by name, their parameters from a command line, and those of other packages."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_engine import decode, read, tiny_engine, tokens

from nearfar.errors import InvalidOptionError, UnknownNameError
from nearfar.policies.base import Policy, Traits
from nearfar.policies.registry import BUILT_IN, create_policy, policy_class, policy_names
from nearfar.policies.sketch import Sketch

EVERY_NTH = '''
"""Every n-th far key, each standing for n."""

from dataclasses import dataclass

import numpy as np

from nearfar.policies.index import FarIndex
from nearfar.policies.base import Policy, Traits
from nearfar.records import ALL, Selection


@dataclass(frozen=True)
class EveryNth(Policy):
    stride: int = 2
    weigh: bool = True

    name = "every-nth"
    traits = Traits("selects", "every n-th far key", "a test", keeps_far=True)

    def new_index(self, geometry, budget, seed):
        return Index(self, geometry)


class Index(FarIndex):
    def __init__(self, policy, geometry):
        self.policy, self.geometry = policy, geometry

    def extend(self, layer, far, arrived=None):
        pass

    def select(self, layer, query, far, step):
        if self.policy.stride == 1:
            return ALL
        indices = np.arange(0, far.length, self.policy.stride, dtype=np.int32)
        rows = self.geometry.kv_heads
        weight = np.log(self.policy.stride) if self.policy.weigh else 0.0
        return Selection(
            np.tile(indices, rows),
            np.arange(rows + 1, dtype=np.int64) * len(indices),
            np.full(rows * len(indices), weight, np.float32),
            self.geometry.group,
        )

    def mark(self):
        return None

    def rewind(self, mark):
        pass

    def index_bytes(self):
        return 0
'''


def install(folder: Path, package: str, *entries: str) -> None:
    """What an installer leaves behind: a module, and metadata that declares its policies."""
    (folder / f"{package}.py").write_text(EVERY_NTH)
    metadata = folder / f"{package}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = "\n".join(f"{entry} = {package}:EveryNth" for entry in entries)
    (metadata / "entry_points.txt").write_text(f"[nearfar.policies]\n{lines}\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder for packages, on the path for one test."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def text_of(kind: type[Exception], spec: str) -> str:
    with pytest.raises(InvalidOptionError) as caught:
        create_policy(spec)
    assert type(caught.value) is kind
    return str(caught.value)


def test_every_name_makes_a_policy_of_that_name() -> None:
    assert policy_names()[: len(BUILT_IN)] == list(BUILT_IN)
    for name in BUILT_IN:
        policy = create_policy(name)
        assert type(policy) is policy_class(name)
        assert policy.name == name
        assert isinstance(policy.traits, Traits)
        assert policy.traits.summary
        assert policy.traits.source
        with pytest.raises(dataclasses.FrozenInstanceError):
            policy.name = "other"  # type: ignore[misc]


def test_a_name_that_is_not_known_names_its_neighbour() -> None:
    known = ", ".join(sorted(policy_names()))
    assert text_of(UnknownNameError, "sketsh") == (
        f"Unknown policy 'sketsh'. Did you mean 'sketch'? Known: {known}."
    )
    assert text_of(UnknownNameError, "qqq:bits=2") == f"Unknown policy 'qqq'. Known: {known}."
    assert text_of(UnknownNameError, "") == f"Unknown policy ''. Known: {known}."
    assert "Did you mean 'streaming-llm'?" in text_of(UnknownNameError, "streamingllm")


def test_parameters_take_the_type_of_their_defaults() -> None:
    policy = create_policy("sketch:bits=3:temper=1:per=head")
    assert policy == Sketch(bits=3, per="head", temper=1.0)
    assert isinstance(policy, Sketch)
    assert type(policy.bits) is int
    assert type(policy.temper) is float
    assert create_policy("sketch") == Sketch()


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("sketch:4", "A policy's parameters are written sketch:key=value. Got '4'."),
        ("sketch:", "A policy's parameters are written sketch:key=value. Got ''."),
        ("sketch:bits=two", "sketch:bits must be of type int. Got 'two'."),
        ("sketch:bits=2.0", "sketch:bits must be of type int. Got '2.0'."),
        ("sketch:bits=", "sketch:bits must be of type int. Got ''."),
        ("sketch:temper=warm", "sketch:temper must be of type float. Got 'warm'."),
        ("sketch:bits=8", "sketch's bits must be 1, 2, 3 or 4. Got 8."),
        ("sketch:per=", "sketch's per must be 'group' or 'head'. Got ''."),
        ("sketch:per=a=b", "sketch's per must be 'group' or 'head'. Got 'a=b'."),
    ],
)
def test_values_that_cannot_be_used(spec: str, text: str) -> None:
    assert text_of(InvalidOptionError, spec) == text


def test_a_parameter_that_is_not_known_names_its_neighbour() -> None:
    assert text_of(UnknownNameError, "sketch:bit=2") == (
        "Unknown parameter of sketch 'bit'. Did you mean 'bits'? Known: bits, per, temper."
    )
    assert text_of(UnknownNameError, "sketch:name=x") == (
        "Unknown parameter of sketch 'name'. Known: bits, per, temper."
    )


def test_a_policy_without_parameters_says_so() -> None:
    assert text_of(InvalidOptionError, "full:bits=2") == "full has no parameters. Got 'bits=2'."


def test_a_policy_of_another_package_runs(site: Path) -> None:
    install(site, "thirdparty_nth", "every-nth")
    assert policy_names() == [*BUILT_IN, "every-nth"]
    policy = create_policy("every-nth:stride=3:weigh=False")
    assert isinstance(policy, Policy)
    assert (policy.stride, policy.weigh) == (3, False)  # type: ignore[attr-defined]
    assert policy_class("every-nth").__module__ == "thirdparty_nth"
    assert "Did you mean 'every-nth'?" in text_of(UnknownNameError, "every-nt")

    prompt, answer = tokens(200), tokens(5, seed=1)
    exact = tiny_engine(policy="full")
    want = decode(exact, read(exact, prompt), answer)
    rows_read, errors = [], []
    for stride in (1, 2, 8):
        engine = tiny_engine(policy=f"every-nth:stride={stride}")
        sequence = read(engine, prompt)
        errors.append(float((decode(engine, sequence, answer) - want).norm()))
        rows_read.append(sequence.far.rows_read)
    torch.testing.assert_close(errors[0], 0.0, rtol=0, atol=1e-3)
    assert errors[1] > 10 * errors[0]
    assert rows_read[0] == pytest.approx(2 * rows_read[1], rel=0.02)
    assert rows_read[0] == pytest.approx(8 * rows_read[2], rel=0.05)


@pytest.mark.parametrize("text", ["1", "yes", ""])
def test_a_switch_is_true_or_false(site: Path, text: str) -> None:
    install(site, "thirdparty_nth", "every-nth")
    assert create_policy("every-nth:weigh=TRUE") == create_policy("every-nth")
    assert text_of(InvalidOptionError, f"every-nth:weigh={text}") == (
        f"every-nth:weigh must be of type bool. Got {text!r}."
    )


def test_a_name_that_is_taken_is_refused(site: Path) -> None:
    install(site, "thirdparty_sketch", "sketch")
    with pytest.raises(InvalidOptionError) as caught:
        policy_names()
    assert str(caught.value) == (
        "Two policies are registered as 'sketch'; one of them is thirdparty_sketch:EveryNth. "
        "Uninstall one or rename its entry point."
    )
    assert type(create_policy("sketch")) is Sketch


def test_two_packages_with_one_name_are_refused(site: Path) -> None:
    install(site, "thirdparty_one", "every-nth", "other")
    install(site, "thirdparty_two", "every-nth")
    assert text_of(InvalidOptionError, "every-nth").startswith(
        "Two policies are registered as 'every-nth'; one of them is thirdparty_"
    )


def test_names_are_listed_without_importing_anything(site: Path) -> None:
    install(site, "thirdparty_broken", "broken")
    (site / "thirdparty_broken.py").write_text("raise RuntimeError('this package is broken')")
    assert policy_names()[-1] == "broken"
    assert "thirdparty_broken" not in sys.modules
    with pytest.raises(InvalidOptionError) as caught:
        create_policy("broken")
    assert str(caught.value) == (
        "The policy 'broken' (thirdparty_broken:EveryNth) cannot be loaded: this package is "
        "broken. Mend or uninstall the package that registers it."
    )


def test_a_parameter_is_given_once() -> None:
    with pytest.raises(InvalidOptionError, match="sketch's parameter 'bits' is given twice"):
        create_policy("sketch:bits=2:bits=3")
