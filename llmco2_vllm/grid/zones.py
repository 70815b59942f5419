"""Grid zones as Electricity Maps names them: a country's two letters, and parts of it after a hyphen."""

from __future__ import annotations

import csv
import difflib
import re
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.resources import files

WORLD = "WORLD"
_PATTERN = re.compile(r"[A-Z]{2}(-[A-Za-z0-9]+)*|WORLD")
# Countries of ISO 3166 that the tables do not have; Electricity Maps may.
_OTHER_COUNTRIES = (
    "AD AI AQ AX BL BQ BV CC CF CW CX EH FM GG GS HM IM IO JE LI MC MF MH MP NF NU PN PW SJ SM SX TF TK TV UM VA WF YT"
)
# What people write who mean another code.
_MEANT = {"UK": "GB", "EL": "GR", "USA": "US", "GER": "DE", "ENG": "GB"}


def shipped_rows(name: str) -> Iterator[Mapping[str, str]]:
    """Rows of ``data/grid/{name}.csv``."""
    text = files("llmco2_vllm").joinpath("data", "grid", f"{name}.csv").read_text("utf-8")
    return iter(csv.DictReader(text.splitlines()))


@cache
def known_zones() -> tuple[str, ...]:
    """Zones of the shipped tables, sorted. Electricity Maps knows more parts of countries."""
    rows = {name: shipped_rows(name) for name in ("intensity", "regions")}
    return tuple(sorted({row["zone"] for part in rows.values() for row in part}))


def country(zone: str) -> str:
    """The country a zone lies in: US of US-CAL-CISO."""
    return zone.partition("-")[0]


def _is_country(code: str) -> bool:
    return code in known_zones() or code in _OTHER_COUNTRIES.split()


def near(zone: str) -> list[str]:
    """Known zones that may have been meant, the likeliest first."""
    wanted = zone.upper().replace("_", "-")
    meant = [_MEANT[country(wanted)]] if country(wanted) in _MEANT else []
    return [*meant, *difflib.get_close_matches(wanted, known_zones(), n=3, cutoff=0.5)][:3]


def check_zone(zone: str) -> str:
    """``zone`` itself. Raises ValueError when it is none or lies in no known country; the message names near ones.

    Parts of known countries pass, known or not: only Electricity Maps itself can tell.
    """
    if not _PATTERN.fullmatch(zone) or not _is_country(country(zone)):
        meant = near(zone)
        hint = f"; near: {', '.join(meant)}" if meant else ""
        raise ValueError(
            f"zone={zone!r} is not known; allowed: a zone as Electricity Maps names it (FR, US-CAL-CISO){hint}"
        )
    return zone
