"""Frozen settings, one group per owner. The only reader of the environment."""

from __future__ import annotations

import difflib
import functools
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

from service.errors import SetupError

ENV_PREFIX = "HEADSTART_"
CONFIG_ENV = "HEADSTART_CONFIG"
DEFAULT_TENANT = "default"  # whoever sends HEADSTART_API_KEY, and everyone where no key is asked for
SHARED_TENANT = "shared"  # the one namespace of all tenants where the operator chose that


@dataclass(frozen=True, slots=True)
class ServerSettings:
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None  # of the tenant "default"; no key at all: none is asked for
    api_keys: tuple[tuple[str, str], ...] = ()  # (tenant, key)
    max_body_bytes: int = 1 << 20
    shutdown_grace_s: float = 30.0  # how long accepted requests may finish after SIGTERM

    @property
    def keys(self) -> dict[str, str]:
        """Each tenant's key; empty: everyone is the tenant "default"."""
        return ({} if self.api_key is None else {DEFAULT_TENANT: self.api_key}) | dict(self.api_keys)


@dataclass(frozen=True, slots=True)
class ModelSettings:
    model: str = "default"  # bundle name, diffusers folder, or hub id
    revision: str | None = None
    dtype: str = "auto"  # auto | float32 | bfloat16 | float16
    device: str = "auto"  # auto | cpu | cuda | cuda:N
    loras: tuple[tuple[str, str], ...] = ()  # (name, file or hub id)
    cache_dir: Path = field(default_factory=lambda: Path.home() / ".cache" / "headstart")


@dataclass(frozen=True, slots=True)
class EngineSettings:
    max_batch: int = 16  # network rows of one tick; a picture with guidance takes two, any other one
    max_running: int = 32  # pictures that hold latent slots
    max_waiting: int = 256  # pictures accepted and not yet running; beyond it: 429
    ageing_s: float = 10.0  # waiting this long is worth one point of priority
    max_pixels: int = 1024 * 1024  # of one picture


@dataclass(frozen=True, slots=True)
class RankSettings:
    """Of several GPUs, each with a process of its own; with the device cpu, of several processes on it."""

    gpus: int = 1
    patch_degree: str = "auto"  # GPUs that share one picture where its request does not say; auto: by measured times
    patch_warm_up: int = 4  # rows of such a picture that run in step, before GPUs use what the others had a row ago
    patch_launch: str = "auto"  # eager | compile | capture | graph; auto: capture on GPUs, eager on a CPU
    timeout_s: float = 60.0  # a GPU's process that is silent for so long is lost, and so is a step that takes longer


@dataclass(frozen=True, slots=True)
class CacheSettings:
    """Of the latents that requests start from."""

    enabled: bool = True
    folder: Path | None = None  # None: `latents` in ModelSettings.cache_dir; each model has a folder in it
    budget_bytes: int = 2 * 10**9  # of one model's latents
    redis_url: str | None = None  # None: LMDB in `folder`
    policy: Path | None = None  # None: the model's own, else published thresholds
    ttl_s: tuple[tuple[str, float], ...] = ()  # (tenant, seconds); a tenant that is not named keeps its entries
    shared: bool = False  # all tenants start from each other's latents


@dataclass(frozen=True, slots=True)
class LlmSettings:
    """Of the language model that writes text and rewrites prompts, and of the memory that it shares with pictures."""

    enabled: str = "auto"  # auto: unless it is a bundle that has not been fetched | on | off
    model: str = "default"  # bundle name, transformers folder, .gguf file, or hub id
    dtype: str = "auto"  # auto | float32 | bfloat16 | float16
    adapter: Path | None = None  # folder of a PEFT adapter, merged into the weights
    gpu_memory_fraction: float = 0.9  # of a GPU's memory: weights, latents, working memory, and KV pages of the rest
    kv_backend: str = "paged"  # paged | virtual (contiguous in virtual memory)
    kv_pages: int | None = None  # of 16 tokens; None: on a GPU what the fraction leaves, on a CPU CPU_KV_PAGES
    max_running: int = 32  # answers being written at once
    max_waiting: int = 256  # answers accepted and not yet running; beyond it: 429
    rewrite_budget_s: float | None = None  # None: 2 on a CPU, 0.15 on a GPU


