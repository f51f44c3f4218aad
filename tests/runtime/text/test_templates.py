from __future__ import annotations

import pytest
from tiny_gguf import TEMPLATE

from nearfar.errors import InvalidOptionError, UnsupportedModelError
from nearfar.runtime.text.templates import ChatTemplate

MARKS = {"bos_token": "<s>", "eos_token": "</s>"}
TALK = ("user", "assistant", "user")


def around(source: str, *roles: str) -> list[str]:
    return ChatTemplate(source, MARKS).around(roles or ("user",))


def test_what_is_around_messages_is_cut_where_they_are() -> None:
    assert around(TEMPLATE, "user", "assistant") == [
        "<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>\n<|im_start|>assistant\n",
    ]
    closed = ChatTemplate(TEMPLATE, MARKS).around(("user", "assistant"), answer=False)
    assert closed[2] == "<|im_end|>\n"


def test_contents_may_be_read_as_lists_of_parts() -> None:
    parts = (
        "{% for m in messages %}[{% for p in m['content'] %}{% if p.type == 'text' %}"
        "{{ p.text }}{% endif %}{% endfor %}]{% endfor %}"
    )
    assert around(parts, "user", "assistant") == ["[", "][", "]"]


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{% include 'x' %}{{ messages[0].content }}", r"fails: TypeError|no loader"),
        ("{{ 1/0 }}{{ messages[0].content }}", r"fails: ZeroDivisionError: division by zero\. "),
        ("{{ messages[0].content.index('zz') }}", r"fails: ValueError: substring not found\. "),
        ("{% for i in range(10**9) %}{% endfor %}", r"fails: OverflowError: Range too big"),
        (
            "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
            r"fails: OverflowError: its loops take more than 100,000 steps\. ",
        ),
        ("{{ 'x' * 10**10 }}", r"fails: OverflowError: it writes more than 2,000,000 characters"),
        (
            "{{ 10 ** (10**10) }}",
            r"fails: OverflowError: it raises a number to a power above 1,000",
        ),
        (
            "{% for i in range(9999) %}{{ 'x' * 9999 }}{% endfor %}",
            r"fails: OverflowError: it writes more than 2,000,000 characters",
        ),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", r"fails: RecursionError: "),
        ("{{ strftime_now(3) }}", r"fails: TypeError: "),
        (
            "{{ nothing.at.all }}",
            r"fails: UndefinedError: 'nothing' is undefined\. Give the prompt",
        ),
        ("{{ foo() }}", r"fails: UndefinedError: 'foo' is undefined\. Give the prompt without"),
        ("{{ raise_exception('needs a system message') }}", r"refuses .*: needs a system message"),
        ("{{ raise_exception('') }}", r"refuses these messages: no reason given\. "),
        ("{% for %}", r"is not valid Jinja: "),
        ("{{ x | no_such_filter }}", r"is not valid Jinja: No filter named 'no_such_filter'\. "),
        ("{% break %}{{ messages[0].content }}", r"is not valid Jinja: 'break' outside loop"),
        ("{{ messages[0].content | upper }}", r"cuts, escapes or respells what messages say"),
        ("{{ messages[0].content | e }}", r"cuts, escapes or respells what messages say"),
        ("{{ messages[0].content[:2000] }}", r"cuts, escapes or respells what messages say"),
        ("{{ messages[0].content.replace('cat', 'dog') }}", r"cuts, escapes or respells what"),
        ("{{ messages[0].content.strip().replace('cat', '') }}", r"cuts, escapes or respells what"),
        ("{{ messages[0].content | trim | replace('cat', 'dog') }}", r"cuts, escapes or respells"),
        ("{{ messages[0].content | tojson }}", r"cuts, escapes or respells what messages say"),
        ("{{ messages[0].role }}", r"must show each message once, in order; that of 'user'"),
    ],
)
def test_a_template_that_fails_says_so_in_one_sentence(source: str, text: str) -> None:
    with pytest.raises((UnsupportedModelError, InvalidOptionError), match=text) as caught:
        around(source)
    assert str(caught.value).startswith("The model's chat template ")
    assert isinstance(caught.value, InvalidOptionError) == ("refuses" in text)
    assert "\n" not in str(caught.value)


def test_what_a_template_replaces_in_its_own_words_is_its_own_matter() -> None:
    source = (
        "{{ 'a cat'.replace('cat', 'dog') | replace('dog', 'fox') }}: {{ messages[0].content }}"
    )
    assert around(source) == ["a fox: ", ""]


def test_every_rendering_counts_its_own_steps() -> None:
    template = ChatTemplate(
        "{% for i in range(9999) %}{% for j in range(8) %}{% endfor %}{% endfor %}"
        "{{ messages[0].content }}",
        {},
    )
    for _ in range(2):
        assert template.around(["user"]) == ["", ""]


def test_loops_know_their_length_and_place() -> None:
    source = (
        "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ m.content }}"
        "{% if loop.last %}.{% endif %}{% endfor %}"
    )
    assert around(source, *TALK) == ["1/3", "2/3", "3/3", "."]


def test_a_switch_for_thinking_is_passed_on_under_its_name() -> None:
    for name in ("enable_thinking", "thinking"):
        source = (
            "{{ messages[0].content }}{% if " + name + " is defined %}{{ " + name + " }}{% endif %}"
        )
        ends = [ChatTemplate(source, {}, wanted).around(["user"])[1] for wanted in (None, True)]
        assert ends == ["", "True"]
        ChatTemplate(source, {}).require_switch()
    expected = r"no switch for thinking \(enable_thinking\), so it can be turned neither on nor off"
    with pytest.raises(InvalidOptionError, match=expected):
        ChatTemplate(TEMPLATE, {}).require_switch()


def test_whether_thoughts_are_kept_is_what_the_template_shows() -> None:
    assert ChatTemplate(TEMPLATE, {}).keeps_thoughts("<think>", "</think>")
    typed = TEMPLATE.replace("message['content']", "message['content'][0]['text']")
    assert ChatTemplate(typed, {}).keeps_thoughts("<think>", "</think>")
    dropping = TEMPLATE.replace(
        "message['content']", "message['content'].split('</think>')[-1].lstrip('\\n')"
    )
    assert dropping != TEMPLATE
    assert not ChatTemplate(dropping, {}).keeps_thoughts("<think>", "</think>")
    assert around(dropping, *TALK) == around(TEMPLATE, *TALK)
