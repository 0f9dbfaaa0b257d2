from __future__ import annotations

from pathlib import Path

import pytest

from service.config import DEFAULTS, GROUPS, OPTIONS, ModelSettings, Settings, load
from service.errors import SetupError


def toml(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "headstart.toml"
    path.write_text(text)
    return path


def test_nothing_given_is_the_defaults() -> None:
    assert load({}, {"PATH": "/bin"}) == Settings()


def test_flags_win_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    file = toml(tmp_path, '[server]\nport = 1\nhost = "a"\n[log]\njson = true\n[engine]\nmax_batch = 3')
    settings = load({"--port": "3"}, {"HEADSTART_PORT": "2", "HEADSTART_HOST": "b", "HEADSTART_LOG_JSON": "no"}, file)
    assert settings.server.port == 3
    assert settings.server.host == "b"
    assert settings.log.json is False
    assert settings.engine.max_batch == 3
    assert settings.engine.max_running == DEFAULTS.engine.max_running


def test_given_defaults_yield_to_every_source() -> None:
    defaults = Settings(model=ModelSettings(model="mine", dtype="float32"))
    settings = load({"--model": "theirs"}, {}, defaults=defaults)
    assert (settings.model.model, settings.model.dtype) == ("theirs", "float32")


def test_the_environment_can_name_the_file(tmp_path: Path) -> None:
    file = toml(tmp_path, "[server]\nport = 7")
    assert load({}, {"HEADSTART_CONFIG": str(file)}).server.port == 7


def test_every_setting_has_an_option_and_every_option_a_setting() -> None:
    settings = {f"{group}.{name}" for group in GROUPS for name in type(getattr(DEFAULTS, group)).__slots__}
    assert {option.key for option in OPTIONS} == settings
    assert len({option.flag for option in OPTIONS}) == len({option.env for option in OPTIONS}) == len(OPTIONS)


def test_loras_from_every_source(tmp_path: Path) -> None:
    pairs = (("ink", "a.safetensors"), ("moss", "owner/name"))
    assert load({"--lora": "ink=a.safetensors,moss=owner/name"}, {}).model.loras == pairs
    assert load({}, {"HEADSTART_LORA": "ink=a.safetensors,moss=owner/name"}).model.loras == pairs
    file = toml(tmp_path, '[model.loras]\nink = "a.safetensors"\nmoss = "owner/name"')
    assert load({}, {}, file).model.loras == pairs


@pytest.mark.parametrize(
    ("flag", "value", "allowed"),
    [
        ("--port", "65536", "an integer from 0 to 65535"),
        ("--port", "8e3", "an integer from 0 to 65535"),
        ("--port", "", "an integer from 0 to 65535"),
        ("--host", "a b", "a host name or address"),
        ("--shutdown-grace-s", "nan", "seconds from 0 to 3600"),
        ("--shutdown-grace-s", "-1", "seconds from 0 to 3600"),
        ("--dtype", "float8", "one of auto, float32, bfloat16, float16"),
        ("--device", "gpu", "auto, cpu, cuda or cuda:N"),
        ("--device", "cuda:", "auto, cpu, cuda or cuda:N"),
        ("--lora", "a.safetensors", "NAME=FILE"),
        ("--lora", "a=b,a=c", "NAME=FILE"),
        ("--log-level", "loud", "one of debug, info, warning, error"),
        ("--log-json", "perhaps", "true or false"),
        ("--max-batch", "0", "an integer from 1 to 256"),
        ("--cache-dir", "", "a folder"),
        ("--cache-dir", "~no-such-user/models", "a folder"),
        ("--cache", "maybe", "true or false"),
        ("--cache-folder", "", "a folder"),
        ("--job-ttl-s", "0", "seconds from 0.1 to 1e+09"),
        ("--job-budget", "10", "from 1MB"),
        ("--llm", "maybe", "one of auto, on, off"),
        ("--gpu-memory-fraction", "0", "a number from 0.01 to 1"),
        ("--gpu-memory-fraction", "1.5", "a number from 0.01 to 1"),
        ("--kv-backend", "contiguous", "one of paged, virtual"),
        ("--kv-pages", "0", "an integer from 1"),
        ("--llm-max-running", "0", "an integer from 1 to 1024"),
        ("--rewrite-budget-s", "0", "seconds from 0.001 to 600"),
        ("--cache-budget", "2 gigs", "bytes, such as"),
        ("--cache-budget", "1KB", "from 1MB"),
        ("--cache-budget", "-2GB", "bytes, such as"),
        ("--cache-budget", "2000TB", "to 1000TB"),
        ("--cache-ttl", "60", "TENANT=SECONDS"),
        ("--cache-ttl", "ada=0", "seconds from 1 to 1e+09"),
        ("--cache-ttl", "ada=60,ada=61", "TENANT=SECONDS"),
    ],
)
def test_bad_flags_and_variables_name_the_source_the_value_and_what_is_allowed(
    flag: str, value: str, allowed: str
) -> None:
    env = next(option.env for option in OPTIONS if option.flag == flag)
    for source, flags, environ in ((flag, {flag: value}, {}), (env, {}, {env: value})):
        with pytest.raises(SetupError) as caught:
            load(flags, environ)
        assert str(caught.value).startswith(f"{source}: {value!r} is not allowed; ")
        assert allowed in str(caught.value)


@pytest.mark.parametrize(
    ("text", "count"),
    [("2000000", 2 * 10**6), ("500MB", 5 * 10**8), ("2GB", 2 * 10**9), ("1.5 gb", 15 * 10**8), ("1TB", 10**12)],
)
def test_bytes_with_units(tmp_path: Path, text: str, count: int) -> None:
    assert load({"--cache-budget": text}, {}).cache.budget_bytes == count
    assert load({}, {}, toml(tmp_path, f'[cache]\nbudget_bytes = "{text}"')).cache.budget_bytes == count
    assert load({}, {}, toml(tmp_path, f"[cache]\nbudget_bytes = {count}")).cache.budget_bytes == count


def test_tenants_and_how_long_their_entries_are_kept(tmp_path: Path) -> None:
    settings = load({"--cache-ttl": "ada=60,shared=1e6"}, {"HEADSTART_API_KEYS": "ada=k1,bob.2=k=2"})
    assert settings.server.keys == {"ada": "k1", "bob.2": "k=2"}
    assert settings.cache.ttl_s == (("ada", 60.0), ("shared", 1e6))
    file = toml(tmp_path, '[server.api_keys]\nada = "k1"\n[cache.ttl_s]\nada = 60')
    settings = load({}, {"HEADSTART_API_KEY": "k0"}, file)
    assert settings.server.keys == {"default": "k0", "ada": "k1"}
    assert settings.cache.ttl_s == (("ada", 60.0),)
    assert load({}, {}).server.keys == {}


@pytest.mark.parametrize(
    "keys",
    [
        "secret",
        "=secret",
        "ada=",
        "a b=secret",
        "shared=secret",
        "-a=secret",
        "é=secret",
        "a=se cret",
        "a=secret,a=x",
        "a=secret,",
        f"{'a' * 65}=secret",
        "../a=secret",
    ],
)
def test_refused_tenants_are_told_without_their_keys(keys: str) -> None:
    with pytest.raises(SetupError, match=r"^HEADSTART_API_KEYS: the value is not allowed; TENANT=KEY") as caught:
        load({}, {"HEADSTART_API_KEYS": keys})
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("environ", "told"),
    [
        ({"HEADSTART_API_KEY": "k0", "HEADSTART_API_KEYS": "default=k1"}, "'default' is not allowed beside"),
        ({"HEADSTART_API_KEY": "k1", "HEADSTART_API_KEYS": "ada=k1"}, "two tenants have the same key"),
        ({"HEADSTART_API_KEYS": "ada=k1,bob=k1"}, "two tenants have the same key"),
    ],
)
def test_a_key_names_one_tenant(environ: dict[str, str], told: str) -> None:
    with pytest.raises(SetupError) as caught:
        load({}, environ)
    assert told in str(caught.value)
    assert "k1" not in str(caught.value)


