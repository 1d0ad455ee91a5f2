"""A checkpoint ready to use: network, tokenizer and sampler behind `generate` and `stream`.

The one place where networks, noise, text and samplers meet.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack, overload

import torch
from torch import Tensor

from dlm import bundled
from dlm.adapters import attach, lora, medusa
from dlm.calibration.table import Calibration
from dlm.errors import InputError
from dlm.files import write_text
from dlm.formats import bridge as bridges
from dlm.formats import huggingface, native
from dlm.formats.families import known
from dlm.formats.families import load as foreign
from dlm.formats.native import ModelConfig
from dlm.inference import prepare, quantize
from dlm.inference.spread import spread
from dlm.language_model.companions import Companions, denoisers, fingerprints
from dlm.language_model.generation import Generation, Run, trajectory
from dlm.language_model.options import DecodingKeywords, DecodingOptions, LayoutKeywords, TextKeywords, check_dtype, separate
from dlm.language_model.prompting import NEW_TOKENS, Prompting
from dlm.language_model.resolution import DecodingPlan, Facts, needs_calibration, resolve
from dlm.language_model.samplers import build
from dlm.model_scheduling.saved import SavedSchedule
from dlm.models import axes
from dlm.models.attention import BLOCKWISE
from dlm.models.canvas import CanvasNetwork
from dlm.models.causal_text import AfterText
from dlm.models.pattern import reading
from dlm.models.shifted import Shifted, shift
from dlm.models.transformer import Transformer, predict_beside, predict_next
from dlm.models.wrapped import WrappedNetwork
from dlm.noise import process
from dlm.noise.gaussian import GaussianNoise
from dlm.noise.learned import LearnedNoise
from dlm.protocols import Denoiser, Sampler
from dlm.sampling import registry
from dlm.sampling.autoregressive.draft import Draft
from dlm.sampling.autoregressive.draft_length import AdaptiveDraftLength
from dlm.sampling.draw import generators
from dlm.text.chat import ChatTemplate, Messages
from dlm.text.special_tokens import as_ids
from dlm.text.tokenizer import Tokenizer
from dlm.text.tokenizer import read as read_tokenizer
from dlm.trajectory import Canvas, Frame, Trajectory

Callback = Callable[[Trajectory, Frame], None]


class LanguageModel:
    """`dlm.load(name)` gives one. Attributes: network, config, tokenizer, noise, name."""

    def __init__(
        self, network: Transformer, config: ModelConfig, tokenizer: Tokenizer, name: str = "model", *, prepared: bool = True
    ) -> None:
        """prepared: whether an autoregressive network is prepared for decoding here."""
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
        if isinstance(self.noise, LearnedNoise):
            try:
                self.noise.check(config.network.window)
            except ValueError as error:
                raise InputError(f"{name}: its config.json has {error}") from None
        self.defaults: dict[str, Any] = {}
        self.path: Path | None = None
        self.chat = ChatTemplate()
        self.chat_sampling: dict[str, Any] = {}  # of answers, by the record of a fetched base
        self.heads: medusa.Heads | None = None
        self.draft_lengths: dict[tuple[Draft, bool], AdaptiveDraftLength] = {}  # learned by adaptive drafts, with and without adapter
        self.pass_seconds: dict[tuple[int, bool], float] = {}  # measured, by positions, with and without adapter
        self.companions: Companions[LanguageModel] = Companions(self._load_beside)
        if prepared and not self.is_diffusion:
            prepare(network)

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        ready: native.Ready | None = None,
        family: str = "",
        prepared: bool = True,
    ) -> LanguageModel:
        """Load a directory, a GGUF file, a bundled or pulled checkpoint or a hub id. InputError names the missing or wrong part.

        family: of `dlm.formats.families`, for a plain config that does not say it.
        ready: quantizes parts of the network while others are still on disk. prepared: as of the constructor.
        """
        path = native.find(str(name))
        record = known.of(path, family)
        if record is not None or native.is_foreign(path):
            read = partial(huggingface.load, path) if record is None else partial(foreign.load, path, record)
            base = read(device=device, dtype=dtype, ready=ready)
            called = path.stem if path.is_file() else Path(name).name
            model = cls(base.network, base.config, base.tokenizer, name=called, prepared=prepared)
            model.defaults, model.chat = base.defaults, base.chat
            model.path = path if path.is_dir() else None
            model.chat_sampling = bundled.chat_sampling(path)
            return model
        network, config = native.load(path, device=device, dtype=dtype, ready=ready)
        ids = config.network.vocab_size
        if config.family == "dlm":
            tokenizer = Tokenizer.load(path).with_classes(config.noise.get("names", ()))
        else:
            tokenizer = Tokenizer.with_mask(read_tokenizer(path), ids, config.mask_token_id)
        model = cls(network, config, tokenizer, name=Path(name).name, prepared=prepared)
        model.path, model.chat = path, ChatTemplate.load(path)
        model.defaults = native.read_defaults(path)
        return model

    def save_pretrained(self, directory: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write a checkpoint directory. dtype: bfloat16 halves it; int8 keeps matrices in eight bits with a scale for each row.

        InputError for a model that was loaded in int8 or int4.
        """
        if self.network.quantized:
            raise InputError(f"{self.name} was loaded with quantized weights: save it from float32 or bfloat16")
        if isinstance(self.network, WrappedNetwork):
            raise InputError(f"{self.name} is a network of transformers: copy its own files")
        if any(tensor.is_meta for tensor in self.network.parameters()):
            raise InputError(f"{self.name} lies partly on disk: load it without device_map to save it")
        files = self.files() | {"README.md": self.card(str(directory))}
        native.save(directory, self.network.state_dict(), self.config, files=files, dtype=dtype)

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
            write_text(Path(directory) / "README.md", self.card(repo_id))
            api.upload_folder(repo_id=repo_id, folder_path=directory)
        return str(url)

    def card(self, place: str = "") -> str:
        """The model card, Markdown with the hub's header. place: directory or hub id where the model is to be found, else its name."""
        return native.card(self.config, self.name, self.network.parameters_count(), place)

    @property
    def is_diffusion(self) -> bool:
        return self.config.objective != "autoregressive"

    @property
    def is_causal(self) -> bool:
        """Whether it is a model of block diffusion, which no text after a block reaches."""
        return self.is_diffusion and self.config.network.attention in BLOCKWISE

    @property
    def reads_both_ways(self) -> bool:
        """Whether it is an autoregressive model too: it reads its text causally, and fully the block that it writes."""
        return self.is_diffusion and self.config.network.attention == "causal_text"

    def left_to_right(self) -> LanguageModel:
        """The autoregressive model that the causal reading of its weights is, of one that `reads_both_ways`."""
        view = copy.copy(self)
        view.network = reading(self.network, "causal")
        context = self.context or foreign.carried(view.network.config)  # no text is longer than the window
        view.config = replace(self.config, objective="autoregressive", start_token_id=None, context=context)
        return view

    @property
    def samplers(self) -> list[registry.SamplerInfo]:
        """Those that it can use by name alone."""
        found = registry.usable(self.kind, bidirectional=not self.is_causal, heads=self.heads is not None)
        return [*found, *registry.usable(None, heads=False, blocks=True)] if self.reads_both_ways else found

    @property
    def kind(self) -> registry.Noise | None:
        """The noise that its samplers suit; None for an autoregressive model."""
        return registry.kind(self.noise) if self.is_diffusion else None

    @property
    def exact_samplers(self) -> list[str]:
        """The names of its samplers whose distribution is that of one token a forward pass."""
        return [one.name for one in self.samplers if one.noise is None or registry.is_exact(one.name, self.kind)]

    @property
    def default_sampler(self) -> str:
        """The sampler used when none is asked for."""
        return str(self.defaults.get("sampler", "ancestral" if self.is_diffusion else "autoregressive"))

    @property
    def grid(self) -> dict[str, list[int] | list[str]] | None:
        """Of a model of grids, its shape and the tile that pictures draw a border around, as `meta["grid"]` of a trajectory; else None.
        With the colour of each token, "" for one without, where the checkpoint has colours."""
        network = self.config.network
        if not network.axes:
            return None
        shape, tile = axes.picture(network.axes, network.groups)
        drawn: dict[str, list[int] | list[str]] = {"axes": list(shape), "tile": list(tile)}
        return drawn | ({"colours": list(self.config.colours)} if self.config.colours else {})

    @property
    def stops(self) -> frozenset[int]:
        """Tokens that end a text or a turn: eos_token_id of `defaults`."""
        return frozenset(as_ids(self.defaults.get("eos_token_id"), self.name))

    @property
    def window(self) -> int:
        return self.config.network.window

    @property
    def context(self) -> int:
        return self.config.context

    def decode(self, frame: Frame, row: int = 0) -> str:
        """Text of one row of a frame; noise shows as █."""
        return self.tokenizer.spelling.text(frame.tokens_BT[row].tolist())

    @property
    def prompting(self) -> Prompting:
        """The encoding of its prompts."""
        fills, start = self.config.family == "dlm", self.config.start_token_id
        return Prompting(self.name, self.tokenizer, self.chat, self.window, self.context, fills, start)

    def canvas(self, prompt: str | Sequence[str | Sequence[int]] = "", **layout: Unpack[LayoutKeywords]) -> Canvas:
        """Prompts, texts or token ids, a suffix and holes as one Canvas, a row for each prompt.

        length: tokens of the whole text, prompt and suffix included; max_new_tokens: of the new part alone; suffix: the text's end.
        template: a text in which every `_` is one token to fill (`\\_` is an underscore), instead of the other arguments.
        InputError for a prompt that leaves no room.
        """
        return self.prompting.canvas(prompt, **layout)

    def known(self, tokens: Sequence[int]) -> list[int]:
        """These token ids. InputError for one outside the vocabulary; the mask is outside."""
        return self.prompting.known(tokens)

    def chat_prompt(self, messages: Messages, **variables: Any) -> str:
        """The text of a conversation up to where the model is to speak. InputError without chat template. See `ChatTemplate.render`."""
        return self.chat.render(messages, **variables)

    def chat_canvas(self, messages: Messages, *, max_new_tokens: int = NEW_TOKENS, **variables: Any) -> Canvas:
        """A conversation and room for an answer; text that looks like a control token stays text. InputError as `chat_prompt`."""
        return self.prompting.chat_canvas(messages, max_new_tokens, **variables)

    def prompt_ids(self, text: str) -> list[int]:
        """The ids that this model reads before it answers: the text as a user's message where it has a chat template, else alone."""
        return self.prompting.prompt_ids(text)

    def sampler(self, **options: Unpack[DecodingKeywords]) -> Sampler:
        """The sampler that these options mean for this model; unset ones come from generation_config.json.

        sampler: a name of `dlm.sampling.registry` with its parameters, as in `confidence:0.7`; `auto`: the best within `budget`
        (`calls:32`, `seconds:2`, `bits:0.1`) by `dlm calibrate`; of an autoregressive model also `strided:4`, `strided:4x16`, `lookup:4`,
        `heads:4`, `block:8`, `draft:NAME:4`, or `lossless`, its fastest drafter. draft: a `Draft` or its text (`self:int4`, `ngram`).
        steps: of each window. temperature, top_p, top_k: of every draw. greedy_tail: last steps that take the likeliest token everywhere.
        until_settled: steps without a change that end a window. early_stop: nothing is computed after an end-of-text token.
        block_length, cache, context: how a window is filled and carried over.
        guidance: the classifier-free guidance scale. allow, pattern: characters, and a regular expression that the text must match.
        schedule, light: which model takes which step, and the names of the others. `DecodingOptions` says more of each.
        InputError for an unknown option, and for options that do not go with the model or with one another.
        """
        return self.build(self.resolve(DecodingOptions.of(options)))

    def resolve(self, options: DecodingOptions) -> DecodingPlan:
        """The plan that these options mean for this model; nothing is attached or changed. InputError as `sampler`."""
        if self.reads_both_ways and options.left_to_right:
            return self.left_to_right().resolve(options)
        facts = self.facts(options)
        if options.schedule == registry.AUTO and options.light is None and self.path is not None:
            facts = replace(facts, saved_schedule=SavedSchedule.load(self.path))
        if needs_calibration(options, facts) and self.path is not None:
            facts = replace(facts, calibration=Calibration.load(self.path))
        return resolve(options, facts)

    def build(self, plan: DecodingPlan) -> Sampler:
        """The sampler of a plan. InputError for a rule, cache or draft model that cannot be used."""
        return build(plan, self.left_to_right() if self.is_diffusion and plan.left_to_right else self)

    def for_chat(self, options: DecodingOptions) -> DecodingOptions:
        """The options of an answer in a conversation, in chat, on the server and on its page.

        generation_config.json, or the settings of another project's sampler, say how it is drawn; else the record of a fetched base; else
        it takes the likeliest tokens. Options that are given stand.
        """
        said = any(self.defaults.get(name) is not None for name in ("temperature", "top_p", "top_k", "do_sample"))
        if said or options.preset is not None or (self.is_diffusion and self.config.family != "dlm"):
            return options
        usual = self.chat_sampling or {"temperature": 0.0}
        return replace(options, **{name: value for name, value in usual.items() if getattr(options, name) is None})

    def facts(self, options: DecodingOptions) -> Facts:
        """The facts about this model that a plan for these options depends on."""
        network = self.config.network
        adapter = None if self.is_diffusion else lora.adapter_of(self.network)
        drafts_itself = options.draft is not None and options.draft.source == "self"
        return Facts(
            self.name,
            self.kind,
            self.window,
            self.context,
            bidirectional=not self.is_causal,
            fills_window=self.config.fills_window,
            block_length=network.block_length,
            default_sampler=self.default_sampler,
            default_steps=self.defaults.get("steps", self.window),
            default_temperature=self.defaults.get("temperature", 1.0) if self.defaults.get("do_sample", True) else 0.0,
            default_top_p=self.defaults.get("top_p", 1.0),
            default_top_k=self.defaults.get("top_k", 0),
            default_block_length=0 if self.config.fills_window else self.defaults.get("block_length", 0),
            official=known.preset(self.config.family),
            adapter_tokens=None if adapter is None else adapter.config.stride - 1,
            heads=None if self.heads is None else self.heads.config.count,
            own_block=network.block_length if network.attention == "causal_text" and not self.is_diffusion else 0,
            draft_dtype=quantize.draft_dtype(self.network) if options.sampler == registry.LOSSLESS or drafts_itself else "",
        )

    def _load_beside(self, name: str) -> LanguageModel:
        """A model of the directory beside this checkpoint, or as `load` finds it."""
        at = self.path / name if self.path is not None and (self.path / name).is_dir() else name
        return load(str(at), device=str(self.network.device), dtype=self.network.embed.weight.dtype)

    def other(self, name: str) -> LanguageModel:
        """A model to work beside this one, loaded once: from its directory or as `load` finds it."""
        return self.companions.get(name)

    def introduce(self, other: LanguageModel, name: str = "") -> None:
        """Have `other` give this model for a name, by default its own, instead of loading it once more."""
        self.companions.introduce(other, name or other.name)

    def quantized(self, dtype: str) -> Transformer:
        """This network with its weights quantized to `int8` or `int4`, made once; the embedding is held once."""
        return self.companions.quantized(self.network, dtype)

    def draft_network(self, draft: Draft) -> Transformer | None:
        """The network that drafts for this one, if it is another: a quantized copy or another model's."""
        if draft.source == "self":
            return self.quantized(draft.model or quantize.draft_dtype(self.network) or "int8")
        return self.other(draft.model).network if draft.source == "model" else None

    def denoisers(self, light: str | Mapping[str, str]) -> dict[str, Transformer]:
        """This network as H beside others. InputError for a model of another vocabulary, window or noise."""
        return denoisers(self, light, self.other)

    def fingerprints(self, light: str | Mapping[str, str]) -> dict[str, str]:
        """Of the weights of this model as H and of others by key, 16 hex digits. InputError as `denoisers`."""
        return fingerprints(self.denoisers(light))

    def prepare_lossless(self) -> None:
        """Attach the adapter that is bundled for this base, on a device where one drafts faster than a quantized copy: any but the CPU.

        For `sampler="lossless"`, once, before decoding; nothing happens where there is none, or where the model has a drafter.
        """
        drafts = self.heads is not None or lora.adapter_of(self.network) is not None
        if self.is_diffusion or drafts or self.network.device.type == "cpu":
            return
        if (path := attach.bundled_for(self.network)) is not None:
            attach.with_adapter(self, path)

    def calibration(self) -> Calibration:
        """The table of `dlm calibrate`. InputError where there is none."""
        if self.path is None:
            raise InputError(f"{self.name} is not on disk: save it, then run dlm calibrate")
        return Calibration.load(self.path)

    def stream(
        self,
        prompt: str | Sequence[str | Sequence[int]] = "",
        *,
        seed: int = 0,
        canvas: Canvas | None = None,
        **options: Unpack[TextKeywords],
    ) -> Iterator[Frame]:
        """Frames as they come. Options are those of `canvas` and `sampler`; `decode(frame)` gives the text."""
        layout, decoding = separate(options)
        canvas = self.canvas(prompt, **layout) if canvas is None else canvas
        rng = generators(seed, len(canvas.tokens_BT))
        yield from self.build(self.resolve(decoding)).steps(canvas.to(self.network.device), rng=rng)

    def run(self, canvas: Canvas, options: DecodingOptions | None = None, *, seed: int = 0) -> Run:
        """A generation under way, to be stepped by hand: `step` gives the next frame. InputError as `sampler`."""
        plan = self.resolve(options or DecodingOptions())
        return Run(self, canvas, seed, plan, self.build(plan))

    def trajectory(self, canvas: Canvas, **meta: Any) -> Trajectory:
        """An empty trajectory of this model, ready to `append` frames of a run on `canvas`."""
        return trajectory(self, canvas, **meta)

    @overload
    def generate(
        self,
        prompt: str = "",
        *,
        seed: int = 0,
        streamer: Any = None,
        callback: Callback | None = None,
        **options: Unpack[TextKeywords],
    ) -> Generation: ...

    @overload
    def generate(
        self,
        prompt: list[str] | list[list[int]],
        *,
        seed: int = 0,
        streamer: Any = None,
        callback: Callback | None = None,
        **options: Unpack[TextKeywords],
    ) -> list[Generation]: ...

    def generate(
        self,
        prompt: str | list[str] | list[list[int]] = "",
        *,
        seed: int = 0,
        streamer: Any = None,
        callback: Callback | None = None,
        **options: Unpack[TextKeywords],
    ) -> Generation | list[Generation]:
        """A Generation, or a list of them for a list of prompts, texts or token ids (row i draws with seed + i, alone or in any batch).

        streamer: an object with put(tokens) and end(), and put_draft(tokens) for drafts, as in transformers; one prompt only.
        callback(trajectory, frame): called after every step. Other options are those of `canvas` (length, max_new_tokens, suffix,
        template) and of `sampler`. InputError as of both.
        """
        layout, decoding = separate(options)
        canvas = self.canvas(prompt, **layout)
        if streamer is not None and len(canvas.tokens_BT) > 1:
            raise InputError("a streamer takes one prompt at a time")
        plan = self.resolve(decoding)
        run = Run(self, canvas, seed, plan, self.build(plan))
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
        """Logits (B, T, V) of block diffusion in float32, row i for token i: every block of z beside the clean blocks of x before it."""
        beside_BTV = predict_beside(self.network, z_BT, x_BT, block_length)
        causal_text = self.config.network.attention == "causal_text"
        if not (causal_text or self.config.shift):
            return beside_BTV
        text = reading(self.network, "causal") if causal_text else reading(self.network, "block_causal", block_length)
        beside_BTV = shift(beside_BTV) if self.config.shift else beside_BTV
        beside_BTV[:, block_length::block_length] = text(x_BT)[:, block_length - 1 : -1 : block_length].float()
        return beside_BTV

    def predict(self, z_BT: Tensor, t_B: Tensor) -> Tensor:
        """Logits (B, T, V) in float32, as the bounds of `dlm.noise.loss` want them; `predict_next` of an autoregressive model.

        Under noise on vectors z is evidence, (B, T, V).
        """
        if isinstance(self.network, CanvasNetwork):
            raise InputError(f"{self.name} denoises a canvas after a text: no bound of it is known")
        if not self.is_diffusion:
            return predict_next(self.network, z_BT, self.config.start_token_id)
        if isinstance(self.noise, GaussianNoise):
            return self.noise.reading(self.denoiser)(z_BT, t_B)
        return self.denoiser(z_BT, t_B).float()

    @torch.no_grad()
    def logits(self, ids_BT: Tensor, attention_mask: Tensor | None = None, t: Tensor | float | None = None) -> Tensor:
        """The logits (B, T, V) of a checkpoint as its own code gives them, in float32, unshifted: row i as it comes.

        ids_BT: int64; attention_mask: 0 at padding, whose rows mean nothing; t: noise level of each row, for networks that read one.
        """
        if t is None and self.config.network.time_conditioning:
            raise InputError(f"{self.name} reads the noise level: give t, 0 for text and 1 for noise")
        device = self.network.device
        pos_BT = torch.arange(ids_BT.shape[1], device=device).expand(ids_BT.shape)
        valid_BT = None if attention_mask is None else attention_mask.to(device).bool()
        t_B = None if t is None else torch.as_tensor(t, device=device).expand(len(ids_BT))
        logits_BTV: Tensor = self.network(
            ids_BT.to(device), t_B, pos_BQ=pos_BT if valid_BT is not None else None, valid_BT=valid_BT
        ).float()
        return logits_BTV[..., :-1] if self.config.family in native.MASKLESS else logits_BTV

    @property
    def denoiser(self) -> Denoiser:
        """The network with row i of its logits for token i."""
        if self.config.network.attention == "causal_text":
            return AfterText(self.network)
        return Shifted(self.network) if self.config.shift else self.network


