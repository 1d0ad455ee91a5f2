"""Tasks of lm-evaluation-harness: `dlm eval MODEL --tasks`, and its own command line with `--model dlm`.

python -m dlm.workflows.harness run --model dlm --model_args pretrained=shakespeare-mask,mc_samples=64 --tasks ...
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from dlm.adapters.lora import fingerprint
from dlm.errors import InputError, nearest
from dlm.evaluation import card as cards
from dlm.language_model import LanguageModel
from dlm.workflows.inputs import FORMAT, Model, fields_of, language_model

EXTRA = "tasks of lm-evaluation-harness need the harness extra: pip install 'dlm[harness]'"


@dataclass(frozen=True)
class TaskResults:
    """figures: by task, the metrics of the harness (`acc,none`) and their errors over the documents (`acc_stderr,none`).

    samples: documents by task; likelihood: the estimator of log-likelihoods, its samples and Monte-Carlo errors. card: a file with it all.
    """

    model: str
    figures: Mapping[str, Mapping[str, float]]
    versions: Mapping[str, str]
    samples: Mapping[str, int]
    likelihood: Mapping[str, object]
    settings: Mapping[str, object] = field(default_factory=dict)
    card: Path | None = None

    def record(self) -> dict[str, object]:
        """As `dlm eval --tasks --json` prints it."""
        return {"format": FORMAT} | fields_of(self, "card") | ({"card": str(self.card)} if self.card else {})


def evaluate_tasks(
    model: Model,
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    shots: int | None = None,
    limit: float | None = None,
    batch_size: int | str = "auto",
    resume: str | Path | None = None,
    chat: bool = False,
    card: str | Path | None = None,
    device: str = "cpu",
    **model_args: Any,
) -> TaskResults:
    """Run tasks of lm-evaluation-harness on a model.

    tasks: names of the harness, or of YAML files under include_path. shots: examples before a question, by default the task's own.
    limit: documents of each task, or a share of them below 1. resume: files that begin with this keep every answer, one for each model and
    settings, so that a second run goes on.
    chat: apply the chat template. card: a JSON file for the results. model_args: as of `dlm.workflows.harness_model.Harness`.
    InputError without the extra, for unknown tasks, and for data that cannot be had.
    """
    require()
    import lm_eval

    from dlm.workflows.harness_model import Harness

    lm = Harness(language_model(model, device), batch_size=batch_size, **model_args)
    manager = _manager(tasks, include_path)
    settings = {"shots": shots, "limit": limit, "chat": chat} | model_args
    try:
        found = lm_eval.simple_evaluate(
            model=lm,
            tasks=list(tasks),
            task_manager=manager,
            num_fewshot=shots,
            limit=limit,
            use_cache=None if resume is None else f"{resume}-{_digest(lm.lm, model_args)}",
            apply_chat_template=chat,
            log_samples=False,
        )
    except (ConnectionError, FileNotFoundError) as error:
        raise InputError(f"the data of a task cannot be had ({str(error).splitlines()[0]}): use local task files, or go online") from None
    made = TaskResults(
        lm.lm.name,
        {task: {name: value for name, value in row.items() if isinstance(value, float)} for task, row in found["results"].items()},
        {task: str(version) for task, version in found["versions"].items()} | {"lm_eval": metadata.version("lm_eval")},
        {task: int(count["effective"]) for task, count in found["n-samples"].items()},
        lm.get_model_info(),
        settings,
        None if card is None else Path(card),
    )
    if made.card is not None:
        cards.write(made.record(), made.card)
    return made


def _digest(lm: LanguageModel, model_args: Mapping[str, Any]) -> str:
    """Of a model and the settings of its answers: the harness's own cache tells neither apart."""
    weights = fingerprint(lm.network)
    return hashlib.sha256(repr((lm.name, weights, sorted(model_args.items()))).encode()).hexdigest()[:8]


def require() -> None:
    """InputError without the extra."""
    try:
        import lm_eval  # noqa: F401
    except ModuleNotFoundError:
        raise InputError(EXTRA) from None


def _manager(tasks: Sequence[str], include_path: str | Path | None) -> Any:
    """The task manager; the harness's own tasks are read only where a name is not under include_path, since that takes long."""
    from lm_eval.tasks import TaskManager

    if include_path is not None and not Path(include_path).is_dir():
        raise InputError(f"no directory {include_path}: it holds the YAML files of tasks")
    include = None if include_path is None else str(include_path)
    for defaults in (False, True) if include else (True,):
        manager = TaskManager(include_path=include, include_defaults=defaults)
        strange = [task for task in tasks if not manager.match_tasks([task])]
        if not strange:
            return manager
    near = nearest(strange[0], manager.all_tasks)
    raise InputError(f"unknown task {strange[0]!r}{near}; python -m dlm.workflows.harness ls tasks lists them")


def main() -> None:
    """The harness's own command line, which knows the model `dlm`."""
    try:
        require()
        from lm_eval.__main__ import cli_evaluate
        from lm_eval.api.registry import model_registry

        model_registry.register("dlm", target="dlm.workflows.harness_model:Harness")
        cli_evaluate()
    except InputError as error:
        print(f"dlm: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
