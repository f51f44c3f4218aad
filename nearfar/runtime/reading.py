"""A prompt that was read once, to be handed to sequences under any number of policies.

Every policy's prompt is read with exact attention, so its keys and values are the same under all of
them; reading is what a long context costs, and handing over is a copy. Policies that score tokens
by the attention they got need that too, which makes reading slower: `with_attention`.

Keys are held unrotated, because a policy may count positions in the cache; `give_to` turns them for
those that do not. A sequence that was given a reading equals, bit for bit, one that read the prompt
itself. Rows are in host memory; a reading that would not fit there, or is above the engine's cap of
far memory, is refused before it is made.
"""

from __future__ import annotations

import time

import torch

from nearfar.config import Budget, format_bytes
from nearfar.errors import OutOfMemoryError
from nearfar.policies.base import Policy, Traits
from nearfar.records import Geometry
from nearfar.runtime.accounting import memory_errors
from nearfar.runtime.engine import Engine
from nearfar.runtime.hardware import available_memory_bytes
from nearfar.runtime.ledger import Ledger
from nearfar.runtime.prefill import pieces, prefill
from nearfar.runtime.progress import Progress, silent
from nearfar.runtime.rope import Angles, rotate
from nearfar.runtime.sequence import Sequence, SequenceSettings

ROTATED_TOKENS = 16_384  # turned at a time: rotation computes in float32


class _Reader(Policy):
    """Keeps what it is given: the policy of a sequence that only reads."""

    name = "reader"
    traits = Traits("evicts", "reads", "", keeps_far=False, positions="cache-index")


class _ScoringReader(_Reader):
    """The same, told what attention each token got."""

    traits = Traits(
        "evicts", "reads", "", keeps_far=False, needs_attention=True, positions="cache-index"
    )


class _Recorder(Sequence):
    """A sequence without memory of its own: layers go to lists in host memory."""

    def __init__(self, engine: Engine, policy: Policy) -> None:
        model = engine.model_config
        settings = SequenceSettings(
            model.geometry, policy, Budget(1), 0, 1, torch.bfloat16, 0, engine.config.seed
        )
        super().__init__(settings, engine.decoder.weights.norm, Ledger())
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self.received: list[torch.Tensor | None] = []

    def absorb_prompt(
        self,
        layer: int,
        keys: torch.Tensor,
        values: torch.Tensor,
        received: torch.Tensor | None,
    ) -> None:
        """Keep a layer as it comes."""
        assert layer == len(self.keys)
        self.keys.append(keys.cpu().contiguous())
        self.values.append(values.cpu().contiguous())
        self.received.append(None if received is None else received.cpu())


class Reading:
    """Keys and values of one prompt in all layers. Made by `read_once`."""

    def __init__(self, engine: Engine, recorder: _Recorder, tokens: int, seconds: float) -> None:
        self._engine, self._recorder = engine, recorder
        self.tokens = tokens
        self.seconds = seconds  # that reading took
        self.num_bytes = reading_bytes(engine.model_config.geometry, engine.decoder.dtype, tokens)

    def give_to(self, sequence: Sequence) -> None:
        """Let ``sequence``, which is empty, take in the prompt as if it had read it."""
        decoder, recorder = self._engine.decoder, self._recorder
        device, scored = decoder.device, sequence.policy.traits.needs_attention
        with memory_errors():
            sequence.announce_prompt(self.tokens)
            for layer in range(decoder.config.layers):
                keys = recorder.keys[layer].to(device)
                if decoder.uses_rope(layer) and not sequence.counts_cache_slots:
                    keys = self._turned(keys)
                received = recorder.received[layer] if scored else None
                sequence.absorb_prompt(
                    layer,
                    keys,
                    recorder.values[layer].to(device),
                    None if received is None else received.to(device),
                )
        sequence.finish_step(self.tokens)

    def close(self) -> None:
        """Give the memory back."""
        self.num_bytes = 0
        for rows in (self._recorder.keys, self._recorder.values, self._recorder.received):
            rows.clear()

    def _turned(self, keys: torch.Tensor) -> torch.Tensor:
        """``keys`` [Hkv, N, D] rotated to their positions."""
        turned = torch.empty_like(keys)
        for rows in pieces(slice(0, self.tokens), ROTATED_TOKENS):
            positions = torch.arange(rows.start, rows.stop, device=keys.device)
            cos, sin = self._engine.decoder.rotary.angles(positions)
            turned[:, rows] = rotate(keys[:, rows], Angles(cos[None], sin[None]))
        return turned


def reading_bytes(geometry: Geometry, dtype: torch.dtype, tokens: int) -> int:
    """Bytes of the keys and values of ``tokens`` in all layers."""
    return geometry.layers * geometry.kv_heads * 2 * geometry.head_dim * tokens * dtype.itemsize


def read_once(
    engine: Engine, ids: list[int], *, with_attention: bool, progress: Progress = silent
) -> Reading:
    """Read the prompt ``ids`` for any policies of this model.

    Raises OutOfMemoryError where the keys and values do not fit the engine's far memory.
    """
    dtype = engine.decoder.dtype
    _require(reading_bytes(engine.model_config.geometry, dtype, len(ids)), engine)
    recorder = _Recorder(engine, _ScoringReader() if with_attention else _Reader())
    started = time.perf_counter()
    with memory_errors():
        tokens = torch.tensor(ids, device=engine.decoder.device)
        prefill(engine.decoder, recorder, tokens, engine.chunk_tokens, progress)
    return Reading(engine, recorder, len(ids), time.perf_counter() - started)


def _require(num_bytes: int, engine: Engine) -> None:
    have, cap = available_memory_bytes(), engine.config.far_memory_bytes
    allowed = have if cap is None else min(have, cap)
    if num_bytes > allowed:
        raise OutOfMemoryError(
            f"Keeping a prompt for several policies takes {format_bytes(num_bytes)}, and "
            f"{format_bytes(allowed)} of host memory are allowed. Raise --far-memory or give "
            "shorter contexts."
        )
