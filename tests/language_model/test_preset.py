"""`--preset official`: the reference sampler with the settings of the model card, which another project's checkpoint takes by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conftest import Dlm
from dlm.errors import InputError
from dlm.language_model import load
from dlm.language_model.options import DecodingOptions, TextKeywords

GOLDEN = Path(__file__).parents[1] / "golden"
FOREIGN: dict[
    str, tuple[str, str, TextKeywords]
] = {  # golden checkpoints, the family to read them as, and a golden generation with the options that its settings are here
    "llada": ("", "semi-autoregressive blocks", {"steps": 16, "block_length": 8, "max_new_tokens": 32}),
    "dream": (
        "",
        "entropy, top_p 0.95 narrows the confidence",
        {"steps": 8, "temperature": 0.0, "max_new_tokens": 16},
    ),
    "a2d_qwen3": ("", "mdlm, blocks of 8, 3 steps each", {"steps": 6, "block_length": 8, "max_new_tokens": 16}),
    "nemotron_labs_diffusion": ("", "threshold 0.9, blocks of 4", {"block_length": 4, "max_new_tokens": 16}),
}


def case_of(name: str, case: str) -> dict[str, Any]:
    cases = json.loads((GOLDEN / name / "generations.json").read_text())["cases"]
    return dict(next(one for one in cases if one["name"] == case))


@pytest.mark.parametrize("name", FOREIGN)
def test_the_preset_writes_the_ids_of_the_reference(name: str) -> None:
    family, case, options = FOREIGN[name]
    lm, expected = load(str(GOLDEN / name), family=family), case_of(name, case)
    rows: list[list[int]] = expected["prompt_ids"]
    keywords: TextKeywords = {**options, "preset": "official"}
    ids = lm.generate(rows, **keywords)[0].trajectory.current_BT[0].tolist()
    written = [token for token in ids if token != lm.tokenizer.mask_id]  # a text that has ended leaves masks behind
    assert expected["output_ids"][0][: len(written)] == written


@pytest.mark.parametrize(("name", "family"), [*((name, "") for name in FOREIGN), ("sdar", ""), ("sdar", "i-dlm"), ("tiny_diffusion", "")])
def test_it_is_what_a_checkpoint_of_another_project_takes(name: str, family: str, tmp_path: Path) -> None:
    lm = load(str(GOLDEN / name), family=family)
    assert lm.resolve(DecodingOptions(preset="official")) == lm.resolve(DecodingOptions())
    lm.defaults |= {"steps": 3, "temperature": 0.7, "sampler": lm.default_sampler}
    lm.save_pretrained(tmp_path / "saved")
    again = load(str(tmp_path / "saved"))
    assert again.resolve(DecodingOptions()).draw.temperature == 0.7
    assert again.resolve(DecodingOptions(preset="official")) == load(str(GOLDEN / name), family=family).resolve(DecodingOptions())


def test_other_options_replace_its_settings() -> None:
    lm = load(str(GOLDEN / "dream"))
    plan = lm.resolve(DecodingOptions(preset="official", steps=5, temperature=1.0))
    assert (plan.word, plan.steps, plan.draw.temperature, plan.draw.top_p) == ("dream", 5, 1.0, 0.95)


def test_what_has_no_preset_is_told(dlm: Dlm) -> None:
    lm = load("shakespeare-mask")
    with pytest.raises(InputError, match="shakespeare-mask has no official preset"):
        lm.resolve(DecodingOptions(preset="official"))
    foreign = load(str(GOLDEN / "llada"))
    with pytest.raises(InputError, match="unknown preset 'offical'; did you mean official"):
        foreign.resolve(DecodingOptions(preset="offical"))
    with pytest.raises(InputError, match="chooses the sampler: leave --sampler"):
        foreign.resolve(DecodingOptions(preset="official", sampler="topk"))
    code, _, err = dlm("generate", "the", str(GOLDEN / "llada"), "--preset", "official", "--sampler", "topk")
    assert code == 2
    assert err.count("\n") == 1
    code, out, err = dlm("generate", "the", str(GOLDEN / "llada"), "--preset", "official", "--max-new-tokens", "4")
    assert code == 0
    assert "llada, llada, seed 0" in err
    assert out


def test_a_chat_takes_the_temperature_of_its_preset(dlm: Dlm, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    seen = []
    for options in ([], ["--temperature", "0"], ["--preset", "official"]):
        monkeypatch.setattr("sys.stdin", io.StringIO("the\n"))
        code, out, _ = dlm("chat", str(GOLDEN / "llada"), "--max-new-tokens", "8", *options)
        assert code == 0
        seen.append(out)
    assert seen[0] == seen[1] == seen[2]
