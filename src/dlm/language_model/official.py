"""The reference sampler of a family, by the reference's own names of settings: the rule, quota, blocks and guidance that they mean here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from dlm.errors import InputError
from dlm.language_model.protocols import Model
from dlm.language_model.samplers import by_blocks
from dlm.models.pattern import reading
from dlm.models.step_number import StepNumber
from dlm.noise.masked import MaskedNoise
from dlm.sampling.diffusion.blockwise import FirstAlone, Surest, Tempered
from dlm.sampling.diffusion.editing import AboveThreshold, Editing
from dlm.sampling.diffusion.guidance import ClassifierFree
from dlm.sampling.diffusion.loop import DiffusionSampler
from dlm.sampling.diffusion.p2 import PathPlanning
from dlm.sampling.diffusion.protocols import Rule
from dlm.sampling.diffusion.transfer import Transfer, dream, reference
from dlm.sampling.diffusion.unmasking import Threshold
from dlm.sampling.draw import Draw

Settings = Mapping[str, Any]
OF_FAMILY = {
    "sdar": "sdar",
    "open-dcoder": "open-dcoder",
    "tiny-diffusion": "tiny",
}  # references of families whose default sampler has another name


@dataclass(frozen=True)
class Plan:
    """A sampler and how many tokens it is to write.

    whole_blocks: the reference returns all tokens up to the end of a block of this length; 0: those that are asked for.
    ends: tokens after the first of which it cuts the text.
    """

    sampler: DiffusionSampler
    max_new_tokens: int
    whole_blocks: int = 0
    ends: frozenset[int] = frozenset()

    def room(self, prompt: int) -> int:
        """Positions after a prompt of so many tokens."""
        new = self.max_new_tokens
        return new + (-(prompt + new) % self.whole_blocks if self.whole_blocks else 0)

    def cut(self, new: list[int]) -> list[int]:
        """The tokens after a prompt that the reference returns."""
        return next((new[: at + 1] for at, token in enumerate(new) if token in self.ends), new)


def plan(model: Model, settings: Settings, name: str = "") -> Plan:
    """Settings as the reference names them. name: `llada`, `dream`, `mdlm`, `bd3lm`; by default the one of the model's family.

    InputError for a model without reference sampler and for settings that the reference does not have.
    """
    usual = str(model.defaults.get("sampler", "")).partition(":")[0]
    name = name or OF_FAMILY.get(model.config.family, usual)
    if name not in REFERENCES:
        raise InputError(
            f"{model.name} has no reference sampler here that draws nothing at random (known: {', '.join(REFERENCES)}): "
            "compare the logits and losses of the reference, as a .safetensors file"
        )
    if not isinstance(model.noise, MaskedNoise):
        raise InputError(f"{model.name} has no masks for {name} to fill: compare the logits and losses of its own reference")
    make, defaults = REFERENCES[name]
    if strange := [key for key in settings if key not in defaults]:
        raise InputError(f"{name} has no setting {strange[0]!r}; it has: {', '.join(defaults)}")
    given = {key: value for key, value in settings.items() if value is not None or defaults[key] is None}
    return make(model, {**defaults, **given})


def _whole(model: Model, settings: Settings, rule: Rule) -> DiffusionSampler:
    """The loop over the text alone, blocks from the prompt's end on."""
    scale = 1.0 + settings.get("cfg_scale", 0.0)
    guidance = ClassifierFree(scale, model.tokenizer.mask_id) if scale != 1 else None
    sampler = DiffusionSampler(model.denoiser, model.noise, model.window, rule, settings["steps"], model=model.name, guidance=guidance)
    return replace(sampler, fills_window=False, block_phase="prompt")


def _llada(model: Model, settings: Settings) -> Plan:
    """ML-GSAI/LLaDA `generate.py`."""
    token = model.tokenizer.control
    eos, eot = token.get("<|endoftext|>"), token.get("<|eot_id|>")
    last = (eos, eot) if settings["temperature"] == 0 else (eot,)  # as the reference, which changes a tensor that it has copied or not
    rule = reference(
        "even",
        settings["remasking"],
        Draw(settings["temperature"]),
        never=tuple(i for i in (eos,) if settings["logits_eos_inf"] and i is not None),
        last=tuple(i for i in last if settings["confidence_eos_eot_inf"] and i is not None),
    )
    return Plan(replace(_whole(model, settings, rule), block_length=settings["block_length"]), settings["gen_length"])


