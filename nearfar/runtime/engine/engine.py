"""The engine: a model, a policy, and the near (GPU) and far (host) memory of its texts.

>>> engine = Engine.from_pretrained()
>>> document = engine.read(text)
>>> document.ask("Who found the key?").text
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any, overload

from nearfar.config import (
    DEFAULT_CONFIG,
    DEFAULT_MODEL,
    DEFAULT_SAMPLING,
    EngineConfig,
    SamplingConfig,
)
from nearfar.policies.registry import create_policy
from nearfar.progress import Progress, silent
from nearfar.results import Generation, MemoryReport
from nearfar.runtime.engine.accounting import memory_errors
from nearfar.runtime.engine.document import Document
from nearfar.runtime.engine.generation import check_room, decode_all, generation_of
from nearfar.runtime.engine.loading import (
    load_decoder,
    random_decoder,
    require_context,
)
from nearfar.runtime.engine.prepared import Prepared, prepare
from nearfar.runtime.engine.stream import TextStream
from nearfar.runtime.engine.token_engine import TokenEngine
from nearfar.runtime.engine.workplace import in_turn
from nearfar.runtime.models.plan import ModelPlan
from nearfar.runtime.saved.document_state import DocumentState
from nearfar.runtime.saved.opened import OpenedDocument, open_facts
from nearfar.runtime.saved.read_document import Reader, read_document
from nearfar.runtime.text.chat import DocumentPrompt, document_prompt, prompt_ids


class Engine(TokenEngine):
    """A loaded model under one policy. Use `from_pretrained`."""

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
        """Load the weights of a prepared model, after a check that the context fits."""
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

        With ``context_tokens``, memory is planned first for that many tokens in each of
        ``sequences`` sequences. Without ``reads`` the plan has no prefill: contexts are generated.
        """
        if context_tokens is not None:
            require_context(model_config, config, context_tokens, sequences, reads=reads)
        return cls("random weights", random_decoder(model_config, config, seed), None, config)

    def with_config(self, config: EngineConfig) -> Engine:
        """The same weights under other settings; type and device of the weights do not change."""
        same = config.replace(dtype=self.config.dtype, device=self.config.device)
        return Engine(self.model_name, self.decoder, self._tokenizer, same, self._identity)

    def with_policy(self, policy: str) -> Engine:
        """The same weights under another policy, ``name`` or ``name:key=value``."""
        return self.with_config(self.config.replace(policy=policy))

    @in_turn
    def read(self, text: str | DocumentPrompt, *, progress: Progress = silent) -> Document:
        """Read a document with exact attention; it then answers any number of questions.

        ``text`` may also be a result of `Prepared.document_prompt`, which is not tokenized again.
        ``progress`` gets the number of layers that have read the text. Raises DocumentError,
        ContextTooLongError or OutOfMemoryError.
        """
        prompt = document_prompt(self.tokenizer, text)
        self.check_ids(prompt.prefix_ids)
        check_room(self.decoder, 0, len(prompt.prefix_ids))
        self.check_memory(len(prompt.prefix_ids))
        sequence = self.new_sequence()
        try:
            seconds = self.read_ids(sequence, prompt.prefix_ids, progress)
            return Document(self, DocumentState(prompt, sequence, seconds))
        except BaseException:
            sequence.close()
            raise

    @in_turn
    def open(self, path: str | Path | OpenedDocument, *, progress: Progress = silent) -> Document:
        """Open a saved document; its keys and values stay in the file and are shared.

        Sinks, window and far rows are those of the first reading. An index that the file lacks is
        built from the keys; ``progress`` counts the layers that have it. Raises SavedDocumentError.
        """
        with memory_errors():
            opened = path if isinstance(path, OpenedDocument) else open_facts(Path(path))
            made_with = (self.settings(), self._ledger)
            reader = Reader(self.model, self.tokenizer, *made_with, self.room.check_opened)
            held = read_document(opened, reader, progress)
        self.adopt(held.sequence)
        return Document(self, held)

    @in_turn
    def stream(
        self,
        prompt: str | list[int],
        sampling: SamplingConfig = DEFAULT_SAMPLING,
        *,
        chat: bool = False,
    ) -> TextStream[Generation]:
        """Continue ``prompt`` (with ``chat``, answer it) piece by piece.

        ``prompt`` may be the ids that `Prepared.prompt_ids` made of it.
        """
        ids = prompt_ids(self.tokenizer, prompt, chat)
        self._check_prompts([ids])
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
        """Continue one prompt, or several of any lengths, which are decoded together.

        Each sequence has its own near and far memory and, with a temperature above 0, its own
        random draws, so a text is the same alone and in a batch.
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
            read = [prompt_ids(self.tokenizer, text, chat) for text in prompts]
            self._check_prompts(read)
            for ids in read:
                run = self.new_run(self.new_sequence(), sampling, chat=chat)
                closed.callback(run.sequence.close)
                run.read_prompt(self.decoder, ids, self.chunk_tokens)
                runs.append(run)
            for _ in decode_all(self.decoder, self.step, runs):
                pass
            return [
                generation_of(run, run.hear(self.tokenizer.decode(run.token_ids), last=True))
                for run in runs
            ]

    def _check_prompts(self, prompts: list[list[int]]) -> None:
        """Raise, before any prompt is read, if one cannot be read or they do not fit together."""
        for ids in prompts:
            self.check_ids(ids)
            check_room(self.decoder, 0, len(ids))
        if len(prompts) == 1:
            self.check_memory(len(prompts[0]))
        elif prompts:
            self.room.check_together([len(ids) for ids in prompts])

    @in_turn
    def memory_report(self) -> MemoryReport:
        """Bytes of this engine and of all its sequences that still exist."""
        return self.report_of(list(self._sequences))
