"""Everything near: exact attention, which all other policies are compared with."""

from __future__ import annotations

from dataclasses import dataclass

from nearfar.policies.base import Policy, Traits


@dataclass(frozen=True)
class Full(Policy):
    """Every key and value stays near and every step reads all of them."""

    name = "full"
    traits = Traits(
        kind="exact",
        summary="everything near, exact",
        source="scaled dot-product attention (Vaswani et al., arXiv 1706.03762)",
        keeps_far=False,
    )
