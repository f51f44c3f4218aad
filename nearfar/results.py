"""The results of the engine: answers and memory reports."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from nearfar.records import Verification

FinishReason = Literal["stop", "length", "context"]


@dataclass(frozen=True)
class Generation:
    """Text that the model generated after a prompt."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason  # stop token, max_new_tokens, or the model's context is full
    prompt_tokens: int
    prompt_seconds: float  # reading the prompt (for a question: the question alone)
    seconds_to_first_token: float
    tokens_per_second: float  # of decoding, the first token left out
    far_bytes_read_per_token: float
    # of decoding, under a policy that estimates its own error
    verification: Verification | None = field(default=None, kw_only=True)

    thought: str = field(default="", kw_only=True)  # what the model thought before it answered
    ended_in_thought: bool = field(default=False, kw_only=True)  # so that there is no answer

    @property
    def new_tokens(self) -> int:
        """Tokens generated, the stop token left out."""
        return len(self.token_ids)


@dataclass(frozen=True)
class Passage:
    """A stretch of a document that an answer attended to."""

    source: str  # name of the file, or "text"
    start: int  # characters of it, as `nearfar.runtime.text.text_origins` counts them
    stop: int
    text: str
    weight: float  # share of the attention to the document, see `nearfar.runtime.engine.passages`


@dataclass(frozen=True)
class Answer(Generation):
    """A question to a document, and the generation that answers it."""

    question: str
    passages: tuple[Passage, ...] = ()  # where it came from, on request


@dataclass(frozen=True)
class Turn:
    """A question of a conversation and its answer."""

    question: str
    answer: str


@dataclass(frozen=True)
class MemoryReport:
    """Bytes where they are held; peaks are of the whole process since it started."""

    weight_bytes: int
    near_bytes: int  # keys and values of sinks, window and all else that the policy keeps near
    far_bytes: int
    index_bytes: int
    peak_rss_bytes: int
    peak_gpu_bytes: int