def test_a_password_in_a_url_is_not_printed() -> None:
    with pytest.raises(SetupError, match="redis://HOST:PORT/DB") as caught:
        load({}, {"HEADSTART_REDIS_URL": "http://:hunter2@localhost"})
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('[server]\nport = "80"', "server.port: '80' is not allowed; an integer from 0 to 65535"),
        ("[server]\nport = true", "server.port: True is not allowed"),
        ("[server]\nshutdown_grace_s = inf", "server.shutdown_grace_s: inf is not allowed"),
        ("[log]\njson = 1", "log.json: 1 is not allowed; true or false"),
        ("[model]\nloras = ['a']", "model.loras: ['a'] is not allowed"),
        ("[model]\ncache_dir = 3", "model.cache_dir: 3 is not allowed; a folder"),
        ("server = 3", "server: 3 is not allowed; a table, [server]"),
        ("[server]\nprot = 80", "server.prot: unknown setting; did you mean server.port"),
        ("[sever]\nport = 80", "sever: unknown setting; did you mean server?"),
        ("[server\nport = 80", "not a TOML file: "),
        ("[server]\nport = = 80", "(at line 2"),
    ],
)
def test_bad_files_name_the_key_or_the_line(tmp_path: Path, text: str, told: str) -> None:
    path = toml(tmp_path, text)
    with pytest.raises(SetupError) as caught:
        load({}, {}, path)
    assert str(caught.value).startswith(f"{path}: ")
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="No such file"):
        load({}, {}, tmp_path / "missing.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(SetupError, match="not a TOML file"):
        load({}, {}, tmp_path / "binary.toml")


def test_unknown_variables_are_errors() -> None:
    with pytest.raises(SetupError, match=r"HEADSTART_PROT: unknown setting; did you mean HEADSTART_PORT"):
        load({}, {"HEADSTART_PROT": "80"})


def test_a_refused_key_is_not_printed() -> None:
    with pytest.raises(SetupError) as caught:
        load({}, {"HEADSTART_API_KEY": "se cret"})
    assert "se cret" not in str(caught.value)
