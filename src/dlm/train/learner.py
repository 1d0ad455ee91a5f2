"""One optimiser step: draw, corrupt, loss, gradient, update, average.

Everything random at step n is a function of (seed, n). Shapes: B rows of the batch, T positions.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor
from torch.distributed.tensor import DTensor

from dlm import seeds
from dlm.errors import InputError
from dlm.formats import native
from dlm.models.block import Blocks
from dlm.models.config import TransformerConfig
from dlm.models.dropout import drawing_from
from dlm.models.hardware import multiplies_bf16
from dlm.models.transformer import Transformer
from dlm.noise import loss
from dlm.noise.classes import ClassNoise
from dlm.noise.gaussian import GaussianNoise
from dlm.noise.learned import COPIES, LearnedNoise
from dlm.noise.process import Process
from dlm.noise.uniform import UniformNoise
from dlm.train.config import TrainConfig
from dlm.train.data import Stream
from dlm.train.loop import Update
from dlm.train.mixtures import Mixed, temperature
from dlm.train.noise_weights import NoiseWeights
from dlm.train.objective import Objective, RowsOf, levels_on
from dlm.train.optimisers import EMA, Settings, learning_rate, make, set_learning_rate
from dlm.train.workers import Workers

PIECE_TOKENS = {False: 1024, True: 4096}
"""By whether products are in bfloat16, tokens of one forward and backward pass on a CPU, at least a window: most of what they read and
write then stays in its caches."""
LEAST_TOKENS = 256  # of a piece, however many threads there are


def pieces(own: slice, tokens: int, multiple: int, at_once: int) -> list[slice]:
    """The rows `own` of a batch in runs of about so many tokens at once, each of a multiple of so many rows. tokens: of a row."""
    rows = max(multiple, at_once // tokens // multiple * multiple)
    return [slice(first, min(first + rows, own.stop)) for first in range(own.start, own.stop, rows)]


def step_generator(seed: int, step: int) -> torch.Generator:
    """The generator of everything drawn at one step. seed: of 32 bits, as of `seeds.folded`."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * 2_654_435_761 % (1 << 63))


