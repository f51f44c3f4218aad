"""What is kept of dropped rows follows a sequence: steps, marks, tails, files, batches."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest
import saved_cases
import torch
from less_reference import Written, heavy_maps, heavy_spec, heavy_state
from tiny_engine import DEVICE, decode, read, tiny_config, tiny_engine, tokens

from nearfar.config import SamplingConfig
from nearfar.errors import InvalidOptionError
from nearfar.policies import less
from nearfar.policies.less import Less
from nearfar.policies.registry import create_policy
from nearfar.policies.trained import save_trained
from nearfar.records import Partial
from nearfar.runtime.engine.engine import Engine
from nearfar.runtime.memory.sequence import Sequence
from nearfar.runtime.memory.tail import delta_since, put_back
from nearfar.runtime.steps.attention import merge
from nearfar.runtime.steps.decode import decode_step

GEOMETRY = tiny_config().geometry
close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
equal = partial(torch.testing.assert_close, rtol=0, atol=0)


@pytest.fixture
def spec(tmp_path: Path) -> str:
    return heavy_spec(tmp_path, GEOMETRY)


def some_rows(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    rows = torch.randn(2, 2, count, 16, generator=generator).to(DEVICE)
    return rows[0], rows[1]


def some_queries(count: int) -> torch.Tensor:
    return torch.randn(6, count, 16, generator=torch.Generator().manual_seed(9)).to(DEVICE)


def held(sequence: Sequence) -> dict[str, torch.Tensor]:
    assert sequence.evicted_summary is not None
    return {name: tensor.clone() for name, tensor in sequence.evicted_summary.state().items()}


def test_every_step_is_one_sum_over_kept_and_dropped_rows(spec: str) -> None:
    """The state that grows token by token equals weights over all rows that ever were."""
    engine = tiny_engine(policy=spec, budget=12)
    written = Written({name: each.to(DEVICE) for name, each in heavy_maps(GEOMETRY).items()})
    written.take_prompt(tiny_engine(policy="full"), tokens(45))
    sequence = read(engine, tokens(45))
    for token in tokens(40, seed=1):
        decode_step(engine.decoder, [sequence], token[None], written)
    assert len(written.found) == 80
    for wanted, got in written.found:
        close(got, wanted)
    plain = tiny_engine(policy="h2o", budget=12)
    without = decode(plain, read(plain, tokens(45)), tokens(1, seed=1))
    with_it = decode(engine, read(engine, tokens(45)), tokens(1, seed=1))
    assert (with_it - without).abs().max() > 0.01  # the state is no trifle here


def test_nothing_dropped_is_exact_and_an_empty_state(spec: str) -> None:
    engine, exact = tiny_engine(policy=spec, budget=1000), tiny_engine(policy="full")
    sequence = read(engine, tokens(61))
    close(
        decode(engine, sequence, tokens(30, seed=1)),
        decode(exact, read(exact, tokens(61)), tokens(30, seed=1)),
    )
    assert all(float(each.abs().max()) == 0 for each in held(sequence).values())


def test_an_empty_state_changes_nothing() -> None:
    state, queries = heavy_state(GEOMETRY), some_queries(1)
    part = state.attend(1, queries)
    assert part.lse.eq(-torch.inf).all()
    assert part.out.isfinite().all()
    own = Partial(torch.randn(6, 16, device=DEVICE), torch.randn(6, device=DEVICE))
    merged = merge(own, Partial(part.out[:, 0], part.lse[:, 0]))
    equal(merged.out, own.out)
    equal(merged.lse, own.lse)
    state.fold(0, *some_rows(5))
    assert state.attend(1, queries).lse.eq(-torch.inf).all()  # layers are apart
    assert state.attend(0, queries).lse.isfinite().all()


@pytest.mark.parametrize("folded_rows", [1, 7, 64])
def test_rows_may_be_folded_in_any_pieces(
    folded_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, values = some_rows(64)
    at_once, in_pieces = heavy_state(GEOMETRY), heavy_state(GEOMETRY)
    at_once.fold(1, keys, values)
    monkeypatch.setattr(less, "FOLDED_ROWS", folded_rows)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    for some in (order[:9], order[9:10], order[10:]):
        in_pieces.fold(1, keys[:, some], values[:, some])
    for name, wanted in at_once.state().items():
        close(in_pieces.state()[name], wanted)
    queries = some_queries(5)
    close(in_pieces.attend(1, queries).out, at_once.attend(1, queries).out)
    for t in range(5):  # queries do not see each other
        close(
            at_once.attend(1, queries[:, t : t + 1]).lse[:, 0], at_once.attend(1, queries).lse[:, t]
        )


def test_a_mark_can_be_returned_to_twice(spec: str) -> None:
    engine = tiny_engine(policy=spec, budget=12)
    sequence = read(engine, tokens(45))
    mark, before = sequence.mark(), held(sequence)
    want = decode(engine, sequence, tokens(20, seed=1))
    for _ in range(2):
        sequence.rewind(mark)
        equal(held(sequence)["values"], before["values"])
        read(engine, tokens(30, seed=2), sequence)
        assert not torch.equal(held(sequence)["masses"], before["masses"])
        sequence.rewind(mark)
        equal(decode(engine, sequence, tokens(20, seed=1)), want)


def test_a_tail_brings_the_state_back(spec: str) -> None:
    engine = tiny_engine(policy=spec, budget=12)
    sequence = read(engine, tokens(45))
    mark = sequence.mark()
    decode(engine, sequence, tokens(30, seed=1))
    tail, there = delta_since(sequence, mark), held(sequence)
    want = decode(engine, sequence, tokens(9, seed=2))
    sequence.rewind(mark)
    decode(engine, sequence, tokens(50, seed=3))
    for _ in range(2):
        put_back(sequence, mark, tail)
        equal(held(sequence)["values"], there["values"])
        equal(decode(engine, sequence, tokens(9, seed=2)), want)


@pytest.mark.slow
def test_saved_documents_and_conversations_hold_the_state(tmp_path: Path) -> None:
    base = saved_cases.tiny_engine(tmp_path / "model", budget=12)
    engine = base.with_policy(heavy_spec(tmp_path, base.model_config.geometry))
    document = engine.read(saved_cases.TEXT)
    document.save(tmp_path / "document")
    opened = engine.open(tmp_path / "document")
    equal(held(opened._held.sequence)["values"], held(document._held.sequence)["values"])
    some = SamplingConfig(max_new_tokens=20)
    talk = document.conversation()
    talk.ask("what did the cat do?", some)
    talk.save(tmp_path / "talk")
    want = talk.ask("and then?", some)
    again = opened.conversation(tmp_path / "talk")
    assert again.ask("and then?", some).token_ids == want.token_ids
    equal(held(opened._held.sequence)["values"], held(document._held.sequence)["values"])


def test_bytes_are_those_of_the_sums(spec: str) -> None:
    engine, plain = (tiny_engine(policy=each, budget=12) for each in (spec, "h2o"))
    heads = 2 * 2
    assert engine.policy.predict_evicted_summary_bytes(GEOMETRY) == heads * 8 * (16 + 1) * 4
    for count in (3, 45):  # also before anything is folded
        more = read(engine, tokens(count)).near_bytes - read(plain, tokens(count)).near_bytes
        assert more == engine.policy.predict_evicted_summary_bytes(GEOMETRY)
        assert engine.plan(count).near_kv_bytes - plain.plan(count).near_kv_bytes == more


def test_a_batch_of_ragged_lengths_equals_each_alone(spec: str) -> None:
    engine = tiny_engine(policy=spec, budget=12)
    prompts = [tokens(n, seed=n) for n in (4, 61, 30)]
    together = [read(engine, prompt) for prompt in prompts]
    steps = torch.stack([engine.step(together, [t] * 3) for t in tokens(20, seed=1).tolist()])
    for number, prompt in enumerate(prompts):
        alone = read(engine, prompt)
        close(steps[:, number], decode(engine, alone, tokens(20, seed=1)))
        close(held(together[number])["values"], held(alone)["values"])


def test_chunks_are_only_a_matter_of_memory(spec: str) -> None:
    """Of the first prompt, and of a second one whose queries read the state."""
    logits = []
    for chunk_tokens in (1000, 16, 7):
        engine = tiny_engine(policy=spec, budget=12, chunk_tokens=chunk_tokens)
        sequence = read(engine, tokens(61), read(engine, tokens(45)))
        logits.append(decode(engine, sequence, tokens(9, seed=1)))
    close(logits[1], logits[0])
    close(logits[2], logits[0])


def test_a_prompt_reads_the_state_as_steps_do(spec: str) -> None:
    engine = tiny_engine(policy=spec, budget=12)
    stepped, prompted = read(engine, tokens(45)), read(engine, tokens(45))
    for token in tokens(5, seed=1):
        decode(engine, stepped, token[None])
        read(engine, token[None], prompted)
    close(decode(engine, prompted, tokens(4)), decode(engine, stepped, tokens(4)))
    close(held(prompted)["values"], held(stepped)["values"])


def test_it_takes_what_h2o_takes_and_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a=b.safetensors"
    policy = create_policy(f"less:recent_share=0.25:maps={path}")
    assert policy == Less(recent_share=0.25, maps=str(path))
    with pytest.raises(InvalidOptionError, match=r"written less:key=value\. Got 'b'\.$"):
        create_policy("less:maps=a:b")


def test_making_a_policy_reads_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nearfar.policies.trained.safe_open", None)
    for name in ("less", "h2o", "sketch"):
        assert create_policy(name).name == name


def test_tensors_of_other_shapes_are_refused(tmp_path: Path) -> None:
    good, path = heavy_maps(GEOMETRY), tmp_path / "x"
    for changed, text in (
        ({"q_out": good["q_out"][..., :4]}, "q_out of [2, 6, 128, 8]. Got [2, 6, 128, 4]."),
        ({"k_mix": None}, "k_mix of [2, 2, 8, 8]. Got none."),
    ):
        tensors = {n: t for n, t in (good | changed).items() if t is not None}
        save_trained(path, "less", GEOMETRY, tensors, {}, overwrite=True)
        with pytest.raises(InvalidOptionError, match=re.escape(f"{path} must hold {text}")):
            tiny_engine(policy=f"less:maps={path}").new_sequence()


def test_another_model_is_refused_before_its_weights_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved_cases.tiny_engine(tmp_path / "model")
    monkeypatch.setattr("nearfar.runtime.checkpoints.model_source._FolderSource.load_weights", None)
    with pytest.raises(InvalidOptionError, match=r"^less was trained for a model of 30 layers, "):
        Engine.from_pretrained(str(tmp_path / "model"), policy="less", device="cpu")
