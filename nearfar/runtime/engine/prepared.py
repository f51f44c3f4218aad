"""A model before its weights are loaded, so that memory can be planned first."""

from __future__ import annotations

from dataclasses import dataclass

from nearfar.config import DEFAULT_MODEL
from nearfar.progress import Progress, silent
from nearfar.runtime.checkpoints.model_source import ModelSource, open_source
from nearfar.runtime.models.plan import ModelPlan
from nearfar.runtime.saved.document_state import Model
from nearfar.runtime.text.chat import DocumentPrompt, document_prompt, prompt_ids
from nearfar.runtime.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Prepared:
    """A model whose configuration and tokenizer are loaded, and whose weights are not."""

    source: ModelSource
    tokenizer: Tokenizer

    def with_thinking(self, thinking: bool | None) -> Prepared:
        """The same model with thinking on, off, or as the model's default (None)."""
        return Prepared(self.source, self.tokenizer.with_thinking(thinking))

    @property
    def config(self) -> ModelPlan:
        """Sizes and limits of the model."""
        return self.source.config

    @property
    def model(self) -> Model:
        """Name and identity of the model."""
        return Model(self.source.name, self.source.identity)

    def document_prompt(self, text: str) -> DocumentPrompt:
        """``text`` as a tokenized document, which can be counted and then passed to `Engine.read`.

        Raises DocumentError if there is no text.
        """
        return document_prompt(self.tokenizer, text)

    def prompt_ids(self, text: str, chat: bool) -> list[int]:
        """Ids of ``text`` as a prompt: to be counted and then given to `Engine.stream`."""
        return prompt_ids(self.tokenizer, text, chat)


def prepare(model: str = DEFAULT_MODEL, *, progress: Progress = silent) -> Prepared:
    """Find (or fetch) a model and open its tokenizer, so that memory can be planned."""
    source = open_source(model, progress=progress)
    return Prepared(source, source.load_tokenizer())