def load(
    name: str,
    *,
    device: str = "cpu",
    dtype: torch.dtype | str = torch.float32,
    adapter: str | Path | Sequence[str | Path] | None = None,
    deterministic: bool = False,
    compile: bool = False,
    family: str = "",
    bridge: str = "",
    device_map: str = "",
    max_memory: Mapping[int | str, int | str] | None = None,
    trust_remote_code: bool = False,
) -> LanguageModel:
    """Load a checkpoint: a directory, a GGUF file, a bundled name (`shakespeare-mask`), a pulled one (`smollm2-135m`) or a hub id.

    dtype: of torch, or a word: float32, bfloat16, int8 or int4, which quantize the weights (CPU, inference only). adapter: directory that
    `dlm convert` made for this base, a bundled name, `auto`, or several. deterministic: batch-invariant, for autoregressive models; the
    logits of a position are bitwise identical in forward passes of any shape, at a cost in speed. compile: by torch.compile, forward
    passes of few positions of an autoregressive model, those of a diffusion model without an approximate cache; the first ones take
    seconds. family: of another project's checkpoint whose plain config does not say it: `open-dcoder`, `diffullama`, `i-dlm`.
    bridge: `transformers`, for DiffusionGemma: the class that transformers ships in place of a network of ours; device_map: `auto`
    spreads the network over GPUs, memory and disk; max_memory: what each may hold (`dlm.inference.spread`). trust_remote_code: of a
    bridge, whose class then comes from the checkpoint's own code. InputError for the adapter of another base, and for settings that do not
    go together.
    """
    if isinstance(dtype, str):
        check_dtype(dtype)
    if trust_remote_code and not bridge:
        raise InputError("a network of dlm's runs no code of a checkpoint: --trust-remote-code goes with --bridge transformers alone")
    if bridge:
        others = bool(adapter or deterministic or compile or family or max_memory)
        return _bridged(name, bridge, device, dtype, device_map, others=others, trust_remote_code=trust_remote_code)
    _check_map(device_map, device, dtype, spread=bool(max_memory), others=bool(adapter or deterministic or compile))
    bits = quantize.BITS.get(str(dtype))
    if bits and torch.device(device).type != "cpu":
        raise InputError(f"{dtype} is for the CPU: use --dtype bfloat16 on other devices")
    # an adapter is loaded onto the weights that it was made for, before they are quantized
    ready = partial(quantize.quantize_part, bits=bits) if bits and adapter is None else None
    kept = (torch.bfloat16 if dtype == "bfloat16" else torch.float32) if isinstance(dtype, str) else dtype
    model = LanguageModel.from_pretrained(name, device=device, dtype=kept, ready=ready, family=family, prepared=not device_map)
    if adapter is not None:
        for path in [adapter] if isinstance(adapter, str | Path) else adapter:
            attach.with_adapter(model, path)
    if deterministic and model.is_diffusion:
        raise InputError(f"{name} is a diffusion model: deterministic decoding is for autoregressive models")
    if device_map:
        spread(model.network, max_memory)
    elif bits or compile or not model.is_diffusion or torch.device(device).type == "cpu":
        prepare(model.network, bits=bits, batch_invariant=deterministic, compiled=compile)
    return model


