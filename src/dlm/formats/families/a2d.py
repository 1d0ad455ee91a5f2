"""Autoregressive checkpoints made bidirectional by dllm (ZHZisZZ/dllm, `dllm/pipelines/a2d`): the base's config and tensor names.

The mask is an added token that only the tokenizer names. Members for the sampler `mdlm` and for `bd3lm` differ in training alone.
"""

from __future__ import annotations

from dlm.errors import InputError
from dlm.formats import huggingface
from dlm.formats.families.record import Config, Family
from dlm.formats.keys import Keys
from dlm.models.config import TransformerConfig


def bidirectional(config: Config, kind: str) -> TransformerConfig:
    """The backbone of a config with the keys of `kind`, read bidirectionally and without a row for a mask of ours."""
    keys = config if isinstance(config, Keys) else Keys(config)
    shape = huggingface.read_shape(keys, kind, is_causal=(None, False))
    if shape.sliding_layers:
        raise InputError(f"attention that slides over {shape.sliding_window} tokens in {len(shape.sliding_layers)} layers is not supported")
    return shape.with_(vocab_size=config["vocab_size"], attention="full")


def family(kind: str, architecture: str) -> Family:
    return Family(
        name=f"a2d-{kind}",
        architectures=(architecture,),
        names=huggingface.NAMES,
        shape=lambda config: bidirectional(config, kind),
        mask_texts=("<|mask|>",),
        stop_texts=("<|im_end|>",),
        preset={"sampler": "mdlm", "steps": 256, "block_length": 32, "temperature": 0.0},
    )


QWEN2 = family("qwen2", "A2DQwen2LMHeadModel")
QWEN3 = family("qwen3", "A2DQwen3LMHeadModel")
LLAMA = family("llama", "A2DLlamaLMHeadModel")
