"""The command line; through subprocesses only where a process is the point."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from PIL import Image

from service import commands, logs
from service.cli import main
from service.config import LogSettings, version
from service.pictures import GAP
from tests import tiny

TINY_SIDE = 64


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.sd(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands run in this process must not change its logging, nor see its caller's settings."""
    monkeypatch.setattr(logs, "setup", lambda settings: None)
    for variable in list(os.environ):
        if variable.startswith("HEADSTART_"):
            monkeypatch.delenv(variable)


def headstart(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "service", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)  # type: ignore[call-overload, no-any-return]


def draw(folder: Path, *arguments: str) -> int:
    model = ["--model", str(folder), "--device", "cpu", "--dtype", "float32", "--steps", "2"]
    return main(["generate", *arguments, *model])


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("loading ")]
    assert out == ""
    assert len(lines) == 1
    return lines[0]


def test_help_is_instant_and_imports_nothing_heavy() -> None:
    code = "import sys, service.cli; service.cli._parser().format_help(); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "numpy", "PIL", "fastapi", "pydantic", "uvicorn", "asyncio", "tqdm"} & set(modules)
    seconds = []
    for _ in range(3):
        begun = time.monotonic()
        result = headstart("--help")
        seconds.append(time.monotonic() - begun)
    assert result.returncode == 0
    assert 'headstart generate "a red fox" -o fox.png' in result.stdout
    assert min(seconds) < 0.3


