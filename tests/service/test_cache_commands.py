"""`headstart cache` and `headstart generate --cache`, on a folder and through a server."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch

from service import logs
from service.cache_commands import Client
from service.cli import main
from service.config import Settings
from service.errors import HeadstartError, SetupError
from tests.service.cached import bundle, client_of, draw, serving_cached, until_kept

PICTURES = ["--sampler", "ddim", "--steps", "10"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle(tmp_path_factory.mktemp("cached") / "tiny")


@pytest.fixture(autouse=True)
def untouched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Commands run in this process must not change its logging, nor see its caller's settings."""
    monkeypatch.setattr(logs, "setup", lambda settings: None)
    for variable in list(os.environ):
        if variable.startswith("HEADSTART_"):
            monkeypatch.delenv(variable)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, object]:
    assert main([*arguments, "--json"]) == 0
    answer: dict[str, object] = json.loads(capsys.readouterr().out)
    return answer


def test_filling_looking_using_and_emptying_a_folder(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["--model", str(model), "--cache-folder", str(tmp_path / "latents")]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red apple\ntwo dogs\n\na red apple\n")
    drawing = [*settings, "--device", "cpu", "--dtype", "float32"]
    drawn = run(capsys, "cache", "warm", str(prompts), "--quiet", *drawing, *PICTURES)
    assert (drawn["drawn"], drawn["stored"], drawn["entries"]) == (2, 2, 2)
    stats = run(capsys, "cache", "stats", *settings)
    assert stats["tenants"] == {"default": {"entries": 2, "bytes": drawn["bytes"]}}
    assert stats["damaged"] == 0
    fox = ["-o", str(tmp_path / "fox.png"), "--quiet", *drawing, *PICTURES]
    for mode, result in (("use", "hit"), ("bypass", "bypass")):
        described = run(capsys, "generate", "a red apple", "--cache", mode, "--seed", "1", *fox)
        (image,) = described["images"]  # type: ignore[misc]
        assert image["cache"] == result
        assert (image["steps_skipped"] > 0) is (result == "hit")
    assert run(capsys, "cache", "purge", "--prompt", "a green cat", *settings)["purged"] == 0
    assert run(capsys, "cache", "purge", "--tenant", "nobody", *settings)["purged"] == 0
    assert run(capsys, "cache", "purge", "--prompt", "two dogs", *settings)["purged"] == 1
    assert run(capsys, "cache", "purge", *settings)["purged"] == 1
    assert run(capsys, "cache", "stats", *settings)["tenants"] == {}
    assert main(["cache", "stats", *settings]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["tenants: none", "damaged: 0"]


def test_through_a_server(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a red apple"}\n{"prompt": "two dogs"}\n')
    with serving_cached(model, tmp_path / "latents", tenants=True) as url, client_of(url, "ada") as ada:
        assert main(["cache", "stats", "--url", url]) == 2
        assert "a valid API key is needed" in capsys.readouterr().err
        monkeypatch.setenv("HEADSTART_API_KEY", "key-of-ada")
        assert run(capsys, "cache", "warm", str(prompts), "--url", url, "--quiet", *PICTURES)["drawn"] == 2
        until_kept(ada, 2)
        assert draw(ada, "two dogs")["result"] == "hit"
        stats = run(capsys, "cache", "stats", "--url", f"{url}/", "--tenant", "ada")
        assert (stats["tenant"], stats["entries"]) == ("ada", 2)
        assert main(["cache", "stats", "--url", url]) == 0
        assert "  hit: 1" in capsys.readouterr().out
        assert main(["cache", "purge", "--url", url, "--tenant", "bob"]) == 2
        assert "tenant: 'bob' is not allowed" in capsys.readouterr().err
        assert run(capsys, "cache", "purge", "--url", url, "--prompt", "two dogs")["purged"] == 1
        folder = ["--model", str(model), "--cache-folder", str(tmp_path / "latents")]
        assert main(["cache", "purge", *folder]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.endswith("in use by another process; a server that uses it can be asked with --url")
        assert run(capsys, "cache", "purge", "--url", url)["purged"] == 1


def test_no_cache_to_fill(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.txt").write_text("a fox\n")
    (tmp_path / "off.toml").write_text("[cache]\nenabled = false\n")
    arguments = ["--model", str(model), "--device", "cpu", "--dtype", "float32", "--config", str(tmp_path / "off.toml")]
    assert main(["cache", "warm", str(tmp_path / "prompts.txt"), "--quiet", *arguments]) == 2
    assert capsys.readouterr().err == "headstart: there is no cache to fill; the log says why\n"


class Answers(BaseHTTPRequestHandler):
    """A server that is busy once, then broken, then no server of ours."""

    replies = iter(
        [
            (429, b'{"error": {"message": "full"}}'),
            (200, b'{"entries": 3}'),
            (500, b'{"error": {"message": "broken"}}'),
            (404, b"<html>"),
            (200, b"<html>"),
        ]
    )

    def do_GET(self) -> None:
        status, body = next(self.replies)
        self.send_response(status)
        self.send_header("Retry-After", "0")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


def test_servers_that_answer_otherwise() -> None:
    with HTTPServer(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        client = Client(f"http://127.0.0.1:{server.server_port}", Settings())
        try:
            assert client.ask("GET", "/cache") == {"entries": 3}
            with pytest.raises(HeadstartError, match=r"^http://127.0.0.1:\d+: broken$") as caught:
                client.ask("GET", "/cache")
            assert not isinstance(caught.value, SetupError)
            with pytest.raises(SetupError, match="status 404"):
                client.ask("GET", "/cache")
            with pytest.raises(SetupError, match="cannot be asked: Expecting value"):
                client.ask("GET", "/cache")
        finally:
            server.shutdown()
            thread.join()
