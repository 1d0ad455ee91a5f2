"""From prompts and conversations to a canvas: token ids and holes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dlm.errors import InputError
from dlm.language_model.options import MAX_TOKENS
from dlm.text.chat import ChatTemplate, Messages
from dlm.text.tokenizer import Tokenizer
from dlm.trajectory import Canvas

NEW_TOKENS = 256  # that a converted model adds unless told otherwise, or until it ends its text
MIN_NEW_TOKENS = 64  # tokens that a model of ours adds at least to a long prompt, unless told otherwise


@dataclass(frozen=True)
class Prompting:
    """The encoding of prompts for one model. fills_windows: whether a text is usually a window long, as of models trained here;
    start: the token that the sampler reads before a text, None for none."""

    name: str
    tokenizer: Tokenizer
    chat: ChatTemplate
    window: int
    context: int
    fills_windows: bool = True
    start: int | None = None

    def canvas(
        self,
        prompt: str | Sequence[str | Sequence[int]] = "",
        *,
        length: int | None = None,
        max_new_tokens: int | None = None,
        suffix: str = "",
        template: str | None = None,
    ) -> Canvas:
        """As of `LanguageModel.canvas`."""
        if template is not None:
            if prompt or suffix or length or max_new_tokens:
                raise InputError("a template stands alone: put prompt, holes and suffix into it")
            return Canvas.from_rows([self.tokenizer.encode_template(template)], fill=self.tokenizer.mask_id)
        if length is not None and max_new_tokens is not None:
            raise InputError("give length or max_new_tokens, not both")
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if not hasattr(prompts, "__iter__") or any(isinstance(one, int) for one in prompts):
            raise InputError(f"a prompt is a text, or a list of texts or of lists of token ids; got {prompt!r}")
        tail = self.tokenizer.encode(suffix, "inside")
        if (asked := max(length or 0, max_new_tokens or 0) * len(prompts)) > MAX_TOKENS:
            raise InputError(f"{asked:,} tokens are asked for, one run writes {MAX_TOKENS:,} at most: ask for a shorter text or fewer")
        rows = [self._row(one, tail, length, max_new_tokens) for one in prompts]
        return Canvas.from_rows(rows, fill=self.tokenizer.mask_id)

    def _row(self, prompt: str | Sequence[int], tail: list[int], length: int | None, max_new_tokens: int | None) -> list[int | None]:
        head = self.tokenizer.encode(prompt) if isinstance(prompt, str) else self.known(prompt)
        given = len(head) + len(tail)
        usual = max(self.window, given + MIN_NEW_TOKENS) if self.fills_windows else self._usual(given)
        whole = usual if length is None else length
        new = whole - given if max_new_tokens is None else max_new_tokens
        if new < 1:
            counts = "" if length is None else " (length counts them, max_new_tokens does not)"
            raise InputError(f"nothing to generate: the prompt and suffix have {given} tokens, the text is to have {given + new}{counts}")
        if len(head) >= self.window and not self.context:
            raise InputError(f"the prompt has {len(head)} tokens, the window {self.window} and no context: use at most {self.window - 1}")
        if not self.fills_windows and not self.context and given + new > self.window:
            raise InputError(
                f"the text is to have {given + new} tokens, the window of {self.name} holds {self.window}: "
                f"with {given} given, ask for at most {self.window - given} new ones"
            )
        return [*head, *[None] * new, *tail]

    def _usual(self, given: int) -> int:
        """Tokens of a text of which so many are given: as many new ones as usual, or as the window holds."""
        return given + NEW_TOKENS if self.context else max(given + 1, min(given + NEW_TOKENS, self.window))

    def known(self, tokens: Sequence[int]) -> list[int]:
        """These tokens. InputError for one outside the vocabulary; the mask is outside."""
        if strange := [token for token in tokens if not 0 <= token < self.tokenizer.vocab_size or token == self.tokenizer.mask_id]:
            raise InputError(f"the token {strange[0]} is none of the {self.tokenizer.vocab_size} of {self.name}")
        return list(tokens)

    def prompt_ids(self, text: str) -> list[int]:
        """The text as a user's message where there is a chat template, else the text alone."""
        return self.conversation([{"role": "user", "content": text}]) if self.chat.source else self.tokenizer.encode(text)

    def chat_canvas(self, messages: Messages, max_new_tokens: int, **variables: Any) -> Canvas:
        """A conversation and room for an answer."""
        ids = self.conversation(messages, **variables)
        return Canvas.from_rows([[*ids, *[None] * min(max_new_tokens, self.window - len(ids))]], fill=self.tokenizer.mask_id)

    def conversation(self, messages: Messages, **variables: Any) -> list[int]:
        """Its ids. InputError without a chat template, and for one that fills the window."""
        ids = self.chat.encode(messages, self.tokenizer, **variables)
        ids = ids[1:] if ids[:1] == [self.start] else ids  # the sampler reads it anyway
        if len(ids) >= self.window:
            raise InputError(f"the conversation has {len(ids)} tokens, the window {self.window}: begin a new one")
        return ids
