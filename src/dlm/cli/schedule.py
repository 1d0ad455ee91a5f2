"""`dlm schedule`: which model takes which denoising step; what that costs, what it loses, and the best schedule by search."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dlm.cli.app import Device, Json, Seed, app, bar, console, err, judging, load, named_models
from dlm.errors import InputError

if TYPE_CHECKING:
    from dlm.model_scheduling.cost import CallCost
    from dlm.model_scheduling.outcome import Outcome
    from dlm.model_scheduling.sensitivity import Sensitivity
    from dlm.model_scheduling.trial import Trial

schedules = typer.Typer(no_args_is_help=True, help="Which model takes which denoising step.")
app.add_typer(schedules, name="schedule")

Heavy = Annotated[str, typer.Argument(help="The model H: bundled name, directory or hub id.")]
Light = Annotated[str, typer.Argument(help="The smaller model L; several: M=NAME,L=NAME.")]
Data = Annotated[str | None, typer.Option(help="Text file, folder of .txt files, or hf:DATASET; default: what H learned.")]
Judge = Annotated[str, typer.Option(help="An autoregressive model; any causal one of transformers reads the text.")]
Steps = Annotated[int | None, typer.Option(help="Denoising steps of a window; default: one for each token.")]
Sampler = Annotated[str, typer.Option(help="A sampler that masks have, as in `dlm generate`.")]
Segments = Annotated[int, typer.Option(help="Equal parts of the steps.")]


@schedules.command()
def cost(
    schedule: Annotated[str, typer.Argument(help="'L125 H750 L125', 'L0.125 H0.75 L0.125', sandwich:0.25 ...")],
    heavy: Annotated[str, typer.Option(help="The model H.")] = "shakespeare-mask",
    light: Annotated[str, typer.Option(help="The smaller model L; several: M=NAME,L=NAME.")] = "shakespeare-mask-2",
    steps: Steps = None,
    as_json: Json = False,
) -> None:
    """FLOPs of a schedule by three conventions: blocks alone, with the output head, and of the calls that really happen."""
    from rich.table import Table

    from dlm.model_scheduling.cost import cost as count
    from dlm.model_scheduling.plan import ModelSchedule

    plan = ModelSchedule.parse(schedule)
    lm, _, prices = _models(heavy, light)
    found = count(plan, prices, plan.steps or steps or lm.window)
    table = Table(
        box=None, header_style="bold", caption=f"{plan}, one text of {lm.window} tokens; saved against H alone, in the same sampler"
    )
    for head in ("counted", "GFLOPs", "saved"):
        table.add_column(head, justify="left" if head == "counted" else "right")
    for name, label in (
        ("blocks", "blocks, every step"),
        ("with_head", "and the head"),
        ("executed", f"calls that happen ({found.calls:.0f})"),
    ):
        table.add_row(label, f"{getattr(found, name) / 1e9:,.2f}", f"{getattr(found, f'saved_{name}'):.1%}")
    console(as_json).print(table)
    if as_json:
        print(json.dumps({"schedule": str(plan), "steps": plan.steps or steps or lm.window} | found.record()))


@schedules.command()
def sensitivity(
    heavy: Heavy,
    light: Light,
    data: Data = None,
    split: Annotated[str, typer.Option(help="train | val | all.")] = "val",
    max_windows: Annotated[int, typer.Option(help="At most this many windows, spread evenly over the text.")] = 64,
    segments: Segments = 16,
    sampler: Sampler = "ancestral",
    steps: Steps = None,
    samples: Annotated[int, typer.Option("--samples", "-n", help="Texts that H writes, to see the states it comes by.")] = 16,
    swap: Annotated[int, typer.Option(help="Also let L take one of so many parts of the steps, write and judge; 0: no.")] = 0,
    judge: Judge = "shakespeare-ar",
    plot: Annotated[Path | None, typer.Option(help="Write the curves as .png, .svg or .pdf (viz extra).")] = None,
    seed: Seed = 0,
    as_json: Json = False,
    device: Device = "cpu",
) -> None:
    """What each step loses with the light model: loss gap and KL on noised text and on H's own runs, with 95 % bands."""
    from dlm.evaluation.card import dumps
    from dlm.model_scheduling import sensitivity as measure
    from dlm.sampling.draw import generators

    if plot is not None:
        from dlm.viz.plots import check

        check(plot)  # before the work, not after it
    lm, networks, _ = _models(heavy, light, device)
    source, windows_WT = _windows(lm, data, split, max_windows)
    predict = measure.predictors(networks)
    with bar("noised text", len(windows_WT) * segments) as progress:
        text = measure.on_text(lm.noise, predict, windows_WT.to(device), segments=segments, seed=seed, progress=progress.forward)
    with bar("states of H", samples * segments) as progress:
        made = lm.sampler(sampler=sampler, steps=steps).steps(
            lm.canvas([""] * samples, length=lm.window).to(device), rng=generators(seed, samples)
        )
        planned = sampler in ("ancestral", "first-hitting")
        runs = measure.on_trajectories(lm.noise, predict, made, segments=segments, written_only=not planned, progress=progress.forward)
    lights = [key for key in networks if key != "H"]
    swaps: dict[str, list[dict[str, float]]] = {}
    if swap:
        trial = _trials(lm, light, judge, sampler=sampler)(steps or lm.window)
        words = {key: [_one(key, j, swap) for j in range(swap)] for key in lights}
        with bar("one segment at a time", 1 + swap * len(lights)) as progress:
            alone = trial("H", seed, seed + samples)
            progress.forward()
            for key in lights:
                swaps[key] = []
                for word in words[key]:
                    swaps[key].append(trial(word, seed, seed + samples).against(alone, "bits").record())
                    progress.forward()
    record = {"heavy": lm.name, "light": light, "data": source, "windows": len(windows_WT), "segments": segments, "sampler": sampler}
    record |= {"seed": seed, "text": _curves(text, lights), "runs": _curves(runs, lights), "swap": swaps}
    out = console(as_json)
    for key in lights:
        out.print(_sensitivity_table(record, key))
    if plot is not None:
        from dlm.viz.plots import panels_plot

        panels_plot(_panels(record, lights), plot, doubling=False)
        err.print(f"wrote {plot}", highlight=False)
    if as_json:
        print(dumps(record))


