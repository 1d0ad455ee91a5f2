"""Introspective training: the pattern against its definition, the loss against one plain causal call for every mask."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor

from conftest import make_model
from dlm.adapters import divergence, lora
from dlm.adapters.objective import acceptance, consistency, slots
from dlm.language_model import LanguageModel
from dlm.models import attention
from dlm.models.transformer import Transformer


@pytest.mark.parametrize(("block", "phases"), [(1, [0, 0]), (2, [0, 1]), (3, [0, 2]), (7, [3, 5])])
def test_the_pattern_is_its_definition(block: int, phases: list[int]) -> None:
    length = 8
    found = attention.introspective(torch.arange(length)[None], block, torch.tensor(phases))
    for b, phase in enumerate(phases):
        for query in range(2 * length):
            for key in range(2 * length):
                q, k = query % length, key % length
                if query < length and key < length:  # a mask reads its own block, causally
                    wanted = k <= q and (k + phase) // block == (q + phase) // block
                elif query < length:  # and the text of earlier blocks
                    wanted = (k + phase) // block < (q + phase) // block
                else:  # text is causal and never reads masks
                    wanted = key >= length and k <= q
                assert bool(found[b, query, key]) == wanted, (b, query, key)
    aligned = attention.introspective(torch.arange(length)[None], block)
    assert torch.equal(aligned, attention.introspective(torch.arange(length)[None], block, torch.tensor([0])))


def adapted(seed: int = 0, chain: int = 0, **network: Any) -> LanguageModel:
    """A tiny causal model with an adapter that is far from doing nothing."""
    lm = make_model("autoregressive", **network)
    lora.attach(lm.network, lora.AdapterConfig(rank=4, alpha=8.0, stride=8, chain=chain), lm.tokenizer.mask_id)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in lora.adapter_state(lm.network).values():
            p.normal_(0.0, 0.2, generator=rng)
    return lm


def batch(lm: LanguageModel, rows: int = 3, length: int = 13) -> tuple[Tensor, Tensor]:
    """Text after the start token; the second row has a prompt, the third is padded."""
    x_BT = torch.randint(lm.tokenizer.vocab_size, (rows, length), generator=torch.Generator().manual_seed(1))
    assert lm.config.start_token_id is not None
    x_BT[:, 0] = lm.config.start_token_id
    free_BT = torch.ones_like(x_BT, dtype=torch.bool)
    free_BT[1, :5] = False
    free_BT[2, 9:] = False
    return x_BT, free_BT


def slow(lm: LanguageModel, x: Tensor, free: Tensor, stride: int, phase: int) -> list[tuple[int, Tensor, Tensor, int]]:
    """(slot, log p, log q, next token) of every scored mask of a row, each from one plain call on clean text and the masks of its block,
    and from the tokens that those masks stand for where the network has a chain."""
    found, mask_id, free = [], lm.tokenizer.mask_id, free.clone()
    free[0] = False
    for s in range(len(x) - 1):
        if not (free[s] and free[s + 1]):
            continue
        begin = s
        while begin > 0 and (begin - 1 + phase) // (stride - 1) == (s + phase) // (stride - 1):
            begin -= 1
        read = [*x[:begin].tolist(), *(mask_id if free[i] else int(x[i]) for i in range(begin, s + 1))]
        hidden_1D, slot = lm.network(torch.tensor([read]), logits=False)[:, -1], int(free[begin:s].sum())
        if (adapter := lora.adapter_of(lm.network)) is not None and adapter.chain is not None:
            hidden_1D = adapter.chain(slot, hidden_1D, lm.network.embed.weight[x[None, s - slot : s + 1]])
        logq = lm.network.head(hidden_1D)[0, :mask_id].log_softmax(-1)
        logp = lm.network(x[None, : s + 1])[0, -1, :mask_id].log_softmax(-1)
        found.append((slot, logp, logq, int(x[s + 1])))
    return found


def phases(stride: int) -> Tensor:
    """Two of every row."""
    return torch.tensor([[0, 1], [1, 4], [2, 3]]) % (stride - 1)


@pytest.mark.parametrize("stride", [2, 3, 4, 8])
@pytest.mark.parametrize(("clean", "chain"), [(None, 0), (None, 6), (0.2, 0)], ids=["beside", "chained", "together"])
@pytest.mark.parametrize("conv", [0, 4])
def test_the_loss_is_what_blocks_give_alone(stride: int, clean: float | None, chain: int, conv: int) -> None:
    lm = adapted(kv_heads=1, mlp="swiglu", chain=chain, conv=conv)
    x_BT, free_BT = batch(lm)
    options: dict[str, Any] = {"stride": stride, "mask_id": lm.tokenizer.mask_id, "clean": clean}
    with torch.no_grad():
        got = {how: consistency(lm.network, x_BT, free_BT, phases(stride), how=how, **options) for how in ("kl", "ce")}
        both = zip(x_BT, free_BT, phases(stride).tolist(), strict=True)
        parts = [[mask for phase in own for mask in slow(lm, x, free, stride, phase)] for x, free, own in both]
    kl = [sum(float((p.exp() * (p - q)).sum()) for _, p, q, _ in row) / len(row) for row in parts]
    ce = [sum(-float(q[token]) for _, _, q, token in row) / len(row) for row in parts]
    own = torch.zeros(3)
    if clean is not None:
        logp_BTV = lm.network(x_BT)[..., : lm.tokenizer.mask_id].log_softmax(-1)
        told = [[s for s in range(12) if free_BT[b, s + 1]] for b in range(3)]
        own = torch.tensor([sum(-float(logp_BTV[b, s, x_BT[b, s + 1]]) for s in row) / len(row) * clean for b, row in enumerate(told)])
    torch.testing.assert_close(got["kl"].nats_B, torch.tensor(kl) + own, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got["ce"].nats_B, torch.tensor(ce) + own, atol=1e-5, rtol=1e-5)
    count, accepted, agreed = [0] * (stride - 1), [0.0] * (stride - 1), [0] * (stride - 1)
    for slot, p, q, _ in (mask for row in parts for mask in row):
        count[slot] += 1
        accepted[slot] += float(torch.minimum(p.exp(), q.exp()).sum())
        agreed[slot] += int(p.argmax() == q.argmax())
    for outcome in got.values():
        assert outcome.count_S.tolist() == count
        assert outcome.accepted_S is not None
        assert outcome.agreed_S is not None
        torch.testing.assert_close(outcome.accepted_S, torch.tensor(accepted), atol=1e-4, rtol=1e-5)
        assert outcome.agreed_S.tolist() == agreed


@pytest.mark.parametrize(("chain", "conv"), [(0, 0), (6, 0), (0, 4)])
@pytest.mark.parametrize("how", ["kl", "ce"])
def test_the_gradient_is_that_of_blocks_alone(how: str, chain: int, conv: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergence, "CHUNK_MASKS", 5)
    lm = adapted(kv_heads=1, mlp="swiglu", chain=chain, conv=conv)
    x_BT, free_BT = batch(lm)
    found = consistency(lm.network, x_BT, free_BT, phases(4), stride=4, mask_id=lm.tokenizer.mask_id, how=how)
    (found.nats_B * torch.tensor([1.0, -2.0, 0.5])).sum().backward()
    got = {name: p.grad.clone() for name, p in lm.network.named_parameters() if p.grad is not None}
    lm.network.zero_grad()
    total = torch.zeros(())
    for b, weight in enumerate([1.0, -2.0, 0.5]):
        masks = [mask for phase in phases(4)[b].tolist() for mask in slow(lm, x_BT[b], free_BT[b], 4, phase)]
        nats = [(p.exp() * (p - q)).sum() if how == "kl" else -q[token] for _, p, q, token in masks]
        total = total + weight * torch.stack(nats).mean()
    total.backward()
    wanted = {name: p.grad for name, p in lm.network.named_parameters() if p.grad is not None}
    unused = {f"chain.up_{slot}" for slot in range(3, 7)}  # of a stride of 8
    assert got.keys() == wanted.keys() == lora.adapter_state(lm.network).keys() - unused
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-5, rtol=1e-4)


def test_slots_by_hand() -> None:
    free_BT = torch.tensor([[False, True, True, True, True, True, True]] * 2)
    # stride 3: blocks 01 23 45 6, and a position further 0 12 34 56; a given token begins the first block
    assert slots(free_BT, 3, torch.tensor([0, 1])).tolist() == [[-1, 0, 0, 1, 0, 1, 0], [-1, 0, 1, 0, 1, 0, 1]]
    prompt = torch.tensor([[False, False, False, True, True, True, False]])
    assert slots(prompt, 4, torch.tensor([0])).tolist() == [[-1, -1, -1, 0, 1, 2, -1]]
    assert slots(prompt, 4, torch.tensor([2])).tolist() == [[-1, -1, -1, 0, 0, 1, -1]]  # 0 123 456


@pytest.mark.parametrize("stride", [2, 3, 4, 8])
def test_every_position_meets_every_slot(stride: int) -> None:
    free_BT = torch.ones(stride - 1, 20, dtype=torch.bool)
    found = slots(free_BT, stride, torch.arange(stride - 1))
    for position in range(stride, 20):
        assert sorted(found[:, position].tolist()) == list(range(stride - 1))


def test_the_teacher_of_a_mask_is_the_clean_row_beside_it() -> None:
    """A network that says at every row what it read there last: mask s then learns from the token at s, which says s + 1."""

    class Echo(torch.nn.Module):
        head = torch.nn.Linear(6, 6, bias=False)

        def forward(self, z_BQ: Tensor, **pattern: object) -> Tensor:
            length = z_BQ.shape[1] // 2
            clean = torch.nn.functional.one_hot(z_BQ[:, length:], 6).float() * 20  # row s is sure of "token s"
            return torch.cat([clean, clean], 1)

    torch.nn.init.eye_(Echo.head.weight)
    x_BT, network = torch.tensor([[0, 1, 2, 3, 4]]), cast(Transformer, Echo())
    free_BT = torch.ones_like(x_BT, dtype=torch.bool)
    found = consistency(network, x_BT, free_BT, torch.tensor([[0]]), stride=3, mask_id=5, clean=0.2)
    assert found.accepted_S is not None  # the mask at s says just what the clean row s does
    assert found.count_S.tolist() == [2, 1]  # masks 1, 2 | 3, and 4, whose token lies outside, is not scored
    torch.testing.assert_close(found.accepted_S, torch.tensor([2.0, 1.0]))


def test_only_the_adapter_learns() -> None:
    lm = adapted()
    x_BT, free_BT = batch(lm)
    for how in ("kl", "ce"):
        lm.network.zero_grad()
        found = consistency(
            lm.network, x_BT, free_BT, torch.tensor([[0], [1], [2]]), stride=4, mask_id=lm.tokenizer.mask_id, how=how, measure=False
        )
        assert found.accepted_S is None
        found.nats_B.mean().backward()
        moved = {name for name, p in lm.network.named_parameters() if p.grad is not None and bool(p.grad.any())}
        assert moved == set(lora.adapter_state(lm.network))


def test_what_is_not_measured_does_not_change_the_loss() -> None:
    lm = adapted()
    x_BT, free_BT = batch(lm)
    for how in ("kl", "ce"):
        a, b = (
            consistency(
                lm.network, x_BT, free_BT, torch.zeros(3, 1).long(), stride=4, mask_id=lm.tokenizer.mask_id, how=how, measure=measure
            )
            for measure in (True, False)
        )
        torch.testing.assert_close(a.nats_B, b.nats_B)
    with pytest.raises(ValueError, match="unknown loss 'mse'; known: kl, ce"):
        consistency(lm.network, x_BT, free_BT, torch.zeros(3, 1).long(), stride=4, mask_id=lm.tokenizer.mask_id, how="mse")


def test_the_clean_half_of_full_training() -> None:
    lm = make_model("autoregressive")
    lm.network.requires_grad_(True)
    x_BT, free_BT = batch(lm)

    def nats(clean: float | None) -> Tensor:
        return consistency(
            lm.network, x_BT, free_BT, torch.zeros(3, 1).long(), stride=3, mask_id=lm.tokenizer.mask_id, how="ce", clean=clean
        ).nats_B

    logp_BTV = lm.network(x_BT)[..., : lm.tokenizer.mask_id].log_softmax(-1).detach()
    own = []
    for b in range(3):
        told = [s for s in range(12) if free_BT[b, s + 1]]
        own.append(sum(-float(logp_BTV[b, s, x_BT[b, s + 1]]) for s in told) / len(told))
    torch.testing.assert_close(nats(0.2), nats(None) + 0.2 * torch.tensor(own))
    torch.testing.assert_close(nats(0.0).mean(), 2 * nats(None).mean())  # the ratio changes the gradient alone
    nats(0.2).mean().backward()
    assert lm.network.embed.weight.grad is not None
    assert bool(lm.network.embed.weight.grad[lm.tokenizer.mask_id].any())


def test_acceptance_does_not_depend_on_the_batch() -> None:
    lm = adapted()
    x_BT, free_BT = batch(lm)
    alone, together = (acceptance(lm.network, x_BT, free_BT, stride=4, mask_id=lm.tokenizer.mask_id, batch=size) for size in (1, 3))
    assert alone.sampled == pytest.approx(together.sampled, abs=1e-5)
    assert all(0 < a < 1 for a in alone.sampled)
    assert alone.greedy == together.greedy
