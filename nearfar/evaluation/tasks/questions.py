"""Questions about documents: the user's own, and those of JSONL files.

Contexts are built to the wanted length: documents joined under their titles, paragraphs that have
the answer among others, or a window of a book. Where a file is too short, a haystack fills the
rest. Questions are also asked without the context: a model may know the answer.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nearfar.errors import ContextTooLongError, InvalidOptionError
from nearfar.evaluation.haystack import digest
from nearfar.evaluation.question_files import (
    RECALL,
    DatasetQuestion,
    Paragraph,
    Source,
    read_questions,
)
from nearfar.evaluation.scores import best_f1, contains, share_recalled
from nearfar.evaluation.tasks.base import (
    AskTask,
    Case,
    Material,
    Metric,
    Question,
    about,
    largest_case,
)

F1 = Metric("F1", "%", higher_is_better=True)
CONTAINED = Metric("answer contained", "%", higher_is_better=True)
RECALLED = Metric("words recalled", "%", higher_is_better=True)
ANSWER_TOKENS = 48
LONGEST_QUOTE_TOKENS = 96
MARGIN_TOKENS = 8  # of a quotation, for quotation marks
SENTENCE_TOKENS = 20  # about
PARAGRAPH_TOKENS = 150  # about
FILLER_SENTENCES = 6  # of a paragraph of prose


@dataclass(frozen=True)
class QuestionFile(AskTask):
    """All questions of one file."""

    path: Path
    questions_per_case: int = 4

    without_context = True

    @property
    def name(self) -> str:  # type: ignore[override]  # a constant of other tasks
        """By the file."""
        return f"qa/{self.path.stem}"

    @property
    def quotes(self) -> bool:
        """Whether the answers are to be quoted."""
        return all(source.task == RECALL for source in read_questions(self.path))

    @property
    def metric(self) -> Metric:  # type: ignore[override]
        """Recall of quotations, F1 of other answers."""
        return RECALLED if self.quotes else F1

    def check(self, material: Material) -> None:  # noqa: ARG002
        """The file must be one of questions."""
        read_questions(self.path)

    def source(self, material: Material) -> str:
        """The file, and the haystack that fills the rest."""
        return digest(read_questions(self.path), material.haystack.name)

    def case(self, number: int, context_tokens: int, material: Material) -> Case:
        """One line's book, or paragraphs, or as many documents as fit."""
        sources = read_questions(self.path)
        rng = material.draws(self.name, context_tokens, number)
        order = random.Random(f"{material.seed} {self.name}")
        if sources[0].is_book:
            asked = [(source, each) for source in sources for each in source.questions]
            order.shuffle(asked)
            source, anchor = asked[number % len(asked)]
            return self._window(source, anchor, context_tokens, material, rng)
        if all(source.supporting and source.knows_gold for source in sources):
            asked = [(source, each) for source in sources for each in source.questions]
            order.shuffle(asked)
            source, question = asked[number % len(asked)]
            return paragraphs_case(
                source,
                question,
                sources,
                (material, context_tokens),
                rng,
                lambda text, each: Case(about(text), (self._asked(each, material),)),
            )
        return self._joined(sources, context_tokens, material, rng)

    def score(self, prediction: str, references: Sequence[str]) -> float:
        """By the metric."""
        return (share_recalled if self.quotes else best_f1)(prediction, references)

    def _asked(
        self, question: DatasetQuestion, material: Material, depth: float | None = None
    ) -> Question:
        tokens = ANSWER_TOKENS
        if self.quotes:
            longest = max(len(material.tokenizer.encode(each)) for each in question.answers)
            tokens = min(longest + MARGIN_TOKENS, LONGEST_QUOTE_TOKENS)
        return Question(f"\n\n{question.text}", question.answers, tokens, depth=depth)

    def _window(
        self,
        source: Source,
        anchor: DatasetQuestion,
        context_tokens: int,
        material: Material,
        rng: random.Random,
    ) -> Case:
        """A piece of a book with the answer to ``anchor``, and the questions that it answers."""
        place, drawn = rng.uniform(0.05, 0.9), rng.random()
        offset = 0 if anchor.offset is None else anchor.offset

        def make(characters: int) -> Case:
            text = source.text
            start = max(0, min(offset - int(place * characters), len(text) - characters))
            stop = min(len(text), start + characters)
            # with room for the longest answer before the window's end
            inside = [
                each
                for each in source.questions
                if each is not anchor and each.offset is not None
                if start <= each.offset and each.offset + len(each.answers[0]) <= stop
            ]
            random.Random(drawn).shuffle(inside)
            chosen = [anchor, *inside[: self.questions_per_case - 1]]
            asked = tuple(
                self._asked(
                    each,
                    material,
                    None if each.offset is None else (each.offset - start) / max(1, characters),
                )
                for each in chosen
            )
            return Case(about(text[start:stop]), asked)

        size = len(source.text)
        return largest_case(make, material.tokenizer, context_tokens, context_tokens * 3, size)

    def _joined(
        self,
        sources: Sequence[Source],
        context_tokens: int,
        material: Material,
        rng: random.Random,
    ) -> Case:
        """Documents under their titles until nothing more fits, and haystack for the rest."""
        chosen = _documents_that_fit(sources, context_tokens, material, rng, self.path)
        seed = rng.random()

        def make(sentences: int) -> Case:
            inner = random.Random(seed)
            several = len(chosen) > 1 or sentences > 0
            parts = [(_title(source, i), source.text) for i, source in enumerate(chosen, start=1)]
            if sentences:
                filler = " ".join(material.haystack.sentences(sentences, inner))
                parts.insert(inner.randint(0, len(parts)), ("Other text", filler))
            asked = []
            for i in range(self.questions_per_case):
                number = i % len(chosen)
                source = chosen[number]
                question = inner.choice(source.questions)
                if several:
                    title = _title(source, number + 1)
                    question = DatasetQuestion(f"In '{title}': {question.text}", question.answers)
                asked.append(self._asked(question, material))
            text = "\n\n".join(f"{title}\n\n{text}" if several else text for title, text in parts)
            return Case(about(text), tuple(dict.fromkeys(asked)))

        return largest_case(make, material.tokenizer, context_tokens, 0)


