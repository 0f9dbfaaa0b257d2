"""The `headstart` command. Heavy modules are imported by the commands that need them, so that --help is instant."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from models.errors import ModelError
from service import commands
from service.config import DEFAULTS, OPTIONS, Option, version
from service.errors import HeadstartError, InputError, SetupError

MAIN_HELP = """\
Draws pictures from text.

examples:
  headstart models pull                            fetch what the models need that come with Headstart
  headstart serve                                  serve it on http://127.0.0.1:8000
  headstart generate "a red fox" -o fox.png        draw one picture without a server
  headstart rewrite "kitty n a hat pls"            what a prompt is made into for the model
  headstart eval --limit 100                       measure how well the default model draws
  headstart cache stats                            what is kept of earlier pictures, to start new ones from
  headstart show fox.png                           print what a picture was drawn from
"""
SERVE_HELP = """\
Serves the model over HTTP until SIGTERM or Ctrl-C. A setting is taken from its flag, else from its
HEADSTART_* variable, else from the TOML file, else it is the default.

examples:
  headstart serve --port 8001 --model ./my-sd15
  HEADSTART_API_KEY=secret headstart serve --host 0.0.0.0
  curl localhost:8000/generate -H 'Accept: image/png' -d '{"prompt": "a red apple"}' -o apple.png
"""
GENERATE_HELP = """\
Draws pictures in this process and writes them to files that carry their settings. With --n above 1,
`-o fox.png` writes fox-1.png, fox-2.png ... and fox.png, a contact sheet of them all.
Files that exist are overwritten. The cache of half-drawn pictures is left alone unless --cache asks
for it; a server that uses the same folder must not run then.

examples:
  headstart generate "a red fox" -o fox.png --seed 7
  headstart generate "a red fox" -o fox.png --n 4 --sampler lcm --steps 4
  headstart generate "a red fox" -o - --format jpeg > fox.jpg
"""
CACHE_HELP = """\
Servers keep half-drawn pictures, and later prompts that are similar start from them (docs/cache.md).
These commands work on the folder or Redis server that the settings name, or with --url through a
server, which asks for its key (HEADSTART_API_KEY). A folder belongs to one process at a time.

examples:
  headstart cache stats --url http://127.0.0.1:8000
  headstart cache purge --prompt "a red fox"
  headstart cache warm prompts.txt --sampler ddim --steps 50
  headstart cache calibrate --model ./my-sd15 --out policy.json
