"""Small real runs for the tests of pictures."""

from __future__ import annotations

import torch

from dlm.trajectory import Canvas, Frame, Trajectory

TEXT = "First Citizen:\nBefore we proceed any further, hear me speak, and let this be longer than eighty cells.\n\nAll:\nSpeak."


def run(text: str = TEXT, *, given: int = 5, steps: int = 10, revise: bool = False, until: int | None = None) -> Trajectory:
    """`text` revealed in random order, one token a character; the first `given` are the prompt."""
    alphabet = sorted(set(text))
    x_BT = torch.tensor([[alphabet.index(c) for c in text]])
    free_BT = torch.arange(x_BT.shape[1])[None] >= given
    mask_id = len(alphabet)
    z_BT = torch.where(free_BT, mask_id, x_BT)
    made = Trajectory(z_BT, Canvas(x_BT, free_BT, torch.ones_like(free_BT)), pieces=dict(enumerate(alphabet)), mask_id=mask_id)
    order = given + torch.randperm(x_BT.shape[1] - given, generator=torch.Generator().manual_seed(0))
    for k in range(1, (until or steps) + 1):
        settled_BT = ~free_BT
        settled_BT[:, order[: len(order) * k // steps]] = True
        z_BT = torch.where(settled_BT, x_BT, (x_BT + 1) % mask_id if revise else mask_id)
        made.append(Frame(z_BT, settled_BT, torch.tensor([1 - k / steps]), "", k), seconds=k / 10)
    return made


DRAFTS = [("H", "ear"), ("ear ", "my\n"), ("me", " no"), (" now", ""), (".", "")]
"""For each forward pass the text that it added (the accepted draft tokens and one token more), and the draft tokens after it."""


def drafting(until: int | None = None) -> Trajectory:
    """`O: Hear me now.`, one token a character; 3 draft tokens are accepted, 1 of 3, and 3 again."""
    text = "O: " + "".join(new for new, _ in DRAFTS)
    alphabet = sorted(set(text + "".join(draft for _, draft in DRAFTS)))
    x_BT = torch.tensor([[alphabet.index(c) for c in text]])
    column_T = torch.arange(x_BT.shape[1])[None]
    free_BT, mask_id, known = column_T >= 3, len(alphabet), 3
    canvas = Canvas(x_BT, free_BT, torch.ones_like(free_BT))
    made = Trajectory(torch.where(free_BT, mask_id, x_BT), canvas, pieces=dict(enumerate(alphabet)), mask_id=mask_id)
    for k, (new, draft) in enumerate(DRAFTS[:until], 1):
        known += len(new)
        draft_BT = torch.full_like(x_BT, -1)
        draft_BT[0, known : known + len(draft)] = torch.tensor([alphabet.index(c) for c in draft], dtype=torch.long)
        z_BT, t_B = torch.where(column_T < known, x_BT, mask_id), torch.tensor([1 - known / len(text)])
        made.append(Frame(z_BT, column_T < known, t_B, "", k, draft_BT=draft_BT), seconds=k / 10)
    return made
