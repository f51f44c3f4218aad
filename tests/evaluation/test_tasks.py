from __future__ import annotations

import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest
from tiny_folder import make_folder

from nearfar.errors import DocumentError, InvalidOptionError, UnknownNameError
from nearfar.evaluation.haystack import Haystack, split_sentences, word_list
from nearfar.evaluation.question_files import read_questions
from nearfar.evaluation.tasks.base import AskTask, Case, Material, largest_case
from nearfar.evaluation.tasks.needle_grid import NeedleGrid
from nearfar.evaluation.tasks.questions import QuestionFile
from nearfar.evaluation.tasks.recall import Recall
from nearfar.evaluation.tasks.registry import BUILT_IN, METRICS, RULER, create_tasks
from nearfar.evaluation.tasks.ruler_qa import RulerQa
from nearfar.evaluation.tasks.text import TextTask
from nearfar.evaluation.tasks.word_counts import coded_text
from nearfar.runtime.checkpoints.tokenizer_files import read_tokenizer
from nearfar.runtime.text.tokenizer import Tokenizer

DATA = Path(__file__).parents[3] / "shared" / "data" / "qa"
PARAGRAPHS = [
    f"Paragraph {i} says that the colour of box {i} is number {i * 7}." for i in range(12)
]
LONG = 3000  # tokens of the tiny tokenizer, which spells most words


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tiny")
    make_folder(folder)
    return read_tokenizer(folder)


