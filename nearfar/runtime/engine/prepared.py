"""A model of which everything but the weights is here, so that memory can be planned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nearfar.config import DEFAULT_MODEL
from nearfar.progress import Progress, silent
from nearfar.runtime.checkpoints.model_source import ModelSource, open_source
from nearfar.runtime.models.plan import ModelPlan
from nearfar.runtime.saved.document_state import Model
from nearfar.runtime.text.chat import DocumentPrompt, prompt_ids
from nearfar.runtime.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Prepared:
    """A model whose configuration and tokenizer are here; its weights are not loaded yet."""

    source: ModelSource
    tokenizer: Tokenizer

    def with_thinking(self, thinking: bool | None) -> Prepared:
        """The same with a tokenizer that lets the model think, or not."""
        return Prepared(self.source, self.tokenizer.with_thinking(thinking))

    @property
    def config(self) -> ModelPlan:
        """Sizes and limits of the model."""
        return self.source.config

    @property
    def model(self) -> Model:
        """Name and identity of the model."""
        return Model(self.source.name, self.source.identity)

    def count_document_tokens(self, text: str) -> int:
        """Tokens of ``text`` as a document, the words around it included."""
        return len(DocumentPrompt(self.tokenizer, text).prefix_ids)

    def count_question_tokens(self, text: str, questions: Sequence[str]) -> list[int]:
        """Tokens that each of ``questions`` adds behind ``text`` as a document."""
        prompt = DocumentPrompt(self.tokenizer, text)
        return [len(prompt.question_ids(question)) for question in questions]

    def count_prompt_tokens(self, text: str, chat: bool) -> int:
        """Tokens that `Engine.generate` reads of ``text``."""
        return len(prompt_ids(self.tokenizer, text, chat))


def prepare(model: str = DEFAULT_MODEL, *, progress: Progress = silent) -> Prepared:
    """Find (or fetch) a model and open its tokenizer, so that memory can be planned."""
    source = open_source(model, progress=progress)
    return Prepared(source, source.load_tokenizer())
