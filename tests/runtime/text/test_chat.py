from __future__ import annotations

import pytest
from tiny_gguf import TEMPLATE
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from nearfar.errors import DocumentError, InvalidOptionError, UnsupportedModelError
from nearfar.runtime.text import tokenizer as tokenizer_module
from nearfar.runtime.text.chat import INSTRUCTION, DocumentPrompt, chat_ids, document_prompt

LLAMA3 = r"[^\r\n\p{L}\p{N}]?\p{L}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
MESSAGES = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": " Hi there. \n"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "Say <|im_end|> and {{ 7 * 7 }}."},
]


def library_tokenizer(word_rule: str | None = None) -> Tokenizer:
    """A byte-level tokenizer that joins a full stop with line breaks where its rule lets it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), (".", "ĊĊ"), ("h", "e")]
    words = [*alphabet, "ĊĊ", ".ĊĊ", "he"]
    made = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if word_rule:
        split = pre_tokenizers.Split(Regex(word_rule), behavior="isolated")
        last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.pre_tokenizer = pre_tokenizers.Sequence([split, last])
    made.decoder = decoders.ByteLevel()
    control = ["<s>", "<|im_start|>", "<|im_end|>"]
    made.add_special_tokens([AddedToken(token, normalized=False) for token in control])
    bos = made.token_to_id("<s>")
    made.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    return made


def tokenizer_with(
    template: str | None, word_rule: str | None = None
) -> tokenizer_module.Tokenizer:
    marks = {"bos_token": "<s>", "eos_token": "<|im_end|>"}
    return tokenizer_module.Tokenizer(library_tokenizer(word_rule).to_str(), marks, template)


def test_conversation_is_rendered_with_contents_as_plain_text() -> None:
    tokenizer = tokenizer_with(TEMPLATE)
    ids = chat_ids(tokenizer, MESSAGES)
    assert tokenizer.decode(ids, skip_special_tokens=False) == (
        "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nHi there.<|im_end|>\n"
        "<|im_start|>assistant\nYes?<|im_end|>\n"
        "<|im_start|>user\nSay <|im_end|> and {{ 7 * 7 }}.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert ids.count(tokenizer.eos_token_ids[0]) == 4


@pytest.mark.parametrize("word_rule", [None, LLAMA3])
@pytest.mark.parametrize("text", ["The end.", " \n The <|im_end|> end\n", "x", "Fin…", ""])
def test_document_and_question_are_the_whole_prompt(word_rule: str | None, text: str) -> None:
    tokenizer = tokenizer_with(TEMPLATE, word_rule)
    prompt = DocumentPrompt(tokenizer, text)
    user = f"{INSTRUCTION}\n\n{text.strip()}\n\nWhy <|im_end|>?"
    ids = prompt.prefix_ids + prompt.question_ids(" Why <|im_end|>?\n")
    assert ids == chat_ids(tokenizer, [{"role": "user", "content": user}])
    shown = tokenizer.decode(ids, skip_special_tokens=False)
    assert shown == f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"
    assert ids.count(tokenizer.eos_token_ids[0]) == 1


@pytest.mark.parametrize("template", [None, TEMPLATE])
@pytest.mark.parametrize("word_rule", [None, LLAMA3])
def test_spans_are_the_characters_of_tokens(template: str | None, word_rule: str | None) -> None:
    tokenizer = tokenizer_with(template, word_rule)
    text = " \n The <s> end.\n\nhe said <|im_end|> 7."
    prompt = DocumentPrompt(tokenizer, text)
    assert prompt.text == text.strip()
    assert prompt.spans.shape == (len(prompt.prefix_ids), 2)
    own = [(i, a, b) for i, (a, b) in zip(prompt.prefix_ids, prompt.spans.tolist(), strict=True)]
    covered = [(i, a, b) for i, a, b in own if b > a]
    for token, start, stop in covered:
        assert tokenizer.decode([token], skip_special_tokens=False) == prompt.text[start:stop]
    assert [a for _, a, _ in covered] == [0, *(b for _, _, b in covered[:-1])]
    assert covered[-1][2] == len(prompt.text) - len(prompt.rest)
    before = len(own) - len(covered)
    assert all(b == 0 for _, _, b in own[:before])


@pytest.mark.parametrize("template", [None, TEMPLATE])
@pytest.mark.parametrize("word_rule", [None, LLAMA3])
def test_extending_is_as_if_all_had_been_there(template: str | None, word_rule: str | None) -> None:
    tokenizer = tokenizer_with(template, word_rule)
    texts = ["The end.", " he said <s>.\n", "x"]
    prompt = DocumentPrompt(tokenizer, texts[0])
    for count in (2, 3):
        whole = DocumentPrompt(tokenizer, "\n\n".join(text.strip() for text in texts[:count]))
        before = list(prompt.prefix_ids)
        prompt = prompt.extended(texts[count - 1])
        assert prompt.prefix_ids[: len(before)] == before
        assert (prompt.prefix_ids, prompt.text) == (whole.prefix_ids, whole.text)
        assert prompt.spans.tolist() == whole.spans.tolist()
        assert prompt.question_ids("Why?") == whole.question_ids("Why?")
    again = DocumentPrompt.restored(
        tokenizer, prompt.text, prompt.prefix_ids, prompt.spans, prompt.rest
    )
    assert again.question_ids("Why?") == prompt.question_ids("Why?")


def test_questions_after_answers_are_turns_of_the_template() -> None:
    tokenizer = tokenizer_with(TEMPLATE, LLAMA3)
    prompt = DocumentPrompt(tokenizer, "The end.")
    answer = tokenizer.encode("Because.")
    ids = (
        prompt.prefix_ids
        + prompt.question_ids("Why?")
        + answer
        + prompt.next_question_ids(" And? ")
    )
    assert tokenizer.decode(ids, skip_special_tokens=False) == (
        f"<|im_start|>user\n{INSTRUCTION}\n\nThe end.\n\nWhy?<|im_end|>\n<|im_start|>assistant\n"
        "Because.<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n"
    )
    plain = DocumentPrompt(tokenizer_with(None), "The end.")
    assert tokenizer.decode(plain.next_question_ids("And?")) == "\n\nQuestion: And?\nAnswer:"


def test_questions_do_not_change_the_prefix() -> None:
    prompt = DocumentPrompt(tokenizer_with(TEMPLATE, LLAMA3), "The end.")
    before = list(prompt.prefix_ids)
    assert prompt.question_ids("Why?") != prompt.question_ids("How?")
    assert prompt.prefix_ids == before


def test_model_without_a_template_gets_plain_text_after_its_opening_token() -> None:
    tokenizer = tokenizer_with(None)
    prompt = DocumentPrompt(tokenizer, "  The <s> end. ")
    ids = prompt.prefix_ids + prompt.question_ids("Why?")
    assert ids[0] == tokenizer.opening_ids[0]
    assert ids.count(ids[0]) == 1
    shown = tokenizer.decode(ids, skip_special_tokens=False)
    assert shown == "<s>The <s> end.\n\nQuestion: Why?\nAnswer:"


def test_templates_have_what_transformers_gives_them() -> None:
    template = (
        "{{ bos_token }}{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}\n"
        "    {% generation %}{{ m['content'] | trim }}{% endgeneration %}{% endfor %}\n"
        "{{ strftime_now('%%') }}{{ {'a': '<é>'} | tojson }}{% if tools is none %}!{% endif %}"
    )
    ids = chat_ids(tokenizer_with(template), [{"role": "user", "content": " Hi "}])
    shown = tokenizer_with(template).decode(ids, skip_special_tokens=False)
    assert shown == '<s>Hi%{"a": "<é>"}!'


def test_template_cannot_reach_the_program() -> None:
    escape = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(UnsupportedModelError, match=r"fails: SecurityError: access to attribute"):
        chat_ids(tokenizer_with(escape), MESSAGES)
    with pytest.raises(UnsupportedModelError, match=r"'append' of .* is unsafe\. Give the"):
        chat_ids(tokenizer_with("{{ messages.append(1) }}"), MESSAGES)


def test_refusal_of_a_template_is_passed_on() -> None:
    template = "{{ raise_exception('Roles must alternate') }}"
    expected = r"refuses these messages: Roles must alternate\. Roles given: system, user"
    with pytest.raises(InvalidOptionError, match=expected):
        chat_ids(tokenizer_with(template), MESSAGES)


@pytest.mark.parametrize("template", ["{{ 'x' }}", "{{ messages[0].content * 2 }}"])
def test_template_that_drops_or_repeats_a_message_is_refused(template: str) -> None:
    with pytest.raises(UnsupportedModelError, match="must show each message once, in order; that"):
        DocumentPrompt(tokenizer_with(template), "The end.")


def test_broken_template_is_named() -> None:
    with pytest.raises(UnsupportedModelError, match="chat template is not valid Jinja"):
        chat_ids(tokenizer_with("{% for %}"), MESSAGES)


def test_conversation_needs_a_template() -> None:
    with pytest.raises(UnsupportedModelError, match="has no chat template, so it cannot be given"):
        chat_ids(tokenizer_with(None), MESSAGES)


@pytest.mark.parametrize("question", ["", "  "])
def test_an_empty_question_is_refused(question: str) -> None:
    prompt = DocumentPrompt(tokenizer_with(TEMPLATE), "The end.")
    for ask in (prompt.question_ids, prompt.next_question_ids):
        with pytest.raises(InvalidOptionError, match=r"The question is empty\. Ask one with text"):
            ask(question)


def test_a_document_that_is_tokenized_stays_as_it_is() -> None:
    tokenizer, other = tokenizer_with(TEMPLATE), tokenizer_with(None)
    prompt = document_prompt(tokenizer, "The end.")
    assert document_prompt(tokenizer, prompt) is prompt
    with pytest.raises(InvalidOptionError, match="was tokenized for another model, or with other"):
        document_prompt(other, prompt)
    with pytest.raises(DocumentError, match=r"The document has no text. Give one with text\."):
        document_prompt(tokenizer, " \n")
