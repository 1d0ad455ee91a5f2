"""The schema of requests. Unknown fields and wrong types are rejected; fields of OpenAI's clients without effect here are accepted."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from dlm import seeds

MAX_CHARACTERS, MAX_CHOICES = 1_000_000, 16
MAX_COUNT = 2**31 - 1  # the limits of tokens and steps are the server's: `Shelf`
Word = Annotated[str, StringConstraints(max_length=200)]
Text = Annotated[str, StringConstraints(max_length=MAX_CHARACTERS)]
Token = Annotated[int, Field(ge=0, le=2**31 - 1)]
Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]
Zero = Annotated[float, Field(ge=0, le=0)]


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class Decoding(Strict):
    """How the text of a request is decoded. The last six fields are this server's own."""

    model: Word | None = None
    max_tokens: Count | None = Field(None, description="Tokens to add at most; by default a window is filled.")
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=seeds.LOWEST, le=seeds.HIGHEST)] | None = Field(None, description="The same seed gives the same text.")
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = Field(None, description="Keep this many likeliest tokens; 0: all.")
    sampler: Word | None = Field(None, description="One that /v1/models lists, with its setting after a colon.")
    steps: Annotated[int, Field(ge=1, le=MAX_COUNT)] | None = Field(None, description="Denoising steps of each window.")
    schedule: Word | None = Field(None, description="Which model takes which step, as `L0.5 H0.5`.")
    light: Word | None = Field(None, description="Model L of the schedule.")
    lossless: bool | None = Field(None, description="The model's exact distribution or greedy text, in fewer forward passes.")


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class OpenAI(Decoding):
    """The fields that completions and chat share."""

    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stop: Word | Annotated[list[Annotated[str, StringConstraints(min_length=1, max_length=200)]], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    diffusing: bool | None = Field(None, description="Each chunk holds the whole text as it stands and replaces the last.")
    user: Word | None = None
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None


class CompletionRequest(OpenAI):
    """POST /v1/completions."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_CHOICES)]
        | Annotated[list[Token], Field(min_length=1)]
        | Annotated[list[Annotated[list[Token], Field(min_length=1)]], Field(min_length=1, max_length=MAX_CHOICES)]
        | None
    ) = None
    max_tokens: Annotated[int, Field(ge=0, le=MAX_COUNT)] | None = Field(None, description="Tokens to add at most; 0 goes with echo.")
    suffix: Text | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None


class Part(Strict):
    type: Literal["text"]
    text: Text


class Message(BaseModel):
    """Fields that clients send back from an answer are not read."""

    model_config = ConfigDict(strict=True, extra="ignore")
    role: Annotated[str, StringConstraints(min_length=1, max_length=50)]
    content: Text | Annotated[list[Part], Field(max_length=1000)] | None = None


def content(message: Message) -> str:
    """Its text."""
    return message.content if isinstance(message.content, str) else "".join(part.text for part in message.content or [])


class TextFormat(Strict):
    type: Literal["text"]


class ObjectFormat(Strict):
    type: Literal["json_object"]


class NamedSchema(Strict):
    """A JSON schema, as OpenAI's clients send it."""

    name: Word | None = None
    description: Text | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class SchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: NamedSchema


class ChatRequest(OpenAI):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1000)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    response_format: Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")] | None = None
    metadata: dict[str, Any] | None = None
    store: Literal[False] | None = None


class GenerateRequest(Decoding):
    """POST /v1/dlm/generate. canvas: a token to keep by its id, null for a hole, a text to keep; instead of prompt and suffix.
    messages: a conversation to answer, instead of either."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1000)] | None = None
    prompt: Text | None = None
    suffix: Text | None = None
    canvas: Annotated[list[Token | Text | None], Field(min_length=1)] | None = None
    length: Count | None = Field(None, description="Tokens of the whole text, instead of max_tokens.")
    alternatives: Annotated[int, Field(ge=0, le=5)] = 3


class ExportRequest(Strict):
    """POST /v1/dlm/export."""

    model_config = ConfigDict(strict=True, extra="allow")
    format: Literal["html", "gif", "json"]


FIELDS = sorted({name for kind in (CompletionRequest, ChatRequest, GenerateRequest, ExportRequest) for name in kind.model_fields})
"""The fields of all requests, for the nearest name to a misspelt one."""
