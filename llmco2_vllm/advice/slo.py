"""Service level objectives: upper bounds on mean latencies."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields

from llmco2_vllm.advice.steady import Steady

_SECONDS = {"": 1.0, "s": 1.0, "ms": 1e-3}
_BOUND = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(s|ms)?")


@dataclass(frozen=True)
class Slo:
    """Bounds in seconds on the means of a workload; None is no bound."""

    ttft: float | None = None
    tpot: float | None = None
    latency: float | None = None

    @classmethod
    def parse(cls, text: str) -> Slo:
        """``ttft=1,tpot=50ms``: seconds unless it says ms. Raises ValueError that names the key and what is allowed."""
        names = [field.name for field in fields(cls)]
        found: dict[str, float] = {}
        for part in filter(None, (part.strip() for part in text.split(","))):
            name, equals, value = (word.strip() for word in part.partition("="))
            bound = _BOUND.fullmatch(value)
            if name not in names or not equals:
                raise ValueError(f"slo={part!r} is not possible; allowed: {', '.join(f'{n}=SECONDS' for n in names)}")
            if name in found:
                raise ValueError(f"slo={text!r} is not possible; {name} is there twice")
            if bound is None or float(bound[1]) <= 0:
                raise ValueError(
                    f"slo: {name}={value!r} is not possible; allowed: seconds above 0, such as 0.05 or 50ms"
                )
            found[name] = float(bound[1]) * _SECONDS[bound[2] or ""]
        return cls(**found)

    def broken_by(self, steady: Steady) -> str | None:
        """The first bound that is not kept, in words; None when all are."""
        for field in fields(self):
            bound, value = getattr(self, field.name), getattr(steady, f"{field.name}_seconds")
            if bound is not None and value is not None and value > bound:
                return f"{field.name} {value:.4g} s, allowed {bound:.4g} s"
        return None

    def to_dict(self) -> dict[str, float]:
        """The bounds that are set, for JSON."""
        return {f"{f.name}_seconds": getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
