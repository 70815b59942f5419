"""``vllm`` command lines, one after the other: ``python -m tests.server.command_child JSON``.

JSON is a list of ``{"arguments": [...], "environment": {...}}``. Each runs the real command in a fork of a process
that has imported vLLM already, because that import takes longer than everything else about a refusal.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import vllm.entrypoints.cli.main
import vllm.entrypoints.cli.serve


def run(case: dict[str, Any]) -> dict[str, Any]:
    """Exit status, standard output and standard error of a command."""
    with tempfile.TemporaryDirectory() as folder:
        names = [Path(folder) / name for name in ("stdout", "stderr")]
        process = os.fork()
        if process == 0:
            for number, name in enumerate(names, 1):
                os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), number)
            os.environ.update(case.get("environment", {}))
            sys.argv = ["vllm", *case["arguments"]]
            # What it raises reaches the interpreter, as in the command itself.
            sys.exit(vllm.entrypoints.cli.main.main())
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        stdout, stderr = (name.read_text(errors="replace") for name in names)
    return {"status": status, "stdout": stdout, "stderr": stderr}


if __name__ == "__main__":
    print(json.dumps({"results": [run(case) for case in json.loads(sys.argv[1])]}))
