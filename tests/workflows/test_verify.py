"""`dlm verify`: golden cases are equal, a changed id is found and named, bad files get one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conftest import Dlm
from dlm.workflows.verify import verify

GOLDEN = Path(__file__).parents[1] / "golden"


def cases(family: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((GOLDEN / family / "generations.json").read_text())
    return data


def written(tmp_path: Path, data: object) -> str:
    path = tmp_path / "cases.json"
    path.write_text(json.dumps(data))
    return str(path)


COUNTS = {
    "llada": 6,
    "dream": 7,
    "a2d_qwen3": 8,
    "a2d_qwen2": 6,
    "sdar": 4,
    "llada2_moe": 4,
    "nemotron_labs_diffusion": 3,
    "tiny_diffusion": 2,
}


@pytest.mark.parametrize(("family", "count"), COUNTS.items())
def test_golden_cases_are_equal(dlm: Dlm, family: str, count: int) -> None:
    code, out, _ = dlm("verify", str(GOLDEN / family), "--cases", str(GOLDEN / family / "generations.json"))
    *rows, last = out.splitlines()
    assert code == 0
    assert len(rows) == count
    assert all(row.startswith("equal") for row in rows)
    assert json.loads(last) == {"cases": count, "equal": count, "differ": []}


def test_a_changed_id_is_found(dlm: Dlm, tmp_path: Path) -> None:
    data = cases("llada")
    data["cases"] = data["cases"][:2]
    data["cases"][1]["output_ids"][0][-1] += 1
    code, out, _ = dlm("verify", str(GOLDEN / "llada"), "--cases", written(tmp_path, data))
    name = data["cases"][1]["name"]
    assert code == 1
    assert f"differs from new token 15 on  {name}" in out
    assert json.loads(out.splitlines()[-1]) == {"cases": 2, "equal": 1, "differ": [name]}


def test_text_behind_a_row_is_a_difference_and_padding_is_none(tmp_path: Path) -> None:
    data = cases("llada")
    data["cases"] = data["cases"][:1]
    data["cases"][0]["output_ids"][0].append(273)
    assert verify(GOLDEN / "llada", written(tmp_path, data)).differ == []
    data["cases"][0]["output_ids"][0].append(5)
    assert verify(GOLDEN / "llada", written(tmp_path, data)).differ == ["pure diffusion, a token a step"]


def test_other_settings_write_other_ids(tmp_path: Path) -> None:
    """Each setting of the golden cases matters: without it a case differs."""
    for family, setting in [("llada", "cfg_scale"), ("llada", "confidence_eos_eot_inf"), ("dream", "alg"), ("a2d_qwen3", "block_size")]:
        data = cases(family)
        data["cases"] = [case for case in data["cases"] if setting in case["settings"]]
        for case in data["cases"]:
            del case["settings"][setting]
        assert verify(GOLDEN / family, written(tmp_path, data)).differ


BAD: dict[str, tuple[object, str]] = {
    "no cases": ({}, "holds no cases"),
    "a list": ([1], "holds no cases"),
    "no prompt": ({"cases": [{"settings": {}}]}, "case 1 is damaged (KeyError: 'prompt_ids')"),
    "a row too few": ({"cases": [{"settings": {}, "prompt_ids": [[1]], "output_ids": []}]}, "case 1 is damaged"),
    "an unknown setting": ({"cases": [{"settings": {"alg": "origin"}, "prompt_ids": [[1]], "output_ids": [[1]]}]}, "no setting 'alg'"),
    "a strange id": ({"cases": [{"settings": {}, "prompt_ids": [[999]], "output_ids": [[1]]}]}, "the token 999 is none"),
    "an unknown sampler": ({"cases": [{"settings": {}, "sampler": "x", "prompt_ids": [[1]], "output_ids": [[1]]}]}, "known: llada"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_get_one_line(dlm: Dlm, tmp_path: Path, case: str) -> None:
    data, message = BAD[case]
    assert message in dlm.told("verify", str(GOLDEN / "llada"), "--cases", written(tmp_path, data))


def test_a_missing_file_and_a_model_without_reference(dlm: Dlm, tmp_path: Path, masked_dir: Path) -> None:
    assert "none.json' does not exist" in dlm.told("verify", str(GOLDEN / "llada"), "--cases", str(tmp_path / "none.json"))
    told = dlm.told("verify", str(masked_dir), "--cases", str(GOLDEN / "llada" / "generations.json"))
    assert "has no reference sampler here" in told