@schedules.command()
def search(
    heavy: Heavy,
    light: Light,
    how: Annotated[
        str, typer.Option("--search", help="kl (by theory) | joint (and fewer steps) | exhaustive | halving (of many, again and again).")
    ] = "kl",
    saved: Annotated[float, typer.Option(help="Share of H's block FLOPs to save at least.")] = 0.35,
    segments: Segments = 8,
    steps: Annotated[int, typer.Option(help="Denoising steps of a window.")] = 64,
    sampler: Sampler = "ancestral",
    samples: Annotated[int, typer.Option("--samples", "-n", help="Texts for each schedule, the same seeds for all.")] = 16,
    count: Annotated[int, typer.Option(help="Schedules that halving begins with.")] = 24,
    judge: Judge = "shakespeare-ar",
    data: Data = None,
    max_windows: Annotated[int, typer.Option(help="Windows of the text that the KL is measured on.")] = 32,
    ledger: Annotated[Path | None, typer.Option(help="File of trials: a search that stopped goes on where it was.")] = None,
    save: Annotated[bool, typer.Option(help="Keep the best beside H, for `dlm generate --schedule auto`.")] = False,
    seed: Seed = 0,
    as_json: Json = False,
    device: Device = "cpu",
) -> None:
    """Find the best schedule that saves so much; every one is written and judged with the same seeds, beside H alone and L alone."""
    from dlm.evaluation.card import dumps
    from dlm.evaluation.statistics import pareto_front, spearman
    from dlm.model_scheduling import search as find
    from dlm.model_scheduling.plan import LIGHT, ModelSchedule
    from dlm.model_scheduling.saved import SavedSchedule

    if how not in find.WAYS:
        raise InputError(f"unknown search {how!r}; known: {', '.join(find.WAYS)}")
    if samples < 2:
        raise InputError(f"--samples must be at least 2, to have an error, got {samples}")
    lm, networks, prices = _models(heavy, light, device)
    if save and lm.path is None:
        raise InputError(f"{heavy} is not on disk: there is no place beside it")
    trial = _trials(lm, light, judge, sampler=sampler, ledger=ledger)
    trial(steps)  # a judge or sampler that cannot be is told before the work
    windows_WT = _windows(lm, data, "val", max_windows)[1].to(device)
    kl = _kl(lm, networks, windows_WT, segments, seed)
    order_cost = _price(lm, windows_WT) if how == "joint" else None
    blocks = {key: one.blocks for key, one in prices.items()}
    plan = find.Search.plan(how, kl, blocks, saved, steps=steps, tokens=lm.window, count=count, price=order_cost)
    if how == "joint":
        err.print(f"{plan.taken} steps of {steps}, {plan.best}: {plan.nats:.2f} nats a text lost by theory", highlight=False)
    outcomes: dict[str, Outcome] = {}
    with bar(f"{len(plan.tried)} schedules of {samples} texts", plan.trials) as progress:
        for label, outcome in plan.run(trial, texts=samples, seed=seed):
            outcomes[label] = outcome
            progress.forward()
    reference = outcomes[str(plan.alone[0])]
    rows = [_row(label, one, reference, find.path_kl(ModelSchedule.parse(one.schedule), kl, lm.window)) for label, one in outcomes.items()]
    whole = {label: outcome for label, outcome in outcomes.items() if outcome.texts == samples}
    winner = plan.winner(whole, saved)
    front = pareto_front(whole, lambda label: whole[label].blocks / samples, lambda label: whole[label].mean("bits").value)
    mixed = rows[len(plan.alone) :]
    agreement = spearman([row["path_kl"] for row in mixed], [row["bits"]["mean"] for row in mixed])
    best = outcomes[winner]
    if best.saved(reference) < saved - find.CHANCE:
        err.print(f"{winner} saved {best.saved(reference):.1%}, not {saved:.1%}: {sampler} ends before the steps of L", highlight=False)
    console(as_json).print(_search_table(rows, winner, front))
    record = {"heavy": lm.name, "light": light, "search": how, "saved": saved, "segments": segments, "steps": steps, "sampler": sampler}
    record |= {"samples": samples, "judge": judge, "seed": seed, "best": best.schedule, "kl": kl, "rows": rows, "front": front}
    record |= {"winner": winner, "rank_agreement": agreement}
    if save and lm.path is not None:
        others = named_models(light)
        made = {name: record[name] for name in ("search", "saved", "segments", "steps", "sampler", "samples", "judge", "seed")}
        names = {LIGHT: others} if isinstance(others, str) else others
        path = SavedSchedule(ModelSchedule.parse(best.schedule), names, plan.taken, made).save(lm.path)
        err.print(f"wrote {path}; try: dlm generate --heavy {heavy} --schedule auto", highlight=False, soft_wrap=True)
    if as_json:
        print(dumps(record))


