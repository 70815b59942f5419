"""The ledger of one request: its wire form between engine and front end, and its front-end copy.

A ledger travels as one compact string inside ``EngineCoreOutput.trace_headers`` under
``KEY``, so no schema of the host changes. It holds figures and method names, never text or ids.

Some requests the front end ends by itself, at a stop string, and needs their figures on the spot. Once
such a request decodes steadily its ledger is not sent any more: the engine's running sums come with each
step, one record under ``SUMS_KEY`` for the whole batch, and the front end settles as the engine would.
"""

from __future__ import annotations

import struct
from binascii import unhexlify
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from llmco2_vllm.core.ledgers import DecodeSums, RequestCharge

KEY = "llmco2"
SUMS_KEY = "llmco2-sums"
WIRE_VERSION = "5"
_NO_SUMS: Mapping[int, DecodeSums] = {}


@dataclass(frozen=True, slots=True)
class Wire:
    """A kind of record as it travels: wire version, numbers and ``texts`` texts, comma-separated.

    The numbers are packed and written in hexadecimal: exact, and a fifth of the time of decimal digits, which is the
    scheduler thread's. Base64 is shorter and takes longer, above all to read.
    """

    name: str
    version: str
    numbers: struct.Struct
    texts: int = 0

    def read(self, record: str) -> tuple[tuple[Any, ...], list[str]]:
        """The numbers and the texts of a record. Raises ValueError on another version or a malformed record."""
        version, *parts = record.split(",", 1 + self.texts)
        if version != self.version:
            raise ValueError(f"{self.name} of wire version {version[:9]!r}; this front end reads {self.version!r}")
        if len(parts) != 1 + self.texts:
            raise ValueError(f"{self.name} with {1 + len(parts)} fields instead of {2 + self.texts}")
        try:
            return self.numbers.unpack(unhexlify(parts[0])), parts[1:]
        except (ValueError, struct.error):
            raise ValueError(f"{self.name} whose numbers are not {self.numbers.size} bytes in hexadecimal") from None


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


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a record comes from: index of the engine among data-parallel ranks, and its provenance.

    text: the provenance on the wire, written once.
    """

    engine: int
    provenance: Provenance
    text: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", "".join(f",{name}" for name in self.provenance))


# In the order of Ledger, and an engine before the order of DecodeSums. Little-endian: an engine may be on another host.
_LEDGER = Wire("ledger", WIRE_VERSION, struct.Struct("<i??5d7q"), texts=len(Provenance._fields))
_SUMS = Wire("running sums", WIRE_VERSION, struct.Struct("<iq6dq"))
_pack_ledger, _pack_sums = _LEDGER.numbers.pack, _SUMS.numbers.pack


def encode(
    charge: Ledger | RequestCharge, origin: Origin, final: bool, context: int = -1, seconds_per_joule: float = 0.0
) -> str:
    """The wire form, exact: version, numbers and provenance.

    seconds_per_joule: busy time of the engine per predicted joule, recently; a request held its share of that time.
    """
    prefill_joules, decode_joules = charge.prefill_joules, charge.decode_joules
    numbers = _pack_ledger(
        origin.engine,
        final,
        charge.in_distribution,
        prefill_joules,
        decode_joules,
        charge.lower_joules,
        charge.upper_joules,
        seconds_per_joule * (prefill_joules + decode_joules),
        charge.prefill_tokens,
        charge.decode_tokens,
        charge.cached_tokens,
        charge.recomputed_tokens,
        charge.rejected_draft_tokens,
        charge.steps,
        context,
    )
    return f"{WIRE_VERSION},{numbers.hex()}{origin.text}"


def decode(text: str) -> tuple[Ledger, Provenance]:
    """Inverse of :func:`encode`. Raises ValueError on another version or a malformed record."""
    numbers, names = _LEDGER.read(text)
    return Ledger._make(numbers), Provenance._make(names)


def encode_sums(sums: DecodeSums, engine: int) -> str:
    """The wire form of an engine's running sums, exact: differences of them are taken."""
    return f"{WIRE_VERSION},{_pack_sums(engine, *sums).hex()}"


def decode_sums(text: str) -> tuple[int, DecodeSums]:
    """Inverse of :func:`encode_sums`. Raises ValueError on another version or a malformed record."""
    (engine, *sums), _ = _SUMS.read(text)
    return engine, DecodeSums._make(sums)


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
