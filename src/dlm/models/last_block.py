"""The last block at the positions whose logits are wanted alone: a step that writes few of them has one block less to compute.

Shapes: B batch, Q queried positions, T keys, C wanted positions, D width, H heads, K head dim.
"""

from __future__ import annotations

from torch import Tensor

from dlm.models.block import Block, Blocks, ForwardPass


def pick(x_BQD: Tensor, index_BC: Tensor) -> Tensor:
    """These positions of each row (B, C, D)."""
    return x_BQD.gather(1, index_BC[..., None].expand(-1, -1, x_BQD.shape[-1]))


def blocks_at(blocks: Blocks, x_BQD: Tensor, forward_pass: ForwardPass, index_BC: Tensor | None) -> Tensor:
    """(B, C, D): `pick` of what the blocks give, up to the order of sums; all of it without an index."""
    if index_BC is None:
        everywhere_BQD: Tensor = blocks(x_BQD, forward_pass)
        return everywhere_BQD
    if index_BC.shape[1] >= x_BQD.shape[1] or not blocks.lets_last_apart(forward_pass):
        return pick(blocks(x_BQD, forward_pass), index_BC)
    return _at(list(blocks)[-1], blocks.before_last(x_BQD, forward_pass), forward_pass, index_BC)


def _at(block: Block, x_BQD: Tensor, forward_pass: ForwardPass, index_BC: Tensor) -> Tensor:
    """`Block.forward` of these positions (B, C, D): they read keys and values of all."""
    cos, sin, _, _, cache, _, near, *_ = forward_pass
    attention, read_BQD = block.attention, block.attention_norm(x_BQD)
    mask, _ = forward_pass.mask_of(attention)
    if block.conv is not None:
        source = read_BQD if cache is None else cache.write_conv(attention.layer, read_BQD)
        read_BQD = block.conv(read_BQD, near, source)
    q_BHQK, k, v = attention.heads(read_BQD, cos, sin)
    if cache is not None:
        k, v = cache.write(attention.layer, k, v)
    q_BHCK = q_BHQK.gather(2, index_BC[:, None, :, None].expand(-1, q_BHQK.shape[1], -1, q_BHQK.shape[3]))
    if isinstance(mask, Tensor):  # (B or 1, 1, Q, T)
        mask = mask.expand(len(index_BC), -1, -1, -1).gather(2, index_BC[:, None, :, None].expand(-1, 1, -1, mask.shape[3]))
    x_BCD = pick(x_BQD, index_BC) + attention.project_out(attention.attend(q_BHCK, k, v, mask, False))
    y_BCD: Tensor = x_BCD + block.mlp(block.mlp_norm(x_BCD))
    return y_BCD
