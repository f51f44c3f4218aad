"""Prefill and generation of token ids: one loaded model under one configuration.

It handles no text: `nearfar.runtime.engine.engine.Engine` adds texts, documents and files.
"""

from __future__ import annotations

import time
import weakref
from collections import abc
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from nearfar.config import EngineConfig, SamplingConfig
from nearfar.errors import InvalidOptionError
from nearfar.policies.registry import create_policy
from nearfar.progress import Progress
from nearfar.results import MemoryReport
from nearfar.runtime.engine.accounting import memory_errors, peak_gpu_bytes, peak_rss_bytes
from nearfar.runtime.engine.generation import GenerationState, decode_all
from nearfar.runtime.engine.planning.memory_plan import (
    MemoryPlan,
)
from nearfar.runtime.engine.planning.memory_setup import MemorySetup
from nearfar.runtime.engine.planning.room import Room
from nearfar.runtime.engine.workplace import Hands, in_turn
from nearfar.runtime.memory.hardware import default_threads
from nearfar.runtime.memory.host_memory import give_back_freed
from nearfar.runtime.memory.ledger import Ledger
from nearfar.runtime.memory.sequence import Sequence
from nearfar.runtime.memory.sequence_settings import SequenceSettings, settings_of
from nearfar.runtime.models.decoder import Decoder
from nearfar.runtime.models.weights import identity_of, total_bytes
from nearfar.runtime.saved.document_state import Model
from nearfar.runtime.steps.prefill import chunk_tokens_of, prefill
from nearfar.runtime.steps.stepping import Stepper
from nearfar.runtime.steps.timeline import Timeline
from nearfar.runtime.text.thoughts import ThoughtSplitter
from nearfar.runtime.text.token_range import check_token_ids
from nearfar.runtime.text.tokenizer import Tokenizer