@dataclass(frozen=True, slots=True)
class JobSettings:
    """Of jobs that have ended: how long they can be asked for."""

    ttl_s: float = 3600.0
    budget_bytes: int = 256 * 10**6  # of all results together; beyond it the oldest go before their time


@dataclass(frozen=True, slots=True)
class LogSettings:
    level: str = "info"  # debug | info | warning | error
    json: bool = False


@dataclass(frozen=True, slots=True)
class Settings:
    server: ServerSettings = field(default_factory=ServerSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    engine: EngineSettings = field(default_factory=EngineSettings)
    ranks: RankSettings = field(default_factory=RankSettings)
    cache: CacheSettings = field(default_factory=CacheSettings)
    llm: LlmSettings = field(default_factory=LlmSettings)
    jobs: JobSettings = field(default_factory=JobSettings)
    log: LogSettings = field(default_factory=LogSettings)


GROUPS = ("server", "model", "engine", "ranks", "cache", "llm", "jobs", "log")
SECRETS = ("server.api_key", "server.api_keys", "cache.redis_url")  # not repeated in errors
DEFAULTS = Settings()


class Kind(NamedTuple):
    """How a value is read from text (flag, environment) and from TOML; both raise ValueError for what is refused."""

    allowed: str
    from_text: Callable[[str], object]
    from_toml: Callable[[object], object]


class Option(NamedTuple):
    """One setting: where it lives and how each source names it."""

    group: str
    name: str
    flag: str
    kind: Kind
    help: str
    metavar: str | None = None

    @property
    def key(self) -> str:
        return f"{self.group}.{self.name}"

    @property
    def env(self) -> str:
        return ENV_PREFIX + self.flag.removeprefix("--").replace("-", "_").upper()


def _refuse_unless(good: bool) -> None:
    if not good:
        raise ValueError


def _integer(low: int, high: int) -> Kind:
    def check(value: object) -> int:
        _refuse_unless(type(value) is int and low <= value <= high)
        return cast(int, value)

    return Kind(f"an integer from {low} to {high}", lambda text: check(int(text)), check)


def _number(low: float, high: float, unit: str) -> Kind:
    def check(value: object) -> float:
        _refuse_unless(type(value) in (int, float))
        number = float(cast(float, value))
        _refuse_unless(low <= number <= high)
        return number

    return Kind(f"{unit} from {low:g} to {high:g}", lambda text: check(float(text)), check)


def _text(allowed: str, pattern: str = r".+") -> Kind:
    def check(value: object) -> str:
        _refuse_unless(isinstance(value, str) and re.fullmatch(pattern, value) is not None)
        return cast(str, value)

    return Kind(allowed, check, check)


def _choice(*names: str) -> Kind:
    return _text("one of " + ", ".join(names), "|".join(names))


def _switch() -> Kind:
    words = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}

    def from_text(text: str) -> bool:
        _refuse_unless(text.lower() in words)
        return words[text.lower()]

    def from_toml(value: object) -> bool:
        _refuse_unless(isinstance(value, bool))
        return cast(bool, value)

    return Kind("true or false", from_text, from_toml)


def _path(allowed: str) -> Kind:
    def check(value: object) -> Path:
        _refuse_unless(isinstance(value, str) and value != "" and "\0" not in value)
        path = os.path.expanduser(cast(str, value))
        _refuse_unless(not path.startswith("~"))  # a user that there is not
        return Path(path)

    return Kind(allowed, check, check)


def _bytes(low: int, high: int) -> Kind:
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}

    def check(value: object) -> int:
        _refuse_unless(type(value) is int and low <= value <= high)
        return cast(int, value)

    def from_text(text: str) -> int:
        match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,6})?) ?([KMGT]?B|)", text.strip(), re.ASCII | re.IGNORECASE)
        _refuse_unless(match is not None)
        number, unit = cast(re.Match[str], match).groups()
        return check(round(float(number) * units[unit.upper()]))

    def from_toml(value: object) -> int:
        return from_text(value) if isinstance(value, str) else check(value)

    return Kind("bytes, such as 2000000000, 500MB or 2GB, from 1MB to 1000TB", from_text, from_toml)