def _title(source: Source, number: int) -> str:
    return source.title or f"Document {number}"


def _documents_that_fit(
    sources: Sequence[Source],
    context_tokens: int,
    material: Material,
    rng: random.Random,
    path: Path,
) -> list[Source]:
    """Sources in random order as long as they leave room for a question and its answer."""
    room = context_tokens - 4 * ANSWER_TOKENS
    chosen: list[Source] = []
    shortest = room
    for source in rng.sample(sources, len(sources)):
        if len(source.text) > 16 * room:  # certainly too long; encoding it would tell no more
            continue
        tokens = len(material.tokenizer.encode(source.text)) + SENTENCE_TOKENS
        shortest = min(shortest, tokens) if chosen else tokens
        if tokens <= room:
            chosen.append(source)
            room -= tokens
        if room < SENTENCE_TOKENS * 4:
            break
    if not chosen:
        raise InvalidOptionError(
            f"No document of {path} fits a context of {context_tokens:,} tokens. "
            "Give a longer --contexts."
        )
    return chosen


Frame = Callable[[str, DatasetQuestion], Case]


def paragraphs_case(
    source: Source,
    question: DatasetQuestion,
    sources: Sequence[Source],
    room: tuple[Material, int],
    rng: random.Random,
    frame: Frame,
) -> Case:
    """Paragraphs that have the answer, filled up with others of the same line, of any, of prose.

    ``room`` is the material and the wanted tokens; ``frame`` makes the case of the joined text.
    """
    material, context_tokens = room
    gold = source.gold(question)
    own = [each for each in source.paragraphs if each not in gold]
    others = [each for line in sources if line is not source for each in line.paragraphs]
    rng.shuffle(own)
    rng.shuffle(others)
    fillers = own + [each for each in others if each not in gold]
    seed = rng.random()

    def make(count: int) -> Case:
        extra = material.haystack.sentences(
            FILLER_SENTENCES * max(0, count - len(fillers)), random.Random(seed)
        )
        made = [
            Paragraph(" ".join(extra[i : i + FILLER_SENTENCES]))
            for i in range(0, len(extra), FILLER_SENTENCES)
        ]
        documents = [*gold, *fillers[:count], *made]
        random.Random(seed).shuffle(documents)
        texts = [f"Document {i}:\n{_with_title(each)}" for i, each in enumerate(documents, start=1)]
        return frame("\n\n".join(texts), question)

    guess = context_tokens // PARAGRAPH_TOKENS
    return largest_case(make, material.tokenizer, context_tokens, guess)


def _with_title(paragraph: Paragraph) -> str:
    return f"{paragraph.title}\n{paragraph.text}" if paragraph.title else paragraph.text


@dataclass(frozen=True)
class OwnQuestions(AskTask):
    """The user's questions about the user's document, whole."""

    name: str = "questions"
    metric: Metric = CONTAINED
    without_context = True

    def samples(self, material: Material) -> int:
        """All of them."""
        return len(material.asked)

    def source(self, material: Material) -> str:
        """The document and what is asked."""
        return digest(material.document, material.asked)

    def case(self, number: int, context_tokens: int, material: Material) -> Case:  # noqa: ARG002
        """The document at its own length."""
        return material.own

    def check_length(self, material: Material, limit: int) -> None:
        """Raise ContextTooLongError where document, question and answer exceed ``limit`` tokens."""
        tokens = material.own.tokens(material.tokenizer)
        if tokens > limit:
            raise ContextTooLongError(
                f"Document, question and answer are {tokens:,} tokens, but the model reads at most "
                f"{limit:,}. Shorten the document, split it, lower --max-new-tokens, or choose a "
                "model with a longer context (--model)."
            )

    def score(self, prediction: str, references: Sequence[str]) -> float:
        """Whether the answer has the given one in it."""
        return contains(prediction, references)
