"""A prompt that is prefilled once and copied to sequences under any number of policies.

Every policy's prompt is read with exact attention, so its keys and values are the same under all of
them. Prefill is the cost of a long context; the copy is cheap. All statistics that a policy may
need are recorded during prefill. Sums of the attention that each token gets make it slower and are
recorded only with `with_attention`.

Keys are held unrotated, because some policies rotate by cache slots; `give_to` rotates them for the
others. The sequence then equals, bit for bit, one that read the prompt itself. Rows are in host
memory. A prefill that would not fit there, or would exceed the engine's cap on far memory, is
refused before it starts.
"""

from __future__ import annotations

import time

import torch

from nearfar.config import Budget, format_bytes, generator_seed
from nearfar.errors import OutOfMemoryError
from nearfar.policies.base import Moments, Policy, PromptQueryStats, Traits, Watched
from nearfar.progress import Progress, silent
from nearfar.records import Geometry
from nearfar.runtime.engine.accounting import memory_errors
from nearfar.runtime.engine.token_engine import TokenEngine
from nearfar.runtime.memory.hardware import available_memory_bytes
from nearfar.runtime.memory.ledger import Ledger
from nearfar.runtime.memory.sequence import Sequence
from nearfar.runtime.memory.sequence_settings import SequenceSettings
from nearfar.runtime.models.linear import pieces
from nearfar.runtime.models.rope import Angles, Rotary, rotate
from nearfar.runtime.steps.prefill import prefill

ROTATED_TOKENS = 16_384  # rotated at a time: rotation computes in float32


class _Reader(Policy):
    """Keeps all rows: the policy of a sequence that only reads."""

    name = "reader"
    traits = Traits("evicts", "reads", "", keeps_far=False, positions="cache-index")


class _Recorder(Sequence):
    """A sequence without memory of its own: it appends layers to lists in host memory."""

    def __init__(self, engine: TokenEngine, watched: tuple[Watched, ...]) -> None:
        model = engine.model_config
        seed = generator_seed(engine.config.seed)
        place = (engine.decoder.dtype, engine.decoder.device)
        settings = SequenceSettings(
            model.geometry, _Reader(), Budget(1), 0, 1, torch.bfloat16, 0, seed, *place
        )
        super().__init__(settings, Ledger())
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self.stats: list[PromptQueryStats] = []
        self._watched = watched

    @property
    def watched(self) -> tuple[Watched, ...]:
        """All statistics that a receiving policy may need."""
        return self._watched

    def absorb_prompt(
        self,
        layer: int,
        keys: torch.Tensor,
        values: torch.Tensor,
        stats: PromptQueryStats | None = None,
    ) -> None:
        """Keep the keys, values and statistics of a layer."""
        assert layer == len(self.keys)
        self.keys.append(keys.cpu().contiguous())
        self.values.append(values.cpu().contiguous())
        assert stats is not None
        self.stats.append(_moved(stats, torch.device("cpu")))


class SharedPrefill:
    """Keys and values of one prompt in all layers. Made by `prefill_once`."""

    def __init__(
        self, engine: TokenEngine, recorder: _Recorder, tokens: int, seconds: float
    ) -> None:
        self._engine, self._recorder = engine, recorder
        self.tokens = tokens
        self.seconds = seconds  # of prefill
        self.num_bytes = shared_prefill_bytes(
            engine.model_config.geometry, engine.decoder.dtype, tokens
        )

    def give_to(self, sequence: Sequence) -> None:
        """Copy the prompt to ``sequence``, which must be empty, as if it had read it."""
        decoder, recorder = self._engine.decoder, self._recorder
        device, watches = decoder.device, bool(sequence.watched)
        with memory_errors():
            sequence.announce_prompt(self.tokens)
            for layer in range(sequence.settings.geometry.layers):
                keys = recorder.keys[layer].to(device)
                if decoder.uses_rope(layer) and not sequence.settings.counts_cache_slots:
                    keys = self._turned(keys, decoder.rotary(layer))
                stats = _moved(recorder.stats[layer], device) if watches else None
                values = recorder.values[layer].to(device)
                sequence.absorb_prompt(layer, keys, values, stats)
        sequence.finish_step(self.tokens)

    def close(self) -> None:
        """Give the memory back."""
        self.num_bytes = 0
        for rows in (self._recorder.keys, self._recorder.values, self._recorder.stats):
            rows.clear()

    def _turned(self, keys: torch.Tensor, rotary: Rotary) -> torch.Tensor:
        """``keys`` [Hkv, N, D] rotated to their positions."""
        turned = torch.empty_like(keys)
        for rows in pieces(slice(0, self.tokens), ROTATED_TOKENS):
            positions = torch.arange(rows.start, rows.stop, device=keys.device)
            cos, sin = rotary.angles(positions)
            turned[:, rows] = rotate(keys[:, rows], Angles(cos[None], sin[None]))
        return turned


def _moved(stats: PromptQueryStats, device: torch.device) -> PromptQueryStats:
    """The same on another device."""
    moments = stats.moments
    return PromptQueryStats(
        stats.angles,
        None if stats.sums is None else stats.sums.to(device),
        None if stats.last is None else stats.last.to(device),
        None if moments is None else Moments(*(each.to(device) for each in moments)),
    )


def shared_prefill_bytes(geometry: Geometry, dtype: torch.dtype, tokens: int) -> int:
    """Bytes of the keys and values of ``tokens`` in all layers."""
    return geometry.layers * geometry.kv_heads * 2 * geometry.head_dim * tokens * dtype.itemsize


def prefill_once(
    engine: TokenEngine, ids: list[int], *, with_attention: bool, progress: Progress = silent
) -> SharedPrefill:
    """Prefill the prompt ``ids`` for any policies of this model.

    Raises OutOfMemoryError if the keys and values do not fit the engine's far memory.
    """
    dtype = engine.decoder.dtype
    _require(shared_prefill_bytes(engine.model_config.geometry, dtype, len(ids)), engine)
    sums: tuple[Watched, ...] = ("sums",) if with_attention else ()
    recorder = _Recorder(engine, ("last", "moments", *sums))
    started = time.perf_counter()
    with memory_errors():
        tokens = torch.tensor(ids, device=engine.decoder.device)
        prefill(engine.decoder, recorder, tokens, engine.chunk_tokens, progress)
    return SharedPrefill(engine, recorder, len(ids), time.perf_counter() - started)


def _require(num_bytes: int, engine: TokenEngine) -> None:
    have, cap = available_memory_bytes(), engine.config.far_memory_bytes
    allowed = have if cap is None else min(have, cap)
    if num_bytes > allowed:
        raise OutOfMemoryError(
            f"Keeping a prompt for several policies takes {format_bytes(num_bytes)}, and "
            f"{format_bytes(allowed)} of host memory are allowed. Raise --far-memory or give "
            "shorter contexts."
        )
