"""A model as lm-evaluation-harness calls it: `loglikelihood`, `loglikelihood_rolling` and `generate_until`.

Autoregressive models: exact, the numbers of the harness's own `hf` model. Masked diffusion: the bound of `dlm.evaluation.conditional`.
Every answer depends on its request alone, so batches, their order and a resumed run change nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm

from dlm import seeds
from dlm.errors import InputError
from dlm.evaluation.conditional import BLOCKWISE, MASKED, Estimator, Pair, Score
from dlm.language_model import LanguageModel, load
from dlm.language_model.options import DecodingOptions
from dlm.noise.masked import MaskedNoise
from dlm.text import chat
from dlm.trajectory import Canvas
from dlm.workflows.inputs import check_device

BATCH_LOGITS = 1 << 27  # numbers of the logits of one forward pass, with batch_size=auto
AUTO_ROWS = 32  # rows of one, with batch_size=auto
DRAWN = ("temperature", "top_p", "top_k")  # settings of a request that a model argument overrides
EXACT = "autoregressive, exact"


@dataclass(frozen=True)
class Generate:
    """One request of `generate_until`. more: how many equal requests came before it."""

    text: str
    settings: Mapping[str, Any]
    context: tuple[int, ...]
    more: int


class Harness(TemplateLM):  # type: ignore[misc]
    """pretrained: as `dlm.load` takes it, or a model. batch_size: rows of a forward pass, also as a text; `auto` goes by the logits' size.

    mc_samples: mask patterns a continuation (all of them where there are no more). likelihood_blocks: block length of the likelihood of
    block diffusion, by default the model's own; 1 is exact. prefix_token_id: read before a text without context, by default the start
    token or the end of text. max_gen_toks: of requests that name none. decoding: options of `dlm.DecodingOptions` for generation, before
    those of the request. InputError for an option that is unknown.
    """

    def __init__(
        self,
        pretrained: str | LanguageModel = "shakespeare-mask",
        *,
        device: str | None = None,
        dtype: str = "float32",
        adapter: str | None = None,
        family: str = "",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        mc_samples: int = 128,
        likelihood_blocks: int | None = None,
        prefix_token_id: int | None = None,
        max_gen_toks: int = 256,
        seed: int = 0,
        **decoding: Any,
    ) -> None:
        super().__init__()
        self.options = DecodingOptions.of(decoding)
        if isinstance(pretrained, LanguageModel):
            self.lm = pretrained
        else:
            self.lm = load(pretrained, device=_device(device), dtype=dtype, adapter=adapter, family=family)
        self._device = self.lm.network.device
        self.rows = _rows(batch_size, max_batch_size, self.lm)
        self.mc_samples, self.seed, self.max_gen_toks = mc_samples, seeds.check(seed), max_gen_toks
        self.likelihood_blocks, self._prefix = likelihood_blocks, prefix_token_id
        self.estimator = EXACT
        self.stderrs: list[float] = []  # Monte-Carlo errors of the scores so far
        self._templated = False

    # The tokenizer's interface for the harness

    @property
    def start(self) -> int | None:
        """The token that an autoregressive network reads before a text."""
        return None if self.lm.is_diffusion else self.lm.config.start_token_id

    @property
    def eot_token_id(self) -> int:
        return self.prefix_token_id

    @property
    def prefix_token_id(self) -> int:
        """InputError for an autoregressive model that has neither a start token nor an end of text."""
        for token in (self._prefix, self.start, min(self.lm.stops, default=None)):
            if token is not None:
                return token
        raise InputError(f"{self.lm.name} has no token to begin a text with: give prefix_token_id=ID")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Control tokens are read out of a text only where the chat template is applied."""
        return chat.ids(string, self.lm.tokenizer) if self._templated else self.lm.tokenizer.encode(string)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation; without generation prompt it ends with the last message, which the model goes on with."""
        self._templated = True
        text = self.lm.chat.spell(chat_history, self.lm.tokenizer, answer=add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()
        return text[: text.rindex(last) + len(last)]

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.lm.chat.source if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        return f"{self.lm.name}-{self.lm.tokenizer.fingerprint()}"

    def get_model_info(self) -> dict[str, object]:
        """The facts about the model that the harness writes beside its results."""
        found: dict[str, object] = {"dlm_model": self.lm.name, "likelihood_estimator": self.estimator, "mc_samples": self.mc_samples}
        if self.stderrs:
            mean = sum(self.stderrs) / len(self.stderrs)
            found |= {"loglikelihood_mc_stderr_mean": mean, "loglikelihood_mc_stderr_max": max(self.stderrs)}
        return found

    # Likelihood

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(nats, whether greedy decoding writes it) of each continuation."""
        pairs = [self._pair(*request.args) for request in requests]
        found: dict[int, tuple[float, bool]] = {}
        for i, score in tqdm(self._scores(pairs), total=len(pairs), disable=disable_tqdm, desc="loglikelihood"):
            found[i] = score.logp, score.is_greedy
            self.cache_hook.add_partial("loglikelihood", requests[i].args, found[i])
        return [found[i] for i in range(len(pairs))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Nats of whole texts, in windows side by side; each window but the first reads one token of the last."""
        windows = [self._windows(request.args[0]) for request in requests]
        pairs = [pair for some in windows for pair in some]
        scores = dict(tqdm(self._scores(pairs), total=len(pairs), disable=disable_tqdm, desc="loglikelihood_rolling"))
        found, first = [], 0
        for request, some in zip(requests, windows, strict=True):
            found.append(sum(scores[first + i].logp for i in range(len(some))))
            first += len(some)
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, found[-1])
        return found

    def _loglikelihood_tokens(self, requests: list[tuple[Any, list[int], list[int]]], **_: object) -> list[tuple[float, bool]]:
        scores = dict(self._scores([Pair(tuple(context), tuple(continuation)) for _, context, continuation in requests]))
        return [(scores[i].logp, scores[i].is_greedy) for i in range(len(requests))]

    def _pair(self, context: str, continuation: str) -> Pair:
        head, tail = self._encode_pair(context, continuation) if context else ([], self.tok_encode(continuation))
        if not tail:
            raise InputError(f"the continuation {continuation!r} has no tokens of its own")
        if self.lm.is_diffusion:
            return Pair(tuple(head), tuple(tail))
        if not head:
            head = [self.prefix_token_id]
            return Pair(tuple(head), tuple(tail)) if tail[0] != head[0] or len(tail) == 1 else Pair(tuple(tail[:1]), tuple(tail[1:]))
        start = [] if self.start is None or head[0] == self.start else [self.start]
        return Pair((*start, *head), tuple(tail))

    def _windows(self, text: str) -> list[Pair]:
        ids, diffusion = self.tok_encode(text), self.lm.is_diffusion
        most = self.lm.window - 1 if diffusion else self.lm.window  # a diffusion model reads the context in the same window
        prefix = -1 if diffusion else self.prefix_token_id
        found = [make_disjoint_window(window) for window in get_rolling_token_windows(ids, prefix, most, 1)]
        return [Pair(() if diffusion and i == 0 else tuple(head), tuple(tail)) for i, (head, tail) in enumerate(found)]

    def _scores(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, Score]]:
        if not self.lm.is_diffusion:
            yield from self._exact(pairs)
            return
        for i, score in self._bound().scores(pairs):
            self.stderrs.append(score.stderr)
            yield i, score

    @torch.no_grad()
    def _exact(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, Score]]:
        """Of an autoregressive model; rows are padded on the right, which no token before it reads."""
        never, device = self.lm.noise.mask_id, self.lm.network.device
        pairs = [pair.within(self.lm.window + 1) for pair in pairs]  # the last token is predicted, not read
        order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i]))
        for begin in range(0, len(order), self.rows):
            some = order[begin : begin + self.rows]
            texts = [[*pairs[i].context, *pairs[i].continuation] for i in some]
            x_BT = torch.zeros(len(some), len(texts[0]) - 1, dtype=torch.long)
            for b, text in enumerate(texts):
                x_BT[b, : len(text) - 1] = torch.tensor(text[:-1])
            logits_BTV = self.lm.network(x_BT.to(device)).float()
            logits_BTV[..., never] = -torch.inf
            for b, i in enumerate(some):
                target_N = torch.tensor(pairs[i].continuation, device=device)
                logp_NV = logits_BTV[b, len(texts[b]) - 1 - len(target_N) : len(texts[b]) - 1].log_softmax(-1)
                logp = float(logp_NV.gather(1, target_N[:, None]).sum())
                yield i, Score(logp, 0.0, bool((logp_NV.argmax(-1) == target_N).all()))

    def _bound(self) -> Estimator:
        """InputError for a model that has no conditional bound here."""
        lm, network = self.lm, self.lm.config.network
        if not isinstance(lm.noise, MaskedNoise) or network.time_conditioning or not lm.noise.uniform_order:
            raise InputError(
                f"{lm.name}: tasks of likelihood are for autoregressive models, and masked ones that read no time and learned no order; "
                "tasks of generation (generate_until) work with every model"
            )
        blocks = (self.likelihood_blocks or network.block_length) if lm.is_causal else 0
        if self.likelihood_blocks is not None and (not lm.is_causal or lm.window % self.likelihood_blocks):
            raise InputError(f"likelihood_blocks={self.likelihood_blocks}: for block diffusion, a divisor of the window of {lm.window}")

        def predict(z_BT: Tensor, x_BT: Tensor, *, want_BT: Tensor, valid_BT: Tensor | None) -> Tensor:
            if blocks:
                return lm.predict_beside(z_BT, x_BT, blocks)
            t_B = torch.zeros(len(z_BT), device=z_BT.device)
            return lm.denoiser(z_BT, t_B, valid_BT=valid_BT, at_BQ=want_BT)

        self.estimator = f"{BLOCKWISE}, blocks of {blocks}" if blocks else MASKED
        fills, sampling = lm.config.fills_window, {"samples": self.mc_samples, "seed": self.seed, "batch": self.rows}
        return Estimator(lm.noise, predict, lm.window, fills, blocks, device=lm.network.device, **sampling)

    # Generation

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text after each context, up to a stop string, the end of text or max_gen_toks."""
        seen: Counter[str] = Counter()
        waiting: dict[str, list[tuple[int, Generate]]] = {}
        for i, request in enumerate(requests):
            text, settings = request.args
            kwargs = normalize_gen_kwargs(settings, self.max_gen_toks)
            head = self._context(text, kwargs["max_gen_toks"])
            key = repr(sorted(kwargs.items(), key=str))
            waiting.setdefault(key, []).append((i, Generate(text, kwargs, head, seen[key + text])))
            seen[key + text] += 1
        found: dict[int, str] = {}
        with tqdm(total=len(requests), disable=disable_tqdm, desc="generate_until") as bar:
            for group in waiting.values():
                group.sort(key=lambda one: -len(one[1].context))
                for begin in range(0, len(group), self.rows):
                    some = group[begin : begin + self.rows]
                    for (i, _), text in zip(some, self._generate([one for _, one in some]), strict=True):
                        found[i] = text
                        self.cache_hook.add_partial("generate_until", requests[i].args, text)
                    bar.update(len(some))
        return [found[i] for i in range(len(requests))]

    def _context(self, text: str, new: int) -> tuple[int, ...]:
        """The end of a context that leaves room for so many new tokens; the carry of a window where the window is too short."""
        ids, room = self.tok_encode(text), self.lm.window - new
        room = room if room > 0 else self.lm.context
        if room < 1:
            raise InputError(f"max_gen_toks={new} leaves no room for a context in the window of {self.lm.window}: use a smaller one")
        return tuple(ids[len(ids) - room :] if len(ids) > room else ids)

    def _generate(self, some: Sequence[Generate]) -> list[str]:
        settings, lm = some[0].settings, self.lm
        new = int(settings["max_gen_toks"])
        canvas = Canvas.from_rows([[*one.context, *[None] * new] for one in some], fill=lm.tokenizer.mask_id)
        sampler = lm.build(lm.resolve(self._decoding(settings)))
        rng = [torch.Generator().manual_seed(Pair(one.context, ()).seed(self.seed, one.more)) for one in some]
        begins = [len(one.context) for one in some]
        texts: list[str | None] = [None] * len(some)
        tokens_BT = canvas.tokens_BT
        for frame in sampler.steps(canvas.to(lm.network.device), rng=rng):
            tokens_BT, settled_BT = frame.tokens_BT.cpu(), frame.settled_BT.cpu()
            for b, begin in enumerate(begins):
                if texts[b] is None:
                    part = slice(begin, begin + _prefix(settled_BT[b, begin : begin + new].tolist()))
                    text, ended = self._cut(tokens_BT[b, part].tolist(), settings["until"])
                    texts[b] = text if ended else None
            if None not in texts:
                break
        rows = enumerate(zip(texts, begins, strict=True))
        return [self._cut(tokens_BT[b, n : n + new].tolist(), settings["until"])[0] if text is None else text for b, (text, n) in rows]

    def _decoding(self, settings: Mapping[str, Any]) -> DecodingOptions:
        """The model's options, and how a token is drawn as the request says it: the likeliest one unless it samples."""
        drawn = {name: settings[name] for name in DRAWN if settings.get(name) is not None}
        if not settings.get("do_sample"):
            drawn = {"temperature": 0.0}
        own, plain = vars(self.options), vars(DecodingOptions())
        return DecodingOptions(**drawn | {name: value for name, value in own.items() if value != plain[name]})

    def _cut(self, ids: Sequence[int], until: Iterable[str]) -> tuple[str, bool]:
        """The text up to the first stop, and whether there is one."""
        tokenizer = self.lm.tokenizer
        stops = self.lm.stops | {tokenizer.control[word] for word in until if word in tokenizer.control}
        end = next((n for n, token in enumerate(ids) if token in stops), len(ids))
        control = {*tokenizer.control.values()}
        text = tokenizer.decode([token for token in ids[:end] if token not in control])
        cut = min((at for word in until if word and (at := text.find(word)) >= 0), default=len(text))
        return text[:cut], end < len(ids) or cut < len(text)


def _prefix(settled: Sequence[bool]) -> int:
    """How many are settled before the first that is not."""
    return next((n for n, done in enumerate(settled) if not done), len(settled))


def _device(asked: str | None) -> str:
    """The harness's command line asks for cuda:0 where nobody chose a device. InputError for another one that is not there."""
    if asked is None or (asked == "cuda:0" and not torch.cuda.is_available()):
        return "cpu"
    check_device(asked)
    return asked


def _rows(batch_size: int | str, most: int | None, lm: LanguageModel) -> int:
    """Rows of a forward pass. InputError for a word that is neither a number nor auto."""
    word = str(batch_size)
    if word.partition(":")[0] == "auto":
        return max(1, min(most or AUTO_ROWS, BATCH_LOGITS // (lm.window * lm.config.network.vocab_size)))
    if not word.isdigit() or int(word) < 1:
        raise InputError(f"batch_size {word!r}: give a number of rows, or auto")
    return int(word)
