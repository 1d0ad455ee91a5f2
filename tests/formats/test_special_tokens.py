"""Stops, begin tokens and sampling defaults from every file that says them; transformers is the oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import BertProcessing, ByteLevel, RobertaProcessing, TemplateProcessing
from tokenizers.processors import Sequence as Processors

from bases import SPECIAL, TEMPLATE, publish, tokenizer, transformer
from conftest import Dlm
from dlm.errors import InputError
from dlm.formats import huggingface, native
from dlm.language_model import LanguageModel, load
from dlm.text import special_tokens
from dlm.text.chat import ChatTemplate
from dlm.text.tokenizer import Tokenizer

START, END = SPECIAL
IDS: dict[str, int] = {text: tokenizer().get_vocab()[text] for text in SPECIAL}


@pytest.fixture(scope="module")
def model() -> Any:
    return transformer("Llama", num_hidden_layers=1)


@pytest.fixture
def base(model: Any, tmp_path: Path) -> Path:
    return publish(model, tmp_path / "base")


def put(path: Path, name: str, data: Any) -> None:
    (path / name).write_text(data if isinstance(data, str) else json.dumps(data))


def theirs(path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


@pytest.mark.parametrize(
    ("after", "found"),
    [
        ("{{ m.content }}<|im_end|>\n", END),
        ("{{ m.content | trim }}\n <|im_end|>", END),
        ("{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}", START),
        ("{{ m.content }}\n", None),
        ("{{ m.content }} and <|im_end|>", None),
        ("{{ raise_exception('no') }}", None),
    ],
)
def test_the_control_token_after_an_answer_ends_a_turn(after: str, found: str | None) -> None:
    chat = ChatTemplate("{% for m in messages %}" + after + "{% endfor %}", {"eos_token": START})
    assert chat.end_of_turn(Tokenizer(tokenizer())) == (None if found is None else IDS[found])


def test_d13_special_tokens_map(base: Path) -> None:
    template = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}{{ pad_token }}{{ image_token }}"
    message = [{"role": "user", "content": "ROMEO"}]

    def both() -> tuple[str, set[int]]:
        lm = load(str(base))
        assert lm.chat_prompt(message) == theirs(base).apply_chat_template(message, tokenize=False)
        assert lm.prompting.conversation(message) == theirs(base).apply_chat_template(message, tokenize=True)["input_ids"]
        return lm.chat_prompt(message), set(lm.stops)

    put(base, "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template})
    assert both() == ("ROMEO", set())
    put(base, "special_tokens_map.json", {"bos_token": START, "eos_token": {"content": END, "lstrip": False}})
    assert both() == (f"{START}ROMEO{END}", {IDS[END]})
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template, "eos_token": START, "pad_token": START}
    put(base, "tokenizer_config.json", config)
    assert both() == (f"{START}ROMEO{END}{START}", {IDS[END]})  # the second file wins
    added = {str(i): {"content": text, "special": True} for text, i in IDS.items()}
    put(base, "tokenizer_config.json", config | {"added_tokens_decoder": added})
    assert both() == (f"ROMEO{START}{START}", {IDS[START]})  # and does not count
    put(base, "special_tokens_map.json", {"bos_token": 3})
    put(base, "tokenizer_config.json", {})
    with pytest.raises(InputError, match=r"special_tokens_map\.json is damaged \(bos_token is 3"):
        load(str(base))


def test_a_named_token_that_the_tokenizer_does_not_mark_is_a_control_token(base: Path) -> None:
    """`th` is a token of the vocabulary like others; its name makes it the end of a text, and no text that is typed."""
    inner = tokenizer()
    word = next(text for text in inner.get_vocab() if len(text) > 1 and text.isalpha())
    put(base, "tokenizer_config.json", {"eos_token": word, "chat_template": "{{ messages[0].content }}{{ eos_token }}"})
    lm = load(str(base))
    assert lm.stops == {inner.token_to_id(word)}
    assert lm.prompting.conversation([{"role": "user", "content": "a"}])[-1] == inner.token_to_id(word)


def processor(single: str) -> TemplateProcessing:
    return TemplateProcessing(single=single, special_tokens=list(IDS.items()))


PROCESSORS: dict[str, tuple[Any, list[str], list[str]]] = {
    "none": (None, [], []),
    "bytes": (ByteLevel(), [], []),
    "before": (processor(f"{START} $A"), [START], []),
    "after": (processor(f"$A {END}"), [], [END]),
    "both": (processor(f"{START} $A {END}"), [START], [END]),
    "two": (processor(f"{START} {END} $A {END} {START}"), [START, END], [END, START]),
    "bert": (BertProcessing((END, IDS[END]), (START, IDS[START])), [START], [END]),
    "roberta": (RobertaProcessing((END, IDS[END]), (START, IDS[START])), [START], [END]),
    "sequence": (Processors([ByteLevel(), processor(f"{START} $A {END}")]), [START], [END]),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_tokens_at_either_end_of_a_text(name: str, tmp_path: Path) -> None:
    """The ids that the library itself puts around a text, read off the post-processor without running it."""
    inner = tokenizer()
    if PROCESSORS[name][0] is not None:
        inner.post_processor = PROCESSORS[name][0]
    ids, plain = (inner.encode("so", add_special_tokens=one).ids for one in (True, False))
    before, after = special_tokens.around(inner, tmp_path)
    assert (before, after) == tuple([IDS[text] for text in side] for side in PROCESSORS[name][1:])
    assert [*before, *plain, *after] == ids


@pytest.mark.parametrize(("name", "start", "stops"), [("after", None, {END}), ("both", START, {END}), ("before", START, {END})])
def test_a_base_begins_and_ends_as_its_tokenizer_says(base: Path, name: str, start: str | None, stops: set[str]) -> None:
    inner = tokenizer()
    inner.post_processor = PROCESSORS[name][0]
    inner.save(str(base / "tokenizer.json"))
    lm = load(str(base))
    assert lm.config.start_token_id == (None if start is None else IDS[start])
    assert lm.stops == {IDS[text] for text in stops}


def test_a_tokenizer_that_begins_texts_with_several_tokens_or_repeats_them_is_refused(base: Path) -> None:
    inner = tokenizer()
    several = Processors([processor(f"{START} $A"), processor(f"$A {END}")])
    refused = (PROCESSORS["two"][0], "puts 2 tokens before"), (processor("$A $A"), "takes a text 2 times"), (several, "2 post-processors")
    for processors, told in refused:
        inner.post_processor = processors
        inner.save(str(base / "tokenizer.json"))
        with pytest.raises(InputError, match=told):
            load(str(base))


def test_stops_are_a_union(model: Any, base: Path) -> None:
    put(base, "generation_config.json", {"eos_token_id": [1, 2]})
    config = json.loads((base / "config.json").read_text())
    put(base, "config.json", config | {"eos_token_id": 3})
    assert load(str(base)).stops == {1, 2, 3, IDS[END]}
    put(base, "config.json", config | {"eos_token_id": [[3]]})
    with pytest.raises(InputError, match=r"eos_token_id has \[3\]"):
        load(str(base))


def texts(path: Path, **options: Any) -> list[str]:
    lm = load(str(path))
    return [lm.generate("ROMEO", max_new_tokens=12, seed=3, **options).text, lm.generate("ROMEO", max_new_tokens=12, temperature=0.0).text]


@pytest.mark.parametrize("said", [{"top_k": 1}, {"top_p": 1e-6}, {"do_sample": False, "temperature": 0.9}, {"temperature": 0}])
def test_d14_generation_config_is_honoured_and_options_win(base: Path, said: dict[str, Any]) -> None:
    free, greedy = texts(base)
    assert free != greedy
    put(base, "generation_config.json", {"do_sample": True, "temperature": 1.0} | said)
    found, again = texts(base)
    assert found == again == greedy
    assert texts(base, temperature=1.0, top_k=0, top_p=1.0)[0] == free
    lm = load(str(base))
    lm.save_pretrained(base.parent / "ours")
    assert texts(base.parent / "ours")[0] == greedy


def test_d14_null_is_unset(base: Path, dlm: Dlm) -> None:
    free, _ = texts(base)
    put(base, "generation_config.json", dict.fromkeys(["temperature", "top_k", "top_p", "do_sample", "eos_token_id", "steps"]))
    assert texts(base)[0] == free
    assert dlm("generate", "ROMEO", "--model", str(base), "--max-new-tokens", "12", "--seed", "3")[:2] == (0, free + "\n")


@pytest.mark.parametrize(
    "said",
    [
        {"temperature": "0.5"},
        {"temperature": float("nan")},
        {"temperature": -1},
        {"temperature": True},
        {"top_p": 0},
        {"top_p": 1.5},
        {"top_k": 2.5},
        {"top_k": -1},
        {"do_sample": "yes"},
        {"eos_token_id": [[400]]},
        {"eos_token_id": 1.5},
        {"eos_token_id": {"a": 1}},
        {"eos_token_id": True},
        {"steps": float("inf")},
        {"sampler": 3},
        [1],
    ],
    ids=str,
)
def test_d14_other_types_get_one_line(base: Path, dlm: Dlm, said: Any) -> None:
    put(base, "generation_config.json", said)
    assert "generation_config.json" in dlm.told("generate", "ROMEO", "--model", str(base), "--max-new-tokens", "3")


def test_d14_what_is_not_read_is_told(base: Path) -> None:
    put(base, "generation_config.json", {"repetition_penalty": 1.1, "num_beams": 1, "min_p": None, "bad_words_ids": []})
    with pytest.warns(UserWarning, match=r"asks for repetition_penalty 1\.1, which dlm does not do"):
        native.read_defaults(base)
    with pytest.warns(UserWarning, match="repetition_penalty"):
        load(str(base))


def test_greedy_text_ends_where_that_of_transformers_ends(model: Any, base: Path) -> None:
    """Stops of generation_config.json alone, of config.json alone, and of neither."""
    import transformers

    lm = load(str(base))
    head = torch.tensor([lm.tokenizer.encode("ROMEO:")])
    free = model.generate(head, max_new_tokens=20, do_sample=False, pad_token_id=0)[0, head.shape[1] :].tolist()
    put(base, "tokenizer_config.json", {})
    for name in ("generation_config.json", "config.json"):
        path = base / name
        data = json.loads(path.read_text())
        path.write_text(json.dumps(data | {"eos_token_id": [free[5], free[9]]}))
        if name == "config.json":
            (base / "generation_config.json").unlink()
        again = transformers.AutoModelForCausalLM.from_pretrained(base).eval()
        expected = again.generate(head, max_new_tokens=20, do_sample=False, pad_token_id=0)[0, head.shape[1] :].tolist()
        lm = load(str(base))
        made = lm.generate("ROMEO:", max_new_tokens=20, temperature=0.0)
        assert made.trajectory.current_BT[0, head.shape[1] :][: made.tokens].tolist() == expected
        assert made.tokens == len(expected) < 20
        path.write_text(json.dumps(data))


def test_the_template_of_the_tests_ends_turns(model: Any, base: Path) -> None:
    put(base, "tokenizer_config.json", {"chat_template": TEMPLATE})  # no eos_token anywhere
    assert load(str(base)).stops == {IDS[END]}
    assert huggingface.stops(None, None, ChatTemplate(), Tokenizer(tokenizer()), base) == []
    assert isinstance(load(str(base)), LanguageModel)
