"""PromQL of the metric table: a metric that the table lacks cannot be asked for."""

from __future__ import annotations

import re
from collections.abc import Iterable

from prometheus_client import Histogram

from llmco2_vllm.telemetry.metric_table import METRICS

RATE = "$__rate_interval"
RANGE = "$__range"
_SUFFIXES = re.compile(r"_(bucket|sum|count)$")
_NAME = re.compile(r"(?<![:\w])llmco2_[a-z0-9_]+")


def family(sample: str) -> str:
    """The metric of the table that a sample belongs to. Raises ValueError for a name that the table lacks."""
    if sample in METRICS:
        return sample
    name = _SUFFIXES.sub("", sample)
    if name not in METRICS or METRICS[name].kind is not Histogram:
        raise ValueError(f"{sample}: no such metric in the table")
    return name


def families(expressions: Iterable[str]) -> list[str]:
    """The metrics of the table that these expressions ask for, in order, each once."""
    return list(dict.fromkeys(family(sample) for text in expressions for sample in _NAME.findall(text)))


def select(sample: str, *matchers: str) -> str:
    """A selector with the dashboard's variables, as far as the metric has their labels.

    Raises ValueError for a name that the table lacks.
    """
    labels = METRICS[family(sample)].labels
    variables = ["job", *(name for name in ("model_name",) if name in labels), "instance"]
    # Failures of the front end say so in the label of the engine, which the variable does not offer.
    if "engine" in labels and "where" not in labels:
        variables.append("engine")
    chosen = [f'{name}=~"${name}"' for name in variables]
    return f"{sample}{{{', '.join((*chosen, *matchers))}}}"


def total(aggregation: str, sample: str, *matchers: str, by: str = "") -> str:
    """A gauge put together over series."""
    return f"{aggregation}{_by(by)}({select(sample, *matchers)})"


def rate(sample: str, *matchers: str, by: str = "") -> str:
    """What a counter gains per second, summed over series."""
    return f"sum{_by(by)}(rate({select(sample, *matchers)}[{RATE}]))"


def increase(sample: str, *matchers: str, by: str = "", window: str = RANGE) -> str:
    """What a counter gained, over the range shown unless told otherwise, summed over series."""
    return f"sum{_by(by)}(increase({select(sample, *matchers)}[{window}]))"


def ratio(part: str, whole: str) -> str:
    """Nothing where the whole is nothing, instead of NaN."""
    return f"{part} / ({whole} > 0)"


def told(part: str, whole: str) -> str:
    """As ratio, for a number that stands alone: NaN where both are there and the whole is nothing, to say why."""
    return f"({ratio(part, whole)} or NaN * {part} / {whole})"


def excess(estimate: str, truth: str) -> str:
    """Relative error, of both signs; NaN as in ``told``."""
    return f"{told(estimate, truth)} - 1"


def plus(*terms: str) -> str:
    """A sum to be divided by or multiplied."""
    return f"({' + '.join(terms)})"


def quantile(level: float, histogram: str) -> str:
    """A percentile of a histogram over all series, interpolated within its buckets."""
    return f"histogram_quantile({level:g}, {rate(f'{histogram}_bucket', by='le')})"


def mean(histogram: str, window: str, by: str = "") -> str:
    """The exact mean of a histogram over ``window``."""
    parts = (increase(f"{histogram}_{part}", by=by, window=window) for part in ("sum", "count"))
    return ratio(*parts)


def _by(labels: str) -> str:
    return f" by ({labels}) " if labels else ""