@schedules.command()
def compare(
    heavy: Heavy,
    light: Light,
    words: Annotated[str, typer.Argument(metavar="SCHEDULES", help="With semicolons between; NAME@STEPS in another number of steps.")],
    steps: Annotated[int, typer.Option(help="Denoising steps of a window.")] = 256,
    sampler: Sampler = "ancestral",
    samples: Annotated[int, typer.Option("--samples", "-n", help="Texts for each schedule, the same seeds for all.")] = 16,
    judge: Judge = "shakespeare-ar",
    data: Data = None,
    segments: Segments = 16,
    max_windows: Annotated[int, typer.Option(help="Windows of the text that the KL is measured on.")] = 32,
    ledger: Annotated[Path | None, typer.Option(help="File of trials: what it holds is not measured again.")] = None,
    seed: Seed = 0,
    as_json: Json = False,
    device: Device = "cpu",
) -> None:
    """Measure these schedules beside H alone: 'L0.5 H0.5;sandwich:0.25;H@100'."""
    from dlm.evaluation.card import dumps
    from dlm.model_scheduling import search as find
    from dlm.model_scheduling.plan import ModelSchedule

    plan = {"H": ("H", steps)}
    for label in filter(None, (word.strip() for word in words.split(";"))):
        word, at, count = label.partition("@")
        if at and not (count.isdecimal() and int(count)):
            raise InputError(f"{label!r}: after @ stands a number of steps, as in H@100")
        plan[label] = str(ModelSchedule.parse(word)), int(count or steps)
    if samples < 2:
        raise InputError(f"--samples must be at least 2, to have an error, got {samples}")
    lm, networks, _ = _models(heavy, light, device)
    trial = _trials(lm, light, judge, sampler=sampler, ledger=ledger)
    trial(steps)  # a judge or sampler that cannot be is told before the work
    kl = _kl(lm, networks, _windows(lm, data, "val", max_windows)[1].to(device), segments, seed)
    outcomes: dict[str, Outcome] = {}
    with bar(f"{len(plan)} schedules of {samples} texts", len(plan)) as progress:
        for label, (word, taken) in plan.items():
            outcomes[label] = trial(taken)(word, seed, seed + samples)
            progress.forward()
    paths = {label: find.path_kl(ModelSchedule.parse(word), kl, lm.window) for label, (word, _) in plan.items()}
    rows = [_row(label, one, outcomes["H"], paths[label]) for label, one in outcomes.items()]
    console(as_json).print(_search_table(rows, "", ()))
    if as_json:
        record = {"heavy": lm.name, "light": light, "steps": steps, "sampler": sampler, "samples": samples, "judge": judge, "seed": seed}
        print(dumps(record | {"kl": kl, "rows": rows}))