class TokenEngine:
    """A model, a policy, and the near and far memory of their sequences."""

    def __init__(
        self,
        name: str,
        decoder: Decoder,
        tokenizer: Tokenizer | None,
        config: EngineConfig,
        identity: str | None = None,
    ) -> None:
        """``identity`` identifies the weights; None if they have no source."""
        self.model_name = name
        self.decoder = decoder
        self.model_config = decoder.plan  # sizes and limits of the model
        self.config = config
        self.policy = create_policy(config.policy)
        self.device = str(decoder.device)  # of near memory
        self.dtype = str(decoder.dtype).removeprefix("torch.")  # of weights and activations
        self.hands = Hands(config.threads or default_threads())
        place = (decoder.dtype, decoder.device)
        setup = MemorySetup(decoder.plan, config, self.policy, *place)
        self.room = Room(setup)
        self.chunk_tokens = chunk_tokens_of(config.chunk_tokens, decoder.device)  # of a prompt
        self.on_thought: Callable[[str], None] = lambda _: None  # called with pieces of a thought
        self._identity = identity
        self._tokenizer = tokenizer and tokenizer.with_thinking(config.thinking)
        self._ledger = Ledger(config.far_memory_bytes)
        self._sequences: weakref.WeakSet[Sequence] = weakref.WeakSet()
        self._stepper = Stepper.of(decoder, self.hands.threads, self.policy)
        # whether `traced_step` works: only on a GPU, and only if decode evicts nothing
        self.traces = self._stepper.by_micro_batches
        self._settings = settings_of(decoder, config, self.policy, setup.budget)
        weakref.finalize(self, self._stepper.close)

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer; InvalidOptionError for random weights, which have none."""
        if self._tokenizer is None:
            raise InvalidOptionError(
                "A model with random weights has no tokenizer and reads no text. Load a real one."
            )
        return self._tokenizer

    @property
    def model(self) -> Model:
        """Name and identity of the model; weights without a source are hashed for the identity."""
        if self._identity is None:
            self._identity = identity_of(self.model_config, self.decoder.weights)
        return Model(self.model_name, self._identity)

    def plan(self, context_tokens: int) -> MemoryPlan:
        """Predicted bytes of one context under this engine's policy."""
        return self.room.plan(context_tokens)

    def check_memory(self, context_tokens: int) -> None:
        """Raise OutOfMemoryError if one more context of ``context_tokens`` does not fit."""
        self.room.check(context_tokens)

    def report_of(self, sequences: abc.Sequence[Sequence]) -> MemoryReport:
        """Bytes of ``sequences`` and of the weights, and the peaks of the process."""
        return MemoryReport(
            total_bytes(self.decoder.weights),
            sum(sequence.near_bytes for sequence in sequences),
            sum(sequence.far.store.num_bytes for sequence in sequences),
            sum(sequence.far.index_bytes for sequence in sequences),
            peak_rss_bytes(),
            peak_gpu_bytes(self.decoder.device),
        )

    @in_turn
    def new_sequence(self, *, observed: bool = False) -> Sequence:
        """An empty sequence under this engine's policy.

        ``observed`` is for `decode_step` with an observer: the policy then selects on the host even
        if the GPU could.
        """
        settings = self.settings(observed=observed)
        return self.adopt(Sequence(settings, self._ledger))

    def settings(self, *, observed: bool = False) -> SequenceSettings:
        """The settings of `new_sequence`."""
        near_selection = self._stepper.by_micro_batches and not observed
        return replace(self._settings, near_selection=near_selection)

    def adopt(self, sequence: Sequence) -> Sequence:
        """Count a sequence as this engine's; its far memory is freed with it."""
        self._sequences.add(sequence)
        weakref.finalize(sequence, sequence.far.store.close)
        return sequence

    @in_turn
    def step(self, sequences: abc.Sequence[Sequence], token_ids: abc.Sequence[int]) -> torch.Tensor:
        """Logits [B, V] float32 after ``token_ids``, the newest token of each sequence."""
        return self._stepper.step(sequences, token_ids)

    @in_turn
    def traced_step(
        self, sequences: abc.Sequence[Sequence], token_ids: abc.Sequence[int]
    ) -> tuple[torch.Tensor, Timeline]:
        """`step`, and when each of its stages ran on GPU and host."""
        return self._stepper.traced_step(sequences, token_ids)

    def pieces(self, run: GenerationState, ids: list[int]) -> Iterator[str]:
        """Read a prompt, then yield text as tokens are generated."""
        self.check_ids(ids)
        decoder_stream = self.tokenizer.stream()
        with memory_errors():
            run.read_prompt(self.decoder, ids, self.chunk_tokens)
            for got in decode_all(self.decoder, self.step, [run]):
                if got and (piece := run.hear(decoder_stream.push(run.token_ids[-1]))):
                    yield piece
        if piece := run.hear(decoder_stream.finish(), last=True):
            yield piece
        give_back_freed()

    @in_turn
    def read_ids(self, sequence: Sequence, ids: list[int], progress: Progress) -> float:
        """Read ``ids`` into ``sequence``; return the seconds that it took."""
        started = time.perf_counter()
        self.check_ids(ids)
        if not ids:  # a document so short that later text may change all its tokens
            return 0.0
        with memory_errors():
            tensor = torch.tensor(ids, device=self.decoder.device)
            prefill(self.decoder, sequence, tensor, self.chunk_tokens, progress)
        return time.perf_counter() - started

    def new_run(
        self,
        sequence: Sequence,
        sampling: SamplingConfig,
        *,
        exact_prompt: bool = True,
        chat: bool = True,
    ) -> GenerationState:
        """A generation at the end of ``sequence``; ``exact_prompt``: its prompt reads all rows.

        With ``chat`` the text is an answer, before which a model may think.
        """
        stop_ids = frozenset(self.tokenizer.eos_token_ids) | set(self.model_config.eos_token_ids)
        run = GenerationState(sequence, sampling, stop_ids, None if exact_prompt else self.step)
        if chat:
            run.splitter = ThoughtSplitter(self.tokenizer.thought_of_prompt())
            run.on_thought = self.on_thought
        return run

    def check_ids(self, ids: list[int]) -> None:
        """Raise CheckpointError for a token without an embedding in the model."""
        check_token_ids(ids, self.model_config.vocab_size, self._tokenizer)
