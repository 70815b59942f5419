"""The ledger of one request: its wire form between engine and front end, and its front-end copy.

A ledger travels as one compact CSV string inside ``EngineCoreOutput.trace_headers`` under
``KEY``, so no schema of the host changes. It holds figures and method names, never text or ids.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from llmco2_vllm.core.ledgers import RequestCharge

KEY = "llmco2"
WIRE_VERSION = "1"
# One % operation: half the time of an f-string with as many floats, on the scheduler thread.
_WIRE = WIRE_VERSION + ",%d,%d,%d,%.9g,%.9g,%.9g,%.9g,%d,%d,%d,%d,%d,%d,%s,%s,%s"


class Provenance(NamedTuple):
    """How the figures of an engine came about: constant while a predictor and a meter are in place."""

    predictor: str
    meter: str
    meter_reason: str = ""


class Ledger(NamedTuple):
    """What one request has been charged so far. Predicted joules, before execution.

    ``energy = prefill_joules + decode_joules`` lies in [lower_joules, upper_joules] at 90 %.
    prefill_tokens counts computed tokens, so cached prompt tokens are not in it and tokens
    replayed after a preemption are (they are also counted in recomputed_tokens).
    """

    engine: int = 0
    final: bool = False
    in_distribution: bool = True
    prefill_joules: float = 0.0
    decode_joules: float = 0.0
    lower_joules: float = 0.0
    upper_joules: float = 0.0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    cached_tokens: int = 0
    recomputed_tokens: int = 0
    rejected_draft_tokens: int = 0
    steps: int = 0

    @property
    def energy_joules(self) -> float:
        """Predicted energy of both phases."""
        return self.prefill_joules + self.decode_joules


class Origin(NamedTuple):
    """Where a record comes from: index of the engine among data-parallel ranks, and its provenance."""

    engine: int
    provenance: Provenance


def encode(charge: Ledger | RequestCharge, origin: Origin, final: bool) -> str:
    """The wire form: comma-separated, version first, joules with nine significant digits."""
    e, p = charge, origin.provenance
    return _WIRE % (
        origin.engine,
        final,
        e.in_distribution,
        e.prefill_joules,
        e.decode_joules,
        e.lower_joules,
        e.upper_joules,
        e.prefill_tokens,
        e.decode_tokens,
        e.cached_tokens,
        e.recomputed_tokens,
        e.rejected_draft_tokens,
        e.steps,
        p.predictor,
        p.meter,
        p.meter_reason,
    )


def decode(text: str) -> tuple[Ledger, Provenance]:
    """Inverse of :func:`encode`. Raises ValueError on another version or a malformed record."""
    parts = text.split(",", 16)
    if parts[0] != WIRE_VERSION:
        raise ValueError(f"ledger of wire version {parts[0]!r}; this front end reads {WIRE_VERSION!r}")
    if len(parts) != 17:
        raise ValueError(f"ledger with {len(parts)} fields instead of 17")
    joules = [float(p) for p in parts[4:8]]
    counts = [int(p) for p in parts[8:14]]
    prefill, decode, lower, upper = joules
    ledger = Ledger(int(parts[1]), parts[2] == "1", parts[3] == "1", prefill, decode, lower, upper, *counts)
    return ledger, Provenance(parts[14], parts[15], parts[16])


def total(ledgers: Iterable[Ledger]) -> Ledger:
    """Sum over the engine requests of one call (n > 1, several prompts, beam search).

    Errors of one predictor on one host are taken as fully correlated, so interval ends add up.
    """
    items = list(ledgers)
    if not items:
        raise ValueError("no ledgers to add up")
    sums = [sum(column) for column in zip(*(item[3:] for item in items), strict=True)]
    return Ledger(
        items[0].engine,
        all(i.final for i in items),
        all(i.in_distribution for i in items),
        *sums,
    )


@dataclass(slots=True)
class RequestLedger:
    """The front end's live copy for one engine request.

    complete: the figures cover the whole request: the engine said it was the final record, or
        the front end itself ended the request (stop string) on the output that carried it.
    finished: the request has left the front end; its figures no longer change.
    """

    model_name: str = ""
    ledger: Ledger = field(default_factory=Ledger)
    provenance: Provenance | None = None
    complete: bool = False
    finished: bool = False

    def receive(self, text: str) -> None:
        """Take over a newer record. Raises ValueError as :func:`decode` does."""
        self.ledger, self.provenance = decode(text)
        self.complete = self.ledger.final
