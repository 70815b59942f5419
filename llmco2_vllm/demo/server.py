"""A real ``vllm serve`` as a child process: start it, wait until it answers, stop all of it."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

from llmco2_vllm.demo.preflight import HOST, DemoError

# Eager: on two cores the compiler takes 90 s of start-up and gains nothing for a model this small.
CPU_ARGUMENTS = ("--dtype", "bfloat16", "--max-model-len", "2048", "--enforce-eager")
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}
# What the log says on the way to the first answer, in order.
STAGES = (
    ("non-default args", "arguments read"),
    ("Initializing a V1 LLM engine", "engine process started"),
    ("Starting to load model", "loading weights"),
    ("Warming up model", "warming up"),
    ("init engine", "engine ready"),
    ("Application startup complete", "listening"),
)
STOP_SECONDS = 20.0
# Free of what the installed plugin reads, so that a test decides alone what is on.
OWN_PREFIX = "LLMCO2_"


class VllmServer:
    """``vllm serve MODEL`` with ``arguments``, listening on ``port`` of this host alone.

    ``environment`` is added to that of this process. Use it as a context manager: leaving it stops
    the server, its engine and its workers, also when an exception or a signal is the reason.
    """

    def __init__(
        self, model: Path, arguments: Sequence[str] = (), environment: Mapping[str, str] | None = None, port: int = 8000
    ) -> None:
        self.port = port
        self.url = f"http://{HOST}:{port}"
        self.arguments = [
            *("serve", str(model), "--host", HOST, "--port", str(port)),
            *CPU_ARGUMENTS,
            *arguments,
        ]
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(OWN_PREFIX)}
        self.environment = {**inherited, **ENVIRONMENT, **(environment or {})}
        # The command of this Python's environment, whatever PATH says.
        self.executable = Path(sys.executable).with_name("vllm")
        self.log_path = Path()
        self.stop_seconds = STOP_SECONDS
        self._process: subprocess.Popen[bytes] | None = None

    def command_line(self) -> str:
        """The command as an operator would type it."""
        return shlex.join(["vllm", *self.arguments])

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def start(self) -> None:
        """Start the process; it does not answer yet. Raises DemoError when there is no ``vllm`` command."""
        descriptor, name = tempfile.mkstemp(prefix="llmco2-vllm-", suffix=".log")
        self.log_path = Path(name)
        try:
            # A session of its own: one signal reaches every process of it, and Ctrl-C comes to us first.
            self._process = subprocess.Popen(
                [str(self.executable), *self.arguments],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=descriptor,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            raise DemoError(f"server: {self.executable} cannot be started ({error.strerror})") from None
        finally:
            os.close(descriptor)

    def wait_ready(self, timeout: float = 300.0, on_stage: Callable[[int, str], None] | None = None) -> None:
        """Return once ``/health`` answers 200; ``timeout`` in seconds.

        ``on_stage`` is told the number of the stage reached, of ``len(STAGES)``, and its name.
        Raises DemoError, with the end of the log, when the server ends or takes longer.
        """
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self.exit_status() is not None:
                raise DemoError(f"server: ended with status {self.exit_status()} before it answered", self.log_tail())
            if on_stage is not None:
                on_stage(*self._stage())
            if self._healthy():
                return
            time.sleep(0.25)
        raise DemoError(f"server: no answer within {timeout:.0f} s", self.log_tail())

    def wait_stopped(self) -> None:
        """Return when the server has ended by itself. Raises DemoError, with the end of the log, when it failed."""
        if self._process is not None and self._process.wait() != 0:
            raise DemoError(f"server: ended with status {self.exit_status()}", self.log_tail())

    def exit_status(self) -> int | None:
        """Exit status of the server, None while it runs."""
        return None if self._process is None else self._process.poll()

    def log_tail(self, lines: int = 25) -> str:
        """The last lines of the server's log."""
        return "\n".join(self._log().splitlines()[-lines:])

    def stop(self) -> None:
        """End every process of the server and remove its log; nothing when it never started."""
        process, self._process = self._process, None
        if process is None:
            return
        try:
            # Not SIGINT: a shell lets its background processes ignore that, and they pass it on.
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(self.stop_seconds)
        finally:
            # Engine and workers share the session; whoever outlived the server goes with it.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            self.log_path.unlink(missing_ok=True)

    def _healthy(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=2.0, trust_env=False).status_code == 200
        except httpx.HTTPError:
            return False

    def _stage(self) -> tuple[int, str]:
        log = self._log()
        reached = [(number, name) for number, (mark, name) in enumerate(STAGES, 1) if mark in log]
        return reached[-1] if reached else (0, "starting Python")

    def _log(self) -> str:
        return self.log_path.read_text(errors="replace")
