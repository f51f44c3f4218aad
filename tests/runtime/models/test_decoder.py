"""A dense forward made of the decoder's pieces gives transformers' logits, for every family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import MODELS, build, reference_logits

from nearfar.runtime.checkpoints.checkpoint import load_directory
from nearfar.runtime.models.decoder import Decoder
from nearfar.runtime.models.layers import Attention
from nearfar.runtime.models.rope import rotate

CPU = torch.device("cpu")
TOKENS = torch.randint(0, 101, (29,), generator=torch.Generator().manual_seed(3))


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal attention [T, Hq D] of q [T, Hq, D] over k and v [T, Hkv, D]."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    logits = torch.einsum("thd,nhd->htn", q.float(), k.float()) * scale
    hidden_keys = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
    weights = logits.masked_fill(hidden_keys, -torch.inf).softmax(-1).to(v.dtype)
    return torch.einsum("htn,nhd->thd", weights, v).reshape(len(q), -1)


def dense_logits(decoder: Decoder, token_ids: torch.Tensor, rotate_at_once: bool) -> torch.Tensor:
    angles = decoder.angles(torch.arange(len(token_ids)))

    def mixed(mixer: Attention, qkv: torch.Tensor) -> torch.Tensor:
        own = angles[mixer.far_layer]
        q, k, v = mixer.heads(qkv, own if rotate_at_once else None)
        if own is not None and not rotate_at_once:
            q, k = rotate(q, own), rotate(k, own)
        return attend(q, k, v, mixer.plan.scale)

    return decoder.logits(decoder.run(decoder.embed(token_ids), mixed))


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    return Decoder(*load_directory(folder, dtype, CPU))


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    model = build(name, tmp_path)
    decoder = load(tmp_path)
    expected = reference_logits(model, TOKENS)
    assert expected.std() > 0.5
    for rotate_at_once in (False, True):
        logits = dense_logits(decoder, TOKENS, rotate_at_once)
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    assert decoder.plan.parameter_count() == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "smollm3"])
def test_untied_and_tied_are_both_possible(name: str, tmp_path: Path) -> None:
    tied = not MODELS[name][1].get("tie_word_embeddings", False)
    model = build(name, tmp_path, tie_word_embeddings=tied)
    decoder = load(tmp_path)
    assert (decoder.head.weight is decoder.embedding) == tied
    logits = dense_logits(decoder, TOKENS, rotate_at_once=True)
    torch.testing.assert_close(logits, reference_logits(model, TOKENS), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mistral", {"sliding_window": 11}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 11, "max_window_layers": 1}),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 11}),
    ],
)
def test_sliding_windows_agree_up_to_the_context_and_no_further(
    name: str, changes: dict[str, int], tmp_path: Path
) -> None:
    model = build(name, tmp_path, **changes)
    decoder = load(tmp_path)
    context = decoder.plan.max_context_tokens
    assert context == 11
    logits, expected = dense_logits(decoder, TOKENS, True), reference_logits(model, TOKENS)
    torch.testing.assert_close(logits[:context], expected[:context], rtol=0, atol=1e-4)
    assert (logits[context:] - expected[context:]).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["llama3", "qwen2", "qwen3"])
def test_bfloat16_stays_near_float32(name: str, tmp_path: Path) -> None:
    model = build(name, tmp_path)
    decoder = load(tmp_path, torch.bfloat16)
    assert decoder.embed(TOKENS).dtype == torch.bfloat16
    logits = dense_logits(decoder, TOKENS, rotate_at_once=True)
    expected = reference_logits(model, TOKENS)
    error = (logits - expected).square().mean().sqrt() / expected.std()
    theirs = reference_logits(model.bfloat16(), TOKENS)
    their_error = (theirs - expected).square().mean().sqrt() / expected.std()
    assert logits.dtype == torch.float32
    assert error < 1.5 * their_error


def test_shapes_of_one_token_and_of_none(tmp_path: Path) -> None:
    build("llama-biased", tmp_path)
    decoder = load(tmp_path)
    for count in (1, 0):
        angles = decoder.angles(torch.arange(count))

        def queries(mixer: Attention, qkv: torch.Tensor) -> torch.Tensor:
            q, k, v = mixer.heads(qkv, angles[mixer.far_layer])  # noqa: B023
            assert q.shape == (count, 6, 10)  # noqa: B023
            assert k.shape == v.shape == (count, 2, 10)  # noqa: B023
            return q.reshape(count, 60)  # noqa: B023

        hidden = decoder.run(decoder.embed(TOKENS[:count]), queries)
        assert hidden.shape == (count, 36)
        assert decoder.logits(hidden).shape == (count, 101)


def test_a_layer_leaves_what_attention_gave_alone(tmp_path: Path) -> None:
    build("llama3", tmp_path)
    decoder = load(tmp_path)
    given = torch.randn(len(TOKENS), 6 * 16)
    before, logits = given.clone(), []
    for _ in range(2):
        hidden = decoder.run(decoder.embed(TOKENS), lambda *_: given)
        logits.append(decoder.logits(hidden))
        assert torch.equal(given, before)
    assert torch.equal(*logits)
