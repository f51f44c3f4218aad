"""Every policy by name, and how to make one from a command line.

A new policy needs its own file and a line in the table below. Other packages register theirs as an
entry point of the group `nearfar.policies`, whose value is the policy class.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import TYPE_CHECKING, Any, cast

from nearfar.errors import InvalidOptionError, UnknownNameError
from nearfar.named import Named

if TYPE_CHECKING:  # a name is checked in no time, and torch takes seconds
    from nearfar.policies.base import Policy

ENTRY_POINT_GROUP = "nearfar.policies"

BUILT_IN = {
    "full": "nearfar.policies.full:Full",
    "full-far": "nearfar.policies.full_far:FullFar",
    "streaming-llm": "nearfar.policies.streaming_llm:StreamingLLM",
    "h2o": "nearfar.policies.h2o:H2O",
    "h2o-mean": "nearfar.policies.h2o:H2OMean",
    "less": "nearfar.policies.less:Less",
    "lococo": "nearfar.policies.lococo:LoCoCo",
    "tova": "nearfar.policies.tova:Tova",
    "snapkv": "nearfar.policies.snapkv:SnapKV",
    "pyramidkv": "nearfar.policies.pyramidkv:PyramidKV",
    "adakv": "nearfar.policies.adakv:AdaKV",
    "expected-attention": "nearfar.policies.expected_attention:ExpectedAttention",
    "keydiff": "nearfar.policies.key_only:KeyDiff",
    "knorm": "nearfar.policies.key_only:Knorm",
    "random": "nearfar.policies.key_only:Random",
    "lsh-tables": "nearfar.policies.lsh_tables:LshTables",
    "sketch": "nearfar.policies.sketch:Sketch",
    "quest": "nearfar.policies.quest:Quest",
    "infllm": "nearfar.policies.infllm:InfLLM",
    "clusters": "nearfar.policies.clusters:Clusters",
    "faiss-ivfpq": "nearfar.policies.faiss_ivfpq:FaissIvfPq",
    "faiss-hnsw": "nearfar.policies.faiss_hnsw:FaissHnsw",
    "verified": "nearfar.policies.verified:Verified",
    "topk-oracle": "nearfar.policies.topk_oracle:TopkOracle",
    "topp-oracle": "nearfar.policies.topp_oracle:ToppOracle",
}


_POLICIES = Named("policy", "policies", ENTRY_POINT_GROUP, BUILT_IN)


def policy_names() -> list[str]:
    """Names of all registered policies: the built-in ones in their order, then others."""
    return _POLICIES.names()


def policy_class(name: str) -> type[Policy]:
    """The class registered as ``name``."""
    return cast("type[Policy]", _POLICIES.load(name))


def check_policy_name(spec: str) -> None:
    """Raise UnknownNameError where no policy has the name in ``spec``; none is imported."""
    _POLICIES.check(spec.split(":")[0])


def is_installed(cls: type[Policy]) -> bool:
    """Whether the packages that a policy needs are installed."""
    return cls.requires is None or importlib.util.find_spec(cls.requires[0]) is not None


def usable_names() -> list[str]:
    """`policy_names` without built-in policies whose packages are not installed."""
    names = policy_names()
    return [n for n in names if n not in BUILT_IN or is_installed(policy_class(n))]


def create_policy(spec: str) -> Policy:
    """A policy from ``name`` or ``name:key=value:key=value``."""
    name, *assignments = spec.split(":")
    cls = policy_class(name)
    if cls.requires is not None and not is_installed(cls):
        module, part = cls.requires
        raise InvalidOptionError(
            f"{name} needs {module}, which is not installed. Run: pip install '{part}'"
        )
    fields = {field.name: field for field in dataclasses.fields(cls)}
    values = _values(name, assignments, fields)
    unset = (dataclasses.MISSING, dataclasses.MISSING)
    missing = [
        key
        for key, field in fields.items()
        if key not in values and (field.default, field.default_factory) == unset
    ]
    if missing:
        raise InvalidOptionError(
            f"{name} needs a value for {', '.join(missing)}: {name}:key=value."
        )
    return cls(**values)


def _values(
    name: str, assignments: list[str], fields: dict[str, dataclasses.Field[Any]]
) -> dict[str, Any]:
    """The parameters that ``key=value`` texts give."""
    values: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise InvalidOptionError(
                f"A policy's parameters are written {name}:key=value. Got {assignment!r}."
            )
        if not fields:
            raise InvalidOptionError(f"{name} has no parameters. Got {assignment!r}.")
        if key in values:
            raise InvalidOptionError(f"{name}'s parameter {key!r} is given twice.")
        if key not in fields:
            raise UnknownNameError(f"parameter of {name}", key, fields)
        values[key] = _parse(f"{name}:{key}", text, fields[key].default)
    return values


def _parse(what: str, text: str, default: object) -> object:
    """``text`` as a value of the default's type."""
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False}[text.lower()]
        if isinstance(default, int | float):
            return type(default)(text)
    except (KeyError, ValueError):
        kind = type(default).__name__
        raise InvalidOptionError(f"{what} must be of type {kind}. Got {text!r}.") from None
    return text
