"""Chat templates: messages to the token ids that a model was trained on.

A template is Jinja, run in a sandbox as in transformers. Control tokens come from the template alone: one that is typed in a message is
text, so no message can end its own turn or speak for somebody else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlm.errors import InputError
from dlm.files import read_object
from dlm.text import special_tokens
from dlm.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

Messages = Sequence[Mapping[str, Any]]
GUARD = "\ufdd0"  # a noncharacter, which no text has: stands inside a control token that somebody typed
ANSWER = "wherefore"  # of the conversation that shows how an answer ends
MAX_PRODUCT = 10_000_000
"""The characters, entries or bits that a product or a power in a template may have."""


@dataclass(frozen=True)
class ChatTemplate:
    """source: Jinja; tokens: the texts of bos_token, eos_token ... that it may name."""

    source: str = ""
    tokens: dict[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, directory: Path) -> ChatTemplate:
        """The one of a Hugging Face directory, in chat_template.jinja or tokenizer_config.json; an empty one where there is none."""
        config, single = directory / "tokenizer_config.json", directory / "chat_template.jinja"
        source = read_object(config).get("chat_template")
        try:
            if single.is_file():
                config, source = single, single.read_text(encoding="utf-8")
            elif isinstance(source, list):  # several, by name
                source = {entry["name"]: entry["template"] for entry in source}.get("default")
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise InputError(f"{config} is damaged ({error})") from None
        if not isinstance(source, str | None):
            raise InputError(f"{config} is damaged (its chat template is a {type(source).__name__}, not a text)")
        return cls(source or "", special_tokens.named(directory))

    def files(self) -> dict[str, str]:
        """The files that `load` reads, by name."""
        if not self.source:
            return {}
        return {"tokenizer_config.json": json.dumps(self.tokens | {"chat_template": self.source}, indent=2) + "\n"}

    def render(self, messages: Messages, *, answer: bool = True, **variables: Any) -> str:
        """The text of a conversation, control tokens spelt out. answer: end where the model is to speak. InputError from the template.

        messages: dicts with `role` and `content`; variables: further ones of the template, such as `enable_thinking` of Qwen3.
        """
        if not self.source:
            raise InputError("this model has no chat template: it was not made for conversations")
        names = self.tokens | {"tools": None, "documents": None} | variables
        try:
            return _environment().from_string(self.source).render(messages=messages, add_generation_prompt=answer, **names)
        except Exception as error:  # of the template's own arithmetic too: a division by 0, an overflow, a macro that calls itself
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise InputError(f"the chat template does not take these messages ({reason}{_line(error)})") from None

    def end_of_turn(self, tokenizer: Tokenizer) -> int | None:
        """The control token that stands after the last word of an answer; None where the template puts none there."""
        control = _control(tokenizer)
        if not self.source or control is None:
            return None
        try:
            text = self.render([{"role": "user", "content": ANSWER[::-1]}, {"role": "assistant", "content": ANSWER}], answer=False)
        except InputError:  # it takes other messages
            return None
        _, _, rest = text.rpartition(ANSWER)
        found = control.match(rest.lstrip()) if ANSWER in text else None
        return None if found is None else tokenizer.control[found[0]]

    def encode(self, messages: Messages, tokenizer: Tokenizer, *, answer: bool = True, **variables: Any) -> list[int]:
        """Token ids of a conversation. InputError as `render`."""
        return ids(self.spell(messages, tokenizer, answer=answer, **variables), tokenizer)

    def spell(self, messages: Messages, tokenizer: Tokenizer, *, answer: bool = True, **variables: Any) -> str:
        """As `render`, with a guard in every control token that a message spells, for `ids`. InputError as `render`."""
        control = _control(tokenizer)

        def guarded(value: Any) -> Any:
            if not isinstance(value, str) or control is None:
                return value
            return control.sub(lambda found: found[0][0] + GUARD + found[0][1:], value.replace(GUARD, ""))

        return self.render([{key: guarded(value) for key, value in m.items()} for m in messages], answer=answer, **variables)


@cache
def _environment() -> ImmutableSandboxedEnvironment:
    """Jinja as transformers sets it up: `{% generation %}` marks an answer for training and changes no text."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012 (as in the class above it)

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    class Environment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(["*", "**"])

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if _size(left, right, operator) > MAX_PRODUCT:
                raise OverflowError(f"the result of {operator} is too large")
            return super().call_binop(context, operator, left, right)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:  # Jinja's own escapes HTML
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": lambda form: datetime.now().strftime(form)}
    return environment


def _size(left: Any, right: Any, operator: str) -> float:
    """About how large a product or a power becomes: characters or entries of a sequence, bits of a whole number."""
    if isinstance(left, int) and isinstance(right, int):
        return left.bit_length() * max(right, 0) if operator == "**" else 0
    lengths = [len(one) for one in (left, right) if isinstance(one, str | list | tuple)]
    times = [one for one in (left, right) if isinstance(one, int)]
    return lengths[0] * times[0] if lengths and times else 0


def _line(error: Exception) -> str:
    """`, line N` of the template that an error comes from; nothing where it says none."""
    lines = [getattr(error, "lineno", None)]
    step = error.__traceback__
    while step is not None:
        if step.tb_frame.f_code.co_filename == "<template>":
            lines.append(step.tb_lineno)
        step = step.tb_next
    told = [line for line in lines if line]
    return f", line {told[-1]} of the template" if told else ""


def ids(text: str, tokenizer: Tokenizer) -> list[int]:
    """Token ids of a text whose control tokens are meant, but for those with a guard."""
    control = _control(tokenizer)
    if control is None:
        return tokenizer.encode(text)
    added = tokenizer.inner.get_added_tokens_decoder()
    found: list[int] = []
    parts = re.split(f"({control.pattern})", text)
    for at, part in enumerate(parts):
        if part in tokenizer.control:
            found.append(tokenizer.control[part])
            continue
        if at and added[found[-1]].rstrip:  # such a control token takes the white space beside it
            part = part.lstrip()
        if at + 1 < len(parts) and added[tokenizer.control[parts[at + 1]]].lstrip:
            part = part.rstrip()
        if part:
            found += tokenizer.encode(part.replace(GUARD, ""), "control" if at else "start")
    return found


def _control(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    """What spells a control token of this tokenizer; None where it has none."""
    longest_first = sorted(tokenizer.control, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
