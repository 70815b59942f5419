"""``vllm`` command lines, one after the other: ``python -m tests.server.command_child JSON``.

JSON is a list of ``{"arguments": [...], "environment": {...}}``. Each runs the real command in a fork of a process
that has imported vLLM already, because that import takes longer than everything else about a refusal.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from typing import IO, Any

import vllm.entrypoints.cli.main
import vllm.entrypoints.cli.serve


def run(case: dict[str, Any]) -> dict[str, Any]:
    """Exit status, standard output and standard error of a command."""
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        process = os.fork()
        if process == 0:
            for number, file in enumerate((stdout, stderr), 1):
                os.dup2(file.fileno(), number)
            os.environ.update(case.get("environment", {}))
            sys.argv = ["vllm", *case["arguments"]]
            # What it raises reaches the interpreter, as in the command itself.
            sys.exit(vllm.entrypoints.cli.main.main())
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        texts = {"stdout": _read(stdout), "stderr": _read(stderr)}
    return {"status": status, **texts}


def _read(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


if __name__ == "__main__":
    print(json.dumps({"results": [run(case) for case in json.loads(sys.argv[1])]}))