def _llada2(model: Model, settings: Settings) -> Plan:
    """inclusionAI/LLaDA2.0 and 2.1, `generate`; 2.1 is the one with an editing_threshold.

    eos_early_stop of 2.0 changes no token: it leaves out forward passes for what is cut.
    """
    length, new = settings["block_length"], settings["gen_length"]
    draw = Draw(settings["temperature"], settings["top_k"] or 0, settings["top_p"] or 1.0)
    if model.config.network.attention != "block_causal":
        raise InputError(f"{model.name} is not read block by block: llada2 cannot be its reference")
    steps = min(settings["steps"], max(1, new // settings["minimal_topk"]))
    rule: Rule = AboveThreshold(settings["threshold"], length, draw)
    if settings["editing_threshold"] is not None:
        if settings["eos_early_stop"]:
            raise InputError("eos_early_stop of LLaDA2.1 leaves out later edits: compare without it")
        steps = length + settings["max_post_steps"]  # each of those before the last ones writes a mask at least
        rule = Editing(settings["threshold"], settings["editing_threshold"], settings["max_post_steps"], draw)
    stops = model.stops if settings["eos_id"] is None else frozenset({settings["eos_id"]})
    whole = _whole(model, {"steps": steps}, rule)
    sampler = replace(whole, denoiser=by_blocks(model, length), block_length=length, sees_ahead=False)
    sampler = replace(sampler, each_block=True, block_phase="zero", stops=stops, ends="text" if settings["eos_early_stop"] else "block")
    return Plan(sampler, new, ends=stops)


def _dream(model: Model, settings: Settings) -> Plan:
    """DreamLM/Dream `generation_utils.py`, `diffusion_generate`."""
    draw = Draw(settings["temperature"], settings["top_k"] or 0, settings["top_p"] or 1.0)
    if settings["eps"] != REFERENCES["dream"][1]["eps"]:
        raise InputError(f"Dream's eps is 0.001 here, got {settings['eps']}")
    return Plan(_whole(model, settings, dream(settings["alg"], draw, settings["alg_temp"] or 0.0)), settings["max_new_tokens"])


def _mdlm(model: Model, settings: Settings) -> Plan:
    """ZHZisZZ/dllm `dllm/core/samplers/mdlm.py`."""
    rule = reference("rounded", settings["remasking"], Draw(settings["temperature"]))
    return Plan(replace(_whole(model, settings, rule), block_length=settings["block_size"]), settings["max_new_tokens"])


def _bd3lm(model: Model, settings: Settings) -> Plan:
    """ZHZisZZ/dllm `dllm/core/samplers/bd3lm.py`: the same by blocks that see nothing after themselves, until one holds a stop."""
    made, length = _mdlm(model, settings), settings["block_size"]
    if model.config.shift:
        raise InputError(f"{model.name} predicts the next token: blocks would not see the row before them")
    network = reading(model.network, "block_causal", length)
    return replace(made, sampler=replace(made.sampler, denoiser=network, sees_ahead=False, stops=model.stops, ends="block"))


def _sdar(model: Model, settings: Settings) -> Plan:
    """JetAstra/SDAR `generate.py`, `block_diffusion_generate`, its draw replaced by the argmax at temperature 0."""
    length, new, draw = settings["block_length"], settings["gen_length"], Draw(settings["temperature"])
    if model.config.network.attention != "block_causal":
        raise InputError(f"{model.name} is not read block by block: sdar cannot be its reference")
    rules: dict[str, Rule] = {
        "low_confidence_static": Transfer("even", draw=draw),
        "low_confidence_dynamic": Threshold(settings["confidence_threshold"], draw),
        "sequential": Transfer("even", "order", draw=draw),
    }
    if settings["remasking_strategy"] not in rules:
        raise InputError(f"SDAR's remasking_strategy is {', '.join(rules)}, got {settings['remasking_strategy']!r}")
    steps = settings["denoising_steps"] * -(-new // length)
    whole = _whole(model, {"steps": steps}, rules[settings["remasking_strategy"]])
    sampler = replace(whole, denoiser=reading(model.network, "block_causal", length), block_length=length, sees_ahead=False)
    return Plan(replace(sampler, block_phase="zero", stops=frozenset(settings["stopping_criteria_idx"] or ()), ends="block"), new, length)


def _nemotron(model: Model, settings: Settings) -> Plan:
    """nvidia's `generate` of modeling_nemotron_labs_diffusion.py, with the text read causally; without threshold one token a step."""
    if not settings["causal_context"]:
        raise InputError("causal_context=False reads the text fully, which is not how Nemotron-Labs-Diffusion is decoded")
    draw, threshold = Draw(settings["temperature"]), settings["threshold"]
    rule = FirstAlone(Surest(1.0, above=True, draw=draw) if threshold is None else Surest(threshold, draw=draw))
    if model.config.network.attention != "causal_text":
        raise InputError(f"{model.name} does not read its text causally: nemotron cannot be its reference")
    length, new = settings["block_length"], settings["max_new_tokens"]
    sampler = replace(_whole(model, {"steps": new}, rule), denoiser=by_blocks(model, length), block_length=length, sees_ahead=False)
    return Plan(replace(sampler, stops=model.stops), new)


def _tiny(model: Model, settings: Settings) -> Plan:
    """nathan-barry/tiny-diffusion `model.py`, `sample`: the likeliest tokens, whose confidence is that at a temperature."""
    length = settings["seq_len"]
    steps = settings["num_steps"] or length
    rules: dict[str, Rule] = {
        "topk": Transfer(settings["k"] or max(1, length // 10), draw=Draw(0.0)),
        "confidence": Surest(settings["confidence_threshold"], draw=Draw(0.0)),
    }
    if settings["method"] not in rules:
        raise InputError(f"tiny-diffusion's method is {' or '.join(rules)}, got {settings['method']!r}")
    rule = rules[settings["method"]]
    if settings["temperature"] != 1:
        rule = Tempered(rule, settings["temperature"])
    if not model.config.network.time_steps:
        raise InputError(f"{model.name} does not read the number of a step: tiny cannot be its reference")
    sampler = _whole(model, {"steps": steps}, rule)
    return Plan(replace(sampler, denoiser=StepNumber(model.denoiser, steps)), length - settings["context_len"])


def _open_dcoder(model: Model, settings: Settings) -> Plan:
    """pengzhangzhi/Open-dLLM `generation_utils.py`: p2, or one of Dream's algorithms."""
    if settings["alg"] != "p2":
        return _dream(model, settings)
    draw = Draw(settings["temperature"], settings["top_k"] or 0, settings["top_p"] or 1.0)
    return Plan(_whole(model, settings, PathPlanning(draw)), settings["max_new_tokens"])


@dataclass(frozen=True)
class WholeBlocks(Plan):
    """The reference fills so many blocks, the first of which begins with the end of the prompt, and adds the token after the last one."""

    length: int = 32

    def room(self, prompt: int) -> int:
        """As of `Plan`."""
        return (prompt // self.length + self.max_new_tokens // self.length) * self.length + 1 - prompt


def _fast_dllm(model: Model, settings: Settings) -> Plan:
    """Fast-dLLM v2's `generate`, without its caches, which are exact."""
    length, draw = settings["block_size"], Draw(settings["temperature"], 0, settings["top_p"])
    if not (model.is_causal and model.config.shift):
        raise InputError(f"{model.name} does not predict the next token block by block: fast-dllm cannot be its reference")
    surest = Surest(settings["threshold"], above=True, narrowed=True, draw=draw)
    whole = _whole(model, {"steps": 1}, FirstAlone(surest, settings["small_block_size"]))
    sampler = replace(whole, denoiser=by_blocks(model, length), block_length=length, sees_ahead=False, block_phase="zero")
    ends = model.stops if settings["stop_token"] is None else frozenset({settings["stop_token"]})
    return WholeBlocks(replace(sampler, stops=ends), settings["max_new_tokens"], ends=ends, length=length)


DLLM = {"steps": 128, "max_new_tokens": 128, "block_size": 32, "temperature": 0.0, "cfg_scale": 0.0, "remasking": "low_confidence"}
REFERENCES: dict[str, tuple[Callable[[Model, Settings], Plan], dict[str, Any]]] = {
    "llada": (
        _llada,
        {
            "steps": 128,
            "gen_length": 128,
            "block_length": 128,
            "temperature": 0.0,
            "cfg_scale": 0.0,
            "remasking": "low_confidence",
            "logits_eos_inf": False,
            "confidence_eos_eot_inf": False,
        },
    ),
    "llada2": (
        _llada2,
        {
            "gen_length": 2048,
            "block_length": 32,
            "steps": 32,
            "temperature": 0.0,
            "top_p": None,
            "top_k": None,
            "threshold": 0.95,
            "minimal_topk": 1,
            "editing_threshold": None,
            "max_post_steps": 16,
            "eos_early_stop": False,
            "eos_id": None,
        },
    ),
    "dream": (
        _dream,
        {
            "alg": "origin",
            "steps": 512,
            "eps": 1e-3,
            "max_new_tokens": 128,
            "temperature": 0.0,
            "top_p": None,
            "top_k": None,
            "alg_temp": None,
        },
    ),
    "sdar": (
        _sdar,
        {
            "gen_length": 256,
            "block_length": 4,
            "denoising_steps": 4,
            "remasking_strategy": "low_confidence_dynamic",
            "confidence_threshold": 0.85,
            "temperature": 0.0,
            "stopping_criteria_idx": None,
            "greedy": None,
        },
    ),
    "nemotron": (
        _nemotron,
        {"max_new_tokens": 512, "block_length": 32, "threshold": None, "causal_context": True, "temperature": 0.0},
    ),
    "open-dcoder": (
        _open_dcoder,
        {"alg": "entropy", "steps": 512, "eps": 1e-3, "max_new_tokens": 128, "temperature": 0.0, "top_p": None, "top_k": None}
        | {"alg_temp": None},
    ),
    "fast-dllm": (
        _fast_dllm,
        {
            "max_new_tokens": 512,
            "block_size": 32,
            "small_block_size": 8,
            "threshold": 1.0,
            "temperature": 0.0,
            "top_p": 0.95,
            "stop_token": None,
        },
    ),
    "tiny": (
        _tiny,
        {"method": "confidence", "k": None, "confidence_threshold": 0.95, "num_steps": None, "temperature": 1.0, "seq_len": 256}
        | {"context_len": 0},
    ),
    "mdlm": (_mdlm, DLLM),
    "bd3lm": (_bd3lm, DLLM),
}
