from __future__ import annotations

import torch
from tiny_engine import read, tiny_engine, tokens

from nearfar.runtime.steps.attention import attend
from nearfar.runtime.steps.decode import Attended, decode_step


def test_an_observer_sees_every_attention_and_changes_nothing_by_passing_it_on() -> None:
    engine = tiny_engine(policy="sketch", budget=20)
    ids = tokens(2, seed=1)
    plain = decode_step(engine.decoder, [read(engine, tokens(90)), read(engine, tokens(120))], ids)
    sequences = [read(engine, tokens(90)), read(engine, tokens(120))]
    seen: list[Attended] = []

    def look(attended: Attended) -> torch.Tensor:
        again = attend(attended.layer, attended.query, attended.sequence, engine.decoder)
        assert torch.equal(again.out, attended.partial.out)  # the same query, the same keys
        seen.append(attended)
        return attended.partial.out

    assert torch.equal(decode_step(engine.decoder, sequences, ids, look), plain)
    layers = engine.model_config.geometry.layers
    assert [(each.layer, each.sequence) for each in seen] == [
        (layer, sequence) for layer in range(layers) for sequence in sequences
    ]
    assert seen[0].query.shape == seen[0].partial.out.shape == (6, 16)
    assert seen[0].query.dtype == torch.float32


def test_what_an_observer_returns_goes_on() -> None:
    """A forgetful policy that is given exact outputs goes the exact way."""
    exact = tiny_engine(policy="full")
    ids = tokens(9, seed=1)[:, None]
    outputs: list[torch.Tensor] = []

    def keep(attended: Attended) -> torch.Tensor:
        outputs.append(attended.partial.out.clone())
        return attended.partial.out

    sequence = read(exact, tokens(150))
    want = torch.cat([decode_step(exact.decoder, [sequence], one, keep) for one in ids])
    engine = tiny_engine(policy="h2o", budget=5)
    sequence = read(engine, tokens(150))
    waiting = iter(outputs)
    got = torch.cat(
        [decode_step(engine.decoder, [sequence], one, lambda _: next(waiting)) for one in ids]
    )
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
