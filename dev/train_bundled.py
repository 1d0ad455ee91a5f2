"""Train every bundled model, several at once on one GPU, and write the table of their bounds.

    python dev/train_bundled.py --out runs/bundled                      # the bundled sizes
    python dev/train_bundled.py --out runs/large --large                # 10.7M parameters each: `make train-gpu`
    python dev/train_bundled.py --out runs/toy --models shakespeare-ar --set steps=3 --set batch=2

Runs that are finished stay, begun ones go on, so the same command resumes after Ctrl-C. Each model is one `dlm train`-like process whose
output is OUT/NAME.out. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from dlm.train import recipes, state
from dlm.train.config import TrainConfig
from dlm.workflows.fit import fit

LARGE = ("layers=6", "heads=6", "width=384")  # the size of nanoGPT's Shakespeare model
AFTER = {"shakespeare-mask-2": "shakespeare-mask", "shakespeare-mask-1": "shakespeare-mask"}
SHARED = ("shakespeare-uniform", "shakespeare-semantic", "shakespeare-hybrid")  # the network that shakespeare-mask has compiled before
NAMES = [name for name in recipes.RECIPES if name.startswith("shakespeare")]


def config_of(name: str, out: Path, settings: list[str]) -> TrainConfig:
    """The recipe with these settings; light models begin with the heavy one of this directory and learn from it."""
    config = recipes.find(name).with_settings(settings)
    found = {key: value for key in ("init", "teacher") if (value := getattr(config, key))}
    return config.with_settings([f"{key}={out / value}" for key, value in found.items()])


def run_one(name: str, out: Path, settings: list[str]) -> None:
    """In a process of its own: train, go on, or leave a finished run."""
    config, directory = config_of(name, out, settings), out / name
    saved = directory / state.FILE
    resume = saved.is_file()
    if not resume or state.read_meta(saved)["step"] < config.steps:
        print(json.dumps(fit(config, directory, resume=resume).record()))


def row(out: Path, name: str) -> dict[str, Any]:
    """The last validation of a run."""
    log = [json.loads(line) for line in (out / name / "log.jsonl").read_text().splitlines()]
    last = [line for line in log if "val_nats" in line][-1:]
    return {key: line[key] for line in last for key in ("step", "epochs", "val_nats", "val_stderr")}


class Crew:
    """The processes of a command."""

    def __init__(self, out: Path, settings: list[str], together: int) -> None:
        self.out, self.settings, self.together = out, settings, together
        self.begun, self.running, self.seconds = time.monotonic(), dict[str, subprocess.Popen[bytes]](), dict[str, float]()
        self.failed: list[str] = []

    def start(self, name: str) -> None:
        words = [word for setting in self.settings for word in ("--set", setting)]
        command = [sys.executable, __file__, "--out", str(self.out), "--one", name, *words]
        with (self.out / f"{name}.out").open("ab") as file:
            self.running[name] = subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | {"OMP_NUM_THREADS": "1"})

    def ready(self, waiting: list[str], names: list[str]) -> list[str]:
        """Those that may start now."""
        done = [*self.seconds, *(name for name in AFTER.values() if name not in names)]
        compiled = time.monotonic() - self.begun > 60
        free = [n for n in waiting if AFTER.get(n) is None or AFTER[n] in done]
        return [n for n in free if compiled or n not in SHARED or "shakespeare-mask" not in names][: self.together - len(self.running)]

    def run(self, names: list[str]) -> None:
        waiting = list(names)
        while waiting or self.running:
            for name in self.ready(waiting, names):
                self.start(name)
                waiting.remove(name)
            time.sleep(0.2)
            for name, process in list(self.running.items()):
                if process.poll() is not None:
                    del self.running[name]
                    self.seconds[name] = round(time.monotonic() - self.begun, 1)
                    self.failed += [name] if process.returncode else []
                    print(f"{name} ended after {self.seconds[name]:.0f} s (exit code {process.returncode})", flush=True)

    def stop(self) -> None:
        """Ask all to save and end."""
        for process in self.running.values():
            process.send_signal(signal.SIGINT)
        for process in self.running.values():
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bundled"))
    parser.add_argument("--models", default=",".join(NAMES), help="names with commas")
    parser.add_argument("--large", action="store_true", help="10.7M parameters each")
    parser.add_argument("--together", type=int, default=12, help="processes at once")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE", help="for every model")
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        return run_one(arguments.one, arguments.out, arguments.settings)
    names = arguments.models.split(",")
    gpu = ["bf16=true", "compile=true"] if torch.cuda.is_available() else []
    settings = [*gpu, *(LARGE if arguments.large else ()), *arguments.settings]
    for name in names:
        config_of(name, arguments.out, settings)  # what cannot be is told before the first one trains
    arguments.out.mkdir(parents=True, exist_ok=True)
    crew = Crew(arguments.out, settings, arguments.together)
    try:
        crew.run(names)
    except KeyboardInterrupt:
        crew.stop()
        sys.exit(130)
    rows = {name: row(arguments.out, name) | {"seconds": crew.seconds[name]} for name in names if name not in crew.failed}
    for name, found in rows.items():
        print(f"{name:28} {found['val_nats']:.4f} +- {found['val_stderr']:.4f} nats per token, {found['epochs']:.0f} epochs")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    print(json.dumps({"device": device, "models": rows, "failed": crew.failed}))
    sys.exit(1 if crew.failed else 0)


if __name__ == "__main__":
    main()