"""
CALIBRATE_HELP = """\
Draws pairs of prompts, the second from the latents of the first at each of several steps, judges the
pictures with the scorer that comes with the model (with the default model's where it has none), and
allows each similarity the deepest step that keeps --alpha of the quality of pictures from scratch.
Where ten pictures of one prompt would be too much alike, starts get fresh noise, the least that makes
them differ half as much as pictures from scratch do, and the pairs are drawn again with it.
Each pair takes about 300 network steps of DDIM, twice that with fresh noise: on a CPU, fewer --pairs
and patience.

examples:
  headstart cache calibrate --pairs 200
  headstart cache calibrate --model ./my-sd15 --prompts mine.txt --out my-policy.json
  headstart serve --model ./my-sd15 --cache-policy my-policy.json
"""
REWRITE_HELP = """\
Rewrites a prompt, terse, misspelt or rambling, to one that the image model draws well, and prints it.
Where the language model's caption cannot be trusted the prompt itself is printed, and why on stderr.
`headstart generate --enhance-prompt` draws what this prints.

examples:
  headstart rewrite "kitty n a hat pls, bluish"
  headstart rewrite "a rocket, nite" --json
"""
EVAL_HELP = """\
Draws prompts in this process, judges the pictures with the scorer that comes with the model (with the
default model's where it has none), and prints how many are right, prompt group by prompt group. Writes
results.json and rows.jsonl, a line a picture, to the folder of --out; files that exist are overwritten.

Prompts are JSON Lines of records that say what a picture should show, or plain text with a prompt a
line, of which only the score can be told. docs/evaluation.md has the fields and the figures.

examples:
  headstart eval --limit 100                          the default model as it is served
  headstart eval --sampler ddim --steps 50 --guidance 3 --out out/ddim-50
  headstart eval --prompts mine.txt --sheet --pictures
  headstart eval --metrics objects,relation --json
"""


SERVED = ("--llm", "--llm-max-running", "--llm-max-waiting")  # of the language model, what only a server needs


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


class Version(argparse.Action):
    """Looks the version up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *ignored: Any) -> NoReturn:
        print(f"headstart {version()}")
        parser.exit()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit status: 0; 1, drawing failed; 2, the caller can mend it; 130, Ctrl-C; 141, stdout was closed.
    """
    chosen = _parser().parse_args(arguments)
    try:
        status: int = chosen.run(chosen)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("headstart: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the flush at exit would fail again
        return 141
    except (HeadstartError, ModelError) as error:
        print(f"headstart: {error}", file=sys.stderr)
        return 2 if isinstance(error, SetupError | InputError | ModelError) else 1


def _parser() -> Parser:
    parser = _described(Parser(prog="headstart"), MAIN_HELP)
    parser.add_argument("--version", action=Version, nargs=0, help="print the version and exit")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_serve(subparsers)
    _add_generate(subparsers)
    _add_rewrite(subparsers)
    _add_eval(subparsers)
    _add_models(subparsers)
    _add_cache(subparsers)
    _add_show(subparsers)
    return parser


def _described(parser: Parser, text: str) -> Parser:
    parser.description = text
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    return parser


def _add_serve(subparsers: Any) -> None:
    parser = _described(subparsers.add_parser("serve", help="serve a model over HTTP"), SERVE_HELP)
    _add_settings(parser, ("server", "model", "engine", "ranks", "cache", "llm", "jobs", "log"))
    parser.set_defaults(run=commands.serve)


def _add_generate(subparsers: Any) -> None:
    parser = _described(subparsers.add_parser("generate", help="draw pictures without a server"), GENERATE_HELP)
    parser.add_argument("prompt", metavar="PROMPT", help="what to draw")
    picture = parser.add_argument_group("picture", "what is left out is the model's default")
    picture.add_argument("--negative", metavar="TEXT", help="what to keep out of the picture")
    picture.add_argument("--n", type=int, default=1, metavar="N", help="how many pictures, 1 to 8; default: 1")
    picture.add_argument("--size", metavar="WxH", help="in pixels, such as 256x256")
    picture.add_argument("--seed", type=int, help="of the first picture; picture i has seed + i; default: random")
    picture.add_argument("--sampler", metavar="NAME", help="such as lcm, ddim, euler")
    picture.add_argument("--steps", type=int, metavar="N", help="how many")
    picture.add_argument("--guidance", type=float, metavar="SCALE", help="how closely to follow the prompt, 0 to 30")
    picture.add_argument("--eta", type=float, help="noise of the sampler ddim, 0 to 1")
    picture.add_argument("--class-label", type=int, metavar="N", help="for a class-conditional model")
    picture.add_argument(
        "--timesteps",
        type=_integers,
        metavar="N,...",
        help="of a pixel-space consistency model, decreasing, such as 22,0; in place of --steps",
    )
    picture.add_argument(
        "--patch-degree",
        type=int,
        metavar="N",
        help="how many of the GPUs share each picture; default: by measured times",
    )
    picture.add_argument(
        "--cache",
        choices=("auto", "use", "bypass", "refresh"),
        default="bypass",
        help="start from what similar prompts left, and leave something: auto (not with --seed), use (even then), "
        "refresh (only leave something); default: bypass",
    )
    picture.add_argument(
        "--enhance-prompt", action="store_true", help="let the language model rewrite the prompt first"
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "-o", "--output", default="headstart.png", metavar="FILE", help="- is stdout; default: %(default)s"
    )
    output.add_argument("--format", choices=("png", "jpeg", "webp"), help="default: by FILE's suffix")
    output.add_argument("--quality", type=int, default=90, metavar="Q", help="of JPEG and WebP, 0 to 100; default: 90")
    output.add_argument("--json", action="store_true", help="print on stdout what was drawn, as JSON")
    output.add_argument("--quiet", action="store_true", help="no progress on stderr")
    unused = ("--lora", "--patch-degree", "--cache", "--cache-shared", "--cache-ttl", *SERVED)
    _add_settings(parser, ("model", "ranks", "cache", "llm", "log"), but=unused)
    _add_lora(parser)
    parser.set_defaults(run=commands.generate)


def _add_rewrite(subparsers: Any) -> None:
    help = "rewrite a prompt for the image model"
    parser = _described(subparsers.add_parser("rewrite", help=help), REWRITE_HELP)
    parser.add_argument("prompt", metavar="PROMPT", help="as someone types it")
    parser.add_argument("--json", action="store_true", help="print what became of it as JSON")
    parser.add_argument("--quiet", action="store_true", help="nothing on stderr")
    _add_settings(parser, ("model", "llm", "log"), but=("--lora", *SERVED))
    parser.set_defaults(run=commands.rewrite)


def _integers(text: str) -> tuple[int, ...]:
    try:
        return tuple(map(int, text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; integers with commas between them") from None


def _add_lora(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--lora",
        action="append",
        metavar="[NAME=]FILE[:SCALE]",
        default=[],
        help="draw with a LoRA file, or one that comes with the model by its name, at scale 1 unless told otherwise; "
        "may be repeated",
    )


def _add_eval(subparsers: Any) -> None:
    parser = _described(subparsers.add_parser("eval", help="measure how well a model draws"), EVAL_HELP)
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="default: the bundle's eval/held-out.jsonl")
    parser.add_argument("--limit", type=int, metavar="N", help="draw N prompts, spread evenly over the file")
    parser.add_argument(
        "--metrics",
        metavar="NAME,...",
        help="of score, objects, colours, relation, count, style, background, all, frechet; default: what FILE allows",
    )
    picture = parser.add_argument_group("pictures", "what is left out is the model's default")
    picture.add_argument("--sampler", metavar="NAME", help="such as lcm, ddim, euler")
    picture.add_argument("--steps", type=int, metavar="N", help="how many")
    picture.add_argument("--guidance", type=float, metavar="SCALE", help="how closely to follow the prompt, 0 to 30")
    picture.add_argument("--size", metavar="WxH", help="in pixels, such as 256x256")
    picture.add_argument(
        "--seed", type=int, default=0, help="a prompt without a seed gets this plus its line's number; default: 0"
    )
    picture.add_argument(
        "--cache",
        choices=("use", "bypass", "refresh"),
        default="bypass",
        help="start from what similar prompts left in the cache, and leave something (use), or only leave something "
        "(refresh); figures then depend on what is there; default: bypass",
    )
    output = parser.add_argument_group("output")
    output.add_argument("--out", type=Path, default=Path("out/eval"), metavar="DIR", help="default: %(default)s")
    output.add_argument("--pictures", action="store_true", help="write every picture to DIR/pictures")
    output.add_argument("--sheet", action="store_true", help="write DIR/sheet.png, the first 64 pictures")
    output.add_argument("--json", action="store_true", help="print the results as JSON, not as a table")
    output.add_argument("--quiet", action="store_true", help="no progress on stderr")
    unused = ("--lora", "--max-waiting", "--ageing-s", "--cache", "--cache-shared", "--cache-ttl")
    _add_settings(parser, ("model", "engine", "cache", "log"), but=unused)
    _add_lora(parser)
    parser.set_defaults(run=commands.evaluate)


def _add_models(subparsers: Any) -> None:
    parser = subparsers.add_parser("models", help="list, fetch and check the models that come with Headstart")
    actions = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, help in (
        ("list", "the models that come with Headstart"),
        ("pull", "fetch what a model needs and does not carry itself"),
        ("verify", "compare a model's files with the digests of its manifest"),
    ):
        action = actions.add_parser(name, help=help, description=help)
        if name != "list":
            action.add_argument("names", nargs="*", metavar="NAME", help="default: all of them")
        _add_settings(action, ("model",), only=("--cache-dir",))
        action.set_defaults(run=commands.models, action=name)


def _add_cache(subparsers: Any) -> None:
    parser = _described(
        subparsers.add_parser("cache", help="look into the cache of half-drawn pictures, empty it, fill it"), CACHE_HELP
    )
    actions = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, run, help in (
        ("stats", commands.cache_stats, "what is kept, for whom, and through a server what that has saved"),
        ("purge", commands.cache_purge, "forget it, all or what one prompt left"),
        ("warm", commands.cache_warm, "draw the prompts of a file, for what they leave"),
    ):
        action = actions.add_parser(name, help=help, description=help)
        if name == "purge":
            action.add_argument("--prompt", metavar="TEXT", help="as it was sent; default: all prompts")
        if name == "warm":
            action.add_argument("file", type=Path, metavar="FILE", help="a prompt a line, or JSON Lines with `prompt`")
            _add_warm(action)
        action.add_argument("--url", metavar="URL", help="of a server to go through, such as http://127.0.0.1:8000")
        everyone = "default" if name == "warm" else "everyone"
        action.add_argument("--tenant", metavar="NAME", help=f"whose; default: {everyone}, or with --url the key's")
        action.add_argument("--json", action="store_true", help="print the answer as JSON")
        _add_settings(action, ("model", "cache", "log"), but=("--lora", "--cache"))
        server = action.add_argument_group("server")
        for option in OPTIONS:
            if option.flag == "--api-key":
                _add_option(server, option)
        action.set_defaults(run=run)
    _add_calibrate(actions)


def _add_calibrate(actions: Any) -> None:
    help = "measure which similarity allows what, and write the policy that --cache-policy reads"
    parser = _described(actions.add_parser("calibrate", help=help), CALIBRATE_HELP)
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="default: the bundle's eval/held-out.jsonl")
    parser.add_argument(
        "--alpha", type=float, default=0.97, help="quality to keep, relative to from scratch; default: %(default)s"
    )
    parser.add_argument(
        "--pairs", type=int, default=50, metavar="N", help="of prompts, for each bin of similarity; default: 50"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the choice of pairs; default: 0")
    parser.add_argument("--out", type=Path, default=Path("policy.json"), metavar="FILE", help="default: %(default)s")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    unused = ("--lora", "--max-waiting", "--ageing-s", "--max-running", "--max-pixels")
    _add_settings(parser, ("model", "engine", "log"), but=unused)
    parser.set_defaults(run=commands.cache_calibrate)


def _add_warm(parser: argparse.ArgumentParser) -> None:
    picture = parser.add_argument_group("pictures", "what is left out is the model's default")
    picture.add_argument("--negative", metavar="TEXT", help="what to keep out of the pictures")
    picture.add_argument("--size", metavar="WxH", help="in pixels, such as 256x256")
    picture.add_argument("--sampler", metavar="NAME", help="such as lcm, ddim, euler")
    picture.add_argument("--steps", type=int, metavar="N", help="how many")
    picture.add_argument("--guidance", type=float, metavar="SCALE", help="how closely to follow the prompt, 0 to 30")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")


def _add_show(subparsers: Any) -> None:
    help = "print the settings that a picture carries"
    parser = subparsers.add_parser("show", help=help, description=help)
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(run=commands.show)


def _add_settings(
    parser: argparse.ArgumentParser, groups: Sequence[str], *, but: Sequence[str] = (), only: Sequence[str] = ()
) -> None:
    parser.add_argument("--config", type=Path, metavar="FILE", help="a TOML file of settings (HEADSTART_CONFIG)")
    for name in groups:
        group = parser.add_argument_group(name)
        for option in OPTIONS:
            if option.group == name and option.flag not in but and (not only or option.flag in only):
                _add_option(group, option)


def _add_option(group: Any, option: Option) -> None:
    default = getattr(getattr(DEFAULTS, option.group), option.name)
    told = f"; default: {default}" if default not in (None, (), False) else ""
    more: dict[str, Any] = {"metavar": option.metavar or option.name.upper()}
    if option.key == "log.json":
        more = {"action": "store_const", "const": "true"}
    elif option.key == "model.loras":
        more |= {"action": "append"}
    group.add_argument(option.flag, dest=option.key, help=f"{option.help}{told} ({option.env})", **more)
