"""Whether a checkpoint, under the reference sampler of its family, writes the ids that the reference wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dlm.errors import InputError
from dlm.files import read_json
from dlm.language_model import LanguageModel, official
from dlm.sampling.draw import generators
from dlm.text.tokenizer import Tokenizer
from dlm.trajectory import Canvas
from dlm.workflows.inputs import Counter, Model, Progress, language_model, silent
from dlm.workflows.numbers import Compared, compare

Rows = list[list[int]]


@dataclass(frozen=True)
class Verified:
    """One case. found: the written tokens, a row for each prompt, prompts included; at: the first new token that differs, -1 for none."""

    name: str
    equal: bool
    found: Rows
    forwards: int
    at: int

    @property
    def line(self) -> str:
        """As `dlm verify` prints it."""
        told = "equal  " if self.equal else f"differs from new token {self.at} on"
        return f"{told}  {self.name}  ({self.forwards} forward passes)"


@dataclass(frozen=True)
class Verification:
    """All cases of a file."""

    cases: tuple[Verified | Compared, ...]

    @property
    def differ(self) -> list[str]:
        return [case.name for case in self.cases if not case.equal]

    def record(self) -> dict[str, object]:
        """As the last line of `dlm verify`."""
        return {"cases": len(self.cases), "equal": len(self.cases) - len(self.differ), "differ": self.differ}


def verify(model: Model, cases: str | Path, *, device: str = "cpu", progress: Progress = silent) -> Verification:
    """Run every case of a file with the reference sampler and compare the ids.

    cases: a JSON object with `cases`, each with `name`, `settings` by the reference's names, `prompt_ids` and `output_ids`, a row each, and
    where they matter `attention_mask` and `sampler`; `pad_id` and `eos_id` beside `cases` name the padding of a reference's batch, and
    `mask_id` the mask, which a checkpoint without tokenizer may not name. Or a
    safetensors file with the reference's logits and losses, as of `dlm.workflows.numbers`.
    InputError for a file or a setting that cannot be.
    """
    if Path(cases).suffix == ".safetensors":
        return Verification(tuple(compare(language_model(model, device), Path(cases))))
    data = read_cases(Path(cases))
    lm = _masked(language_model(model, device), data.get("mask_id"))
    count, found = Counter(progress, len(data["cases"])), []
    for number, case in enumerate(data["cases"], 1):
        try:
            found.append(_run(lm, case, data, str(case.get("name", number))))
        except InputError:
            raise
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            raise InputError(f"{cases}: case {number} is damaged ({type(error).__name__}: {error})") from None
        count.add()
    return Verification(tuple(found))


def _masked(lm: LanguageModel, mask_id: int | None) -> LanguageModel:
    """The model with the mask of the cases. InputError where its own tokenizer names another."""
    if mask_id is None or mask_id == lm.tokenizer.mask_id or lm.config.family == "dlm":
        return lm
    inner, ids = lm.tokenizer.inner, lm.config.network.vocab_size
    if inner.token_to_id(str(mask_id)) != mask_id:
        raise InputError(f"the cases were written with the mask {mask_id}, that of {lm.name} is {lm.tokenizer.mask_id}")
    config = replace(lm.config, mask_token_id=mask_id)
    made = LanguageModel(lm.network, config, Tokenizer.with_mask(inner, ids, mask_id), name=lm.name)
    made.defaults, made.chat = lm.defaults, lm.chat
    return made


def read_cases(path: Path) -> dict[str, Any]:
    """The file. InputError where it is missing or damaged, or holds no case."""
    if not path.is_file():
        raise InputError(f"no file {path}: give the cases that the reference wrote, as JSON")
    data = read_json(path)
    cases = data.get("cases") if isinstance(data, dict) else None
    if not isinstance(cases, list) or not cases or not all(isinstance(case, dict) for case in cases):
        raise InputError(f"{path} holds no cases: it needs an object with a list `cases` of objects")
    return dict(data)


def _run(lm: LanguageModel, case: Mapping[str, Any], data: Mapping[str, Any], name: str) -> Verified:
    if "context_ids" in case:  # tiny-diffusion's word for the prompt; `length` is that of the whole text
        whole = {"seq_len": case["length"], "context_len": len(case["context_ids"][0])}
        case = {**case, "prompt_ids": case["context_ids"], "settings": case["settings"] | whole}
    rows, padding = _prompts(case)
    padding |= {int(data[key]) for key in ("pad_id", "eos_id") if data.get(key) is not None}
    plan = official.plan(lm, case["settings"], case.get("sampler", ""))
    canvas = Canvas.from_rows([[*lm.known(row), *[None] * plan.room(len(row))] for row in rows], fill=lm.tokenizer.mask_id)
    *_, last = plan.sampler.steps(canvas.to(lm.network.device), rng=generators(0, len(rows)))
    written = [_written(last.tokens_BT[b][: len(row) + plan.room(len(row))].tolist(), lm.tokenizer.mask_id) for b, row in enumerate(rows)]
    found = [[*row, *plan.cut(ids[len(row) :])] for ids, row in zip(written, rows, strict=True)]
    expected = [_unpadded(one, row, padding) for one, row in zip(case["output_ids"], rows, strict=True)]
    at = [_first_difference(one[len(row) :], other, padding) for one, other, row in zip(found, expected, rows, strict=True)]
    return Verified(name, max(at) < 0, found, last.forwards, max(at))


def _prompts(case: Mapping[str, Any]) -> tuple[Rows, set[int]]:
    """The prompts without padding, and the ids that pad them."""
    given = case["prompt_ids"]
    masks = case.get("attention_mask") or [[1] * len(row) for row in given]
    pairs = [list(zip(row, mask, strict=True)) for row, mask in zip(given, masks, strict=True)]
    return [[token for token, real in row if real] for row in pairs], {token for row in pairs for token, real in row if not real}


def _written(ids: list[int], mask_id: int) -> list[int]:
    """The tokens before the first mask; a text that has ended leaves masks after it."""
    return ids[: ids.index(mask_id)] if mask_id in ids else ids


def _unpadded(expected: Sequence[int], prompt: list[int], padding: set[int]) -> list[int]:
    """The new tokens of a row that the reference returned, which may begin with padding and the prompt."""
    for begin in range(len(expected) - len(prompt) + 1):
        if list(expected[begin : begin + len(prompt)]) == prompt:
            return list(expected[begin + len(prompt) :])
        if expected[begin] not in padding:
            break
    return list(expected)


def _first_difference(found: Sequence[int], expected: Sequence[int], padding: set[int]) -> int:
    """The first place where they differ, -1 for none; padding behind a row of the reference is no difference."""
    for place, (one, other) in enumerate(zip(found, expected, strict=False)):
        if one != other:
            return place
    same = len(found) <= len(expected) and set(expected[len(found) :]) <= padding
    return -1 if same else min(len(found), len(expected))
