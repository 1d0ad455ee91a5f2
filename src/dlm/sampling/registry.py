"""The samplers by name: what each does, its parameters, the models it suits, whether it is exact; help, docs and checks come from here.

Importing this loads no torch: a factory is imported when it is called, so that `dlm --help` is quick.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from dlm import plugins
from dlm.errors import MAX_SETTING, InputError, in_range, nearest
from dlm.sampling.autoregressive import draft as drafts
from dlm.sampling.autoregressive.draft import Draft, DrafterFactory
from dlm.sampling.autoregressive.draft_length import MAX_STRIDE

if TYPE_CHECKING:
    from dlm.protocols import BoundedProcess, NoiseProcess
    from dlm.sampling.diffusion.protocols import Rule
    from dlm.sampling.draw import Draw

Noise = Literal["masked", "replacement", "genmd4", "gaussian", "classes"]
LOSSLESS = "lossless"  # the fastest drafter of an autoregressive model
PLAIN = "autoregressive"  # one token a forward pass
AUTO = "auto"  # the sampler that a measurement found best


@dataclass(frozen=True)
class Parameter:
    """A number after the colon of a sampler's name. low, high: its range; `open`: the ends that do not belong to it, as in `(0, 1]`.

    default: None where it must be given; a text: the name of a model.
    """

    name: str
    default: float | int | str | None
    low: float = 0.0
    high: float = MAX_SETTING
    kind: type[float] | type[int] | type[str] = float
    open_low: bool = False

    @property
    def range(self) -> str:
        """As mathematics writes it; nothing for a name."""
        if self.kind is str:
            return ""
        return f"{'(' if self.open_low else '['}{self.low:g}, {self.high:g}]"

    def read(self, text: str) -> float | int | str:
        """The value that a text means. ValueError for no number, InputError for one out of range."""
        value = self.kind(text)
        if not isinstance(value, str):
            in_range(value, self.low, self.high, self.name.replace("_", " "), above=self.open_low)
        return value


@dataclass(frozen=True)
class Use:
    """How a sampler is used, which decides whether it is exact. values: of its parameters by name; steps: of a window or block, None for
    no limit; tokens: of that window or block."""

    values: dict[str, Any]
    steps: int | None
    tokens: int


def _one_token(use: Use) -> bool:
    """Tokens that a step draws together are drawn independently, so a window of one token is the only exact one."""
    return use.tokens == 1


def _always(_use: Use) -> bool:
    return True


def _without_tolerance(use: Use) -> bool:
    return bool(use.values["tolerance"] == 0)


@dataclass(frozen=True)
class SamplerInfo:
    """A sampler that a user can name.

    noise: the noise of the diffusion models that it suits; None: it writes the text of an autoregressive model.
    factory: makes the rule from `draw` and the parameters by name; a text: where it is, as in `package.module:Name`.
    about: one line. rule: whether the factory makes a rule of one step, else a whole sampler.
    bidirectional: whether it needs a bidirectional network. settles: whether it ends a window once nothing changes.
    exact: whether its distribution is that of one token a forward pass, in random order or from left to right; the grid of
    `ancestral` is not, however fine, since tokens that share a step are drawn independently.
    blockwise: whether it reads a bidirectional network block by block, and no block what follows it.
    reference: whether it is another project's, kept to compare with; a calibration leaves it out.
    counts_steps: whether it tells the network the number of its step in place of the noise level.
    trials: settings that a calibration measures: (text after the colon, steps as divisors of the window; none: steps do not matter).
    """

    name: str
    noise: Noise | None
    factory: Callable[..., Any] | str
    about: str
    parameters: tuple[Parameter, ...] = ()
    rule: bool = True
    bidirectional: bool = False
    settles: bool = False
    blockwise: bool = False
    reference: bool = False
    counts_steps: bool = False
    exact: Callable[[Use], bool] = _one_token
    trials: tuple[tuple[str, tuple[int, ...]], ...] = ()

    @property
    def usage(self) -> str:
        """The name with its parameters: those with a default in brackets."""
        text, ends = self.name, ""
        for one in self.parameters:
            if one.default is None:
                text += f":{one.name.upper()}"
            else:
                shown = one.default if isinstance(one.default, str) else f"{one.default:g}"
                text, ends = f"{text}[:{shown}", f"{ends}]"
        return text + ends

    @property
    def exact_by_default(self) -> bool:
        """Whether it is exact with its default parameters, whatever the steps."""
        return self.noise is None or self.exact(Use(self.parse(self.name), None, 2))

    @property
    def needs_a_name(self) -> bool:
        """Whether its name alone is not enough."""
        return any(one.default is None for one in self.parameters)

    def resolved(self) -> Callable[..., Any]:
        """The factory itself."""
        made: Callable[..., Any] = pkgutil.resolve_name(self.factory) if isinstance(self.factory, str) else self.factory
        return made

    def parse(self, word: str) -> dict[str, Any]:
        """The parameters by name that `name:1:2` means, defaults put in; a comma is an old spelling.

        InputError for text that is no number, for a number out of range, and for one parameter too many.
        """
        _, colon, text = word.partition(":")
        if colon and not self.parameters:
            raise InputError(f"the sampler {self.name!r} has no setting, got {word!r}")
        given = text.replace(",", ":").split(":", len(self.parameters) - 1) if colon else []
        values = {one.name: one.default for one in self.parameters}
        for one, value in zip(self.parameters, given, strict=False):
            try:
                values[one.name] = one.read(value) if value or len(self.parameters) == 1 else one.default
            except InputError as error:
                raise InputError(f"sampler {word!r}: {error}") from None
            except ValueError:
                raise InputError(f"sampler {word!r}: {value!r} is no number; write {self.name}:{self._names}") from None
        return values

    @property
    def _names(self) -> str:
        return ":".join(one.name.rpartition("_")[2].upper() for one in self.parameters)


_UNMASKING, _REMASKING, _REVISING, _STAGED = (
    f"dlm.sampling.diffusion.{name}:" for name in ("unmasking", "remasking", "revising", "staged")
)
_VECTORS = "dlm.sampling.diffusion.vectors:"
_SPECULATIVE = "dlm.sampling.autoregressive.speculative:SpeculativeDecoder"
_SHARES, _LATER = (16, 8, 4), (8, 4)
_STRIDE, _FLOOR = Parameter("stride", 4, low=1, high=MAX_STRIDE, kind=int), Parameter("floor", 0.0, high=1.0)


def _top_score(score: str) -> Callable[..., Rule]:
    def make(draw: Draw) -> Rule:
        from dlm.sampling.diffusion.unmasking import TopScore

        return TopScore(draw, score)

    return make


def _transfer(quota: str) -> Callable[..., Rule]:
    def make(draw: Draw, remasking: str = "low_confidence") -> Rule:
        from dlm.sampling.diffusion.transfer import reference

        return reference(quota, remasking, draw)

    return make


def _dream(draw: Draw, alg: str = "entropy", alg_temp: float = 0.0) -> Rule:
    from dlm.sampling.diffusion.transfer import dream

    return dream(alg, draw, alg_temp)


def _nemotron(draw: Draw, threshold: float = 0.9) -> Rule:
    from dlm.sampling.diffusion.blockwise import FirstAlone, Surest

    return FirstAlone(Surest(threshold, draw=draw))


def _fast_dllm(draw: Draw, threshold: float = 0.9, sub_length: int = 8) -> Rule:
    from dlm.sampling.diffusion.blockwise import FirstAlone, Surest

    return FirstAlone(Surest(threshold, above=True, narrowed=True, draw=draw), sub_length)


def _tiny_topk(draw: Draw, count: int = 25) -> Rule:
    from dlm.sampling.diffusion.transfer import Transfer

    return Transfer(count, draw=draw)


def _tiny_confidence(draw: Draw, threshold: float = 0.9) -> Rule:
    from dlm.sampling.diffusion.blockwise import Surest

    return Surest(threshold, draw=draw)


def _flow(**settings: Any) -> Any:
    from dlm.sampling.diffusion.vectors import VectorSampler

    return VectorSampler(**settings, flow=True)


def _remask(kind: str) -> Callable[..., Rule]:
    def make(draw: Draw, eta: float) -> Rule:
        from dlm.sampling.diffusion.remasking import Remask

        return Remask(kind, eta, draw)

    return make


_ETA = (Parameter("eta", 0.04, high=1.0),)
BUILT_IN: tuple[SamplerInfo, ...] = (
    SamplerInfo(
        "ancestral",
        "masked",
        f"{_UNMASKING}Ancestral",
        "Random order, each mask in a step drawn in advance: the plain reverse process.",
        trials=(("", (16, 8, 4, 2, 1)),),
    ),
    SamplerInfo(
        "first-hitting",
        "masked",
        f"{_UNMASKING}FirstHitting",
        "Random order, one token a forward pass: exact, whatever the steps.",
        exact=_always,
        trials=(("", ()),),
    ),
    SamplerInfo(
        "topk",
        "masked",
        f"{_UNMASKING}TopScore",
        "The most confident of the drawn tokens first, an equal share in each step.",
        trials=(("", _SHARES),),
    ),
    SamplerInfo(
        "margin",
        "masked",
        _top_score("margin"),
        "Largest margin over the second choice first, an equal share in each step.",
        trials=(("", (*_SHARES, 1)),),
    ),
    SamplerInfo(
        "entropy",
        "masked",
        _top_score("entropy"),
        "Lowest entropy first, an equal share of the masks in each step.",
        trials=(("", (*_SHARES, 1)),),
    ),
    SamplerInfo(
        "confidence",
        "masked",
        f"{_UNMASKING}Threshold",
        "All tokens at once above a confidence threshold, at least one a forward pass.",
        (Parameter("threshold", 0.9, high=1.0, open_low=True),),
        trials=(("0.5", (2,)), ("0.9", (2, 1))),
    ),
    SamplerInfo(
        "factor",
        "masked",
        f"{_UNMASKING}Factor",
        "As many of the most confident tokens at once as are likely to be right together.",
        (Parameter("factor", 1.0, open_low=True),),
        trials=(("1", (2,)), ("4", (2,))),
    ),
    SamplerInfo(
        "entropy-bound",
        "masked",
        f"{_UNMASKING}EntropyBudget",
        "As many of the most confident tokens at once as a budget of entropy allows.",
        (Parameter("bound", 0.1),),
        trials=(("8", (2,)), ("32", (2,))),
    ),
    SamplerInfo(
        "klass",
        "masked",
        f"{_UNMASKING}KLStable",
        "All confident tokens at once whose distribution did not move since the last forward pass.",
        (Parameter("threshold", 0.6, high=1.0, open_low=True),),
        trials=(("0.6", (2,)),),
    ),
    SamplerInfo(
        "predictor-corrector",
        "masked",
        f"{_REVISING}PredictorCorrector",
        "Reveals more than its share, then masks some at random again, to be drawn anew.",
        (Parameter("corrector", 1.0),),
        trials=(("1", _LATER),),
    ),
    SamplerInfo(
        "remdm-cap",
        "masked",
        _remask("cap"),
        "Random order with remasking of any token, at a small fixed probability.",
        _ETA,
        trials=(("0.04", _LATER),),
    ),
    SamplerInfo(
        "remdm-rescale",
        "masked",
        _remask("rescale"),
        "Random order with remasking of any token, at a probability that follows the noise.",
        _ETA,
        trials=(("0.1", _LATER),),
    ),
    SamplerInfo(
        "remdm-conf",
        "masked",
        _remask("conf"),
        "Random order with remasking, the more probable the less confident a token was.",
        _ETA,
        trials=(("0.5", _LATER),),
    ),
    SamplerInfo(
        "remdm-loop",
        "masked",
        _remask("loop"),
        "Random order; in the middle third of the steps tokens are remasked and drawn anew.",
        _ETA,
        trials=(("0.04", _LATER),),
    ),
    SamplerInfo(
        "revoke",
        "masked",
        f"{_REMASKING}Revoke",
        "Writes boldly, then remasks tokens that the rest of the text makes unlikely.",
        (Parameter("threshold", 0.6, high=1.0, open_low=True),),
        bidirectional=True,
        settles=True,
        trials=(("0.6", _LATER),),
    ),
    SamplerInfo(
        "planner",
        "masked",
        f"{_REMASKING}Planned",
        "Keeps the best tokens, new or old, as many as the step allows, and remasks the rest.",
        (Parameter("eta", 1.0),),
        bidirectional=True,
        trials=(("1", _LATER),),
    ),
    SamplerInfo(
        "speculative",
        "masked",
        "dlm.sampling.diffusion.any_order_speculative:AnyOrderSpeculativeSampler",
        "One token at a time in random order, exact, in fewer forward passes: draft tokens are verified.",
        (Parameter("draft_tokens", 8, low=1, high=MAX_STRIDE - 1, kind=int), Parameter("tolerance", 0.0)),
        rule=False,
        exact=_without_tolerance,
        trials=tuple((setting, ()) for setting in ("2", "4", "8", "16", "8:0.5")),
    ),
    SamplerInfo(
        "llada",
        "masked",
        _transfer("even"),
        "Reference of llada: an equal share of each block, most confident or random positions first.",
        (Parameter("remasking", "low_confidence", kind=str),),
        reference=True,
    ),
    SamplerInfo(
        "dream",
        "masked",
        _dream,
        "Reference of dream: a share by time, lowest entropy, largest margin or confidence first.",
        (Parameter("alg", "entropy", kind=str), Parameter("alg_temp", 0.0)),
        reference=True,
    ),
    SamplerInfo(
        "llada2",
        "masked",
        "dlm.sampling.diffusion.editing:AboveThreshold",
        "Reference of the second llada: every mask above a threshold, at least a share of each block.",
        (Parameter("threshold", 0.95, high=1.0),),
        reference=True,
    ),
    SamplerInfo(
        "llada2.1",
        "masked",
        "dlm.sampling.diffusion.editing:Editing",
        "Reference of the second llada that edits: surer tokens also replace those already written.",
        (Parameter("threshold", 0.95, high=1.0), Parameter("editing_threshold", 0.9, high=1.0)),
        reference=True,
    ),
    SamplerInfo(
        "mdlm",
        "masked",
        _transfer("rounded"),
        "Reference of dllm: a rounded share of each block, most confident or random positions first.",
        (Parameter("remasking", "low_confidence", kind=str),),
        reference=True,
    ),
    SamplerInfo(
        "bd3lm",
        "masked",
        _transfer("rounded"),
        "Reference of dllm: as mdlm, in blocks that see nothing after themselves, until a stop.",
        (Parameter("remasking", "low_confidence", kind=str),),
        blockwise=True,
        reference=True,
    ),
    SamplerInfo(
        "nemotron",
        "masked",
        _nemotron,
        "Reference of nemotron-labs-diffusion: a block's first token alone, then all above a threshold.",
        (Parameter("threshold", 0.9, high=1.0),),
        reference=True,
    ),
    SamplerInfo(
        "fast-dllm",
        "masked",
        _fast_dllm,
        "Reference of fast-dllm: as nemotron, in sub-blocks from left to right.",
        (Parameter("threshold", 0.9, high=1.0), Parameter("sub_length", 8, low=1, kind=int)),
        reference=True,
    ),
    SamplerInfo(
        "p2",
        "masked",
        "dlm.sampling.diffusion.p2:PathPlanning",
        "Reference of open-dcoder: all positions drawn anew, the least probable masked, fewer each step.",
        reference=True,
    ),
    SamplerInfo(
        "tiny-topk",
        "masked",
        _tiny_topk,
        "Reference of tiny-diffusion: so many of the most confident tokens in each step.",
        (Parameter("count", 25, low=1, kind=int),),
        reference=True,
        counts_steps=True,
    ),
    SamplerInfo(
        "tiny-confidence",
        "masked",
        _tiny_confidence,
        "Reference of tiny-diffusion: all tokens above a confidence threshold, the surest always.",
        (Parameter("threshold", 0.9, high=1.0),),
        reference=True,
        counts_steps=True,
    ),
    SamplerInfo("ancestral", "replacement", f"{_REVISING}Reverse", "Any token may change in any step: the plain reverse process."),
    SamplerInfo(
        "predictor-corrector",
        "replacement",
        f"{_REVISING}PredictorCorrector",
        "Removes more noise than its share, then puts some back, so that tokens are drawn anew.",
        (Parameter("corrector", 1.0),),
    ),
    SamplerInfo("refine", "replacement", f"{_REVISING}Refine", "Draws every token anew in every step and puts no noise back."),
    SamplerInfo(
        "entropy-bound",
        "replacement",
        f"{_REVISING}EntropyBound",
        "Keeps the most confident tokens within a budget of entropy and puts noise on the rest.",
        (Parameter("bound", 0.1),),
    ),
    SamplerInfo(
        "worst",
        "replacement",
        f"{_REVISING}ChangeWorst",
        "Draws those tokens anew for which the model has a much better one.",
        (Parameter("edits", 2.0, open_low=True),),
    ),
    SamplerInfo(
        "ancestral",
        "genmd4",
        "dlm.sampling.diffusion.revealing:Revealing",
        "Each mask at the rate of the tokens that the network expects there: the plain reverse process.",
    ),
    SamplerInfo(
        "ancestral",
        "gaussian",
        f"{_VECTORS}VectorSampler",
        "All vectors at once with fresh noise in each step, tokens at the end: the plain reverse process.",
        rule=False,
    ),
    SamplerInfo(
        "flow",
        "gaussian",
        _flow,
        "As ancestral, by the ordinary differential equation: the noise is drawn once.",
        rule=False,
    ),
    SamplerInfo(
        "ancestral",
        "classes",
        f"{_STAGED}TwoClocks",
        "Masks become classes or words, classes become words: the plain reverse process.",
    ),
    SamplerInfo(
        "classes-first",
        "classes",
        f"{_STAGED}ClassesFirst",
        "All classes in a share of the steps, then the words, each in random order, an equal share a step.",
        (Parameter("share", 0.5, high=1.0, open_low=True),),
    ),
    SamplerInfo(
        PLAIN,
        None,
        "dlm.sampling.autoregressive.plain:AutoregressiveSampler",
        "One token a forward pass, from left to right.",
        rule=False,
        exact=_always,
    ),
    SamplerInfo(
        "block",
        None,
        _SPECULATIVE,
        "The same text in fewer forward passes: a block that the network denoises drafts, for nemotron.",
        (replace(_STRIDE, default=drafts.BLOCK_TOKENS + 1), _FLOOR),
        rule=False,
        exact=_always,
    ),
    SamplerInfo(
        "strided",
        None,
        _SPECULATIVE,
        "The same text in fewer forward passes: masks of the same pass draft, best with an adapter.",
        (_STRIDE, _FLOOR),
        rule=False,
        exact=_always,
    ),
    SamplerInfo(
        "lookup",
        None,
        _SPECULATIVE,
        "The same text in fewer forward passes: n-grams of the text so far draft.",
        (_STRIDE, _FLOOR),
        rule=False,
        exact=_always,
    ),
    SamplerInfo(
        "draft",
        None,
        _SPECULATIVE,
        "The same text in fewer forward passes: a smaller model or a quantized copy drafts.",
        (Parameter("model", None, kind=str), _STRIDE, _FLOOR),
        rule=False,
        exact=_always,
    ),
    SamplerInfo(
        "heads",
        None,
        _SPECULATIVE,
        "The same text in fewer forward passes: trained heads on the last hidden state draft.",
        (_STRIDE, _FLOOR),
        rule=False,
        exact=_always,
    ),
)
_REGISTERED: dict[tuple[str, Noise | None], SamplerInfo] = {}
_TRIALS: tuple[tuple[str, tuple[int, ...]], ...] = (("", _SHARES),)


def register_sampler(info: SamplerInfo) -> SamplerInfo:
    """Make a sampler of your own known by its name, on the command line too where the module that calls this is imported.

    A package does the same by an entry point of the group `dlm.samplers` that names a SamplerInfo. InputError for a name that is taken.
    """
    if any((one.name, one.noise) == (info.name, info.noise) for one in known()):
        raise InputError(f"the sampler {info.name!r} is there already: register yours under another name")
    if not info.name or set(info.name) & set(":, "):
        raise InputError(f"the name of a sampler has no colon, comma or space, got {info.name!r}")
    _REGISTERED[info.name, info.noise] = info
    return info


def register_drafter(name: str, factory: DrafterFactory, about: str) -> SamplerInfo:
    """Make a drafter of your own known: as `draft=NAME`, `--draft NAME`, and in the short form, `NAME:4`.

    factory: makes a `Drafter` for a network, from `DraftFacts`. A package does the same by an entry point of the group `dlm.drafters`
    that names the factory; `about` is then its docstring's first line. InputError for a name that is taken.
    """
    info = register_sampler(_drafter(name, about))
    drafts.REGISTERED[name] = factory
    return info


def _drafter(name: str, about: str) -> SamplerInfo:
    return SamplerInfo(name, None, _SPECULATIVE, about, (_STRIDE, _FLOOR), rule=False, exact=_always)


def known(noise: Noise | Literal["any"] | None = "any") -> list[SamplerInfo]:
    """All samplers, or those that suit a noise (None: autoregressive models): built in, registered, and of other packages."""
    named: dict[tuple[str, Noise | None], SamplerInfo] = {(one.name, one.noise): one for one in BUILT_IN} | _REGISTERED
    for make, group in ((_plugged_sampler, plugins.SAMPLERS), (_plugged_drafter, plugins.DRAFTERS)):
        for name in plugins.found(group):
            try:
                info = make(name)
            except InputError:  # told once its name is asked for: a broken package is no reason to list nothing
                continue
            named.setdefault((name, info.noise), info)
    return [one for one in named.values() if noise in ("any", one.noise)]


def _plugged_sampler(name: str) -> SamplerInfo:
    info = plugins.load(plugins.SAMPLERS, name)
    if not isinstance(info, SamplerInfo):
        raise InputError(f"the entry point {name!r} of {plugins.SAMPLERS} names no SamplerInfo")
    return replace(info, name=name)


def _plugged_drafter(name: str) -> SamplerInfo:
    about = (plugins.load(plugins.DRAFTERS, name).__doc__ or "A drafter of another package.").strip().splitlines()[0]
    return _drafter(name, about)


def kind(noise: BoundedProcess) -> Noise:
    """Which samplers suit a noise process."""
    from dlm.noise.classes import ClassNoise
    from dlm.noise.gaussian import GaussianNoise
    from dlm.noise.genmd4 import GenMD4Noise
    from dlm.noise.masked import MaskedNoise

    if isinstance(noise, ClassNoise):
        return "classes"
    if isinstance(noise, GenMD4Noise):
        return "genmd4"
    if isinstance(noise, GaussianNoise):
        return "gaussian"
    return "masked" if isinstance(noise, MaskedNoise) else "replacement"


def find(word: str, noise: Noise | None) -> SamplerInfo | None:
    """The sampler of that name for this noise; None where there is none. Parameters after a colon are not looked at."""
    name = word.partition(":")[0]
    return next((one for one in known(noise) if one.name == name), None)


def get(word: str, noise: Noise | None) -> SamplerInfo:
    """As `find`. InputError for a name that is unknown or that suits other models, with the nearest name and all that can be used."""
    name = word.partition(":")[0]
    if (info := find(word, noise)) is not None:
        return info
    if name in plugins.found(plugins.SAMPLERS):
        _plugged_sampler(name)
    if name in plugins.found(plugins.DRAFTERS):
        _plugged_drafter(name)
    usable, others = [one.name for one in known(noise)], [one for one in known() if one.name == name]
    model = "it" if noise is None else f"this model has {noise} noise and"
    if not others:
        reason = f"is unknown{nearest(name, usable)}".removesuffix("?")
    elif others[0].noise is None:
        reason = "needs an autoregressive model"
    else:
        reason = "needs a diffusion model" if noise is None else f"needs {others[0].noise} noise"
    raise InputError(f"the sampler {name!r} {reason}; {model} can use: {', '.join(usable)}")


def check(word: str) -> None:
    """InputError for a sampler that no model has, and for settings that it does not take; no model is looked at."""
    if word in (AUTO, LOSSLESS) or Draft.from_word(word) is not None:
        return
    name = word.partition(":")[0]
    if name in plugins.found(plugins.SAMPLERS):
        _plugged_sampler(name)
    if not (found := [one for one in known() if one.name == name]):
        close = nearest(name, [one.name for one in known()]) or ";"
        raise InputError(f"the sampler {name!r} is unknown{close} dlm samplers lists all of them")
    found[0].parse(word)  # of the same parameters, whatever the noise


def is_exact(word: str, noise: Noise | None, *, steps: int | None = None, tokens: int = 0, cache: bool | str = True) -> bool:
    """Whether a sampler with these settings has the distribution of one token a forward pass.

    steps: of a window or block of so many tokens. cache: a policy by name approximates. InputError as `get`.
    """
    info = get(word, noise)
    if info.noise is None:
        return True
    return not isinstance(cache, str) and info.exact(Use(info.parse(word), steps, tokens))


def make(word: str, draw: Draw, noise: NoiseProcess, greedy_tail: int = 0) -> Rule:
    """The rule that a word such as `confidence` or `confidence:0.7` means for this noise. InputError for one that it cannot use."""
    info = get(word, kind(noise))
    if not info.rule:
        speculative = "speculative decoding proposes and verifies, it is no rule of one step: it cannot be used here"
        raise InputError("noise on vectors has no rules of one token: it cannot be used here" if info.noise == "gaussian" else speculative)
    rule: Rule = info.resolved()(draw=draw, **info.parse(word))
    if not greedy_tail:
        return rule
    if info.noise == "masked":
        raise InputError("a greedy tail revises tokens, which masked noise does not: it needs replacement noise")
    from dlm.sampling.diffusion.revising import GreedyTail

    return GreedyTail(rule, greedy_tail)


def usable(noise: Noise | None, *, bidirectional: bool = True, heads: bool = True, blocks: bool = False) -> list[SamplerInfo]:
    """The samplers that a model can use by name alone. bidirectional: whether its network is; heads: whether it has some; blocks: whether
    it reads its text causally and a block after it fully."""
    lacks = [("heads", None)] * (not heads) + [("block", None)] * (not blocks)
    fits = [one for one in known(noise) if (bidirectional or not one.bidirectional) and not one.needs_a_name]
    return [one for one in fits if (one.name, one.noise) not in lacks]


def lossless(noise: Noise | None, *, bidirectional: bool) -> SamplerInfo | None:
    """The exact sampler of a diffusion model that takes the fewest forward passes; None where no sampler is exact."""
    # a whole sampler reads all blocks anew, where a rule has the exact cache of block diffusion
    fits = [one for one in BUILT_IN if one.noise == noise and (bidirectional or (one.rule and not one.bidirectional))]
    exact = [one for one in fits if one.exact_by_default]
    return exact[-1] if exact else None


def trials(window: int, *, causal: bool, quick: bool = False) -> list[tuple[str, int | None]]:
    """(sampler, steps of a window) that a calibration of a masked model measures, the exact one first. quick: three settings."""
    found: list[tuple[str, int | None]] = []
    for info in usable("masked", bidirectional=not causal):
        for setting, divisors in () if info.reference else info.trials or _TRIALS:
            word = f"{info.name}:{setting}" if setting else info.name
            found += [(word, max(1, window // n)) for n in divisors] or [(word, None)]
    found.sort(key=lambda one: one[0] != "first-hitting")
    return [found[0], *(one for one in found if one[0] == "topk")][:3] if quick else found


CHOICES = (
    f"{AUTO}: the sampler that dlm calibrate found best; {LOSSLESS}: the fastest drafter that the model has; auto as the number of a "
    "drafter: as many draft tokens as pay."
)


def help_text() -> str:
    """The help of `--sampler`, a paragraph for each kind of model: every name with its parameters and defaults."""
    heads: tuple[tuple[Noise | None, str], ...] = (
        ("masked", "Masked noise"),
        ("replacement", "Replacement noise"),
        ("genmd4", "GenMD4's noise"),
        ("gaussian", "Gaussian noise on vectors"),
        ("classes", "Noise of classes"),
        (None, "Autoregressive models, all with the same text"),
    )
    parts = [f"{head}: {', '.join(one.usage for one in known(noise))}." for noise, head in heads]
    return "\n\n".join(["NAME or NAME:SETTING; dlm samplers says what each does.", *parts, CHOICES])


def markdown_table(infos: Sequence[SamplerInfo] | None = None) -> str:
    """A table for the docs: name, parameters, models, exact or not, one line about each."""
    rows = ["| sampler | parameters | for | exact | about |", "|---|---|---|---|---|"]
    rows += [f"| {' | '.join(cells)} |" for cells in _cells(known() if infos is None else infos)]
    return "\n".join(rows) + "\n"


def _cells(infos: Iterable[SamplerInfo]) -> Iterable[tuple[str, ...]]:
    for one in infos:
        models = f"{one.noise} noise{', bidirectional' if one.bidirectional else ''}" if one.noise else "autoregressive"
        values = [f"{p.name} {'' if p.default is None else f'{p.default} '}{p.range}".strip() for p in one.parameters]
        exact = "yes" if one.exact_by_default else "no"
        yield f"`{one.usage}`", ", ".join(values), models, exact, one.about