def _pairs(allowed: str, names: str, value: Kind) -> Kind:
    """NAME=VALUE,NAME=VALUE; in TOML a table. Names match the pattern `names`, each once."""

    def checked(pairs: list[tuple[str, object]], reader: Callable[[Any], object]) -> tuple[tuple[str, object], ...]:
        _refuse_unless(len({name for name, _ in pairs}) == len(pairs))
        _refuse_unless(all(re.fullmatch(names, name, re.ASCII) for name, _ in pairs))
        return tuple((name, reader(each)) for name, each in pairs)

    def from_text(text: str) -> object:
        return checked([part.partition("=")[::2] for part in text.split(",")], value.from_text)

    def from_toml(table: object) -> object:
        _refuse_unless(isinstance(table, dict))
        return checked(list(cast(dict[str, object], table).items()), value.from_toml)

    return Kind(allowed, from_text, from_toml)


TENANT = rf"(?!{SHARED_TENANT}$)[A-Za-z0-9][A-Za-z0-9_.-]{{0,63}}"


OPTIONS = (
    Option("server", "host", "--host", _text("a host name or address", r"\S+"), "address to listen on", "HOST"),
    Option("server", "port", "--port", _integer(0, 65535), "port to listen on; 0 picks a free one", "PORT"),
    Option(
        "server",
        "api_key",
        "--api-key",
        _text("printable ASCII without spaces", r"[!-~]+"),
        "ask clients for this key (the environment keeps it out of the process list)",
        "KEY",
    ),
    Option(
        "server",
        "api_keys",
        "--api-keys",
        _pairs(
            "TENANT=KEY, several with commas between them (in TOML a table), tenants of 1 to 64 letters, digits, '_', "
            "'.' and '-' other than \"shared\", keys of printable ASCII without spaces and commas",
            TENANT,
            _text("a key", r"[!-+\--~]+"),
        ),
        "keys of several tenants, who do not see each other's cached latents",
        "TENANT=KEY,...",
    ),
    Option("server", "max_body_bytes", "--max-body-bytes", _integer(1024, 1 << 30), "largest request body", "BYTES"),
    Option(
        "server",
        "shutdown_grace_s",
        "--shutdown-grace-s",
        _number(0, 3600, "seconds"),
        "how long accepted requests may finish after SIGTERM",
        "SECONDS",
    ),
    Option("model", "model", "--model", _text("a bundle, a diffusers folder or a hub id"), "what to serve", "MODEL"),
    Option("model", "revision", "--revision", _text("a branch, tag or commit", r"\S+"), "of a hub id", "REVISION"),
    Option("model", "dtype", "--dtype", _choice("auto", "float32", "bfloat16", "float16"), "of the networks"),
    Option(
        "model",
        "device",
        "--device",
        _text("auto, cpu, cuda or cuda:N", r"auto|cpu|cuda(:\d{1,3})?"),
        "where the networks run",
    ),
    Option(
        "model",
        "loras",
        "--lora",
        _pairs(
            "NAME=FILE, several with commas between them (in TOML a table of NAME = FILE)",
            r"[\w.-]+",
            _text("a file or hub id"),
        ),
        "a LoRA file to load under a name; may be repeated",
        "NAME=FILE",
    ),
    Option("model", "cache_dir", "--cache-dir", _path("a folder"), "where downloaded weights are kept", "FOLDER"),
    Option("engine", "max_batch", "--max-batch", _integer(1, 256), "network rows of one call; guidance takes two", "N"),
    Option("engine", "max_running", "--max-running", _integer(1, 4096), "pictures being drawn at once", "N"),
    Option("engine", "max_waiting", "--max-waiting", _integer(0, 1_000_000), "pictures that may wait; then 429", "N"),
    Option(
        "engine",
        "ageing_s",
        "--ageing-s",
        _number(0.001, 1e6, "seconds"),
        "waiting this long is worth one point of priority",
        "SECONDS",
    ),
    Option("engine", "max_pixels", "--max-pixels", _integer(64, 1 << 26), "largest picture, width times height", "N"),
    Option("ranks", "gpus", "--gpus", _integer(1, 64), "GPUs to draw on; with --device cpu, processes", "N"),
    Option(
        "ranks",
        "patch_degree",
        "--patch-degree",
        _choice("auto", "1", "2", "4", "8"),
        "GPUs that share one picture whose request does not say; auto: by times measured at the start",
        "N",
    ),
    Option(
        "ranks",
        "patch_warm_up",
        "--patch-warm-up",
        _integer(1, 200),
        "first steps of a shared picture for which GPUs wait for each other",
        "N",
    ),
    Option(
        "ranks",
        "patch_launch",
        "--patch-launch",
        _choice("auto", "eager", "compile", "capture", "graph"),
        "how the network of a shared picture is run: as CUDA graphs (capture, graph), compiled first (compile, graph)",
    ),
    Option(
        "ranks",
        "timeout_s",
        "--rank-timeout-s",
        _number(1, 3600, "seconds"),
        "a GPU's process that is silent for longer, or a step that takes longer, is lost, and all are started anew",
        "SECONDS",
    ),
    Option("cache", "enabled", "--cache", _switch(), "start pictures from latents of similar prompts", "on|off"),
    Option(
        "cache",
        "folder",
        "--cache-folder",
        _path("a folder"),
        "where their latents are kept; default: latents in --cache-dir",
        "FOLDER",
    ),
    Option(
        "cache", "budget_bytes", "--cache-budget", _bytes(10**6, 10**15), "how much they may take, such as 2GB", "BYTES"
    ),
    Option(
        "cache",
        "redis_url",
        "--redis-url",
        _text("redis://HOST:PORT/DB, rediss://... or unix://...", r"(redis|rediss|unix)://\S+"),
        "keep them in Redis, which several servers can share, instead of in the folder",
        "URL",
    ),
    Option("cache", "policy", "--cache-policy", _path("a file"), "which similarity allows what; default: the model's"),
    Option(
        "cache",
        "ttl_s",
        "--cache-ttl",
        _pairs(
            "TENANT=SECONDS, several with commas between them (in TOML a table), seconds from 1 to 1e+09",
            rf"{TENANT}|{SHARED_TENANT}",
            _number(1, 1e9, "seconds"),
        ),
        "how long a tenant's latents are kept; default: until the budget is spent",
        "TENANT=SECONDS,...",
    ),
    Option("cache", "shared", "--cache-shared", _switch(), "let all tenants start from each other's latents", "on|off"),
    Option(
        "llm",
        "enabled",
        "--llm",
        _choice("auto", "on", "off"),
        "write text and rewrite prompts; auto: where the model has been fetched",
        "auto|on|off",
    ),
    Option(
        "llm", "model", "--llm-model", _text("a bundle, a folder, a .gguf file or a hub id"), "what writes", "MODEL"
    ),
    Option("llm", "dtype", "--llm-dtype", _choice("auto", "float32", "bfloat16", "float16"), "of the language model"),
    Option("llm", "adapter", "--llm-adapter", _path("a folder"), "a PEFT adapter to merge into it", "FOLDER"),
    Option(
        "llm",
        "gpu_memory_fraction",
        "--gpu-memory-fraction",
        _number(0.01, 1, "a number"),
        "of a GPU's memory, split between weights, latents and pages of keys and values before anything runs",
        "SHARE",
    ),
    Option(
        "llm",
        "kv_backend",
        "--kv-backend",
        _choice("paged", "virtual"),
        "keys and values in pages that prompts share, or contiguous in virtual memory",
    ),
    Option(
        "llm",
        "kv_pages",
        "--kv-pages",
        _integer(1, 1 << 24),
        "pages of 16 tokens; default: on a GPU what the fraction leaves, on a CPU 256",
        "N",
    ),
    Option("llm", "max_running", "--llm-max-running", _integer(1, 1024), "answers being written at once", "N"),
    Option("llm", "max_waiting", "--llm-max-waiting", _integer(0, 1_000_000), "answers that may wait; then 429", "N"),
    Option(
        "llm",
        "rewrite_budget_s",
        "--rewrite-budget-s",
        _number(0.001, 600, "seconds"),
        "after which a prompt is drawn as it was typed; default: 2 on a CPU, 0.15 on a GPU",
        "SECONDS",
    ),
    Option(
        "jobs",
        "ttl_s",
        "--job-ttl-s",
        _number(0.1, 1e9, "seconds"),
        "how long the result of a job is kept",
        "SECONDS",
    ),
    Option(
        "jobs",
        "budget_bytes",
        "--job-budget",
        _bytes(10**6, 10**15),
        "how much all results may take, such as 256MB; then the oldest go",
        "BYTES",
    ),
    Option("log", "level", "--log-level", _choice("debug", "info", "warning", "error"), "least severe line logged"),
    Option("log", "json", "--log-json", _switch(), "log one JSON object a line"),
)


