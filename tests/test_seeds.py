"""Seeds: one range for the command line, Python, the server and training; all 64 bits count (report D18)."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from conftest import Dlm, make_model
from dlm import seeds
from dlm.adapters.train import ConvertConfig
from dlm.errors import InputError
from dlm.sampling.draw import generators
from dlm.serve.protocol.schema import CompletionRequest
from dlm.train.config import TrainConfig

OUTSIDE = (2**63, 2**64, -(2**63) - 1, 10**40)
KIN = (7, 7 + 2**32, 7 - 2**32, 7 + 2**62, -7, -1, 2**63 - 1, -(2**63))  # alike in their lower 32 bits, or at an end


def test_a_seed_below_2_to_the_32_is_itself_and_all_others_are_mixed() -> None:
    for small in (0, 1, 7, 2**31, 2**32 - 1):
        assert seeds.folded(small) == small
        assert torch.equal(torch.rand(4, generator=seeds.generator(small)), torch.rand(4, generator=torch.Generator().manual_seed(small)))
    many = [*range(2**32 + 1, 2**32 + 2000), *range(-2000, 0), *(1 << bit for bit in range(32, 63))]
    assert len({seeds.folded(seed) for seed in many}) == len(many)
    assert all(0 <= seeds.folded(seed) < 2**32 for seed in many)


def test_d18_seeds_that_differ_draw_other_numbers() -> None:
    drawn = {tuple(torch.rand(8, generator=seeds.generator(seed)).tolist()) for seed in KIN}
    assert len(drawn) == len(KIN)


def test_the_row_after_the_highest_seed_is_the_lowest() -> None:
    assert seeds.after(seeds.HIGHEST, 1) == seeds.LOWEST
    assert seeds.after(5, 3) == 8
    last, next_ = generators(seeds.HIGHEST, 2)
    assert next_.initial_seed() == seeds.folded(seeds.LOWEST) != last.initial_seed()


def test_d18_texts_of_python() -> None:
    model = make_model()
    texts = [model.generate("ROMEO:", length=30, steps=4, seed=seed).text for seed in KIN]
    assert len(set(texts)) == len(texts)
    for seed in OUTSIDE:
        with pytest.raises(InputError, match="a seed lies in"):
            model.generate("ROMEO:", length=30, seed=seed)
    rows = model.generate(["ROMEO:", "ROMEO:"], length=30, steps=4, seed=seeds.HIGHEST)
    assert rows[1].seed == seeds.LOWEST
    assert rows[1].text == model.generate("ROMEO:", length=30, steps=4, seed=seeds.LOWEST).text


@pytest.mark.parametrize("words", [("generate", "ROMEO:"), ("eval", "x"), ("convert", "x"), ("chat",), ("calibrate", "x")])
def test_d18_command_line(dlm: Dlm, words: tuple[str, ...]) -> None:
    for seed in ("18446744073709551616", "99999999999999999999999", "-9223372036854775809"):
        said = dlm.told(*words, "--seed", seed)
        assert "a seed lies in -2**63 .. 2**63 - 1" in said


def test_d18_training_takes_what_generation_takes() -> None:
    for seed in (2**32, seeds.HIGHEST, seeds.LOWEST, -1):
        assert TrainConfig(seed=seed).seed == seed
        assert ConvertConfig(seed=seed).seed == seed
    for seed in OUTSIDE:
        with pytest.raises(InputError, match="seed"):
            TrainConfig(seed=seed)
        with pytest.raises(InputError, match="seed"):
            ConvertConfig(seed=seed)


def test_d18_server() -> None:
    for seed in (seeds.HIGHEST, seeds.LOWEST, -1):
        assert CompletionRequest.model_validate({"prompt": "a", "seed": seed}).seed == seed
    for seed in OUTSIDE:
        with pytest.raises(ValidationError, match="seed"):
            CompletionRequest.model_validate({"prompt": "a", "seed": seed})


def test_no_whole_number_is_no_seed() -> None:
    with pytest.raises(InputError, match=r"a seed is a whole number, got 1\.5"):
        seeds.check(1.5)  # type: ignore[arg-type]