def _check_map(device_map: str, device: str, dtype: torch.dtype | str, *, spread: bool, others: bool) -> None:
    """InputError for a map that is unknown or does not go with the other settings."""
    if device_map not in ("", "auto"):
        raise InputError(f"unknown device_map {device_map!r}; known: auto")
    if spread and not device_map:
        raise InputError("max_memory is for device_map='auto'")
    if device_map and (others or dtype in quantize.BITS or device != "cpu"):
        raise InputError("device_map chooses the devices, of float32 or bfloat16: leave device, int8, int4, adapters and compile away")


def _bridged(
    name: str, bridge: str, device: str, dtype: torch.dtype | str, device_map: str, *, others: bool, trust_remote_code: bool
) -> LanguageModel:
    if others or dtype in quantize.BITS:
        raise InputError("a bridge takes device, dtype (float32 or bfloat16) and device_map alone")
    kept = dtype if isinstance(dtype, torch.dtype) else torch.bfloat16 if dtype == "bfloat16" else torch.float32
    how = {"device": device, "dtype": kept, "device_map": device_map, "trust_remote_code": trust_remote_code}
    base = bridges.load(native.find(name), bridge, **how)  # type: ignore[arg-type]
    model = LanguageModel(base.network, base.config, base.tokenizer, name=Path(name).name)
    model.defaults, model.chat = base.defaults, base.chat
    return model
