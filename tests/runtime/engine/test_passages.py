"""Which passages an answer is from: attention that is noted is the attention that was paid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from saved_cases import NINE, QUESTION, TEXT, tiny_engine
from specs import LSH
from tiny_engine import tiny_engine as random_engine
from tiny_engine import tokens

from nearfar.config import SamplingConfig
from nearfar.errors import InvalidOptionError
from nearfar.runtime.engine.engine import Engine
from nearfar.runtime.engine.passages import AttentionRecorder, best_passages
from nearfar.runtime.models.layers import Attention
from nearfar.runtime.steps.decode import decode_step
from nearfar.runtime.steps.prefill import prefill
from nearfar.runtime.text.text_files import document_text, join_documents
from nearfar.runtime.text.text_origins import Text

LONG = SamplingConfig(max_new_tokens=30)
FAR = ["sketch", "sketch:per=head", "full-far", "topk-oracle", LSH]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return tiny_engine(tmp_path_factory.mktemp("model"))


def exact_attention(engine: Engine, ids: torch.Tensor, steps: torch.Tensor) -> np.ndarray[Any, Any]:
    """Attention [steps, tokens] of decoded ``steps`` to ``ids``, summed over layers and heads."""
    sequence = engine.new_sequence()
    prefill(engine.decoder, sequence, ids, 4096)
    noted = np.zeros((len(steps), len(ids)))
    keys: list[torch.Tensor] = [sequence.near[i].keys.clone() for i in range(2)]
    for number, token in enumerate(steps):
        queries: list[torch.Tensor] = []
        heads = Attention.heads

        def spy(mixer: Attention, qkv: Any, angles: Any = None) -> Any:
            q, k, v = heads(mixer, qkv, angles)  # noqa: B023
            queries.append(q[0].float() * mixer.plan.scale)  # noqa: B023
            layer = mixer.far_layer
            keys[layer] = torch.cat([keys[layer], k[0][:, None]], 1)
            return q, k, v

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Attention, "heads", spy)
            decode_step(engine.decoder, [sequence], token[None])
        for layer, query in enumerate(queries):
            Hkv = keys[layer].shape[0]
            logits = query.view(Hkv, -1, query.shape[1]) @ keys[layer].transpose(1, 2)
            noted[number] += logits.softmax(-1).sum((0, 1)).numpy()[: len(ids)]
    return noted


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["full-far", "sketch", "topk-oracle", LSH])
def test_with_every_key_read_the_trace_is_exact_attention(policy: str) -> None:
    ids, steps = tokens(150), tokens(70, seed=1)  # tokens leave the window on the way
    wanted = exact_attention(random_engine(policy="full"), ids, steps)
    engine = random_engine(policy=policy, budget=100_000)
    sequence = engine.new_sequence()
    prefill(engine.decoder, sequence, ids, 4096)
    trace = AttentionRecorder(sequence, 150, 150)
    sequence.far.tracer = trace
    for token in steps:
        decode_step(engine.decoder, [sequence], token[None])
    heads = engine.model_config.geometry.layers * engine.model_config.geometry.query_heads
    np.testing.assert_allclose(trace.attention, wanted / heads, rtol=2e-3, atol=1e-5)


@pytest.mark.slow
def test_what_is_drawn_stands_for_its_like() -> None:
    """Of a random selection, the attention to a passage is right on average."""
    ids, steps = tokens(900), tokens(1, seed=1)
    wanted = exact_attention(random_engine(policy="full"), ids, steps)[0]
    third = slice(300, 600)
    got = []
    for seed in range(60):
        engine = random_engine(policy="sketch", budget=100, seed=seed)
        sequence = engine.new_sequence()
        prefill(engine.decoder, sequence, ids, 4096)
        trace = AttentionRecorder(sequence, 900, 900)
        sequence.far.tracer = trace
        decode_step(engine.decoder, [sequence], steps)
        got.append(trace.attention[0, third].sum() * 12)
    mean, spread = np.mean(got), np.std(got) / 60**0.5
    assert abs(mean - wanted[third].sum()) < 4 * spread + 0.01 * wanted[third].sum()


@pytest.mark.parametrize("policy", FAR)
@pytest.mark.parametrize("reading", ["exact", "policy"])
def test_answers_are_the_same_with_sources_and_without(
    base: Engine, policy: str, reading: Any
) -> None:
    document = base.with_policy(policy).read(TEXT)
    plain = document.ask(QUESTION, LONG, reading=reading)
    named = document.ask(QUESTION, LONG, reading=reading, sources=4)
    assert named.token_ids == plain.token_ids
    assert named.far_bytes_read_per_token == plain.far_bytes_read_per_token
    assert 1 <= len(named.passages) <= 4
    assert plain.passages == ()
    assert document.ask(QUESTION, LONG, reading=reading).token_ids == plain.token_ids


def test_passages_are_in_their_files(base: Engine, tmp_path: Path) -> None:
    files = {
        "a.txt": TEXT.replace(" house", " house.\r\n"),
        "b.txt": "the cat ran. a red house sat.",
    }
    text = join_documents(
        [(name, document_text(words.encode(), name)) for name, words in files.items()]
    )
    document = base.read(text)
    document.save(tmp_path / "a")
    for each in (document, base.open(tmp_path / "a")):
        passages = each.ask(QUESTION, NINE, sources=50).passages
        assert len(passages) > 5
        assert {passage.source for passage in passages} <= {"a.txt", "b.txt", "text"}
        for passage in passages:
            if passage.source in files:
                found = files[passage.source][passage.start : passage.stop]
                assert found.replace("\r\n", "\n") == passage.text == passage.text.strip() != ""
        weights = [passage.weight for passage in passages]
        assert weights == sorted(weights, reverse=True)
        assert 0 < sum(weights) < 1


def test_in_a_conversation_and_after_extending(base: Engine) -> None:
    document = base.read(TEXT)
    talk = document.conversation()
    talk.ask(QUESTION, NINE)
    named = talk.ask("and then?", NINE, sources=2)
    other = base.read(TEXT).conversation()
    other.ask(QUESTION, NINE)
    assert named.token_ids == other.ask("and then?", NINE).token_ids
    assert len(named.passages) == 2
    document.extend("the cat sat under a red house.")
    assert document.ask(QUESTION, NINE, sources=1).passages[0].text in document._held.prompt.text


def test_nothing_is_far_under_such_a_policy(base: Engine) -> None:
    document = base.with_policy("h2o").read(TEXT)
    message = (
        r"^Under h2o no key is far, so none is retrieved and an answer has no sources\. Choose "
        r"another --policy\.$"
    )
    with pytest.raises(InvalidOptionError, match=message):
        document.ask(QUESTION, NINE, sources=1)
    with pytest.raises(InvalidOptionError, match=r"^sources must be 0 or more\. Got -1\.$"):
        document.ask(QUESTION, NINE, sources=-1)
    with pytest.raises(InvalidOptionError, match=r"or through the 'policy'\. Got 'no'"):
        document.ask(QUESTION, NINE, reading="no")  # type: ignore[arg-type]


def test_an_answer_of_one_token_has_sources(base: Engine) -> None:
    document = base.read(TEXT)
    assert document.ask(QUESTION, SamplingConfig(max_new_tokens=1), sources=1).passages


def spans_of(text: str) -> np.ndarray[Any, np.dtype[np.int32]]:
    """A token a character."""
    return np.array([(i, i + 1) for i in range(len(text))], np.int32).reshape(-1, 2)


def test_what_stands_out_counts_and_not_what_always_gets_attention() -> None:
    text = Text("First words. The code is 7. Nothing here.\n\nLast line")
    attention = np.zeros((4, len(text)), np.float32)
    attention[:, 3] = 0.5  # whatever is asked
    attention[1, text.index("7")] = 0.2
    attention[2, text.index("N")] = 0.1
    best = best_passages(text, spans_of(text), attention, 3)
    assert [passage.text for passage in best] == ["The code is 7.", "Nothing here."]
    assert [passage.weight for passage in best] == pytest.approx([0.05, 0.025])
    assert (best[0].source, best[0].start, best[0].stop) == ("text", 13, 27)


def test_passages_are_short() -> None:
    rng = np.random.default_rng(0)
    for text in ("word " * 300, "x" * 1000, "a. " * 500, "", "\n\n \n", "no end"):
        attention = rng.random((3, len(text))).astype(np.float32)
        passages = best_passages(Text(text), spans_of(text), attention, 10_000)
        assert all(0 < len(passage.text) <= 400 for passage in passages if text.strip())
        covered = sum(len(passage.text.replace(" ", "")) for passage in passages)
        assert covered == len(text.replace(" ", "").replace("\n", ""))


def test_few_steps() -> None:
    text = Text("One. Two.")
    assert best_passages(text, spans_of(text), np.zeros((0, 9), np.float32), 3) == ()
    once = np.zeros((1, 9), np.float32)
    once[0, 6] = 1
    assert [passage.text for passage in best_passages(text, spans_of(text), once, 3)] == ["Two."]
    # tokens of no character are words around the document
    assert best_passages(text, spans_of(text) * 0, once, 3) == ()
