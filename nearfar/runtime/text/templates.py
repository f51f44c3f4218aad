"""Chat templates: Jinja programs from a model's author that put text around messages.

They run in a sandbox, within limits, on stand-ins for the messages. The messages themselves are
inserted afterwards, so that text which looks like a control token cannot escape from its message.
This module knows neither tokenizers nor the content of messages.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nearfar.errors import InvalidOptionError, UnsupportedModelError

_STAND_IN = "\ue000{}\ue001"  # private-use characters; no template and no trimming touches them
# where a template cuts, escapes or respells what messages say, it does so to this
_PROBE = "\ue000{}aA<b>&'\"\\ \n1." + "x" * 100_000 + "\ue001"
_MOST_STEPS = 100_000  # of all loops of a rendering
_MOST_CHARACTERS = 2_000_000  # of a rendering; contents are not in it
_LONGEST_REPLACED = 1000  # characters of a text that is looked for in messages
_THINKING = ("enable_thinking", "thinking")  # the variables by which templates turn it on and off


class ChatTemplate:
    """The template ``source``, with the control tokens that it may name (``marks``).

    ``thinking`` is passed to templates that have a switch for it; None passes nothing.
    """

    def __init__(self, source: str, marks: Mapping[str, str], thinking: bool | None = None) -> None:
        self.source, self._marks, self._thinking = source, marks, thinking

    def around(self, roles: Sequence[str], *, answer: bool = True) -> list[str]:
        """The text before, between and after the messages of ``roles``: one string more than roles.

        With ``answer``, the last one ends where the assistant's answer starts. Raises
        UnsupportedModelError for a template that is broken or does not show each message as it is,
        InvalidOptionError for one that refuses them.
        """
        stand_ins = [_STAND_IN.format(i) for i in range(len(roles))]
        rendered, typed = self._rendered(roles, stand_ins, answer)
        between = _cut(rendered, roles, stand_ins)
        replaced = " ".join(_compile(self.source).replaced)
        probes = [_PROBE.format(i).replace("\n", f"\n{replaced}") for i in range(len(roles))]
        probed = self._render(roles, probes, answer, typed)
        for mark, probe in zip(stand_ins, probes, strict=True):
            probed = probed.replace(probe, mark)
        if probed != rendered:
            raise UnsupportedModelError(
                "The model's chat template cuts, escapes or respells what messages say, which is "
                "not supported. Give the prompt without a chat template."
            )
        return between

    def keeps_thoughts(self, opened: str, closed: str) -> bool:
        """Whether a thought between these marks is shown once the conversation has gone on."""
        roles = ("user", "assistant", "user")
        marks = [_STAND_IN.format(i) for i in range(len(roles))]
        _, typed = self._rendered(roles, marks, True)
        thought = _STAND_IN.format("t")
        marks[1] = f"{opened}\n{thought}\n{closed}\n\n{marks[1]}"
        return thought in self._render(roles, marks, True, typed)

    def require_switch(self) -> None:
        """Raise InvalidOptionError for a template that thinking cannot be turned on or off in."""
        if not any(name in _names(self.source) for name in _THINKING):
            raise InvalidOptionError(
                "The model's chat template has no switch for thinking (enable_thinking), so it can "
                "be turned neither on nor off. Leave --thinking and --no-thinking out."
            )

    def _rendered(
        self, roles: Sequence[str], stand_ins: Sequence[str], answer: bool
    ) -> tuple[str, bool]:
        """The rendered messages, and whether their contents are lists of parts, as some want."""
        rendered = self._render(roles, stand_ins, answer, False)
        if all(mark in rendered for mark in stand_ins):
            return rendered, False
        with suppress(InvalidOptionError, UnsupportedModelError):
            typed = self._render(roles, stand_ins, answer, True)
            if all(mark in typed for mark in stand_ins):
                return typed, True
        return rendered, False

    def _render(
        self, roles: Sequence[str], contents: Sequence[str], answer: bool, typed: bool
    ) -> str:
        messages = [
            {"role": role, "content": [{"type": "text", "text": text}] if typed else text}
            for role, text in zip(roles, contents, strict=True)
        ]
        switches = {} if self._thinking is None else dict.fromkeys(_THINKING, self._thinking)
        template = _compile(self.source)
        try:
            return _limited(
                template.generate(
                    messages=messages,
                    add_generation_prompt=answer,
                    tools=None,
                    documents=None,
                    **switches,
                    **self._marks,
                )
            )
        except _RefusalError as error:
            raise InvalidOptionError(
                f"The model's chat template refuses these messages: {_reason(error)}. "
                f"Roles given: {', '.join(roles)}."
            ) from error
        except Exception as error:  # a program of somebody else, which may raise anything
            raise UnsupportedModelError(
                f"The model's chat template fails: {type(error).__name__}: {_reason(error)}. "
                "Give the prompt without a chat template."
            ) from error


def _cut(rendered: str, roles: Sequence[str], stand_ins: Sequence[str]) -> list[str]:
    """``rendered`` without the stand-ins, cut where they were."""
    between = []
    for role, mark in zip(roles, stand_ins, strict=True):
        before, found, rendered = rendered.partition(mark)
        if not found or mark in rendered:
            raise UnsupportedModelError(
                f"The model's chat template must show each message once, in order; that of "
                f"{role!r} is missing, repeated or out of order. Give the prompt without a chat "
                "template."
            )
        between.append(before)
    return [*between, rendered]


def _limited(pieces: Iterable[str]) -> str:
    """``pieces`` joined."""
    kept, size = [], 0
    for piece in pieces:
        kept.append(piece)
        size += len(piece)
        if size > _MOST_CHARACTERS:
            raise OverflowError(f"it writes more than {_MOST_CHARACTERS:,} characters")
    return "".join(kept)


def _reason(error: Exception) -> str:
    return (str(error).strip() or "no reason given").splitlines()[0].rstrip(".")


class _GenerationBlock(Extension):
    """The block that marks an assistant's words for training; here only its content counts."""

    tags = {"generation"}  # noqa: RUF012  as jinja2 declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    """The environment that transformers gives to templates, with limits."""

    intercepted_binops = frozenset(["*", "**"])

    def __init__(self) -> None:
        extensions = ["jinja2.ext.loopcontrols", _GenerationBlock]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        self.filters["tojson"] = _to_json
        self.replaced: dict[str, None] = {}  # texts that it replaces in what messages say
        self.filters["replace"] = self._replace
        self.globals["raise_exception"] = _raise
        self.globals["strftime_now"] = lambda form: datetime.now().strftime(form)

    def call(__self, __context: Any, __obj: Any, *args: Any, **options: Any) -> Any:  # noqa: N805
        """A call from within a template; what it replaces is noted."""
        if getattr(__obj, "__name__", "") == "replace" and args:
            __self._note(getattr(__obj, "__self__", None), args[0])
        return super().call(__context, __obj, *args, **options)

    def _replace(self, value: Any, old: Any, new: Any, count: int = -1) -> str:
        """Jinja's filter, which escapes nothing here."""
        self._note(value, old)
        return str(value).replace(str(old), str(new), -1 if count is None else count)

    def _note(self, value: Any, old: Any) -> None:
        if isinstance(value, str) and _STAND_IN[0] in value and len(str(old)) < _LONGEST_REPLACED:
            self.replaced[str(old)] = None

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Products and powers whose result is not larger than a prompt can be."""
        if operator == "**" and isinstance(right, int) and abs(right) > 1000:
            raise OverflowError("it raises a number to a power above 1,000")
        sizes = [len(side) for side in (left, right) if isinstance(side, str | list | tuple)]
        counts = [side for side in (left, right) if isinstance(side, int)]
        if sizes and counts and sizes[0] * counts[0] > _MOST_CHARACTERS:
            raise OverflowError(f"it writes more than {_MOST_CHARACTERS:,} characters")
        return super().call_binop(context, operator, left, right)


def _counted() -> Any:
    """A filter that passes on the items of loops, up to a limit for all loops together."""
    steps = 0

    def count(items: Any) -> Iterator[Any]:
        nonlocal steps
        for item in items:
            steps += 1
            if steps > _MOST_STEPS:
                raise OverflowError(f"its loops take more than {_MOST_STEPS:,} steps")
            yield item

    return count


def _parse(environment: _Environment, source: str) -> nodes.Template:
    with _named_invalid():
        return environment.parse(source)


@contextmanager
def _named_invalid() -> Iterator[None]:
    try:
        yield
    # a SyntaxError is Python's, for what Jinja passes on unseen, like a break outside of a loop
    except (TemplateError, SyntaxError, RecursionError) as error:
        raise UnsupportedModelError(
            f"The model's chat template is not valid Jinja: {_reason(error)}. "
            "Give the prompt without a chat template."
        ) from error


class _Counting:
    """A compiled template of which every rendering has its own count of steps."""

    def __init__(self, source: str) -> None:
        self._environment = _Environment()
        self._environment.filters["counted"] = _counted()
        tree = _parse(self._environment, source)
        for loop in list(tree.find_all(nodes.For)):
            loop.iter = nodes.Filter(loop.iter, "counted", [], [], None, None, lineno=loop.lineno)
        with _named_invalid():
            code = self._environment.compile(tree)
        shared = self._environment.make_globals(None)
        self._template = Template.from_code(self._environment, code, shared)

    @property
    def replaced(self) -> list[str]:
        """Texts that renderings until now have replaced in what messages say."""
        return list(self._environment.replaced)

    def generate(self, **variables: Any) -> Iterator[str]:
        self._environment.filters["counted"] = _counted()
        return self._template.generate(**variables)


@lru_cache(maxsize=4)
def _compile(source: str) -> _Counting:
    return _Counting(source)


@lru_cache(maxsize=4)
def _names(source: str) -> frozenset[str]:
    """Names that the template asks for."""
    tree = _parse(_Environment(), source)
    return frozenset(name.name for name in tree.find_all(nodes.Name) if name.ctx == "load")


class _RefusalError(TemplateError):
    """A template's own error for messages that it does not accept."""


def _raise(message: str) -> NoReturn:
    raise _RefusalError(message)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """JSON without the HTML escapes of Jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)