def load(
    flags: Mapping[str, str], environ: Mapping[str, str], file: Path | None = None, defaults: Settings = DEFAULTS
) -> Settings:
    """Settings from flags, then the environment, then a TOML file; the first source that names a setting wins.

    Args:
        flags: raw values by flag, such as {"--port": "8001"}; only those that were given.
        environ: the environment. Unknown HEADSTART_* variables are errors.
        file: a TOML file with a table for each of GROUPS; HEADSTART_CONFIG names one too.
        defaults: for settings that no source names.

    Raises:
        SetupError: naming the source, the value and what is allowed.
    """
    path = file or (Path(environ[CONFIG_ENV]) if environ.get(CONFIG_ENV) else None)
    values = _from_file(path) if path is not None else {}
    values |= _from_environment(environ)
    for option in OPTIONS:
        if option.flag in flags:
            values[option.key] = _read(option, option.flag, flags[option.flag], option.kind.from_text)
    named: dict[str, dict[str, object]] = {group: {} for group in GROUPS}
    for key, value in values.items():
        group, name = key.split(".")
        named[group][name] = value
    changed: dict[str, Any] = {group: replace(getattr(defaults, group), **named[group]) for group in GROUPS}
    settings = Settings(**changed)
    _check_keys(settings.server)
    return settings


