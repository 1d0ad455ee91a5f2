"""A checkpoint ready to use: network, tokenizer and sampler behind `generate` and `stream`.

The one place where networks, noise, text and samplers meet.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from dlm.calibration.table import Calibration
from dlm.errors import InputError
from dlm.formats import huggingface, native
from dlm.formats.families import known
from dlm.formats.families import load as foreign
from dlm.formats.native import ModelConfig
from dlm.inference import prepare, quantize
from dlm.language_model import samplers
from dlm.language_model.generation import Generation, Run
from dlm.language_model.options import DecodingOptions
from dlm.model_scheduling import plan
from dlm.model_scheduling.saved import SavedSchedule
from dlm.models.shifted import Shifted
from dlm.models.transformer import Transformer, predict_beside, predict_next
from dlm.noise import process
from dlm.noise.masked import MaskedNoise
from dlm.protocols import Denoiser, Sampler
from dlm.sampling import registry
from dlm.sampling.autoregressive.draft import Draft
from dlm.sampling.autoregressive.draft_length import AdaptiveDraftLength
from dlm.sampling.draw import generators
from dlm.text.chat import ChatTemplate, Messages
from dlm.text.tokenizer import Tokenizer
from dlm.trajectory import Canvas, Frame, Trajectory

NEW = 256  # tokens that a converted model adds unless told otherwise, or until it ends its text


class LanguageModel:
    """`dlm.load(name)` gives one. Attributes: network, config, tokenizer, noise, name."""

    def __init__(self, network: Transformer, config: ModelConfig, tokenizer: Tokenizer, name: str = "model") -> None:
        if tokenizer.ids != config.network.vocab_size:
            raise InputError(
                f"{name}: the tokenizer has {tokenizer.ids} ids, the mask among them, the network {config.network.vocab_size}; "
                "they belong to different checkpoints"
            )
        if config.mask_token_id != tokenizer.mask_id:
            raise InputError(f"{name}: config.json puts the mask at {config.mask_token_id}, the tokenizer at {tokenizer.mask_id}")
        self.network, self.config, self.tokenizer, self.name = network, config, tokenizer, name
        try:
            self.noise = process.make(config.noise, config.network.vocab_size, config.mask_token_id)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise InputError(f"{name}: its config.json describes no known noise ({error})") from None
        self.defaults: dict[str, Any] = {}
        self.path: Path | None = None
        self.chat = ChatTemplate()
        self.heads: Any = None  # of dlm.adapters.medusa, which propose with `heads:4`
        self.paces: dict[tuple[str, bool], AdaptiveDraftLength] = {}  # what `auto` strides have learned, by word, with and without adapter
        self.seconds: dict[tuple[int, bool], float] = {}  # of calls by positions
        if not self.is_diffusion:
            prepare(network)
        self._others: dict[str, LanguageModel] = {}
        self._quantized: dict[str, Transformer] = {}

    @classmethod
    def from_pretrained(cls, name: str, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> LanguageModel:
        """Load a directory, a GGUF file, a bundled or pulled checkpoint or a hub id. InputError says what is missing or wrong."""
        path = native.find(str(name))
        family = known.of(path)
        if family is not None or native.is_foreign(path):
            read = partial(huggingface.load, path) if family is None else partial(foreign.load, path, family)
            base = read(device=device, dtype=dtype)
            model = cls(base.network, base.config, base.tokenizer, name=path.stem if path.is_file() else Path(name).name)
            model.defaults, model.chat = base.defaults, base.chat
            return model
        network, config = native.load(path, device=device, dtype=dtype)
        ids = config.network.vocab_size
        tokenizer = Tokenizer.load(path) if config.family == "dlm" else Tokenizer.of_network(path, ids, config.mask_token_id)
        model = cls(network, config, tokenizer, name=Path(name).name)
        model.path, model.chat = path, ChatTemplate.load(path)
        model.defaults = native.read_defaults(path)
        return model

    def save_pretrained(self, directory: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write a checkpoint directory; `dtype=torch.bfloat16` halves it. InputError for int8 and int4."""
        if self.network.quantized:
            raise InputError(f"{self.name} was loaded with its weights rounded: save it from float32 or bfloat16")
        native.save(directory, self.network.state_dict(), self.config, files=self.files() | {"README.md": self.card()}, dtype=dtype)

    def files(self) -> dict[str, str]:
        """Tokenizer, generation defaults and chat template as files of a checkpoint, ours or Hugging Face's."""
        files = {"tokenizer.json": self.tokenizer.inner.to_str(), "generation_config.json": json.dumps(self.defaults, indent=2) + "\n"}
        return files | self.chat.files()

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Upload as a model repository, return its address. Needs a network and a hub token."""
        import tempfile

        from huggingface_hub import HfApi

        api = HfApi(token=token)
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as directory:
            self.save_pretrained(directory)
            api.upload_folder(repo_id=repo_id, folder_path=directory)
        return str(url)

    def card(self) -> str:
        """The model card, Markdown with the hub's header."""
        return native.card(self.config, self.name, self.network.parameters_count())

    @property
    def is_diffusion(self) -> bool:
        return self.config.objective != "autoregressive"

    @property
    def is_causal(self) -> bool:
        """Whether it is a model of block diffusion, which no text after a block reaches."""
        return self.is_diffusion and self.config.network.attention == "block_causal"

    @property
    def kind(self) -> registry.Noise | None:
        """The noise that its samplers suit; None for an autoregressive model."""
        return registry.kind(self.noise) if self.is_diffusion else None

    @property
    def exact_samplers(self) -> list[str]:
        """The names of its samplers whose law is that of one token a forward pass."""
        return [one.name for one in registry.usable(self.kind, bidirectional=not self.is_causal) if registry.is_exact(one.name, self.kind)]

    @property
    def default_sampler(self) -> str:
        """The sampler used when none is asked for."""
        return str(self.defaults.get("sampler", "ancestral")) if self.is_diffusion else "autoregressive"

    @property
    def stops(self) -> frozenset[int]:
        """Tokens that end a text or a turn: eos_token_id of generation_config.json."""
        ids = self.defaults.get("eos_token_id", [])
        return frozenset([ids] if isinstance(ids, int) else ids or [])

    @property
    def window(self) -> int:
        return self.config.network.window

    @property
    def context(self) -> int:
        return self.config.context

    def decode(self, frame: Frame, row: int = 0) -> str:
        """Text of one row of a frame; what is still noise shows as █."""
        return "".join("█" if i == self.tokenizer.mask_id else self.tokenizer.piece(i) for i in frame.tokens_BT[row].tolist())

    def canvas(
        self,
        prompt: str | Sequence[str | Sequence[int]] = "",
        *,
        length: int | None = None,
        max_new_tokens: int | None = None,
        suffix: str = "",
        template: str | None = None,
    ) -> Canvas:
        """Prompts, texts or tokens, a suffix and holes as one Canvas, a row for each prompt.

        length: tokens of the whole text, prompt and suffix included; max_new_tokens: of the new part alone.
        template: a text in which every `_` is one token to fill (`\\_` is an underscore), instead of the other arguments.
        """
        if template is not None:
            if prompt or suffix or length or max_new_tokens:
                raise InputError("a template stands alone: put prompt, holes and suffix into it")
            return Canvas.from_rows([self.tokenizer.encode_template(template)], fill=self.tokenizer.mask_id)
        if length is not None and max_new_tokens is not None:
            raise InputError("give length or max_new_tokens, not both")
        tail = self.tokenizer.encode(suffix)
        rows: list[list[int | None]] = []
        for text in [prompt] if isinstance(prompt, str) else prompt:
            head = self.tokenizer.encode(text) if isinstance(text, str) else self.known(text)
            given = len(head) + len(tail)
            usual = max(self.window, given + 64) if self.config.family == "dlm" else given + NEW
            whole = usual if length is None else length
            new = whole - given if max_new_tokens is None else max_new_tokens
            if new < 1:
                raise InputError(f"nothing to generate: the prompt and suffix have {given} tokens, the text is to have {given + new}")
            if len(head) >= self.window and not self.context:
                raise InputError(
                    f"the prompt has {len(head)} tokens, the window {self.window} and no context: use at most {self.window - 1}"
                )
            rows.append([*head, *[None] * new, *tail])
        return Canvas.from_rows(rows, fill=self.tokenizer.mask_id)

    def known(self, tokens: Sequence[int]) -> list[int]:
        """These tokens. InputError for one that the vocabulary has not; the mask is none of it."""
        if strange := [token for token in tokens if not 0 <= token < self.tokenizer.vocab_size or token == self.tokenizer.mask_id]:
            raise InputError(f"the token {strange[0]} is none of the {self.tokenizer.vocab_size} of {self.name}")
        return list(tokens)

    def chat_prompt(self, messages: Messages, **variables: Any) -> str:
        """The text of a conversation up to where the model is to speak. InputError without chat template. See `ChatTemplate.render`."""
        return self.chat.render(messages, **variables)

    def chat_canvas(self, messages: Messages, *, max_new_tokens: int = NEW, **variables: Any) -> Canvas:
        """A conversation and room for an answer; what looks like a control token in a message is text. InputError as `chat_prompt`."""
        ids = self._conversation(messages, **variables)
        return Canvas.from_rows([[*ids, *[None] * min(max_new_tokens, self.window - len(ids))]], fill=self.tokenizer.mask_id)

    def prompt_ids(self, text: str) -> list[int]:
        """What this model reads before it answers: the text as a user's message where it has a chat template, else the text alone."""
        return self._conversation([{"role": "user", "content": text}]) if self.chat.source else self.tokenizer.encode(text)

    def _conversation(self, messages: Messages, **variables: Any) -> list[int]:
        ids = self.chat.encode(messages, self.tokenizer, **variables)
        ids = ids[1:] if ids[:1] == [self.config.start_token_id] else ids  # the sampler reads it anyway
        if len(ids) >= self.window:
            raise InputError(f"the conversation has {len(ids)} tokens, the window {self.window}: begin a new one")
        return ids

    def sampler(self, **options: Any) -> Sampler:
        """The sampler that these options mean for this model; unset ones come from generation_config.json.

        steps: for each window. temperature, top_p, top_k: of every draw.
        sampler: a word of `dlm.sampling.registry`, with its setting after a colon, as in `confidence:0.7`; `auto` takes what `dlm
        calibrate` found best within `budget` (`calls:32`, `seconds:2`, `bits:0.1`). An autoregressive model writes the same text in
        fewer calls with `strided:4` (its own proposals, at masks), `strided:4x16` (16 candidates for those 3 places), `lookup:4` or
        `draft:MODEL,4`, or `auto` instead of 4: as many as pay, by measurement; `lossless` takes the best that it has.
        greedy_tail: that many last steps put the likeliest token everywhere. until_settled: stop a window once no token has changed for
        so many steps. block_length: fill a window block by block; a model of block diffusion has its own. cache: a policy
        of `dlm.sampling.diffusion.cache_policies` for a bidirectional model; True is the exact KV cache of an autoregressive
        one or of block diffusion, False none. guidance: how much more than its due the prompt counts.
        context: tokens of a window that a long text carries into the next;
        a cache makes a long one cheap.
        allow: the characters that may be written; pattern: a regular expression that the whole text must match.
        schedule: which model takes which step, as in `L0.5 H0.5`, `sandwich:0.25`, or `auto` for what `dlm schedule
        search` found; this model is H. light: name of model L, or names by key.
        """
        return samplers.make(self, **self.chosen(options))

    def other(self, name: str) -> LanguageModel:
        """A model to work beside this one, loaded once: from its directory or as `load` finds it."""
        if name not in self._others:
            at = self.path / name if self.path is not None and (self.path / name).is_dir() else name
            self._others[name] = load(str(at), device=str(self.network.device), dtype=self.network.embed.weight.dtype)
        return self._others[name]

    def quantized(self, dtype: str) -> Transformer:
        """This network with its weights quantized to `int8` or `int4`, made once; the embedding is held once."""
        if dtype not in self._quantized:
            self._quantized[dtype] = quantize.quantized_copy(self.network, quantize.BITS[dtype])
        return self._quantized[dtype]

    def draft_network(self, draft: Draft) -> Transformer | None:
        """The network that drafts for this one, if it is another: a quantized copy or another model's."""
        if draft.source == "self":
            return self.quantized(draft.model or quantize.draft_dtype(self.network) or "int8")
        return self.other(draft.model).network if draft.source == "model" else None

    def introduce(self, other: LanguageModel) -> None:
        """Have `other` give this model for its name, instead of loading it once more."""
        self._others[other.name] = other

    def denoisers(self, light: str | Mapping[str, str]) -> dict[str, Transformer]:
        """This network as H beside others. InputError for a model of another vocabulary, window or noise."""
        names = {plan.LIGHT: light} if isinstance(light, str) else dict(light)
        if plan.HEAVY in names:
            raise InputError(f"{plan.HEAVY} is {self.name} itself: the other models have other letters")
        for name in names.values():
            other = self.other(name)
            if not other.is_diffusion or other.is_causal or other.config.noise != self.config.noise:
                raise InputError(f"{name} is no bidirectional diffusion model with the noise of {self.name}: it cannot take its steps")
            if other.tokenizer.fingerprint() != self.tokenizer.fingerprint() or other.window != self.window:
                raise InputError(f"{name} has another vocabulary or window than {self.name}: it cannot take its steps")
        return {plan.HEAVY: self.network} | {key: self.other(name).network for key, name in names.items()}

    def fingerprints(self, light: str | Mapping[str, str]) -> dict[str, str]:
        """Of the weights of this model as H and of others by key, 16 hex digits. InputError as `denoisers`."""
        from dlm.adapters.lora import fingerprint

        return {key: fingerprint(network)[:16] for key, network in self.denoisers(light).items()}

    def chosen(self, options: dict[str, Any]) -> dict[str, Any]:
        """The same options with what `auto` chooses put in; as they are where another sampler is asked for. InputError as `sampler`."""
        if (draft := DecodingOptions.of(options).draft) is not None:
            if options.get("sampler") is not None:
                raise InputError(f"draft {draft.source} chooses the sampler: leave sampler {options['sampler']!r} away")
            options = options | {"draft": draft}
        if options.get("schedule") == "auto":
            if options.get("light") is not None or self.path is None:
                raise InputError("--schedule auto has found the light models itself, beside a checkpoint on disk: leave --light away")
            saved = SavedSchedule.load(self.path)
            options = options | {"schedule": str(saved.schedule), "light": saved.light, "steps": options.get("steps") or saved.steps}
        if options.get("sampler") == registry.LOSSLESS:
            return options | {"sampler": self._lossless()}
        if (options.get("sampler") or self.default_sampler) != "auto":
            return options
        if not self.is_diffusion or not isinstance(self.noise, MaskedNoise):
            raise InputError(f"{self.name} is no masked diffusion model: --sampler auto chooses among the samplers of those")
        if options.get("steps") or options.get("block_length") or options.get("cache", True) is not True:
            raise InputError("--sampler auto chooses steps, blocks and cache itself: leave them away")
        plain = options.get("guidance", 1.0) == 1 and options.get("allow") is None and options.get("pattern") is None

        def usable(found: dict[str, Any]) -> bool:
            return (plain or registry.get(found["sampler"], "masked").rule) and (options.get("guidance", 1.0) == 1 or "cache" not in found)

        found = self.calibration().choose(options.get("budget") or "bits:0.1", usable)
        return options | {"budget": None} | found.options

    def _lossless(self) -> str:
        """The sampler that writes the text of plain decoding fastest: with what it was given, else on a CPU with a rounded copy of a large
        network, or from the text itself; elsewhere with the adapter bundled for it."""
        if self.is_diffusion:
            raise InputError(f"{self.name} is a diffusion model: lossless decoding is for autoregressive ones")
        from dlm.adapters import attach, lora

        network = self.network
        adapted = lora.adapter_of(network) is not None
        if not adapted and self.heads is not None:
            return "heads:auto"
        if not adapted and network.device.type != "cpu" and (path := attach.bundled_for(network)) is not None:
            attach.with_adapter(self, path)
            adapted = lora.adapter_of(network) is not None
        rounded = "" if adapted else quantize.draft_dtype(network)
        return "strided:auto" if adapted else f"draft:{rounded},auto" if rounded else "lookup:auto"

    def calibration(self) -> Calibration:
        """What `dlm calibrate` measured. InputError where it has not."""
        if self.path is None:
            raise InputError(f"{self.name} is not on disk: save it, then run dlm calibrate")
        return Calibration.load(self.path)

    def stream(self, prompt: str | Sequence[str] = "", *, seed: int = 0, canvas: Canvas | None = None, **options: Any) -> Iterator[Frame]:
        """Frames as they come. Options are those of `canvas` and `sampler`; `decode(frame)` gives the text."""
        layout = {k: options.pop(k) for k in ("length", "max_new_tokens", "suffix", "template") if k in options}
        canvas = self.canvas(prompt, **layout) if canvas is None else canvas
        rng = generators(seed, len(canvas.tokens_BT))
        yield from self.sampler(**options).steps(canvas.to(self.network.device), rng=rng)

    def trajectory(self, canvas: Canvas, **meta: Any) -> Trajectory:
        """An empty trajectory of this model, ready to `append` frames of a run on `canvas`."""
        start_BT = torch.where(canvas.free_BT, self.tokenizer.mask_id, canvas.tokens_BT)
        meta = {"model": self.name} | meta
        return Trajectory(start_BT, canvas, pieces=self.tokenizer.pieces(), mask_id=self.tokenizer.mask_id, meta=meta)

    @overload
    def generate(self, prompt: str = "", **options: Any) -> Generation: ...

    @overload
    def generate(self, prompt: list[str], **options: Any) -> list[Generation]: ...

    def generate(
        self,
        prompt: str | list[str] = "",
        *,
        seed: int = 0,
        streamer: Any = None,
        callback: Callable[[Trajectory, Frame], None] | None = None,
        **options: Any,
    ) -> Generation | list[Generation]:
        """A Generation, or a list of them for a list of prompts (row i draws with seed + i, alone or in any batch).

        streamer: an object with put(tokens) and end(), and put_draft(tokens) for drafts, as in transformers; one prompt only.
        callback(trajectory, frame): called after every step. Other options are those of `canvas` and `sampler`.
        """
        layout = {k: options.pop(k) for k in ("length", "max_new_tokens", "suffix", "template") if k in options}
        canvas = self.canvas(prompt, **layout)
        if streamer is not None and len(canvas.tokens_BT) > 1:
            raise InputError("a streamer takes one prompt at a time")
        run = Run(self, canvas, seed, options)
        first = int(canvas.free_BT[0].int().argmax())
        if streamer is not None and bool((~canvas.free_BT[0]).any()):
            streamer.put(canvas.tokens_BT[0][:first])
        while (frame := run.step()) is not None:
            if streamer is not None and hasattr(streamer, "put_draft"):
                streamer.put_draft(run.trajectory.current_BT[0])
            if callback is not None:
                callback(run.trajectory, frame)
        if streamer is not None:
            streamer.put(run.trajectory.current_BT[0][first:])
            streamer.end()
        results = run.results()
        return results[0] if isinstance(prompt, str) else results

    def predict_beside(self, z_BT: Tensor, x_BT: Tensor, block_length: int) -> Tensor:
        """Logits (B, T, V) of block diffusion in float32: every block of z beside the clean blocks of x before it."""
        return predict_beside(self.network, z_BT, x_BT, block_length)

    def predict(self, z_BT: Tensor, t_B: Tensor) -> Tensor:
        """Logits (B, T, V) in float32, as the bounds of `dlm.noise.loss` want them; `predict_next` of an autoregressive model."""
        if not self.is_diffusion:
            return predict_next(self.network, z_BT, self.config.start_token_id)
        return self.denoiser(z_BT, t_B).float()

    @torch.no_grad()
    def logits(self, ids_BT: Tensor, attention_mask: Tensor | None = None, t: Tensor | float | None = None) -> Tensor:
        """The logits (B, T, V) of a checkpoint as its own code gives them, in float32, unshifted: row i as it comes.

        ids_BT: int64; attention_mask: 0 at padding, whose rows mean nothing; t: noise level of each row, for networks that read one.
        """
        device = self.network.device
        pos_BT = torch.arange(ids_BT.shape[1], device=device).expand(ids_BT.shape)
        valid_BT = None if attention_mask is None else attention_mask.to(device).bool()
        t_B = None if t is None else torch.as_tensor(t, device=device).expand(len(ids_BT))
        logits_BTV: Tensor = self.network(
            ids_BT.to(device), t_B, pos_BQ=pos_BT if valid_BT is not None else None, valid_BT=valid_BT
        ).float()
        appended = self.config.family in native.CONVERTIBLE  # a row for a mask that the base does not have
        return logits_BTV[..., :-1] if appended else logits_BTV

    @property
    def denoiser(self) -> Denoiser:
        """The network with row i of its logits for token i."""
        return Shifted(self.network) if self.config.shift else self.network


