"""The training scripts, on a model and texts so small that seconds are enough."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from excerpts import SINKS, WINDOW, Excerpt, ask, draw_excerpts, error_of
from fitting import fit
from less_reference import heavy_maps, heavy_spec
from recording import Record, records
from running import Setting, _fit_layer, train
from safetensors import safe_open
from tiny_engine import decode, read, tiny_engine, tokens
from train_less import LessTrainer, dropped_rows
from train_lococo import LoCoCoTrainer

from nearfar.policies.convolution import random_convolutions
from nearfar.policies.feature_maps import layer_maps, random_maps
from nearfar.policies.less import LowRank
from nearfar.policies.trained import check_trained
from nearfar.records import Geometry
from nearfar.runtime.steps.decode import Attended, decode_step

GEOMETRY = Geometry(2, 6, 2, 16)
MAKE = {
    "less": (LessTrainer, random_maps),
    "lococo": (LoCoCoTrainer, random_convolutions),
}
every_policy = pytest.mark.parametrize("policy", MAKE)
TEXTS, LENGTH = 10, 200


def text_rows() -> torch.Tensor:
    return torch.stack([tokens(LENGTH, seed=s) for s in range(TEXTS)])


def first_record() -> Record:
    return next(iter(records(tiny_engine(policy="full"), text_rows())))


def test_records_are_what_the_model_reads() -> None:
    engine = tiny_engine(policy="full")
    for layer, record in enumerate(records(engine, text_rows())):
        for text in (0, 7):
            near = read(engine, text_rows()[text]).near[layer]
            torch.testing.assert_close(record.keys[text], near.keys, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(record.values[text], near.values, rtol=1e-4, atol=1e-5)


def test_the_state_in_training_is_that_of_the_policy() -> None:
    record = first_record()
    excerpts = draw_excerpts(TEXTS, LENGTH, (16,), seed=1)
    tensors = {name: tensor[0] for name, tensor in random_maps(GEOMETRY, 2).items()}
    tensors["k_scale"] += 1
    trainer = LessTrainer(record, excerpts, Setting((16,), 9), tensors)
    asked = trainer.ask(3)
    state = LowRank([trainer.maps], GEOMETRY, torch.device("cpu"))
    rows = dropped_rows(record, excerpts[3])[..., None].expand(-1, -1, 16)
    state.fold(0, record.keys[3].gather(1, rows), record.values[3].gather(1, rows))
    part = state.attend(0, asked.queries)
    out = trainer.rivals(3, asked)["h2o"]
    kept_lse = _kept_lse(record, excerpts[3].cut, rows[..., 0], asked.queries, asked.own)
    share = torch.sigmoid(part.lse - kept_lse)[..., None]
    torch.testing.assert_close(
        trainer.attend(3, asked), out + share * (part.out - out), rtol=1e-4, atol=1e-4
    )


def test_a_step_of_the_runtime_reads_what_training_says(tmp_path: Path) -> None:
    """At the cut, in every layer: the same rows are gone, and the same comes out."""
    cut, budget = 150, 16
    rows = text_rows()[:3, : cut + 1]
    excerpts = [Excerpt(text, cut, budget) for text in range(3)]
    found = []
    maps = heavy_maps(GEOMETRY)
    for layer, record in enumerate(records(tiny_engine(policy="full"), rows)):
        own = {name: tensor[layer].clone() for name, tensor in maps.items()}
        trainer = LessTrainer(record, excerpts, Setting((budget,), 1), own)
        trainer.maps.log_scale.copy_(maps["log_scale"][layer])
        asked = trainer.ask(1)
        found.append((asked.target[:, 0], trainer.attend(1, asked)[:, 0], trainer.dropped[1]))
    spec = heavy_spec(tmp_path, GEOMETRY)
    engine = tiny_engine(policy=spec, budget=budget, sinks=SINKS, window=WINDOW)
    sequence = read(engine, rows[1, :cut])
    assert isinstance(sequence.evicted_summary, LowRank)
    for near, (_, _, dropped) in zip(sequence.near, found, strict=True):
        assert near.positions is not None
        for head, gone in zip(near.positions[:, : near.length], dropped, strict=True):
            assert sorted([*head.tolist(), *gone.tolist()]) == list(range(cut))

    def compare(attended: Attended) -> torch.Tensor:
        exact, trained, _ = found[attended.layer]
        torch.testing.assert_close(attended.partial.out, trained, rtol=1e-4, atol=1e-4)
        assert (trained - exact).abs().max() > 1e-3
        return exact

    decode_step(engine.decoder, [sequence], rows[1, cut:], compare)


def _kept_lse(
    record: Record, cut: int, gone: torch.Tensor, queries: torch.Tensor, own: torch.Tensor
) -> torch.Tensor:
    found = []
    for head, query in enumerate(queries):
        kept = sorted(set(range(cut)) - set(gone[head // 3].tolist()))
        logits = query @ record.keys[3, head // 3, kept].T
        found.append(torch.cat([logits, own[head]], -1).logsumexp(-1))
    return torch.stack(found)


def test_what_is_asked_for_is_exact_attention() -> None:
    record = first_record()
    excerpt = draw_excerpts(TEXTS, LENGTH, (16,), seed=1)[2]
    asked = ask(record, excerpt, 5, torch.Generator().manual_seed(0))
    wrong, right = error_of(record, asked.target, asked.target)
    assert wrong == 0
    assert right > 0
    assert torch.isfinite(asked.own).any(-1).all()  # a query sees its own token


@every_policy
def test_a_layer_gets_better(policy: str) -> None:
    record, excerpts = first_record(), draw_excerpts(TEXTS, LENGTH, (16, 24), seed=0)
    make_trainer, make_tensors = MAKE[policy]
    tensors = {name: tensor[0].clone() for name, tensor in make_tensors(GEOMETRY, 0).items()}
    trainer = make_trainer(record, excerpts, Setting((16, 24), 32), tensors)
    before = trainer.held_out(policy, trainer.measured)[policy]
    assert fit(trainer.parameters(), trainer.loss, 40, 60.0, 5e-3) == 40
    assert trainer.held_out(policy, trainer.measured)[policy] < before


@every_policy
def test_a_run_writes_what_the_policy_reads(policy: str, tmp_path: Path) -> None:
    engine, output = tiny_engine(policy="full"), tmp_path / "out.safetensors"
    setting = Setting((16, 24), 8, steps=2, minutes=1.0)
    errors = train(policy, engine, text_rows(), output, setting, MAKE[policy], {})
    assert len(errors) == 2
    assert all(policy in each and len(each) >= 2 for each in errors)
    check_trained(policy, str(output), GEOMETRY)
    assert [each.name for each in tmp_path.iterdir()] == [output.name]
    asked = tiny_engine(policy=f"{policy}:maps={output}", budget=20)
    assert torch.isfinite(decode(asked, read(asked, tokens(80)), tokens(5, seed=1))).all()
    with safe_open(output, "pt") as file:
        assert json.loads(file.metadata()["held_out"]) == errors


@every_policy
def test_minutes_end_a_run(policy: str, tmp_path: Path) -> None:
    engine = tiny_engine(policy="full")
    setting = Setting((16,), 8, steps=1_000_000, minutes=0.02)
    train(policy, engine, text_rows(), tmp_path / "x", setting, MAKE[policy], {})


def test_training_that_made_it_worse_is_given_up() -> None:
    record, excerpts = first_record(), draw_excerpts(TEXTS, LENGTH, (16,), seed=0)
    for make_trainer, make_tensors in MAKE.values():
        tensors = {name: tensor[0].clone() for name, tensor in make_tensors(GEOMETRY, 0).items()}
        trainer = make_trainer(record, excerpts, Setting((16,), 8), tensors)
        trainer.give_up()
        asked = trainer.ask(1)
        first = next(iter(trainer.rivals(1, asked).values()))
        torch.testing.assert_close(trainer.attend(1, asked), first, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("blend", [5.0, math.nan])
def test_a_layer_that_is_given_up_is_said_to_be(blend: float) -> None:
    """Also one whose numbers are none: what is written must be finite."""
    excerpts = draw_excerpts(TEXTS, LENGTH, (16,), seed=0)
    tensors = {name: tensor[0].clone() for name, tensor in random_convolutions(GEOMETRY, 0).items()}
    tensors["blend"].fill_(blend)
    trainer = LoCoCoTrainer(first_record(), excerpts, Setting((16,), 8), tensors)
    errors, said = _fit_layer("lococo", trainer, seconds=0.0)
    assert said.endswith(", given up")
    assert errors["lococo"] == errors["without convolution"]
    assert all(float(tensor.abs().sum()) == 0 for tensor in tensors.values())


def test_the_share_of_mixtures_stays_one() -> None:
    excerpts = draw_excerpts(TEXTS, LENGTH, (16,), seed=0)
    tensors = {name: tensor[0].clone() for name, tensor in random_convolutions(GEOMETRY, 0).items()}
    trainer = LoCoCoTrainer(first_record(), excerpts, Setting((16,), 8), tensors)
    for outside, inside in ((-0.2, 0.0), (1.3, 1.0)):
        trainer.conv.blend.fill_(outside)
        trainer.loss(0)
        assert float(trainer.conv.blend) == inside


def test_what_decides_is_not_what_measures() -> None:
    excerpts = draw_excerpts(TEXTS, LENGTH, (16,), seed=0)
    tensors = {name: tensor[0] for name, tensor in random_convolutions(GEOMETRY, 0).items()}
    trainer = LoCoCoTrainer(first_record(), excerpts, Setting((16,), 8), tensors)
    parts = (trainer.trained, trainer.deciding, trainer.measured)
    assert [number for part in parts for number in part] == list(range(TEXTS))
    assert all(parts)


def test_maps_of_a_layer_are_those_that_are_fitted() -> None:
    tensors = random_maps(GEOMETRY, 0)
    maps = layer_maps(tensors, 1)
    maps.q_in.zero_()
    assert (tensors["q_in"][1] == 0).all()
