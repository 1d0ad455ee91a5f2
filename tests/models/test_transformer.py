"""The backbone reads what its pattern says, and its switches do what they are called.

Shapes: B batch, T positions, Q queries, K keys.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dlm.models import attention
from dlm.models.block import rotary, rotate
from dlm.models.config import TransformerConfig
from dlm.models.pattern import reading
from dlm.models.transformer import Transformer

VOCAB, WINDOW = 11, 12
PATTERNS: dict[str, dict[str, Any]] = {
    "full": {"attention": "full"},
    "causal": {"attention": "causal"},
    "block_causal": {"attention": "block_causal", "block_length": 4},
}


def config(**changes: Any) -> TransformerConfig:
    return TransformerConfig(**({"vocab_size": VOCAB, "window": WINDOW, "layers": 2, "heads": 4, "width": 32} | changes))


def network(**changes: Any) -> Transformer:
    """Random weights everywhere: a fresh network is the identity between embedding and head, and would pass any test."""
    made, rng = Transformer(config(**changes)), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0.0, 0.3, generator=rng)
    return made.eval().requires_grad_(False)


def tokens(rows: int = 2, length: int = WINDOW) -> Tensor:
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))


def reads(made: Transformer) -> Tensor:
    """bool (Q, K): do the logits at Q change with the token at K?"""
    z_BT = tokens(1)
    base = made(z_BT)
    columns = []
    for key in range(WINDOW):
        other = z_BT.clone()
        other[0, key] = (z_BT[0, key] + 1) % VOCAB
        columns.append((made(other) != base).any(-1)[0])
    return torch.stack(columns, 1)


@pytest.mark.parametrize("gqa", [False, True])
def test_a_position_reads_what_the_pattern_allows_and_nothing_else(gqa: bool) -> None:
    extra = {"kv_heads": 2} if gqa else {}
    ones = torch.ones(WINDOW, WINDOW, dtype=torch.bool)
    block = torch.block_diag(*[torch.ones(4, 4)] * 3).bool()
    assert torch.equal(reads(network(**PATTERNS["full"], **extra)), ones)
    assert torch.equal(reads(network(**PATTERNS["causal"], **extra)), ones.tril())
    assert torch.equal(reads(network(**PATTERNS["block_causal"], **extra)), ones.tril() | block)


@pytest.mark.parametrize(("block_length", "same"), [(WINDOW, "full"), (1, "causal")])
def test_block_causal_has_full_and_causal_as_its_ends(block_length: int, same: str) -> None:
    z_BT = tokens(3)
    blocks = network(attention="block_causal", block_length=block_length)(z_BT)
    assert torch.allclose(blocks, network(attention=same)(z_BT), atol=1e-5)
    assert not torch.allclose(blocks, network(attention="block_causal", block_length=4)(z_BT), atol=1e-2)


def test_a_shorter_text_is_read_like_the_beginning_of_a_longer_one() -> None:
    z_BT = tokens(2)
    for name, cut in (("causal", 5), ("block_causal", 8)):
        made = network(**PATTERNS[name])
        assert torch.allclose(made(z_BT[:, :cut]), made(z_BT)[:, :cut], atol=1e-5), name


def dense(made: Transformer, z_BT: Tensor, readable_QK: Tensor) -> Tensor:
    """The forward again, one head at a time, keys looked up by hand."""
    c, time = made.config, torch.arange(z_BT.shape[1])[None]
    cos, sin = (x[:, 0] for x in rotary(time, c.head_dim, c.rope_base))
    x = made.embed(z_BT)
    for block in made.blocks:
        h, outs = block.attention_norm(x), []
        attend: Any = block.attention
        for head in range(c.heads):
            group = head * c.kv_heads // c.heads
            mine, its = (slice(i * c.head_dim, (i + 1) * c.head_dim) for i in (head, group))
            q, k, v = attend.q(h)[..., mine], attend.k(h)[..., its], attend.v(h)[..., its]
            if c.qk_norm:
                q, k = attend.q_norm(q), attend.k_norm(k)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            score = (q @ k.transpose(1, 2) / c.head_dim**0.5).masked_fill(~readable_QK, -torch.inf)
            outs.append(score.softmax(-1) @ v)
        x = x + attend.out(torch.cat(outs, -1))
        x = x + block.mlp(block.mlp_norm(x))
    out: Tensor = made.head(made.norm(x))
    return out


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_grouped_heads_equal_a_computation_by_hand(pattern: str, kv_heads: int) -> None:
    made = network(kv_heads=kv_heads, qkv_bias=True, **PATTERNS[pattern])
    at = torch.arange(WINDOW)
    readable = attention.allowed(pattern, at[:, None], at[None], 4)
    assert torch.allclose(made(tokens()), dense(made, tokens(), readable), atol=1e-4, rtol=1e-4)


def test_grouped_heads_equal_full_heads_with_repeated_keys() -> None:
    grouped = network(kv_heads=2)
    state = grouped.state_dict()
    for name in state:
        if name.endswith((".k.weight", ".v.weight")):
            state[name] = state[name].view(2, 8, 32).repeat_interleave(2, 0).reshape(32, 32)
    whole = network()
    whole.load_state_dict(state)
    assert torch.allclose(grouped(tokens()), whole(tokens()), atol=1e-5)


VARIANTS: list[dict[str, Any]] = [
    {},
    {"qk_norm": False},
    {"mlp": "swiglu"},
    {"mlp": "swiglu", "mlp_width": 40},
    {"kv_heads": 2},
    {"kv_heads": 1, "qkv_bias": True},
    {"head_dim": 6},
    {"tied": True},
    {"time_conditioning": True},
    {"mlp": "swiglu", "kv_heads": 2, "qkv_bias": True, "qk_norm": False, "tied": True, "time_conditioning": True, "dropout": 0.1},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=lambda c: "-".join(c) or "plain")
def test_variants_run_and_count_their_parameters(changes: dict[str, Any]) -> None:
    made, c = network(**changes), config(**changes)
    inner, kv_inner = c.heads * c.head_dim, c.kv_heads * c.head_dim
    attend = c.width * (2 * inner + 2 * kv_inner) + (inner + 2 * kv_inner) * c.qkv_bias + 2 * c.head_dim * c.qk_norm
    mlp = (3 if c.mlp == "swiglu" else 2) * c.width * c.mlp_width
    time = (128 + 1) * c.width if c.time_conditioning else 0
    expected = c.layers * (attend + mlp + 2 * c.width) + c.width + VOCAB * c.width * (1 if c.tied else 2) + time
    assert made.parameters_count() == expected
    logits = made(tokens(), torch.tensor([0.2, 0.9]))
    assert logits.shape == (2, WINDOW, VOCAB)
    assert logits.isfinite().all()
    # every switch has an effect on the output, and every weight on the loss
    made.requires_grad_(True)
    made(tokens(), torch.tensor([0.2, 0.9])).square().mean().backward()
    assert [name for name, p in made.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_a_fresh_network_is_the_identity_and_ignores_the_time() -> None:
    fresh = Transformer(config(time_conditioning=True)).eval()
    z_BT = tokens()
    logits = fresh(z_BT, torch.tensor([0.1, 0.9]))
    assert torch.equal(logits, fresh(z_BT, torch.tensor([0.7, 0.3])))
    assert torch.allclose(logits, fresh.head(fresh.norm(fresh.embed(z_BT))))


def test_time_conditioning_reads_the_time_of_each_row() -> None:
    made, z_BT = network(time_conditioning=True), tokens()
    logits = made(z_BT, torch.tensor([0.1, 0.9]))
    moved = made(z_BT, torch.tensor([0.1, 0.5], dtype=torch.float64))
    assert torch.equal(logits[0], moved[0])
    assert not torch.allclose(logits[1], moved[1], atol=1e-2)
    with pytest.raises(ValueError, match="t_B"):
        made(z_BT)
    plain = network()
    assert torch.equal(plain(z_BT), plain(z_BT, torch.tensor([0.1, 0.9])))


def test_dropout_acts_in_training_alone() -> None:
    made, without, z_BT = network(dropout=0.5), network(), tokens()
    assert torch.equal(made(z_BT), made(z_BT))
    assert torch.equal(made(z_BT), without(z_BT))
    made.train()
    assert not torch.equal(made(z_BT), made(z_BT))
    without.train()
    assert torch.equal(without(z_BT), without(z_BT))


def test_positions_are_relative() -> None:
    made, z_BT = network(), tokens()
    pos_BQ = torch.arange(WINDOW).expand(2, -1)
    base = made(z_BT)
    assert torch.allclose(made(z_BT, pos_BQ=pos_BQ), base, atol=1e-5)
    for shift in (1, 37):
        assert torch.allclose(made(z_BT, pos_BQ=pos_BQ + shift), base, atol=1e-3)
    assert not torch.allclose(made(z_BT, pos_BQ=pos_BQ * 2), base, atol=1e-1)
    # the order of the memory is nothing, the positions are all
    order = torch.randperm(WINDOW, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(made(z_BT[:, order], pos_BQ=pos_BQ[:, order]), base[:, order], atol=1e-4)


def test_a_tied_head_is_the_embedding() -> None:
    made = network(tied=True)
    assert made.head.weight is made.embed.weight
    assert network().head.weight is not network().embed.weight


# eager flex says that it is slow without torch.compile; on the CPU it is here to be compared, not to be fast
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_flex_agrees_with_sdpa(pattern: str, kv_heads: int) -> None:
    flex, sdpa = (network(backend=backend, kv_heads=kv_heads, **PATTERNS[pattern]) for backend in ("flex", "sdpa"))
    assert torch.allclose(flex(tokens()), sdpa(tokens()), atol=1e-4)
    short = tokens(2, 7)
    assert torch.allclose(flex(short), sdpa(short), atol=1e-4)


@pytest.mark.parametrize("masked", [False, True])
def test_whole_texts_are_read_in_bfloat16_as_in_float32(masked: bool) -> None:
    """By products or by the kernel, whichever is faster on the machine; few queries by the kernel."""
    rng = torch.Generator().manual_seed(0)
    mask = torch.rand(1, 1, 96, 96, generator=rng) < 0.6 if masked else None
    for queries in (96, 3):
        q, k, v = (torch.randn(2, heads, length, 32, generator=rng).bfloat16() for heads, length in ((6, queries), (2, 96), (2, 96)))
        light = None if mask is None else mask[:, :, :queries]
        expected = attention.attend(q.float(), k.float(), v.float(), light, False)
        torch.testing.assert_close(attention.attend(q, k, v, light, False).float(), expected, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("kind", ["none", "bool", "added"])
def test_products_attend_as_the_kernel_does(kind: str) -> None:
    """And are what half precision learns by on a CPU."""
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 5 + more, 8, generator=rng) for heads, more in ((6, 0), (2, 4), (2, 4)))
    allowed = torch.rand(2, 1, 5, 9, generator=rng) < 0.6
    allowed[..., 0] = True
    mask = {"none": None, "bool": allowed, "added": torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf)}[kind]
    expected = attention.attend(q, k, v, mask, False)
    torch.testing.assert_close(attention.attend_by_products(q, k, v, mask), expected)
    half = [x.bfloat16().requires_grad_() for x in (q, k, v)]
    light = mask.bfloat16() if mask is not None and kind == "added" else mask
    learned = attention.attend(half[0], half[1], half[2], light, False)
    torch.testing.assert_close(learned.float(), expected, atol=0.05, rtol=0.05)
    whole = [x.detach().float().requires_grad_() for x in half]
    attention.attend(whole[0], whole[1], whole[2], mask, False).square().sum().backward()
    learned.float().square().sum().backward()
    for one, other in zip(half, whole, strict=True):
        assert one.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(one.grad.float(), other.grad, atol=0.1, rtol=0.1)


def test_flex_refuses_what_it_cannot_read() -> None:
    flex = network(backend="flex")
    with pytest.raises(ValueError, match="sdpa"):
        flex(tokens(), valid_BT=torch.ones(2, WINDOW, dtype=torch.bool))
    causal = network(backend="flex", attention="causal")
    cache = causal.cache(2)
    cache.advance(1)
    with pytest.raises(ValueError, match="sdpa"):
        causal(tokens(2, 1), cache=cache)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"vocab_size": 0}, "vocab_size"),
        ({"layers": 0}, "layers"),
        ({"window": 0}, "window"),
        ({"heads": 4, "kv_heads": 3}, "kv_heads"),
        ({"head_dim": 7}, "head_dim"),
        ({"mlp": "gelu"}, "mlp"),
        ({"attention": "sideways"}, "attention"),
        ({"attention": "block_causal"}, "block_length"),
        ({"attention": "block_causal", "block_length": 5}, "divide the window"),
        ({"backend": "flash"}, "backend"),
        ({"heads": 0}, "heads"),
        ({"kv_heads": -2}, "kv_heads"),
        ({"width": 3}, "head_dim"),
        ({"mlp_width": -1}, "mlp_width"),
        ({"dropout": 1.5}, "dropout"),
    ],
)
def test_config_errors_are_told(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        config(**changes)


def test_a_config_survives_its_dict_and_derives_its_widths() -> None:
    c = config(mlp="swiglu", kv_heads=2)
    assert TransformerConfig(**c.to_dict()) == c
    assert (c.head_dim, c.mlp_width) == (8, 88)
    assert config().mlp_width == 128
    wider = c.with_(width=64)
    assert (wider.head_dim, wider.mlp_width, wider.kv_heads) == (16, 176, 4)
    assert c.with_(window=24) == config(mlp="swiglu", kv_heads=2, window=24)


def test_bfloat16_runs() -> None:
    logits = network().to(torch.bfloat16)(tokens())
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()


@pytest.mark.parametrize("factor", [0.25, 4.0, 40.0])
@pytest.mark.parametrize("mscale", [None, 1.0, 0.707])
def test_yarn_turns_as_transformers_turns(factor: float, mscale: float | None) -> None:
    """Frequencies and the factor of cosines, for stretched and shortened windows."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from dlm.formats.huggingface import rope_scaling
    from dlm.models.rope import frequencies

    rope = {"rope_type": "yarn", "rope_theta": 1e6, "factor": factor, "original_max_position_embeddings": 4096, "beta_fast": 32.0}
    rope |= {"beta_slow": 1.0} | ({} if mscale is None else {"mscale": mscale, "mscale_all_dim": 1.0})
    theirs = LlamaConfig(hidden_size=256, num_attention_heads=2, head_dim=128, rope_parameters=rope, max_position_embeddings=16384)
    expected_K, amplitude = ROPE_INIT_FUNCTIONS["yarn"](theirs, torch.device("cpu"))
    found_K, found = frequencies(128, 1e6, rope_scaling(rope, 16384))
    assert torch.allclose(found_K, expected_K, rtol=1e-6, atol=0)
    assert found == pytest.approx(amplitude)
    assert not torch.allclose(frequencies(128, 1e6)[0], expected_K, rtol=1e-3)


