"""Maps whose state weighs as much as rows do, and LESS written as its paper says: row by row."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from tiny_engine import DEVICE, read
from torch import Tensor
from torch.nn.functional import gelu

from nearfar.policies.feature_maps import layer_maps, random_maps
from nearfar.policies.less import LowRank
from nearfar.policies.trained import save_trained
from nearfar.records import Geometry
from nearfar.runtime.engine.engine import Engine
from nearfar.runtime.steps.decode import Attended


def heavy_maps(geometry: Geometry, seed: int = 0) -> dict[str, Tensor]:
    """Maps under which what was dropped weighs about what it weighed, other in every head."""
    maps = random_maps(geometry, seed)
    generator = torch.Generator().manual_seed(seed)
    for name in ("k_scale", "k_mix_scale", "log_scale"):
        maps[name] = torch.randn(maps[name].shape, generator=generator) * 0.5
    return {name: tensor.half().float() for name, tensor in maps.items()}  # as a file holds them


def heavy_spec(folder: Path, geometry: Geometry) -> str:
    """`less` with such maps, from a file."""
    path = folder / "less.safetensors"
    save_trained(path, "less", geometry, heavy_maps(geometry), {})
    return f"less:maps={path}"


def heavy_state(geometry: Geometry) -> LowRank:
    """An empty state under such maps."""
    maps = {name: tensor.to(DEVICE) for name, tensor in heavy_maps(geometry).items()}
    layers = [layer_maps(maps, layer) for layer in range(geometry.layers)]
    return LowRank(layers, geometry, torch.device(DEVICE))


def weight_of(one: dict[str, Tensor], head: int, query: Tensor, keys: Tensor) -> Tensor:
    """What dropped ``keys`` [n, D] weigh to a ``query`` [D] of ``head``, by a layer's maps."""
    kv = head // (len(one["q_in"]) // len(one["k_in"]))
    phi = gelu(gelu(query.double() @ one["q_in"][head]) @ one["q_out"][head]).abs()
    u = gelu(gelu(keys.double() @ one["k_in"][kv]) @ one["k_out"][kv]) * one["k_scale"][kv].abs()
    psi = (u + (u @ one["k_mix"][kv]) * one["k_mix_scale"][kv]).abs()
    return psi @ phi * one["log_scale"][head].exp()


@dataclass
class Written:
    """An observer that holds every token's rows and attends to them one head at a time."""

    maps: dict[str, Tensor]
    rows: list[list[tuple[Tensor, Tensor]]] = field(default_factory=list)
    found: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # ours, and what was returned

    def take_prompt(self, exact: Engine, ids: Tensor) -> None:
        """Rows of a prompt, which every policy reads exactly."""
        sequence = read(exact, ids)
        self.rows = [[(near.keys.clone(), near.values.clone())] for near in sequence.near]

    def __call__(self, attended: Attended) -> Tensor:
        """Compare one attention, and go on with what was returned."""
        layer, near = attended.layer, attended.sequence.near[attended.layer]
        self.rows[layer].append((near.keys[:, -1:].clone(), near.values[:, -1:].clone()))
        keys, values = (torch.cat(each, 1) for each in zip(*self.rows[layer], strict=True))
        kept = attended.sequence.layers[layer].positions
        maps, outs = {name: each[layer].double() for name, each in self.maps.items()}, []
        for head, query in enumerate(attended.query):
            own = head // (len(attended.query) // len(keys))
            weights = weight_of(maps, head, query, keys[own])
            weights[kept[own]] = (keys[own][kept[own]].double() @ query.double()).exp()
            outs.append(weights @ values[own].double() / weights.sum())
        self.found.append((torch.stack(outs).float(), attended.partial.out.clone()))
        return attended.partial.out