def load(
    name: str,
    *,
    device: str = "cpu",
    dtype: torch.dtype | str = torch.float32,
    adapter: str | Path | Sequence[str | Path] | None = None,
    deterministic: bool = False,
    compile: bool = False,
) -> LanguageModel:
    """Load a checkpoint: a directory, a GGUF file, a bundled name (`shakespeare-mask`), a pulled one (`smollm2-135m`) or a hub id.

    dtype: of torch, or a word: float32, bfloat16, int8 or int4, which round the weights of an autoregressive model (CPU, inference only).
    adapter: directory that `dlm convert` made for this base, a bundled name, `auto`, or several. deterministic: the logits of a position
    are the same to the bit however many positions and rows a call has, at a cost in speed. compile: calls of few positions by
    torch.compile, the first of which take seconds. InputError for the adapter of another base, and for what cannot be.
    """
    words = {"float32": torch.float32, "bfloat16": torch.bfloat16} | dict.fromkeys(quantize.BITS, torch.float32)
    if isinstance(dtype, str) and dtype not in words:
        raise InputError(f"unknown dtype {dtype!r}; known: {', '.join(words)}")
    model = LanguageModel.from_pretrained(name, device=device, dtype=words[dtype] if isinstance(dtype, str) else dtype)
    if adapter is not None:
        from dlm.adapters.attach import with_adapter

        for path in [adapter] if isinstance(adapter, str | Path) else adapter:
            with_adapter(model, path)
    bits = quantize.BITS.get(str(dtype))
    if (bits or deterministic or compile) and model.is_diffusion:
        raise InputError(f"{name} is a diffusion model: int8, int4, deterministic and compiled decoding are for autoregressive models")
    if bits and model.network.device.type != "cpu":
        raise InputError(f"{dtype} is for the CPU: use --dtype bfloat16 on other devices")
    if not model.is_diffusion:
        prepare(model.network, bits=bits, batch_invariant=deterministic, compiled=compile)
    return model