@pytest.mark.parametrize("conv", [0, 5])
def test_a_text_read_causally_and_its_last_block_fully(conv: int) -> None:
    made = network(attention="causal_text", block_length=4, conv=conv)
    z_BT = tokens()
    whole_BTV = made(z_BT)
    mixed_BTV = made(z_BT, begin_B1=torch.tensor([[8], [4]]))
    causal_BTV = reading(made, "causal")(z_BT)
    assert torch.allclose(whole_BTV, reading(made, "full")(z_BT), atol=1e-6)
    for row, begin in enumerate((8, 4)):
        assert torch.allclose(mixed_BTV[row, :begin], causal_BTV[row, :begin], atol=1e-5)
        changed_BT = z_BT.clone()
        changed_BT[row, begin + 3] = (changed_BT[row, begin + 3] + 1) % VOCAB
        seen_T = (made(changed_BT, begin_B1=torch.tensor([[8], [4]])) - mixed_BTV)[row].abs().amax(-1) > 1e-6
        assert seen_T.tolist() == [place >= begin for place in range(12)]


def test_a_learned_vector_for_each_noise_level() -> None:
    made = network(time_conditioning=True, time_steps=8, embed_norm=True)
    z_BT = tokens(1)
    at = [made(z_BT, torch.tensor([step])) for step in range(8)]
    assert torch.equal(made(z_BT, torch.tensor([1.0])), at[7])
    assert torch.equal(made(z_BT, torch.tensor([0.125])), at[0])
    assert torch.equal(made(z_BT, torch.tensor([0.126])), at[1])
    assert not torch.equal(at[0], at[1])
    assert made.time is not None
    with torch.no_grad():
        made.embed.weight.mul_(2)
        next(made.time.parameters()).mul_(2)  # what is normalised may be scaled
    assert torch.allclose(made(z_BT, torch.tensor([3])), at[3], atol=1e-5)
