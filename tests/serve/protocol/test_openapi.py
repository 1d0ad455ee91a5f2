"""Whatever the OpenAPI document allows, and much that it does not: the server answers, and never with 500."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from conftest import make_model
from dlm.serve.guard import Limits
from serve.serving import serving

schemathesis = pytest.importorskip("schemathesis")


@pytest.mark.slow
def test_schemathesis_finds_no_fault() -> None:
    from hypothesis import HealthCheck, Phase, given, settings
    from schemathesis.generation import GenerationMode

    models = [make_model(window=16), make_model("autoregressive", window=16)]
    seen: set[int] = set()
    with serving(models, Limits(deadline=2.0, body_seconds=5.0), max_tokens=48, max_steps=32) as served, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tool's own
        document = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
        operations = [found.ok() for found in document.get_all_operations()]
        assert {operation.path for operation in operations} >= {"/v1/completions", "/v1/chat/completions", "/v1/dlm/generate", "/v1/models"}
        for operation in operations:
            for mode in GenerationMode.POSITIVE, GenerationMode.NEGATIVE:

                @settings(
                    max_examples=12 if operation.method == "post" else 2,
                    deadline=None,
                    derandomize=True,
                    database=None,
                    suppress_health_check=list(HealthCheck),
                    phases=[Phase.generate],
                )
                @given(case=operation.as_strategy(generation_mode=mode))
                def answered(case: Any) -> None:
                    answer = case.call(timeout=30)
                    seen.add(answer.status_code)
                    assert answer.status_code != 500, (case.as_curl_command(), answer.text)
                    if answer.status_code >= 400 and case.method != "HEAD":
                        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

                try:
                    answered()
                except Exception as error:
                    if type(error).__name__ != "Unsatisfiable":  # a request without parts cannot be wrong
                        raise
        assert served.client.get("/healthz").status_code == 200
    assert {200, 400} <= seen, seen
