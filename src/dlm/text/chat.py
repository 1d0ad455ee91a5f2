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
from pathlib import Path
from typing import Any

from dlm.errors import InputError
from dlm.files import read_json
from dlm.text.tokenizer import Tokenizer

Messages = Sequence[Mapping[str, Any]]
GUARD = "\ufdd0"  # a noncharacter, which no text has: stands inside a control token that somebody typed


@dataclass(frozen=True)
class ChatTemplate:
    """source: Jinja; tokens: the texts of bos_token, eos_token ... that it may name."""

    source: str = ""
    tokens: dict[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, directory: Path) -> ChatTemplate:
        """The one of a Hugging Face directory, in chat_template.jinja or tokenizer_config.json; an empty one where there is none."""
        config, single = directory / "tokenizer_config.json", directory / "chat_template.jinja"
        data = read_json(config) if config.is_file() else {}
        try:
            source = single.read_text(encoding="utf-8") if single.is_file() else data.get("chat_template")
            if isinstance(source, list):  # several, by name
                source = {entry["name"]: entry["template"] for entry in source}.get("default")
            tokens = {key: value["content"] if isinstance(value, dict) else value for key, value in data.items() if key.endswith("_token")}
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise InputError(f"{config} is damaged ({error})") from None
        return cls(source or "", {key: value for key, value in tokens.items() if isinstance(value, str)})

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
        from jinja2 import TemplateError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def raise_exception(message: str) -> None:
            raise TemplateError(message)

        def tojson(value: Any, indent: int | None = None) -> str:  # Jinja's own escapes HTML
            return json.dumps(value, ensure_ascii=False, indent=indent)

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = tojson
        environment.globals |= {"raise_exception": raise_exception, "strftime_now": lambda form: datetime.now().strftime(form)}
        names = self.tokens | {"tools": None, "documents": None} | variables
        try:
            return environment.from_string(self.source).render(messages=messages, add_generation_prompt=answer, **names)
        except (TemplateError, TypeError, ValueError, LookupError) as error:
            raise InputError(f"the chat template does not take these messages ({str(error).splitlines()[0]})") from None

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
