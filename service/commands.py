"""What the commands of `headstart` do. Each imports what it needs when it runs."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from typing import TYPE_CHECKING, Any

from service.config import DEFAULTS, OPTIONS, LogSettings, Settings, load

if TYPE_CHECKING:
    from service.oneshot import Lora

BEGUN = time.monotonic()
LINE_S = 5.0  # between lines of progress


def serve(chosen: argparse.Namespace) -> int:
    settings = _settings(chosen)
    from service import logs
    from service.app import serve

    logs.setup(settings.log)
    serve(settings, BEGUN)
    return 0


def generate(chosen: argparse.Namespace) -> int:
    from service import logs, oneshot

    settings, loras = _with_loras(chosen)
    logs.setup(settings.log)
    output = oneshot.plan_output(chosen.output, chosen.format, chosen.quality, chosen.json)
    draft = oneshot.draft_of(chosen, loras)
    described = oneshot.generate(
        settings, draft, output, cache=chosen.cache, enhance=chosen.enhance_prompt, quiet=chosen.quiet
    )
    if chosen.json:
        print(json.dumps(described, ensure_ascii=False, indent=2))
    return 0


def rewrite(chosen: argparse.Namespace) -> int:
    from service import logs, oneshot

    settings = _settings(chosen, Settings(log=LogSettings(level="warning")))
    logs.setup(settings.log)
    done = oneshot.rewrite(settings, chosen.prompt, quiet=chosen.quiet)
    if chosen.json:
        prompts = {"prompt": done.original, "revised_prompt": done.prompt}
        print(json.dumps(prompts | done.facts | {"seconds": done.seconds}, ensure_ascii=False, indent=2))
        return 0
    if done.outcome != "rewritten":
        oneshot.say(oneshot.told(done), chosen.quiet)
    print(done.prompt)
    return 0


def evaluate(chosen: argparse.Namespace) -> int:
    settings, loras = _with_loras(chosen)
    from service import logs
    from service.evaluation import command

    logs.setup(settings.log)
    results, table = command.run(chosen, settings, loras)
    print(json.dumps(results, ensure_ascii=False, indent=2) if chosen.json else table)
    return 0


def cache_stats(chosen: argparse.Namespace) -> int:
    from service import cache_commands

    return _answer(chosen, cache_commands.stats(chosen, _cache_settings(chosen)))


def cache_purge(chosen: argparse.Namespace) -> int:
    from service import cache_commands

    return _answer(chosen, cache_commands.purge(chosen, _cache_settings(chosen)))


def cache_warm(chosen: argparse.Namespace) -> int:
    from service import cache_commands

    return _answer(chosen, cache_commands.warm(chosen, _cache_settings(chosen)))


def cache_calibrate(chosen: argparse.Namespace) -> int:
    from service.calibration import command

    _, table = command.run(chosen, _cache_settings(chosen))
    print(table)
    return 0


def _cache_settings(chosen: argparse.Namespace) -> Settings:
    from service import logs

    settings = _settings(chosen, Settings(log=LogSettings(level="warning")))
    logs.setup(settings.log)
    return settings


def _answer(chosen: argparse.Namespace, answer: dict[str, Any]) -> int:
    if chosen.json:
        print(json.dumps(answer, ensure_ascii=False, indent=2))
        return 0
    for name, value in answer.items():
        if isinstance(value, dict):
            print(f"{name}:" if value else f"{name}: none")
            for key, inner in value.items():
                told = ", ".join(f"{k} {v}" for k, v in inner.items()) if isinstance(inner, dict) else inner
                print(f"  {key}: {told}")
        else:
            print(f"{name}: {value}")
    return 0


def models(chosen: argparse.Namespace) -> int:
    from models.bundles import registry

    cache_dir = _settings(chosen).model.cache_dir
    if chosen.action == "list":
        for status in registry.list_bundles(cache_dir):
            state = "ready" if status.pulled else "to be fetched: headstart models pull"
            print(f"{status.name}  {status.manifest.name}  {status.manifest.licence}  {state}")
        return 0
    for name in chosen.names or registry.ROOTS:
        if chosen.action == "pull":
            with _Bars() as bars:
                folder = registry.pull(name, cache_dir, bars.show)
            print(f"{name}: {folder}")
        else:
            files = registry.verify(name, cache_dir).files
            print(f"{name}: {len(files)} {'file is as it' if len(files) == 1 else 'files are as they'} should be")
    return 0


def show(chosen: argparse.Namespace) -> int:
    from service.pictures import read_recipe

    recipe = read_recipe(chosen.file)
    if chosen.json:
        fields = {"prompt": recipe.prompt, "negative_prompt": recipe.negative_prompt, "parameters": recipe.parameters}
        print(json.dumps(fields, ensure_ascii=False, indent=2))
        return 0
    print(f"Prompt: {recipe.prompt}")
    if recipe.negative_prompt:
        print(f"Negative prompt: {recipe.negative_prompt}")
    for key, value in recipe.parameters.items():
        print(f"{key}: {value}")
    return 0


def _with_loras(chosen: argparse.Namespace) -> tuple[Settings, list[Lora]]:
    """Settings of a command that draws and ends, and the LoRAs of its --lora flags.

    A bare name that is no file is that of a LoRA that comes with the model.
    """
    from service import oneshot

    loras = oneshot.parse_loras(chosen.lora)
    files = [f"{lora.name}={lora.file}" for lora in loras if lora.name != lora.file or os.path.exists(lora.file)]
    if files:
        setattr(chosen, "model.loras", files)
    return _settings(chosen, Settings(log=LogSettings(level="warning"))), loras


def _settings(chosen: argparse.Namespace, defaults: Settings = DEFAULTS) -> Settings:
    given = {option.flag: getattr(chosen, option.key, None) for option in OPTIONS}
    flags = {
        flag: ",".join(value) if isinstance(value, list) else value
        for flag, value in given.items()
        if value is not None
    }
    return load(flags, os.environ, chosen.config, defaults)


class _Bars:
    """A progress bar for each thing that is fetched; a line now and then where no one watches a terminal."""

    def __init__(self) -> None:
        self._bars: dict[str, Any] = {}
        self._said = -math.inf

    def __enter__(self) -> _Bars:
        return self

    def __exit__(self, *ignored: object) -> None:
        for bar in self._bars.values():
            bar.close()

    def show(self, what: str, done: int, total: int) -> None:
        if not sys.stderr.isatty():
            self._say(what, done, total)
            return
        from tqdm import tqdm

        if what not in self._bars:
            self._bars[what] = tqdm(desc=what, total=total, unit="B", unit_scale=True)
        bar = self._bars[what]
        bar.update(done - bar.n)

    def _say(self, what: str, done: int, total: int) -> None:
        if time.monotonic() - self._said >= LINE_S:
            self._said = time.monotonic()
            print(f"fetching {what}: {done / 1e6:.1f} of {total / 1e6:.1f} MB", file=sys.stderr, flush=True)