def _models(heavy: str, light: str, device: str = "cpu") -> tuple[Any, dict[str, Any], dict[str, CallCost]]:
    """(H, networks by key, what a call of each costs)."""
    from dlm.model_scheduling.cost import call_costs

    lm = load(heavy, device)
    if not lm.is_diffusion or lm.is_causal:
        raise InputError(f"{heavy} is no bidirectional diffusion model: it has no denoising steps to schedule")
    networks = lm.denoisers(named_models(light))
    return lm, networks, call_costs(networks, lm.window)


def _trials(lm: Any, light: str, judge: str, **settings: Any) -> Callable[[int], Trial]:
    """By number of steps, each made once; the judge is read once for all."""
    from dlm.formats import native
    from dlm.model_scheduling.ledger import Ledger
    from dlm.model_scheduling.trial import Trial

    figures = judging(judge, lm)
    ledger: Path | None = settings.pop("ledger", None)
    settings["ledger"] = ledger and Ledger(ledger)
    weights = native.digest(native.find(judge))

    @cache
    def trial(steps: int) -> Trial:
        return Trial.of(lm, named_models(light), figures, judge=judge, judge_weights=weights, steps=steps, **settings)

    return trial


def _one(key: str, j: int, parts: int) -> str:
    """The schedule in which H gives one part of the steps away."""
    from dlm.model_scheduling.plan import ModelSchedule

    return str(ModelSchedule.of([key if i == j else "H" for i in range(parts)], shares=True))


def _curves(found: Sensitivity, lights: Sequence[str]) -> dict[str, Any]:
    from dlm.evaluation.statistics import interval

    def curve(values_WJ: Any) -> dict[str, list[float]]:
        mean_J, band_J = interval(values_WJ)
        return {"mean": mean_J.tolist(), "band95": band_J.tolist()}

    record: dict[str, Any] = {"kl": {key: curve(found.kl_WJ[key]) for key in lights}}
    if found.loss_WJ:
        record["loss"] = {key: curve(values_WJ) for key, values_WJ in found.loss_WJ.items()}
        record["gap"] = {key: curve(found.gap_WJ(key)) for key in lights}
    return record


def _panels(record: dict[str, Any], lights: Sequence[str]) -> list[tuple[str, str, dict[str, list[tuple[float, float, float]]]]]:
    def line(mean: Sequence[float], band: Sequence[float]) -> list[tuple[float, float, float]]:
        return [((j + 0.5) / len(mean), m, b) for j, (m, b) in enumerate(zip(mean, band, strict=True))]

    def lines(curves: dict[str, Any]) -> dict[str, list[tuple[float, float, float]]]:
        return {key: line(curve["mean"], curve["band95"]) for key, curve in curves.items()}

    x, text, runs = "share of the steps done", record["text"], record["runs"]
    panels = [("loss on noised text, nats per token", x, lines(text["loss"])), ("KL(H || model), noised text", x, lines(text["kl"]))]
    panels.append(("KL(H || model), states that H comes by", x, lines(runs["kl"])))
    swaps = {key: line([one["mean"] for one in each], [one["band95"] for one in each]) for key, each in record["swap"].items()}
    return [*panels, ("bits per token added by one segment", x, swaps)] if swaps else panels


