"""The engine: a model, a policy, and the near and far memory of what they read.

>>> engine = Engine.from_pretrained()
>>> document = engine.read(text)
>>> document.ask("Who found the key?").text
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Several
from contextlib import ExitStack
from pathlib import Path
from typing import Any, overload

import torch

from nearfar.config import (
    DEFAULT_CONFIG,
    DEFAULT_MODEL,
    DEFAULT_SAMPLING,
    EngineConfig,
    SamplingConfig,
)
from nearfar.errors import InvalidOptionError
from nearfar.policies.registry import create_policy
from nearfar.progress import Progress, silent
from nearfar.results import Generation, MemoryReport
from nearfar.runtime.engine.accounting import memory_errors, peak_gpu_bytes, peak_rss_bytes
from nearfar.runtime.engine.document import Document
from nearfar.runtime.engine.generation import Run, check_room, decode_all, generation_of
from nearfar.runtime.engine.loading import (
    check_context,
    load_decoder,
    random_decoder,
    require_context,
)
from nearfar.runtime.engine.planner import (
    MemoryPlan,
    plan_memory,
)
from nearfar.runtime.engine.prepared import Prepared, prepare
from nearfar.runtime.engine.stream import TextStream
from nearfar.runtime.engine.workplace import Hands, in_turn
from nearfar.runtime.memory.hardware import default_threads
from nearfar.runtime.memory.host_memory import give_back_freed
from nearfar.runtime.memory.ledger import Ledger
from nearfar.runtime.memory.sequence import Sequence
from nearfar.runtime.memory.sequence_settings import SequenceSettings, settings_of
from nearfar.runtime.models.decoder import Decoder
from nearfar.runtime.models.plan import ModelPlan
from nearfar.runtime.models.weights import identity_of, total_bytes
from nearfar.runtime.saved.document_state import Held, Model
from nearfar.runtime.saved.read_document import (
    OpenedDocument,
    Reader,
    open_facts,
    read_document,
)
from nearfar.runtime.steps.prefill import chunk_tokens_of, prefill
from nearfar.runtime.steps.stepping import Stepper
from nearfar.runtime.steps.timeline import Timeline
from nearfar.runtime.text.chat import DocumentPrompt, document_prompt, prompt_ids
from nearfar.runtime.text.thoughts import ThoughtSplitter
from nearfar.runtime.text.token_range import check_token_ids
from nearfar.runtime.text.tokenizer import Tokenizer


class Engine:
    """A loaded model under one policy. Use `from_pretrained`."""

    def __init__(
        self,
        name: str,
        decoder: Decoder,
        tokenizer: Tokenizer | None,
        config: EngineConfig,
        identity: str | None = None,
    ) -> None:
        self.model_name = name
        self.config = config
        self._identity = identity
        self.decoder = decoder
        self.policy = create_policy(config.policy)
        self._tokenizer = tokenizer and tokenizer.with_thinking(config.thinking)
        self.on_thought: Callable[[str], None] = lambda _: None  # hears thoughts as they come
        self._ledger = Ledger(config.far_memory_bytes)
        self._sequences: weakref.WeakSet[Sequence] = weakref.WeakSet()
        self.hands = Hands(config.threads or default_threads())
        self._stepper = Stepper.of(decoder, self.hands.threads, self.policy)
        weakref.finalize(self, self._stepper.close)

    @classmethod
    def from_pretrained(
        cls,
        model: str = DEFAULT_MODEL,
        config: EngineConfig = DEFAULT_CONFIG,
        *,
        context_tokens: int | None = None,
        progress: Progress = silent,
        **settings: Any,
    ) -> Engine:
        """Load ``model``: a Hugging Face directory, a hub id, a GGUF file or a built-in name.

        ``settings`` are fields of EngineConfig and replace those of ``config``. Memory is planned
        for ``context_tokens`` (None: for the weights and a short text) before weights are loaded.
        Raises ModelError, InvalidOptionError or OutOfMemoryError.
        """
        config = config.replace(**settings)
        create_policy(config.policy)  # a wrong name must not cost a download
        prepared = prepare(model, progress=progress)
        return cls.from_prepared(prepared, config, context_tokens=context_tokens)

    @classmethod
    def from_prepared(
        cls,
        prepared: Prepared,
        config: EngineConfig = DEFAULT_CONFIG,
        *,
        context_tokens: int | None = None,
    ) -> Engine:
        """Load the weights of a prepared model, once it is known that the context fits."""
        decoder = load_decoder(prepared, config, context_tokens or 1)
        source = prepared.source
        return cls(source.name, decoder, prepared.tokenizer, config, source.identity)

    @classmethod
    def random(
        cls,
        model_config: ModelPlan,
        config: EngineConfig = DEFAULT_CONFIG,
        seed: int = 0,
        *,
        context_tokens: int | None = None,
        sequences: int = 1,
        reads: bool = True,
    ) -> Engine:
        """An engine with random weights and no tokenizer, to measure speed and memory.

        With ``context_tokens``, memory is planned first for so many ``sequences`` of them; without
        ``reads``, contexts are made and not read, and reading takes no memory.
        """
        if context_tokens is not None:
            require_context(model_config, config, context_tokens, sequences, reads=reads)
        return cls("random weights", random_decoder(model_config, config, seed), None, config)

    @property
    def model_config(self) -> ModelPlan:
        """Sizes and limits of the model."""
        return self.decoder.plan

    @property
    def model(self) -> Model:
        """Name and identity of the model; weights that have no source are hashed for it."""
        if self._identity is None:
            self._identity = identity_of(self.model_config, self.decoder.weights)
        return Model(self.model_name, self._identity)

    @property
    def device(self) -> str:
        """Where near lives."""
        return str(self.decoder.device)

    @property
    def dtype(self) -> str:
        """Of weights and activations."""
        return str(self.decoder.dtype).removeprefix("torch.")

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer; InvalidOptionError for random weights, which have none."""
        if self._tokenizer is None:
            raise InvalidOptionError(
                "A model with random weights has no tokenizer and reads no text. Load a real one."
            )
        return self._tokenizer

    def with_config(self, config: EngineConfig) -> Engine:
        """The same weights under other settings; type and device of the weights stay."""
        same = config.replace(dtype=self.config.dtype, device=self.config.device)
        return Engine(self.model_name, self.decoder, self._tokenizer, same, self._identity)

    def with_policy(self, policy: str) -> Engine:
        """The same weights under another policy, ``name`` or ``name:key=value``."""
        return self.with_config(self.config.replace(policy=policy))

    def plan(self, context_tokens: int) -> MemoryPlan:
        """Predicted bytes of one context under this engine's policy."""
        place = (self.decoder.dtype, context_tokens, self.decoder.device)
        return plan_memory(self.model_config, self.config, self.policy, *place)

    def check_memory(self, context_tokens: int, mapped_bytes: int | None = None) -> None:
        """Raise OutOfMemoryError if one more context of ``context_tokens`` does not fit.

        With ``mapped_bytes``, it is one that was read and has so many far bytes in a file.
        """
        check_context(self.decoder, self.config, self.plan, context_tokens, mapped_bytes)

    @in_turn
    def read(self, text: str | DocumentPrompt, *, progress: Progress = silent) -> Document:
        """Read a document with exact attention, to be asked about any number of times.

        ``text`` may be what `Prepared.document_prompt` made of it, which is then not tokenized
        again. ``progress`` is told how many of the model's layers have read it. Raises
        DocumentError, ContextTooLongError or OutOfMemoryError.
        """
        prompt = document_prompt(self.tokenizer, text)
        self._check_ids(prompt.prefix_ids)
        check_room(self.decoder, 0, len(prompt.prefix_ids))
        self.check_memory(len(prompt.prefix_ids))
        sequence = self.new_sequence()
        try:
            seconds = self.read_ids(sequence, prompt.prefix_ids, progress)
            return Document(self, Held(prompt, sequence, seconds))
        except BaseException:
            sequence.close()
            raise

    @in_turn
    def open(self, path: str | Path | OpenedDocument, *, progress: Progress = silent) -> Document:
        """Open a document that was saved; its keys and values stay in the file and are shared.

        Sinks, window and far rows are as it was read. An index that the file lacks is made from the
        keys; ``progress`` counts layers that have it. Raises SavedDocumentError.
        """
        with memory_errors():
            opened = path if isinstance(path, OpenedDocument) else open_facts(Path(path))
            held = read_document(opened, self._reader, progress)
        self._register(held.sequence)
        return Document(self, held)

    @in_turn
    def stream(
        self, prompt: str, sampling: SamplingConfig = DEFAULT_SAMPLING, *, chat: bool = False
    ) -> TextStream[Generation]:
        """Continue ``prompt`` (with ``chat``, answer it) piece by piece."""
        ids = prompt_ids(self.tokenizer, prompt, chat)
        run = self.new_run(self.new_sequence(), sampling, chat=chat)

        def finish(text: str) -> Generation:
            run.sequence.close()
            return generation_of(run, text)

        return TextStream(self.hands, self.pieces(run, ids), finish, run.sequence.close)

    @overload
    def generate(
        self, prompt: str, sampling: SamplingConfig = ..., *, chat: bool = ...
    ) -> Generation: ...
    @overload
    def generate(
        self, prompt: list[str], sampling: SamplingConfig = ..., *, chat: bool = ...
    ) -> list[Generation]: ...
    def generate(
        self,
        prompt: str | list[str],
        sampling: SamplingConfig = DEFAULT_SAMPLING,
        *,
        chat: bool = False,
    ) -> Generation | list[Generation]:
        """Continue one prompt or several of any lengths; several are decoded together.

        Each sequence has its own near and far memory and, with a temperature above 0, its own
        draws: the same text whether generated alone or beside others.
        """
        if isinstance(prompt, str):
            return self.stream(prompt, sampling, chat=chat).result
        return self._generate_together(prompt, sampling, chat)

    @in_turn
    def _generate_together(
        self, prompts: list[str], sampling: SamplingConfig, chat: bool
    ) -> list[Generation]:
        with ExitStack() as closed, memory_errors():
            runs = []
            for text in prompts:
                run = self.new_run(self.new_sequence(), sampling, chat=chat)
                closed.callback(run.sequence.close)
                ids = prompt_ids(self.tokenizer, text, chat)
                self._check_ids(ids)
                run.read_prompt(self.decoder, ids, self.chunk_tokens)
                runs.append(run)
            for _ in decode_all(self.decoder, self.step, runs):
                pass
            return [generation_of(run, self._text_of(run)) for run in runs]

    @in_turn
    def memory_report(self) -> MemoryReport:
        """Bytes held by this engine and all that it has read and not dropped."""
        return self.report_of(list(self._sequences))

    def report_of(self, sequences: Several[Sequence]) -> MemoryReport:
        """Bytes held by ``sequences``, beside those of the weights and the process's peaks."""
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

        ``observed``: for `decode_step` and its observers, so that a policy
        selects on the host also where a GPU could.
        """
        settings = self._settings(observed=observed)
        return self._register(Sequence(settings, self.decoder.norm, self._ledger))

    def _settings(self, *, observed: bool = False) -> SequenceSettings:
        near_selection = self._stepper.by_lanes and not observed
        return settings_of(self.decoder, self.config, self.policy, near_selection=near_selection)

    @property
    def _reader(self) -> Reader:
        made_with = (self._settings(), self.decoder.norm, self._ledger)
        return Reader(self.model, self.tokenizer, *made_with, self.check_memory)

    def _register(self, sequence: Sequence) -> Sequence:
        self._sequences.add(sequence)
        weakref.finalize(sequence, sequence.far.store.close)
        return sequence

    @in_turn
    def step(self, sequences: Several[Sequence], token_ids: Several[int]) -> torch.Tensor:
        """Logits [B, V] float32 after ``token_ids``, the newest token of each sequence."""
        return self._stepper.step(sequences, token_ids)

    @property
    def traces(self) -> bool:
        """Whether `traced_step` can tell stages apart: on a GPU, where nothing is evicted."""
        return self._stepper.by_lanes

    @in_turn
    def traced_step(
        self, sequences: Several[Sequence], token_ids: Several[int]
    ) -> tuple[torch.Tensor, Timeline]:
        """`step`, and when each of its stages ran on GPU and host."""
        return self._stepper.traced_step(sequences, token_ids)

    def pieces(self, run: Run, ids: list[int]) -> Iterator[str]:
        """Read a prompt, then yield text as its tokens come."""
        self._check_ids(ids)
        decoder_stream = self.tokenizer.stream()
        with memory_errors():
            run.read_prompt(self.decoder, ids, self.chunk_tokens)
            for got in decode_all(self.decoder, self.step, [run]):
                if got and (piece := run.hear(decoder_stream.push(run.token_ids[-1]))):
                    yield piece
        if piece := run.hear(decoder_stream.finish(), last=True):
            yield piece
        give_back_freed()

    def _text_of(self, run: Run) -> str:
        return run.hear(self.tokenizer.decode(run.token_ids), last=True)

    @in_turn
    def read_ids(self, sequence: Sequence, ids: list[int], progress: Progress) -> float:
        """Read ``ids`` into ``sequence``; seconds that it took."""
        started = time.perf_counter()
        self._check_ids(ids)
        if not ids:  # a document so short that every token may still join what follows
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
    ) -> Run:
        """A generation after what ``sequence`` has read; its prompt attends to all of it or not.

        With ``chat`` it is an answer, before which a model may think.
        """
        stop_ids = frozenset(self.tokenizer.eos_token_ids) | set(self.model_config.eos_token_ids)
        run = Run(sequence, sampling, stop_ids, None if exact_prompt else self.step)
        if chat:
            run.splitter = ThoughtSplitter(self.tokenizer.thought_of_prompt())
            run.on_thought = self.on_thought
        return run

    @property
    def chunk_tokens(self) -> int:
        """Prompt tokens that attend together."""
        return chunk_tokens_of(self.config.chunk_tokens, self.decoder.device)

    def _check_ids(self, ids: list[int]) -> None:
        """Raise CheckpointError for a token that the model has no embedding for."""
        check_token_ids(ids, self.model_config.vocab_size, self._tokenizer)
