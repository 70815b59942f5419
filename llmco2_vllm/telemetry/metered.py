"""What a meter said of one request: its wire form between engine and front end, and the figure made of it.

It travels beside the ledger, under a key of its own, and only where there is a meter. A meter answers a tick or two
after a step, so the record covers the steps settled so far; what is still open is predicted joules times the recent
ratio of measured to predicted, and the figure says how much of the request windows really cover.
"""

from __future__ import annotations

from collections.abc import Iterable
from struct import Struct
from typing import NamedTuple

from llmco2_vllm.core.ledgers import RequestCharge
from llmco2_vllm.core.settlement import Settled, Settlement
from llmco2_vllm.telemetry.ledger import Ledger, Wire

METERED_KEY = "llmco2-metered"
METERED_VERSION = "2"
# In the order of Metered and Settled.
_METERED = Wire("metered record", METERED_VERSION, Struct("<?9d"))
_pack = _METERED.numbers.pack
# Records are exact, sums are not: the shares of a step in its windows add up to one but for rounding, and settled steps
# to what a ledger was charged, as running sums do (1e-11 in the steps after which they begin anew). Nearer than this to
# none or all is that.
_ROUNDING = 1e-6


class Metered(NamedTuple):
    """The settled steps of one request.

    final: every step is settled, the figure no longer changes. recent_ratio: measured over predicted joules.
    """

    final: bool
    settled: Settled
    recent_ratio: float


class Figure(NamedTuple):
    """Energy of a request, metered as far as ``coverage_ratio`` says, joules and 0 to 1."""

    prefill_joules: float
    decode_joules: float
    half_width_joules: float
    coverage_ratio: float
    recomputed_joules: float
    rejected_draft_joules: float

    @property
    def energy_joules(self) -> float:
        """Both phases."""
        return self.prefill_joules + self.decode_joules


def metered_of(
    charge: RequestCharge, settlement: Settlement, recent_ratio: float, reported_ratio: float = 1.0
) -> Metered | None:
    """The record of a charge now; None without a meter.

    reported_ratio: share of its energy that its client is told of; the rest is aborted energy, as of the step that
    ran after a stop string.
    """
    account = charge.account
    if account is None:
        return None
    settled = account.settled(settlement.now)
    if reported_ratio != 1.0:
        settled = Settled._make([reported_ratio * joules for joules in settled])
    return Metered(account.final, settled, recent_ratio)


def encode_metered(record: Metered) -> str:
    """The wire form, exact: version and numbers."""
    final, settled, recent_ratio = record
    return f"{METERED_VERSION},{_pack(final, *settled, recent_ratio).hex()}"


def decode_metered(text: str) -> Metered:
    """Inverse of :func:`encode_metered`. Raises ValueError on another version or a malformed record."""
    (final, *settled, recent_ratio), _ = _METERED.read(text)
    return Metered(final, Settled._make(settled), recent_ratio)


def figure(ledger: Ledger, record: Metered) -> Figure:
    """Energy of a request whose predicted figures are ``ledger``.

    Open steps are predicted joules times the recent ratio; their interval is that of the prediction.
    """
    final, settled, ratio = record
    open_prefill = max(0.0, ledger.prefill_joules - settled.predicted_prefill_joules) * (not final)
    open_decode = max(0.0, ledger.decode_joules - settled.predicted_decode_joules) * (not final)
    spent = ledger.energy_joules or 1.0
    widest = max(ledger.upper_joules - spent, spent - ledger.lower_joules) / spent
    still_open = ratio * (open_prefill + open_decode)
    return Figure(
        settled.prefill_joules + ratio * open_prefill,
        settled.decode_joules + ratio * open_decode,
        settled.half_width_joules + still_open * widest,
        _coverage(settled.measured_joules, settled.energy_joules + still_open),
        settled.recomputed_joules,
        settled.rejected_draft_joules,
    )


def _coverage(covered_joules: float, whole_joules: float) -> float:
    ratio = covered_joules / whole_joules if whole_joules > 0.0 else 0.0
    return 0.0 if ratio < _ROUNDING else 1.0 if ratio > 1.0 - _ROUNDING else ratio


def total_figure(parts: Iterable[tuple[Ledger, Metered | None]]) -> Figure | None:
    """Sum over the engine requests of one call; None where one of them has no meter."""
    items = list(parts)
    if not items or any(record is None for _, record in items):
        return None
    figures = [figure(ledger, record) for ledger, record in items if record is not None]
    whole = sum(f.energy_joules for f in figures)
    covered = _coverage(sum(f.energy_joules * f.coverage_ratio for f in figures), whole)
    sums = [sum(column) for column in zip(*figures, strict=True)]
    return Figure(sums[0], sums[1], sums[2], covered, sums[4], sums[5])
