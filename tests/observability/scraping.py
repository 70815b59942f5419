"""A real Prometheus that scrapes a server every second, and what it answers."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import yaml

from llmco2_vllm.dashboards import build

HOST = "127.0.0.1"
START_SECONDS = 30.0
STOP_SECONDS = 10.0
RULES = build.PACKAGE / "generated" / "prometheus"


class Prometheus:
    """Scrapes ``target`` (host:port) and evaluates our rules; a context manager. Raises AssertionError with its log."""

    def __init__(self, program: Path, folder: Path, port: int, target: str) -> None:
        self.url = f"http://{HOST}:{port}"
        self.folder = folder
        config = {
            "global": {"scrape_interval": "1s", "scrape_timeout": "1s"},
            "rule_files": [str(RULES / "*.yaml")],
            "scrape_configs": [{"job_name": "vllm", "static_configs": [{"targets": [target]}]}],
        }
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        self._command = [
            str(program),
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address={HOST}:{port}",
        ]
        self._process: subprocess.Popen[bytes] | None = None
        self.http = httpx.Client(base_url=self.url, timeout=30.0, trust_env=False)

    def __enter__(self) -> Self:
        with (self.folder / "log").open("wb") as log:
            environment = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        deadline = time.monotonic() + START_SECONDS
        while not self._ready():
            assert self._process.poll() is None, (self.folder / "log").read_text()[-2000:]
            assert time.monotonic() < deadline, (self.folder / "log").read_text()[-2000:]
            time.sleep(0.1)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        process, self._process = self._process, None
        self.http.close()
        if process is not None:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def _ready(self) -> bool:
        try:
            return self.http.get("/-/ready").status_code == 200
        except httpx.HTTPError:
            return False

    @property
    def version(self) -> str:
        """Its version."""
        return str(self._get("/api/v1/status/buildinfo")["version"])

    def query(self, expression: str, at: float) -> list[dict[str, Any]]:
        """Series with their value at a time."""
        found: list[dict[str, Any]] = self._get("/api/v1/query", query=expression, time=at)["result"]
        return found

    def query_range(self, expression: str, begin: float, end: float, step: float) -> list[dict[str, Any]]:
        """Series with their values over a range."""
        answer = self._get("/api/v1/query_range", query=expression, start=begin, end=end, step=step)
        found: list[dict[str, Any]] = answer["result"]
        return found

    def value(self, expression: str) -> float:
        """The only value of an expression now; 0.0 where there is no series."""
        found = self.query(expression, time.time())
        assert len(found) <= 1, found
        return float(found[0]["value"][1]) if found else 0.0

    def rules(self) -> list[dict[str, Any]]:
        """Every rule that it has read, with its health."""
        return [rule for group in self._get("/api/v1/rules")["groups"] for rule in group["rules"]]

    def _get(self, path: str, **parameters: Any) -> Any:
        answer = self.http.get(path, params=parameters)
        body = answer.json()
        assert body["status"] == "success", f"{parameters}: {body.get('error')}"
        return body["data"]