@pytest.mark.parametrize(
    "command",
    [
        ["serve"],
        ["generate"],
        ["rewrite"],
        ["eval"],
        ["models"],
        ["models", "pull"],
        ["cache"],
        ["cache", "warm"],
        ["show"],
    ],
)
def test_every_command_has_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    assert f"usage: headstart {' '.join(command)}" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"headstart {version()}\n"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "COMMAND"),
        (["sevre"], "invalid choice: 'sevre'"),
        (["serve", "--prot", "80"], "--prot"),
        (["generate"], "PROMPT"),
        (["generate", "a", "--steps", "many"], "--steps: invalid int value: 'many'"),
        (["show"], "FILE"),
        (["rewrite"], "PROMPT"),
        (["cache", "warm"], "FILE"),
        (["generate", "a", "--cache", "no"], "--cache: invalid choice: 'no'"),
    ],
)
def test_usage_errors(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    line = one_line(capsys)
    assert told in line
    assert "--help" in line


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["serve", "--port", "66000"], "--port: '66000' is not allowed; an integer from 0 to 65535"),
        (["serve", "--host", "192.0.2.1"], "cannot listen on 192.0.2.1 port 8000: Cannot assign requested address"),
        (["serve", "--host", "x" * 64], "not a host name"),
        (["serve", "--config", "/missing.toml"], "/missing.toml: cannot be read: No such file or directory"),
        (["serve", "--dtype", "float8"], "--dtype: 'float8' is not allowed; one of auto, float32"),
        (["generate", "a", "-o", "fox.gif"], "-o: 'fox.gif' is not allowed; a name ending in .png"),
        (["generate", "a", "-o", "/missing/fox.png"], "-o: /missing/fox.png: cannot be written: no such folder"),
        (["generate", "a", "-o", "/", "--format", "png"], "-o: /: cannot be written: is a folder"),
        (["generate", "a", "-o", "-", "--json"], "--json and -o - would both write to stdout"),
        (["generate", "a", "--quality", "101"], "--quality: 101 is not allowed"),
        (["generate", "a", "--size", "big"], "--size: 'big' is not allowed; WIDTHxHEIGHT"),
        (["generate", "a", "--lora", ""], "--lora: '' is not allowed; [NAME=]FILE[:SCALE]"),
        (["generate", "a", "--device", "abacus"], "--device: 'abacus' is not allowed"),
        (["generate", "a", "--model", "/missing/model"], "/missing/model"),
        (["show", "/missing.png"], "/missing.png: cannot be read: No such file or directory"),
        (["models", "pull", "nothing"], "'nothing'"),
        (["serve", "--cache-budget", "lots"], "--cache-budget: 'lots' is not allowed; bytes, such as"),
        (["cache", "stats", "--model", "/missing/model"], "/missing/model"),
        (["cache", "stats", "--url", "localhost:8000"], "--url: 'localhost:8000' is not allowed; http://HOST:PORT"),
        (["cache", "purge", "--url", "http://127.0.0.1:1"], "http://127.0.0.1:1: cannot be asked: [Errno 111]"),
        (["cache", "warm", "/missing.txt"], "/missing.txt: cannot be read: No such file or directory"),
        (["models", "verify", "nothing"], "'nothing'"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    try:
        assert main(arguments) == 2
    finally:
        signal.signal(signal.SIGTERM, handler)
    line = one_line(capsys)
    assert line.startswith("headstart: ")
    assert told in line


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--n", "9"], "--n: 9 is not allowed; 1 to 8"),
        (["--guidance", "99"], "--guidance: 99.0 is not allowed"),
        (["--size", "65x64"], "--size: width: 65 is not allowed"),
        (["--seed", "-5"], "--seed: -5 is not allowed"),
        (["--sampler", "nope"], "--sampler: 'nope' is not allowed; this model has"),
        (["--class-label", "1"], "--class-label: 1 is not allowed"),
        (["--lora", "missing.safetensors"], "missing.safetensors"),
    ],
)
def test_mistakes_that_the_model_must_know(
    folder: Path, tmp_path: Path, arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert draw(folder, "a", "-o", str(tmp_path / "fox.png"), *arguments) == 2
    assert told in one_line(capsys)
    assert not list(tmp_path.iterdir())


def test_one_picture_and_what_it_carries(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "fox.png"
    assert draw(folder, "a red fox", "-o", str(path), "--seed", "7", "--negative", "blur", "--sampler", "euler_a") == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert f"{path}: seed 7, 2 steps" in err
    assert [file.name for file in tmp_path.iterdir()] == ["fox.png"]
    assert main(["show", str(path)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[:5] == ["Prompt: a red fox", "Negative prompt: blur", "Steps: 2", "Sampler: Euler a", "CFG scale: 7.5"]
    assert main(["show", "--json", str(path)]) == 0
    described = json.loads(capsys.readouterr().out)
    assert described["prompt"] == "a red fox"
    assert described["parameters"]["Seed"] == "7"


def test_several_pictures_and_their_contact_sheet(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "fox.webp"
    assert draw(folder, "a fox", "-o", str(path), "--n", "3", "--seed", "4294967295", "--json", "--quiet") == 0
    out, err = capsys.readouterr()
    assert err == ""
    described = json.loads(out)
    files = [str(tmp_path / f"fox-{number}.webp") for number in (1, 2, 3)]
    assert [image["file"] for image in described["images"]] == files
    assert [image["seed"] for image in described["images"]] == [4294967295, 0, 1]
    assert described["contact_sheet"] == str(path)
    assert described["timings"]["total_s"] > 0
    for file in files:
        with Image.open(file) as picture:
            assert picture.size == (TINY_SIDE, TINY_SIDE)
    with Image.open(path) as sheet:
        assert sheet.size == (2 * (TINY_SIDE + GAP) + GAP,) * 2
    assert main(["show", str(path)]) == 0
    assert "Pictures: 3" in capsys.readouterr().out


def test_the_same_seed_draws_the_same_picture_on_stdout(
    folder: Path, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    assert draw(folder, "a fox", "-o", str(tmp_path / "fox.jpg"), "--seed", "3", "--quiet") == 0
    assert draw(folder, "a fox", "-o", "-", "--seed", "3", "--quiet", "--format", "jpeg") == 0
    assert capfdbinary.readouterr().out == (tmp_path / "fox.jpg").read_bytes()


WRITER = ["--llm-dtype", "float32", "--rewrite-budget-s", "60", "--kv-pages", "64", "--device", "cpu"]


def test_a_prompt_is_rewritten_and_drawn(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ["--model", str(folder), "--dtype", "float32", *WRITER]
    assert main(["rewrite", "puppy on yelow", *model, "--quiet"]) == 0
    assert capsys.readouterr() == ("a puppy on yelow\n", "")
    assert main(["rewrite", "a red apple", *model, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts.pop("seconds") > 0
    assert facts == {"prompt": "a red apple", "revised_prompt": "a red apple", "outcome": "unchanged", "reason": ""}
    fox = tmp_path / "fox.png"
    arguments = ["--steps", "2", "-o", str(fox), "--seed", "3", "--enhance-prompt", "--json"]
    assert main(["generate", "puppy on yelow", *arguments, *model]) == 0
    out, err = capsys.readouterr()
    drawn = json.loads(out)
    assert (drawn["prompt"], drawn["revised_prompt"]) == ("puppy on yelow", "a puppy on yelow")
    assert drawn["rewrite"] == {"outcome": "rewritten", "reason": ""}
    assert drawn["timings"]["rewrite_s"] > 0
    assert "rewritten in " in err
    assert main(["show", str(fox)]) == 0
    assert capsys.readouterr().out.startswith("Prompt: a puppy on yelow\n")


def test_without_a_language_model(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rewriting alone is an error; a picture is drawn all the same, and the reason told."""
    elsewhere = ["--cache-dir", str(tmp_path), "--device", "cpu", "--dtype", "float32"]
    assert main(["rewrite", "a fox", "--model", str(folder), *elsewhere]) == 2
    assert "run `headstart models pull`" in one_line(capsys)
    assert main(["rewrite", " ", "--model", str(folder), *elsewhere]) == 2
    assert one_line(capsys).startswith("headstart: PROMPT: ' ' is not allowed; 1 to 2000 characters")
    arguments = ["--steps", "2", "-o", str(tmp_path / "fox.png"), "--enhance-prompt"]
    assert main(["generate", "a fox", *arguments, "--model", str(folder), *elsewhere]) == 0
    assert "the prompt was kept: no language model is loaded" in capsys.readouterr().err


def test_a_disk_that_refuses(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert draw(folder, "a", "-o", "/dev/full", "--format", "png") == 2
    assert one_line(capsys) == "headstart: /dev/full: cannot be written: No space left on device"


def test_drawing_that_fails_is_no_mistake_of_the_caller(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from models.diffusion.loaded import LoadedModel

    monkeypatch.setattr(LoadedModel, "decode", lambda self, latents: 1 / 0)
    assert draw(folder, "a", "-o", str(tmp_path / "fox.png"), "--quiet") == 1
    assert one_line(capsys).startswith("headstart: ")


def test_ctrl_c(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(chosen: object) -> dict[str, str]:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "_settings", interrupted)
    assert main(["models", "list"]) == 130
    assert one_line(capsys) == "headstart: interrupted"


def test_a_reader_that_leaves(folder: Path, tmp_path: Path) -> None:
    """`headstart show fox.png | true`"""
    from service.pictures import encode
    from service.recipe import Recipe

    path = tmp_path / "fox.png"
    path.write_bytes(encode(torch.zeros(8, 8, 3, dtype=torch.uint8).numpy(), "png", 90, Recipe("a" * 100_000)))
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "service", "show", str(path)]
    result = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, timeout=60, check=False)
    os.close(writer)
    assert (result.returncode, result.stderr) == (141, b"")


def test_progress_is_a_line_now_and_then_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with commands._Bars() as bars:
        for done in (0, 1_200_000, 2_500_000):
            bars.show("text tower", done, 2_500_000)
        monkeypatch.setattr(commands, "LINE_S", 0.0)
        bars.show("text tower", 2_500_000, 2_500_000)
    first, last = "fetching text tower: 0.0 of 2.5 MB\n", "fetching text tower: 2.5 of 2.5 MB\n"
    assert capsys.readouterr() == ("", first + last)


def test_models_list_pull_and_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "verify", "--cache-dir", str(tmp_path)]) == 2
    assert "headstart models pull" in one_line(capsys)
    assert main(["models", "list", "--cache-dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("default  ")
    assert main(["models", "verify", "smollm2", "default"]) == 0
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()] == ["smollm2", "default"]


@pytest.fixture
def serving(folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "service", "serve", "--model", str(folder), "--device", "cpu", "--port", str(port)]
    command += ["--cache", "off", "--llm", "off"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        yield process, f"http://127.0.0.1:{port}"
        process.kill()


def test_serve_from_start_to_sigterm(serving: tuple[subprocess.Popen[str], str]) -> None:
    process, url = serving
    assert process.stderr is not None
    first = process.stderr.readline()
    assert first.endswith(f"INFO service.app: listening on {url}, loading the model\n")
    assert httpx.get(f"{url}/health").status_code == 200
    assert httpx.get(f"{url}/health/ready").status_code == 503
    port = url.rpartition(":")[2]
    taken = headstart("serve", "--port", port)
    assert taken.returncode == 2
    assert taken.stderr == (
        f"headstart: cannot listen on 127.0.0.1 port {port}: Address already in use; try another --host or --port\n"
    )
    lines = []
    while not lines or "ready" not in lines[-1].split(": ", 1)[1].split()[0]:
        lines.append(process.stderr.readline())
        assert lines[-1], "the server ended"
    assert re.search(r"INFO service.app: ready after \d+\.\d s, serving ", lines[-1])
    command = '{"prompt": "a red apple", "num_inference_steps": 2}'
    reply = httpx.post(f"{url}/generate", content=command, headers={"Accept": "image/png"}, timeout=60)
    assert (reply.status_code, reply.headers["content-type"]) == (200, "image/png")
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    rest = process.stderr.read()
    assert "Traceback" not in rest
    assert "apple" not in rest


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_loading_can_be_stopped(serving: tuple[subprocess.Popen[str], str], sent: int, status: int) -> None:
    process, url = serving
    assert process.stderr is not None
    assert "listening on" in process.stderr.readline()
    assert httpx.get(f"{url}/health").status_code == 200
    process.send_signal(sent)
    assert process.wait(2) == status
    assert "Traceback" not in process.stderr.read()


def test_serving_nothing_ends_with_one_line(tmp_path: Path) -> None:
    result = headstart("serve", "--port", "0", "--model", str(tmp_path), "--log-level", "warning")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert str(tmp_path) in result.stderr


def test_log_settings_of_a_command_line_are_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[LogSettings] = []
    monkeypatch.setattr(logs, "setup", seen.append)
    main(["generate", "a", "-o", "fox.gif"])
    main(["generate", "a", "-o", "fox.gif", "--log-level", "debug", "--log-json"])
    assert seen == [LogSettings(level="warning"), LogSettings(level="debug", json=True)]
