"""Pushing an output: the real client against a hub on this machine."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from swquant.checkpoint.hub import push, require_push
from swquant.errors import SwquantError


class Hub(ThreadingHTTPServer):
    """What the client needs of a hub for files that are not large, and what it was told."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.created: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.signed_in = True


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path.startswith("/api/whoami") and not self.server.signed_in:
            self.answer({"error": "Invalid credentials"}, 401)
        else:
            self.answer({"name": "someone", "type": "user", "auth": {"type": "access_token"}})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        if self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            self.answer({"url": f"http://{self.headers['Host']}/someone/model", "name": "someone/model", "id": "1"})
        elif self.path == "/api/validate-yaml":
            self.answer({"warnings": [], "errors": []})
        elif "/preupload/" in self.path:
            files = [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]
            self.answer({"files": files})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"http://{self.headers['Host']}/someone/model/commit/1"
            self.answer({"commitUrl": url, "commitOid": "1", "success": True, "hookOutput": ""})
        else:
            self.answer({"error": f"unexpected {self.path}"}, 404)

    def answer(self, content: Any, status: int = 200) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # it is this machine
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", endpoint)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield server
    server.shutdown()
    server.server_close()


def test_every_file_of_the_output_is_sent_in_one_commit(hub: Hub, tmp_path: Path) -> None:
    content = {"README.md": b"---\ntags:\n- swquant\n---\n", "config.json": b"{}", "gguf/model.gguf": b"\x00\x01"}
    for name, value in content.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(value)
    require_push("someone/model")
    assert push(tmp_path, "someone/model", private=True).endswith("/someone/model")
    assert hub.created[0]["name"] == "model"
    assert hub.created[0].get("private") is True or hub.created[0].get("visibility") == "private"
    assert {name: value for name, value in hub.files.items() if name in content} == content


@pytest.mark.parametrize("name", ["model", "a/b/c", "someone/--x", ""])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(SwquantError, match="expected 'owner/name'"):
        require_push(name)


def test_nobody_is_signed_in(hub: Hub) -> None:
    hub.signed_in = False
    with pytest.raises(SwquantError, match=r"someone/model cannot be pushed .* sign in with 'hf auth login'"):
        require_push("someone/model")


def test_a_push_that_fails_says_that_the_output_is_safe(hub: Hub, tmp_path: Path) -> None:
    hub.shutdown()
    hub.server_close()
    with pytest.raises(SwquantError, match=r"was not pushed .* it is whole on the disk: 'hf upload someone/model"):
        push(tmp_path, "someone/model", private=False)