def _check_keys(server: ServerSettings) -> None:
    """A key says who its sender is, so no tenant has two and no two have the same."""
    names = dict(server.api_keys)
    if server.api_key is not None and DEFAULT_TENANT in names:
        message = f"server.api_keys: {DEFAULT_TENANT!r} is not allowed beside server.api_key, which is that tenant's"
        raise SetupError(message, param="server.api_keys")
    keys = list(server.keys.values())
    if len(set(keys)) < len(keys):
        raise SetupError("server.api_keys: two tenants have the same key", param="server.api_keys")


def _read(option: Option, source: str, value: Any, reader: Callable[[Any], object]) -> object:
    try:
        return reader(value)
    except (ValueError, OverflowError):
        shown = "the value" if option.key in SECRETS else repr(value)
        raise SetupError(f"{source}: {shown} is not allowed; {option.kind.allowed}", param=option.key) from None


def _from_environment(environ: Mapping[str, str]) -> dict[str, object]:
    options = {option.env: option for option in OPTIONS}
    values = {}
    for variable in sorted(environ):
        if variable in options:
            option = options[variable]
            values[option.key] = _read(option, variable, environ[variable], option.kind.from_text)
        elif variable.startswith(ENV_PREFIX) and variable != CONFIG_ENV:
            raise _unknown(f"environment variable {variable}", variable, [*options, CONFIG_ENV])
    return values


def _from_file(path: Path) -> dict[str, object]:
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SetupError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:  # TOMLDecodeError gives the line; UnicodeDecodeError the byte
        raise SetupError(f"{path}: not a TOML file: {error}") from None
    options = {option.key: option for option in OPTIONS}
    values = {}
    for group, table in tables.items():
        if group not in GROUPS:
            raise _unknown(f"{path}: {group}", group, list(GROUPS))
        if not isinstance(table, dict):
            raise SetupError(f"{path}: {group}: {table!r} is not allowed; a table, [{group}]", param=group)
        for name, value in table.items():
            key = f"{group}.{name}"
            if key not in options:
                raise _unknown(f"{path}: {key}", key, list(options))
            values[key] = _read(options[key], f"{path}: {key}", value, options[key].kind.from_toml)
    return values


def _unknown(source: str, word: str, known: list[str]) -> SetupError:
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.6) or known
    return SetupError(f"{source}: unknown setting; did you mean {', '.join(near)}?")


@functools.cache
def version() -> str:
    """The installed distribution's version."""
    from importlib import metadata  # 30 ms that most commands can do without

    return metadata.version("headstart")
