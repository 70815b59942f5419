"""The ledger of one request: its wire form between engine and front end, and its front-end copy.

A ledger travels as one compact CSV string inside ``EngineCoreOutput.trace_headers`` under
``KEY``, so no schema of the host changes. It holds figures and method names, never text or ids.

Some requests the front end ends by itself, at a stop string, and needs their figures on the spot. Once
such a request decodes steadily its ledger is not sent any more: the engine's running sums come with each
step, one record under ``SUMS_KEY`` for the whole batch, and the front end settles as the engine would.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from llmco2_vllm.core.ledgers import DecodeSums, RequestCharge

KEY = "llmco2"
SUMS_KEY = "llmco2-sums"
WIRE_VERSION = "3"
# One % operation: half the time of an f-string with as many floats, on the scheduler thread.
_WIRE = WIRE_VERSION + ",%d,%d,%d" + ",%.9g" * 5 + ",%d" * 7 + ",%s,%s,%s"
# Differences of these are taken: every digit counts.
_SUMS_WIRE = WIRE_VERSION + ",%d,%d,%d" + ",%.17g" * 9


_NO_SUMS: Mapping[int, DecodeSums] = {}


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
    held_seconds: of the engine's whole hardware, at the recent seconds per predicted joule; 0 while that is not known.
    context: tokens in the KV cache of a request that is charged through the running sums, else -1.
    """

    engine: int = 0
    final: bool = False
    in_distribution: bool = True
    prefill_joules: float = 0.0
    decode_joules: float = 0.0
    lower_joules: float = 0.0
    upper_joules: float = 0.0
    held_seconds: float = 0.0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    cached_tokens: int = 0
    recomputed_tokens: int = 0
    rejected_draft_tokens: int = 0
    steps: int = 0
    context: int = -1

    @property
    def energy_joules(self) -> float:
        """Predicted energy of both phases."""
        return self.prefill_joules + self.decode_joules

    @property
    def useful_tokens(self) -> int:
        """Computed tokens less those computed again and rejected drafts: waste makes no figure per token better."""
        return self.prefill_tokens + self.decode_tokens - self.recomputed_tokens - self.rejected_draft_tokens


class Origin(NamedTuple):
    """Where a record comes from: index of the engine among data-parallel ranks, and its provenance."""

    engine: int
    provenance: Provenance


def encode(
    charge: Ledger | RequestCharge, origin: Origin, final: bool, context: int = -1, seconds_per_joule: float = 0.0
) -> str:
    """The wire form: comma-separated, version first, joules with nine significant digits.

    seconds_per_joule: busy time of the engine per predicted joule, recently; a request held its share of that time.
    """
    e, p = charge, origin.provenance
    return _WIRE % (
        origin.engine,
        final,
        e.in_distribution,
        e.prefill_joules,
        e.decode_joules,
        e.lower_joules,
        e.upper_joules,
        seconds_per_joule * e.energy_joules,
        e.prefill_tokens,
        e.decode_tokens,
        e.cached_tokens,
        e.recomputed_tokens,
        e.rejected_draft_tokens,
        e.steps,
        context,
        p.predictor,
        p.meter,
        p.meter_reason,
    )


def decode(text: str) -> tuple[Ledger, Provenance]:
    """Inverse of :func:`encode`. Raises ValueError on another version or a malformed record."""
    parts = text.split(",", 18)
    _check_version(parts[0])
    if len(parts) != 19:
        raise ValueError(f"ledger with {len(parts)} fields instead of 19")
    counts = [int(p) for p in parts[9:16]]
    prefill, decode, lower, upper, held = (float(p) for p in parts[4:9])
    ledger = Ledger(int(parts[1]), parts[2] == "1", parts[3] == "1", prefill, decode, lower, upper, held, *counts)
    return ledger, Provenance(parts[16], parts[17], parts[18])


def encode_sums(sums: DecodeSums, engine: int) -> str:
    """The wire form of an engine's running sums, exact."""
    return _SUMS_WIRE % (engine, sums.steps, sums.outside_at, *sums[1:10])


def decode_sums(text: str) -> tuple[int, DecodeSums]:
    """Inverse of :func:`encode_sums`. Raises ValueError on another version or a malformed record."""
    parts = text.split(",")
    _check_version(parts[0])
    if len(parts) != 13:
        raise ValueError(f"running sums with {len(parts)} fields instead of 13")
    return int(parts[1]), DecodeSums._make([int(parts[2]), *map(float, parts[4:]), int(parts[3])])


def _check_version(version: str) -> None:
    if version != WIRE_VERSION:
        raise ValueError(f"record of wire version {version!r}; this front end reads {WIRE_VERSION!r}")


def total(ledgers: Iterable[Ledger]) -> Ledger:
    """Sum over the engine requests of one call (n > 1, several prompts, beam search).

    Errors of one predictor on one host are taken as fully correlated, so interval ends add up.
    """
    items = list(ledgers)
    if not items:
        raise ValueError("no ledgers to add up")
    sums = [sum(column) for column in zip(*(item[3:-1] for item in items), strict=True)]
    whole = Ledger(items[0].engine, all(i.final for i in items), all(i.in_distribution for i in items), *sums)
    # The time of a part is not known: neither is that of the whole.
    unknown = any(i.energy_joules and not i.held_seconds for i in items)
    return whole._replace(held_seconds=0.0) if unknown else whole


@dataclass(slots=True)
class RequestLedger:
    """The front end's live copy for one engine request.

    complete: the figures cover the whole request: the engine said it was the final record, or
        the front end itself ended the request (stop string) on the output that carried it.
    finished: the request has left the front end; what is predicted no longer changes.
    metered: what a meter said so far (``telemetry.metered.Metered``), None without a meter.
    begin_epoch_seconds, end_epoch_seconds: when the front end took it up, and when it left.
    """

    ledger: Ledger = field(default_factory=Ledger)
    provenance: Provenance | None = None
    complete: bool = False
    finished: bool = False
    metered: Any = None
    begin_epoch_seconds: float = 0.0
    end_epoch_seconds: float = 0.0
    _begin: DecodeSums | None = None

    def receive(self, text: str, sums: Mapping[int, DecodeSums] = _NO_SUMS) -> None:
        """Take over a newer record; ``sums`` are those of each engine at that moment.

        Raises ValueError as :func:`decode` does.
        """
        self.ledger, self.provenance = decode(text)
        self.complete = self.ledger.final
        self._begin = sums.get(self.ledger.engine) if self.ledger.context >= 0 else None

    @property
    def follows_sums(self) -> bool:
        """Whether :meth:`settle` brings the ledger up to date."""
        return self._begin is not None

    def settle(self, sums: DecodeSums) -> None:
        """Charge the steps between the last record and ``sums``, later sums of the same engine."""
        begin, ledger = self._begin, self.ledger
        if begin is None:
            return
        steps = sums.steps - begin.steps
        joules, lower, upper = sums.since(begin, ledger.context - begin.steps)
        pace = ledger.held_seconds / ledger.energy_joules if ledger.energy_joules else 0.0
        self.ledger = ledger._replace(
            in_distribution=ledger.in_distribution and sums.outside_at <= begin.steps,
            decode_joules=ledger.decode_joules + joules,
            lower_joules=ledger.lower_joules + lower,
            upper_joules=ledger.upper_joules + upper,
            held_seconds=ledger.held_seconds + joules * pace,
            decode_tokens=ledger.decode_tokens + steps,
            steps=ledger.steps + steps,
            context=ledger.context + steps,
        )
        self._begin = sums
