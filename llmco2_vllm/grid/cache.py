"""Figures on disk, so that a restart does not begin without any and several front ends ask once.

One JSON file for each provider, kind and address of its API: rows of g CO2e/kWh, begin, end, fetched (epoch
seconds), estimated, source. It is replaced as a whole, so a reader sees one state or the other; a file that cannot be
read is as none at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from llmco2_vllm.core.intensity import Intensity, Kind, check_grams

SCHEMA = 1


def cache_folder() -> Path:
    """Where figures are kept unless a folder is given."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmco2" / "grid"


class Cache:
    """The file of one provider and kind."""

    def __init__(self, folder: Path, name: str, kind: Kind, address: str | None = None) -> None:
        """address: of the API where it is not the provider's own: its figures are another's, in a file of its own."""
        place = () if address is None else (hashlib.sha256(address.rstrip("/").encode()).hexdigest()[:8],)
        words = (name, kind.zone or "", kind.method, kind.basis, kind.factors or "unstated", *place)
        self._path = folder / ("_".join(re.sub(r"[^A-Za-z0-9-]", "-", word) for word in words) + ".json")
        self._kind = kind

    def read(self) -> tuple[Intensity, ...]:
        """The figures; none when there is no file or it is not what was written."""
        try:
            content = json.loads(self._path.read_text("utf-8"))
            if content["schema"] != SCHEMA or content["kind"] != self._words():
                return ()
            return tuple(self._figure(row) for row in content["figures"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return ()

    def write(self, figures: Sequence[Intensity]) -> None:
        """Replace the file. Raises OSError; what was there is then unchanged."""
        rows = [
            [
                figure.grams_per_kwh,
                figure.valid_from_epoch_seconds,
                figure.valid_to_epoch_seconds,
                figure.fetched_epoch_seconds,
                figure.estimated,
                figure.source,
            ]
            for figure in figures
        ]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile("w", dir=self._path.parent, suffix=".new", delete=False, encoding="utf-8") as file:
            temporary = Path(file.name)
            try:
                json.dump({"schema": SCHEMA, "kind": self._words(), "figures": rows}, file)
            except BaseException:
                with contextlib.suppress(OSError):
                    temporary.unlink()
                raise
        temporary.replace(self._path)

    def _words(self) -> list[str | None]:
        return [self._kind.zone, self._kind.method, self._kind.basis, self._kind.factors]

    def _figure(self, row: Any) -> Intensity:
        grams, begin, end, fetched, estimated, source = row
        begin, end, fetched = (float(at) for at in (begin, end, fetched))
        if not isinstance(source, str) or not isinstance(estimated, bool):
            raise ValueError("source or estimated of another type")
        kind = self._kind
        words = (kind.zone, kind.method, kind.basis, source, estimated)
        return Intensity(check_grams(grams, "grams"), *words, begin, end, fetched, kind.factors)
