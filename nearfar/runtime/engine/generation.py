"""From a prompt to tokens: read it, then decode until every sequence has stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from nearfar.config import SamplingConfig
from nearfar.errors import ContextTooLongError
from nearfar.results import FinishReason, Generation
from nearfar.runtime.engine.sampling import Sampler
from nearfar.runtime.memory.sequence import Sequence
from nearfar.runtime.models.decoder import Decoder
from nearfar.runtime.steps.prefill import prefill
from nearfar.runtime.text.thoughts import ThoughtSplitter

Step = Callable[[list[Sequence], list[int]], torch.Tensor]  # `stepping.Stepper.step`


@dataclass
class GenerationState:
    """The state and the times of one sequence's generation."""

    sequence: Sequence
    sampling: SamplingConfig
    stop_ids: frozenset[int]
    through: Step | None = None  # reads the prompt token by token; None: one prefill
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    started: float = 0.0
    first_token_at: float = 0.0
    last_token_at: float = 0.0
    far_bytes_before: int = 0
    splitter: ThoughtSplitter | None = None  # None: all of the text is the answer
    on_thought: Callable[[str], None] = lambda _: None  # called with pieces of a thought
    thought: str = ""

    def __post_init__(self) -> None:
        self._sampler = Sampler(self.sampling)

    def read_prompt(self, decoder: Decoder, prompt_ids: list[int], chunk_tokens: int) -> None:
        """Read the prompt and draw the first token.

        In a prefill, tokens attend to all rows that the policy kept. Token by token, each attends
        to the rows that the policy selects for it.
        """
        check_room(decoder, self.sequence.next_position, len(prompt_ids))
        self.started = time.perf_counter()
        ids = torch.tensor(prompt_ids, device=decoder.device)
        if self.through is None:
            logits = prefill(decoder, self.sequence, ids, chunk_tokens)
        else:
            for token in prompt_ids:
                logits = self.through([self.sequence], [token])[0]
        self.far_bytes_before = self.sequence.far.bytes_read
        self.sequence.far.pop_verification()
        self.draw(decoder, logits)
        self.prompt_tokens = len(prompt_ids)
        self.prompt_seconds = self.seconds_to_first_token

    def draw(self, decoder: Decoder, logits: torch.Tensor) -> None:
        """Draw the next token from ``logits`` [V] and note whether it is the last."""
        token = self._sampler.sample(logits)
        self.last_token_at = time.perf_counter()
        self.first_token_at = self.first_token_at or self.last_token_at
        if token in self.stop_ids:
            self.finish_reason = "stop"
            return
        self.token_ids.append(token)
        if len(self.token_ids) == self.sampling.max_new_tokens:
            self.finish_reason = "length"
        elif self.sequence.next_position >= decoder.plan.max_context_tokens:
            self.finish_reason = "context"

    def hear(self, text: str, last: bool = False) -> str:
        """The part of the next piece of text that belongs to the answer, without thoughts."""
        if self.splitter is None:
            return text
        thought, answer = self.splitter.push(text)
        if last:
            rest = self.splitter.finish()
            thought, answer = thought + rest[0], answer + rest[1]
        if thought:
            self.thought += thought
            self.on_thought(thought)
        return answer

    @property
    def ended_in_thought(self) -> bool:
        """Whether the text so far is only a thought."""
        return self.splitter is not None and self.splitter.in_thought

    @property
    def seconds_to_first_token(self) -> float:
        """Seconds from the start of prefill."""
        return self.first_token_at - self.started

    @property
    def tokens_per_second(self) -> float:
        """Speed of decode; the first token comes from prefill and is not counted."""
        seconds = self.last_token_at - self.first_token_at
        steps = self._decode_steps
        return steps / seconds if steps and seconds > 0 else 0.0

    @property
    def far_bytes_read_per_token(self) -> float:
        """Mean over decode steps; prefill is not counted."""
        read = self.sequence.far.bytes_read - self.far_bytes_before
        return read / self._decode_steps if self._decode_steps else 0.0

    @property
    def _decode_steps(self) -> int:
        drawn = len(self.token_ids) + (self.finish_reason == "stop")
        return max(0, drawn - 1)


def check_room(decoder: Decoder, first_position: int, prompt_tokens: int) -> None:
    """Raise if a prompt that starts at ``first_position`` does not fit the model's context."""
    limit = decoder.plan.max_context_tokens
    total = first_position + prompt_tokens
    if total > limit:
        raise ContextTooLongError(
            f"The text has {total} tokens and the model reads at most {limit}. "
            "Shorten it, split it, or choose a model with a longer context (--model)."
        )


def decode_all(
    decoder: Decoder, step: Step, runs: list[GenerationState]
) -> Iterator[list[GenerationState]]:
    """Decode until every run has finished; yields, step by step, the runs that got a token.

    The runs have read their prompts. The first item yielded is for their first tokens.
    """
    yield [run for run in runs if run.token_ids]
    while active := [run for run in runs if run.finish_reason is None]:
        newest = [run.token_ids[-1] for run in active]
        logits = step([run.sequence for run in active], newest)
        before = [len(run.token_ids) for run in active]
        for run, row in zip(active, logits, strict=True):
            run.draw(decoder, row)
        yield [run for run, count in zip(active, before, strict=True) if len(run.token_ids) > count]


def generation_of(run: GenerationState, text: str) -> Generation:
    """The result of a finished run."""
    assert run.finish_reason is not None
    return Generation(
        text,
        tuple(run.token_ids),
        run.finish_reason,
        run.prompt_tokens,
        run.prompt_seconds,
        run.seconds_to_first_token,
        run.tokens_per_second,
        run.far_bytes_read_per_token,
        verification=run.sequence.far.pop_verification(),
        thought=run.thought.strip(),
        ended_in_thought=run.ended_in_thought,
    )
