"""Keys of the providers, from the environment or a file. What is shown of a key is where it comes from."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

# What a header may carry as it is; a line break or a space inside is a slip in copying.
_ALLOWED = re.compile(r"[!-~]+")


class Key:
    """A secret that is read when needed, so a file may be replaced while we run. Neither repr nor str show it."""

    __slots__ = ("_environment", "_path", "_variable")

    def __init__(self, variable: str, path: Path | None, environment: Mapping[str, str]) -> None:
        """A file, when one is given, else the variable of ``environment``.

        Raises ValueError with one line when there is none, when it cannot be read or holds what no header allows.
        """
        self._variable, self._path = variable, None if path is None else path.expanduser()
        self._environment = environment
        self.read()

    @property
    def origin(self) -> str:
        """Where it comes from."""
        return f"the variable {self._variable}" if self._path is None else f"the file {self._path}"

    def __repr__(self) -> str:
        return f"Key({self.origin})"

    def read(self) -> str:
        """The secret. Raises ValueError as the constructor."""
        if self._path is None:
            text = self._environment.get(self._variable, "")
        else:
            try:
                text = self._path.read_text("utf-8")
            except (OSError, ValueError) as error:
                reason = error.strerror if isinstance(error, OSError) else "not text"
                raise ValueError(f"key_file={str(self._path)!r} cannot be read ({reason})") from None
        secret = text.strip()
        if not secret:
            place = f"set {self._variable} or key_file" if self._path is None else f"put the key into {self._path}"
            raise ValueError(f"key: none in {self.origin}; {place}")
        if not _ALLOWED.fullmatch(secret):
            raise ValueError(
                f"key: {self.origin} holds spaces, line breaks or other signs no key has; allowed: one word"
            )
        return secret