def _sensitivity_table(record: dict[str, Any], key: str) -> Any:
    from rich.table import Table

    caption = "Nats per token, by share of the steps done; +- 95 %. KL(H || L) on noised text and on the states that H comes by."
    table = Table(box=None, header_style="bold", title=f"{record['heavy']} against {record['light']}: {key}", caption=caption)
    for head in ("steps done", "loss of H", f"loss of {key}", "gap", "KL, text", "KL, runs"):
        table.add_column(head, no_wrap=True, justify="right")
    segments, text = record["segments"], record["text"]
    for j in range(segments):
        curves = (text["loss"]["H"], text["loss"][key], text["gap"][key], text["kl"][key], record["runs"]["kl"][key])
        cells = [f"{curve['mean'][j]:.4f}" + (f" +- {curve['band95'][j]:.4f}" if i > 1 else "") for i, curve in enumerate(curves)]
        table.add_row(f"{j / segments:.0%} - {(j + 1) / segments:.0%}", *cells)
    for j, one in enumerate(record["swap"].get(key, ())):
        parts = len(record["swap"][key])
        table.add_row(
            f"{j / parts:.0%} - {(j + 1) / parts:.0%}", f"only here {key}:", f"{one['mean']:+.4f} +- {one['band95']:.4f}", "bits/token"
        )
    return table


def _windows(lm: Any, data: str | None, split: str, most: int) -> tuple[str, Any]:
    """(where the text is, windows of it); by default the text that H learned."""
    from dlm.train import data as reading

    source = lm.config.training.get("data", "") if data is None else data
    return source, reading.Stream.encode(reading.select(reading.read(source), split, 0.1), lm.tokenizer, lm.window).windows(most)


def _kl(lm: Any, networks: dict[str, Any], windows_WT: Any, segments: int, seed: int) -> dict[str, list[float]]:
    """KL(H || model) by key and segment, on noised text."""
    from dlm.model_scheduling.sensitivity import on_text, predictors

    with bar("KL of every segment", len(windows_WT) * segments) as progress:
        return on_text(lm.noise, predictors(networks), windows_WT, segments=segments, seed=seed, progress=progress.forward).kl()


def _price(lm: Any, windows_WT: Any) -> Callable[[int], float]:
    """What a number of steps costs, nats a text."""
    from dlm.evaluation import order_cost

    with bar("the price of fewer steps", order_cost.curve_rows(*windows_WT.shape)) as progress:
        return order_cost.ancestral_prices(lm.noise, lm.predict, windows_WT, progress=progress.forward)


def _row(label: str, outcome: Outcome, reference: Outcome, kl: float) -> dict[str, Any]:
    own = {name: outcome.mean(name).record() for name in outcome.figures}
    paired = {f"d_{name}": outcome.against(reference, name).record() for name in outcome.figures}
    facts = {"schedule": label, "texts": outcome.texts, "saved": outcome.saved(reference), "path_kl": kl}
    return facts | own | paired | {"seconds": outcome.seconds / outcome.texts, "calls": outcome.calls}


def _search_table(rows: Sequence[dict[str, Any]], winner: str, front: Sequence[str]) -> Any:
    from rich.table import Table

    caption = (
        "saved: block FLOPs of the calls that happened; bits per token under the judge, +- 95 % of the paired difference to H; * front"
    )
    table = Table(box=None, header_style="bold", caption=caption, caption_justify="left")
    for head in ("schedule", "texts", "saved", "path KL", "bits", "against H", "entropy", "s/text", ""):
        wide = {"min_width": 24, "overflow": "fold"} if head == "schedule" else {"no_wrap": True, "justify": "right"}
        table.add_column(head, **wide)  # type: ignore[arg-type]
    for row in sorted(rows, key=lambda row: (-row["texts"], row["bits"]["mean"])):
        change = f"{row['d_bits']['mean']:+.4f} +- {row['d_bits']['band95']:.4f}"
        cells = f"{row['saved']:.1%}", f"{row['path_kl']:.2f}", f"{row['bits']['mean']:.3f}", change, f"{row['entropy']['mean']:.3f}"
        mark = ("best" if row["schedule"] == winner else "") + ("*" if row["schedule"] in front else "")
        table.add_row(row["schedule"], str(row["texts"]), *cells, f"{row['seconds']:.2f}", mark)
    return table
