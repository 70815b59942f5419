"""Types of options that several commands share."""

from __future__ import annotations

import math
import re
from typing import Any

import click


class FiniteRange(click.FloatRange):
    """A FloatRange that also refuses NaN, which compares with no bound, and infinity."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number. Fails with one line that names the option and what is allowed."""
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(
                f"{value} is not possible; allowed: a finite number in the range {self._describe_range()}.", param
            )
        return number


def http_url(text: str) -> str:
    """The address of a page, without the anchor of a section. Raises BadParameter, which says what is allowed."""
    if not re.fullmatch(r"https?://[^\s#/?]+[^\s#]*", text):
        raise click.BadParameter(
            f"{text!r} is not possible; allowed: http://HOST/... or https://HOST/..., no # or blank"
        )
    return text