def lines(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Questions of which it is known where the answer is: by index, and by titles."""
    indexed = lines(
        tmp_path / "squad.jsonl",
        *(
            {
                "title": f"Boxes {part}",
                "paragraphs": PARAGRAPHS[part::3],
                "questions": [
                    {
                        "question": f"What is the colour of box {part}?",
                        "answers": [f"number {part * 7}"],
                        "paragraph": 0,
                    }
                ],
            }
            for part in range(3)
        ),
    )
    titled = lines(
        tmp_path / "hops.jsonl",
        *(
            {
                "paragraphs": [
                    {"title": f"T{i}", "text": text} for i, text in enumerate(PARAGRAPHS[start:])
                ],
                "supporting_titles": ["T0", "T2"],
                "questions": [{"question": f"Which {start}?", "answer": f"number {start * 7}"}],
            }
            for start in (0, 4)
        ),
    )
    return indexed, titled


def material(tokenizer: Tokenizer, *data: Path, seed: int = 0) -> Material:
    return Material(tokenizer, Haystack(), seed, data)


@pytest.mark.parametrize("task", [task.name for task in RULER])
@pytest.mark.parametrize("context", [LONG, 12_000])
def test_ruler_fills_the_context_and_holds_the_answers(
    tokenizer: Tokenizer, files: tuple[Path, Path], task: str, context: int
) -> None:
    made = BUILT_IN[task]
    assert isinstance(made, AskTask)
    cases = [made.case(number, context, material(tokenizer, *files)) for number in (0, 1)]
    assert cases[0] != cases[1]
    assert cases[0] == made.case(0, context, material(tokenizer, *files))
    assert cases[0] != made.case(0, context, material(tokenizer, *files, seed=1))
    for case in cases:
        assert 0.85 * context < case.tokens(tokenizer) <= context
        [question] = case.questions
        for reference in question.references:
            assert reference in case.context
        assert made.score(" ".join(question.references), question.references) == 100
        assert made.score("nothing of it", question.references) == 0
        assert question.opening.startswith(" ")


def test_the_words_of_needle_tasks(tokenizer: Tokenizer) -> None:
    def case(name: str) -> Case:
        return BUILT_IN[name].case(0, LONG, material(tokenizer))

    single = case("niah_single_1")
    [question] = single.questions
    [value] = question.references
    found = re.search(r"One of the special magic numbers for (\S+) is: (\d{7})\.", single.context)
    assert found is not None
    assert found[2] == value
    assert single.context.startswith("A special magic number is hidden within the following text.")
    asked = f"the special magic number for {found[1]} mentioned in the provided text"
    assert question.text == f"\nWhat is {asked}?"
    assert question.opening == f" T{asked[1:]} is"
    [many] = case("niah_multiquery").questions
    assert len(many.references) == 4
    assert many.text.startswith("\nWhat are all the special magic numbers for ")
    assert many.text.count(", ") == 3
    assert many.opening.endswith(" mentioned in the provided text are")
    assert len(case("niah_multivalue").questions[0].references) == 4
    uuids = case("niah_multikey_3")
    assert len(re.findall(r"magic uuids for [0-9a-f-]{36} is: [0-9a-f-]{36}\.", uuids.context)) > 5
    assert case("niah_multikey_1").context.count("One of the special magic numbers") == 4


def test_chains_of_variables(tokenizer: Tokenizer) -> None:
    case = BUILT_IN["vt"].case(0, LONG, material(tokenizer))
    [question] = case.questions
    first, *others = question.references
    value = re.search(r"the value (\d{5})", question.text)
    assert value is not None
    assert f"VAR {first} = {value[1]}" in case.context
    places = [case.context.index(f"VAR {first} = {value[1]}")]
    for before, name in zip(question.references, others, strict=False):
        places.append(case.context.index(f"VAR {name} = VAR {before} "))
    assert places == sorted(places)
    assert case.context.count("Memorize and track the chain(s)") == 2  # an example is solved first
    assert "5 variables are assigned the value" in question.opening


@pytest.mark.parametrize(("context", "often", "seldom"), [(LONG, 6, 1), (12_000, 30, 3)])
def test_common_words_are_ten_times_as_frequent(
    tokenizer: Tokenizer, context: int, often: int, seldom: int
) -> None:
    case = BUILT_IN["cwe"].case(0, context, material(tokenizer))
    listed = case.context.rpartition("Memorize the ones that appear most often.\n")[2]
    counts = Counter(re.findall(r"\d+\. (\S+)", listed))
    common = set(case.questions[0].references)
    assert len(common) == 10
    assert {counts[word] for word in common} == {often}
    assert {count for word, count in counts.items() if word not in common} <= {seldom}


def test_frequencies_of_coded_words_fall_as_a_zeta_law() -> None:
    words = [f"w{i}" for i in range(50)]
    counts = Counter(coded_text(words, 10_000, random.Random(0)).split())
    assert counts["w0"] == int(10_000 / 1.6449340668482264)
    assert counts["w0"] / counts["w3"] == pytest.approx(16, rel=0.01)


def test_facts_at_even_depths(tokenizer: Tokenizer) -> None:
    case = NeedleGrid(questions_per_case=4).case(0, LONG, material(tokenizer))
    assert [question.depth for question in case.questions] == [0.125, 0.375, 0.625, 0.875]
    for question in case.questions:
        subject = question.text.removeprefix("\n\nWhat is the secret code of the ").rstrip("?")
        sentence = f"The secret code of the {subject} is {question.references[0]}."
        place = case.context.index(sentence) / len(case.context)
        assert place == pytest.approx(question.depth, abs=0.15)


def test_recall_asks_for_the_sentence_that_follows(tokenizer: Tokenizer) -> None:
    case = Recall(questions_per_case=3).case(0, LONG, material(tokenizer))
    assert len(case.questions) == 3
    for question in case.questions:
        sentence = question.text.partition('exactly.\n"')[2].removesuffix('"')
        assert f"{sentence} {question.references[0]}" in case.context
        assert case.context.count(sentence) == 1


@pytest.mark.parametrize("task", ["perplexity", "distances", "throughput"])
def test_texts_are_cut_to_the_token(tokenizer: Tokenizer, task: str) -> None:
    made = BUILT_IN[task]
    assert isinstance(made, TextTask)
    case = made.case(1, 1000, material(tokenizer))
    read, following = made.ids(case, 1000, material(tokenizer))
    assert len(read) + len(following) == 1000
    assert len(following) == made.following_tokens


def test_joined_documents_and_windows_of_books(tokenizer: Tokenizer, tmp_path: Path) -> None:
    stories = [
        {
            "title": f"tale_{i}",
            "context": " ".join([f"In tale {i} the cat sat and ran."] * 6),
            "questions": [{"question": "Who sat?", "answers": ["the cat"]}] * 2,
        }
        for i in range(4)
    ]
    joined = QuestionFile(lines(tmp_path / "tales.jsonl", *stories))
    case = joined.case(0, LONG, material(tokenizer))
    assert case.tokens(tokenizer) <= LONG
    assert all(f"tale {i}\n\n" in case.context for i in range(4))
    assert {question.text[:9] for question in case.questions} == {"\n\nIn 'tal"}
    book = " ".join(f"Sentence {i} of the  book\nis here." for i in range(400))
    (tmp_path / "book.txt").write_text(book)
    flat = re.sub(r"\s+", " ", book)
    questions = [
        {
            "question": f'Which sentence follows "Sentence {i - 1} of the book is here."?',
            "answers": [f"Sentence {i} of the book is here."],
            "char_offset": flat.index(f"Sentence {i} of"),
        }
        for i in range(5, 395, 10)
    ]
    folder = tmp_path / "qa"
    folder.mkdir()
    row = {"task": "next_sentence_recall", "book": "book.txt", "questions": questions}
    recall = QuestionFile(lines(folder / "recall.jsonl", row))
    assert recall.metric.name == "words recalled"
    for number in range(3):
        case = recall.case(number, LONG, material(tokenizer))
        assert 0.9 * LONG < case.tokens(tokenizer) <= LONG
        for question in case.questions:
            assert question.depth is not None
            assert question.references[0] in case.context
            place = case.context.index(question.references[0]) / len(case.context)
            assert place == pytest.approx(question.depth, abs=0.05)


def test_short_files_are_filled_with_prose(tokenizer: Tokenizer, files: tuple[Path, Path]) -> None:
    case = RulerQa("qa_1", several=False).case(0, 20_000, material(tokenizer, *files))
    assert 0.9 * 20_000 < case.tokens(tokenizer) <= 20_000
    assert sum(text in case.context for text in PARAGRAPHS) == len(PARAGRAPHS)


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ('{"context": "a"}', "'questions' is missing"),
        ('{"questions": []}', "it has no text"),
        ('{"context": "a", "questions": [{"question": "q", "answers": []}]}', "has no answer"),
        ('{"context": "a", "questions": [{"answers": ["x"]}]}', "'question' is missing"),
        ('{"book": "gone.txt", "questions": []}', "the book gone.txt is neither beside the file"),
        (
            '{"paragraphs": ["a"], "questions": '
            '[{"question": "q", "answer": "x", "paragraph": 1}]}',
            "there is no paragraph 1",
        ),
        ("no json", "Expecting value"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(tmp_path: Path, row: str, why: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(f"\n{row}\n")
    with pytest.raises(DocumentError) as caught:
        read_questions(path)
    assert str(caught.value).startswith(f"Line 2 of {path} is not a document with questions: ")
    assert why in str(caught.value)


def test_files_that_are_no_questions(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match=r"gone\.jsonl does not exist\. Check the path\."):
        read_questions(tmp_path / "gone.jsonl")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    with pytest.raises(DocumentError, match="has no questions"):
        read_questions(empty)


def test_a_file_or_a_book_that_has_changed_is_read_again(tmp_path: Path) -> None:
    path, book = tmp_path / "q.jsonl", tmp_path / "b.txt"
    ask = '"questions": [{"question": "q", "answer": "x"}]}'
    book.write_text("The old book.")
    path.write_text(f'{{"book": "b.txt", {ask}\n')
    assert read_questions(path)[0].text == "The old book."
    assert read_questions(path) is read_questions(path)
    book.write_text("A newer book.")
    assert read_questions(path)[0].text == "A newer book."
    path.write_text(f'{{"context": "No book.", {ask}\n')
    assert read_questions(path)[0].text == "No book."


def test_names_and_groups(files: tuple[Path, Path]) -> None:
    names = [task.name for task in create_tasks(["ruler", "vt", "qa"], [files[1]])]
    assert names[:3] == ["niah_single_1", "niah_single_2", "niah_single_3"]
    assert "qa_1" not in names  # no file for it
    assert names[-2:] == ["qa_2", "qa/hops"]
    assert len(create_tasks(["ruler"], list(files))) == 13
    with pytest.raises(UnknownNameError, match="Did you mean 'needles'"):
        create_tasks(["needle"], [])
    assert {task.metric.name for task in BUILT_IN.values()} <= set(METRICS)


def test_tasks_of_questions_need_a_file(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidOptionError) as caught:
        BUILT_IN["qa_2"].check(material(tokenizer))
    assert str(caught.value) == (
        "qa_2 needs a file of questions with paragraphs and supporting_titles. "
        "Name one with --data, or leave the task out."
    )


def test_a_context_without_room_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidOptionError, match="A context of 200 tokens has no room"):
        BUILT_IN["niah_single_1"].case(0, 200, material(tokenizer))


@pytest.mark.parametrize("guess", [0, 1, 7, 5000, 50_000])
def test_the_largest_case_is_found_from_any_guess(tokenizer: Tokenizer, guess: int) -> None:
    question = BUILT_IN["fwe"].case(0, LONG, material(tokenizer)).questions
    case = largest_case(lambda n: Case("cat " * n, question), tokenizer, 2000, guess)
    assert 0.98 * 2000 <= case.tokens(tokenizer) <= 2000


def test_haystacks() -> None:
    text = "One. Two two!  Three\nthree? Four"
    assert split_sentences(text) == ["One.", "Two two!", "Three three?", "Four"]
    assert split_sentences("天下大势。分久必合。") == ["天下大势。", "分久必合。"]
    own = Haystack(text)
    taken = own.sentences(9, random.Random(1))
    assert len(taken) == 9
    assert taken[0] == taken[4] == taken[8]  # from the start again after the last
    made = Haystack()
    sentences = made.sentences(50, random.Random(1))
    assert sentences == Haystack().sentences(50, random.Random(1))
    assert len(set(sentences)) == 50
    assert all(sentence.endswith(".") for sentence in sentences)
    assert len(word_list("noun")) > 3000
    assert Haystack("a").name != Haystack("b").name
    assert made.name == "generated"


@pytest.mark.skipif(not DATA.exists(), reason=f"there are no data files in {DATA}")
def test_the_team_s_files_work_as_they_are(tokenizer: Tokenizer) -> None:
    for path in sorted(DATA.glob("*.jsonl")):
        sources = read_questions(path)
        assert sources
        if path.stem.startswith("recall"):
            for source in sources:
                for asked in source.questions:
                    assert asked.offset is not None
                    end = asked.offset + len(asked.answers[0])
                    assert source.text[asked.offset : end] == asked.answers[0]