def begin_with(name: str, network: Transformer, noise: Process) -> None:
    """Take the weights of a checkpoint, of a deeper one those of blocks spread evenly. Class tokens that it does not have begin as the mean
    of their words. InputError where they do not fit."""
    found = native.load(native.find(name))[0]
    deep, own = len(found.blocks), len(network.blocks)
    if deep > own:
        found.blocks = Blocks(list(found.blocks)[i * deep // own] for i in range(own))
    state, fresh = found.state_dict(), network.state_dict()
    if isinstance(noise, ClassNoise):
        state |= {name: noise.with_class_rows(rows) for name, rows in state.items() if name in ("embed.weight", "head.weight")}
    if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in fresh.items()}:
        raise InputError(f"init={name} has another size, vocabulary or kind of network than this run")
    network.load_state_dict(state)


def teacher_of(config: TrainConfig, network: TransformerConfig, mask_id: int, device: torch.device) -> loss.Predict:
    """The predictions of the network to learn from. InputError where it is no masked model of the same vocabulary and window."""
    teacher, about = native.load(native.find(config.teacher), device=str(device))
    same = (about.network.vocab_size, about.network.window, about.mask_token_id) == (network.vocab_size, network.window, mask_id)
    if not same or about.objective != "diffusion" or about.noise["process"] != "masked" or about.network.attention != "full":
        raise InputError(f"teacher={config.teacher} is no masked diffusion model with the vocabulary and window of this run")

    @torch.no_grad()
    def predict(z_BT: Tensor, t_B: Tensor) -> Tensor:
        logits: Tensor = teacher(z_BT, t_B).float()
        return logits

    return predict


class Learner:
    """Network, optimiser and average, wrapped by accelerate for one process, DDP or FSDP2.

    Of every batch a process takes the rows `own`; the draws do not depend on the number of processes.
    """

    def __init__(
        self,
        config: TrainConfig,
        network: TransformerConfig,
        noise: Process,
        stream: Stream,
        accelerator: Accelerator,
        *,
        resume: bool = False,
    ) -> None:
        self.config, self.stream, self.accelerator, self.device = config, stream, accelerator, accelerator.device
        self.seed = seeds.folded(config.seed)
        set_seed(self.seed)
        self.bare = Transformer(network)
        if config.init and not resume:  # a resumed run has weights of its own
            begin_with(config.init, self.bare, noise)
        if config.compile:
            self.bare.compile()
        cuda = self.device.type == "cuda"
        half = cuda or (config.bf16 and multiplies_bf16(self.device))
        settings = Settings(config.lr, config.betas, config.weight_decay, fused=cuda, bf16=half)
        self.network, self.wrapped = accelerator.prepare(self.bare, make(config.optimizer, self.bare, settings))
        self.optimizer: torch.optim.Optimizer = self.wrapped.optimizer
        self.ema = EMA(self.network, config.ema)
        share = config.batch // accelerator.num_processes
        self.own = slice(accelerator.process_index * share, (accelerator.process_index + 1) * share)
        teacher = teacher_of(config, network, noise.mask_id, self.device) if config.teacher else None
        self.noise, self.noise_weights = noise, self._weights_of(noise, share)
        if self.noise_weights is not None:
            self.noise = cast(Process, cast(LearnedNoise, noise).learning(self.noise_weights.log_weights))
        self.copies, learns = (1, False) if self.noise_weights is None else (COPIES, True)
        tokens = config.network.window * (2 if config.blocks else 1)  # of a row; block diffusion reads its text twice
        at_once, threads = self._piece_tokens(noise, config.batch * tokens)
        self.pieces = pieces(self.own, tokens, self.copies, at_once)
        rows = [cast(Process, RowsOf(self.noise, batch=config.batch, own=piece)) for piece in self.pieces]
        self.objectives, self.equal = (
            [Objective.of(config, some, teacher, equal=equal, learns=learns) for some in rows] for equal in (False, True)
        )
        self.equal_steps = config.equal_steps
        learned = [] if self.noise_weights is None else [self.noise_weights.log_weights]
        self.workers = Workers([*self.network.parameters(), *learned], min(threads, len(self.pieces)), threads)
        self.network.train()

    def _piece_tokens(self, noise: Process, tokens: int) -> tuple[int, int]:
        """Of so many tokens of a batch, those of a piece, and how many threads work on one each. A piece corrupts the whole batch anew,
        which for vectors takes too long."""
        alone = self.device.type == "cpu" and self.accelerator.num_processes == 1
        if not alone or isinstance(noise, GaussianNoise) or self.config.mixtures:
            return sys.maxsize, 1
        threads = 1 if self.config.compile else torch.get_num_threads()
        return min(PIECE_TOKENS[self.config.bf16], max(LEAST_TOKENS, -(-tokens // threads))), threads

    def _weights_of(self, noise: Process, share: int) -> NoiseWeights | None:
        """Of noise that has some to learn. InputError where the pairs of a batch do not divide over the processes."""
        if not isinstance(noise, LearnedNoise):
            return None
        if share % COPIES:
            raise InputError(f"learned weights compare two draws of noise for each text: {share} windows a process are odd, --set batch")
        config = self.config
        settings = {"lr": config.noise_lr, "betas": config.betas, "ema": config.ema}
        return NoiseWeights(noise, config.network.window, self.device, **settings)  # type: ignore[arg-type]

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The network and the weights of the noise are the averages inside the block."""
        with self.ema.swapped():
            if self.noise_weights is None:
                yield
            else:
                with self.noise_weights.ema.swapped():
                    yield

    def update(self, step: int) -> Update:
        """Step `step` of the run."""
        config = self.config
        rng = step_generator(self.seed, step)
        windows = config.batch // self.copies
        x_BT, t_B = self.stream.draw(windows, rng), loss.draw_levels(windows, rng)
        t_B = config.levels[0] + (config.levels[1] - config.levels[0]) * t_B
        free_BT = self.stream.free(x_BT, self.objectives[0].free(windows, rng), config.context_share, rng)
        if self.copies > 1:
            x_BT, t_B, free_BT = (rows.repeat_interleave(self.copies, 0) for rows in (x_BT, t_B, free_BT))
        block_length = self.objectives[0].draw_block_length(rng)
        torch.manual_seed(self.seed * 7919 + step + self.accelerator.process_index * 1_000_000_007)  # dropout off the CPU
        lr = learning_rate(step, peak=config.lr, steps=config.steps, warmup=config.warmup, decay_share=config.decay_share)
        set_learning_rate(self.optimizer, lr)

        def loss_of(job: tuple[slice, Objective]) -> tuple[Tensor, Tensor]:
            piece, objective = job
            with drawing_from(step_generator(self.seed + 2 + piece.start, step)):
                nats_B = self._nats(step, piece, objective, x_BT[piece], free_BT[piece], t_B[piece], block_length)
            return nats_B.sum() / (self.own.stop - self.own.start), nats_B.detach()

        objectives = self.equal if step < self.equal_steps else self.objectives
        nats_B = torch.cat(self.workers.backward(loss_of, list(zip(self.pieces, objectives, strict=True)), self.accelerator.backward))
        norm = self.accelerator.clip_grad_norm_(self.network.parameters(), config.clip)
        self.wrapped.step()
        self.wrapped.zero_grad()
        self.ema.update(step)
        if self.noise_weights is not None:
            weights = self.noise_weights.log_weights
            weights.grad = self.accelerator.reduce(weights.grad, "mean")
            self.noise_weights.update(step, lr / config.lr)
        return Update(nats_B.mean().float(), norm.full_tensor() if isinstance(norm, DTensor) else norm, lr)

    def _nats(self, step: int, piece: slice, objective: Objective, x_BT: Tensor, free_BT: Tensor, t_B: Tensor, block_length: int) -> Tensor:
        """Nats a token of these rows of the batch (B,)."""
        device, network = self.device, cast(Any, self.network)
        x_BT, free_BT, t_B = x_BT.to(device, non_blocking=True), free_BT.to(device, non_blocking=True), levels_on(device, t_B)
        noise_rng = torch.Generator(device).manual_seed(step_generator(self.seed + 1, step).initial_seed())
        if (warm := temperature(self.config, step)) > 0:
            noise = cast(UniformNoise, self.noise)
            network = Mixed(network, noise, x_BT, free_BT, noise_rng, warm, self.config.batch, piece)
        return objective(network, x_BT, free_BT, noise_rng, t_B, block_length)
