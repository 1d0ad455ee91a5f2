"""What the tests of the server share: five models, a server of them, what watches two of their networks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

import dlm
from conftest import make_model
from dlm.language_model import LanguageModel
from dlm.text.chat import ChatTemplate

if TYPE_CHECKING:
    from serve.serving import Served, Watch


def named(lm: LanguageModel, name: str) -> LanguageModel:
    lm.name = name
    return lm


@pytest.fixture(scope="module")
def mask() -> LanguageModel:
    return dlm.load("shakespeare-mask")


@pytest.fixture(scope="module")
def models(mask: LanguageModel) -> list[LanguageModel]:
    tiny = named(make_model(window=32, context=8), "tiny")
    ar = named(make_model("autoregressive", window=32, context=8), "tiny-ar")
    ar.chat = ChatTemplate("{% for m in messages %}{{ m.content }}\n{% endfor %}:")
    uniform = make_model(noise={"process": "uniform", "schedule": "linear"})
    return [mask, tiny, ar, uniform, dlm.load("shakespeare-mask-1")]


@pytest.fixture(scope="module")
def served(models: list[LanguageModel]) -> Iterator[Served]:
    from serve.serving import serving

    with serving(models, max_batch=8, max_queue=4) as made:
        yield made


@pytest.fixture(scope="module")
def watch(models: list[LanguageModel]) -> Watch:
    """Of the model `tiny`."""
    from serve.serving import Watch

    return Watch(models[1])


@pytest.fixture(scope="module")
def watch_ar(models: list[LanguageModel]) -> Watch:
    from serve.serving import Watch

    return Watch(models[2])


@pytest.fixture
def openai(served: Served) -> Iterator[Any]:
    client = pytest.importorskip("openai").OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
    with client:
        yield client
