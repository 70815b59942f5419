"""The ``carbon`` object of a response: its models, its JSON schema and how it is made from ledgers.

``python -m llmco2_vllm.telemetry.annotation`` prints the JSON schema published beside the package's data.
What is not known is left out: never null, never 0.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic.json_schema import SkipJsonSchema

from llmco2_vllm.core.carbon import host_joules, sci_grams
from llmco2_vllm.telemetry.accounting import Accounting
from llmco2_vllm.telemetry.ledger import Ledger, RequestLedger, total
from llmco2_vllm.telemetry.metered import Figure, total_figure

SCHEMA: Final = "llmco2/1"
METHOD: Final = "1.0"
ATTRIBUTION: Final = "step-kernel/1"


def _six_digits(value: float) -> float:
    return float(f"{value:.6g}")


def _without_default(schema: dict[str, Any]) -> None:
    schema.pop("default", None)


def _optional(description: str) -> Any:
    return Field(None, description=description, json_schema_extra=_without_default)


Number = Annotated[float, Field(ge=0, allow_inf_nan=False), AfterValidator(_six_digits)]
Count = Annotated[int, Field(ge=0)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", serialize_by_alias=True)


class Estimate(_Part):
    """Energy of the request as predicted before each of its steps ran."""

    energy_joules: Number = Field(description="Device energy of both phases, J")
    prefill_joules: Number = Field(description="Part of it spent on known tokens, J")
    decode_joules: Number = Field(description="Part of it spent on sampled tokens, J")
    host_joules: Number | SkipJsonSchema[None] = _optional("Rest of the node, J, on top of energy_joules")
    lower: Number = Field(description="Lower end of the 90 % interval of energy_joules, J")
    upper: Number = Field(description="Upper end of the 90 % interval of energy_joules, J")
    when: Literal["before_execution"]


class MeasuredEnergy(_Part):
    """Energy of the request as metered; what no window covers yet is predicted, as coverage_ratio says."""

    value: Number = Field(description="Device energy, J")
    lower: Number = Field(description="Lower end of its interval, J")
    upper: Number = Field(description="Upper end of its interval, J")
    prefill: Number | SkipJsonSchema[None] = _optional("Part spent on known tokens, J")
    decode: Number | SkipJsonSchema[None] = _optional("Part spent on sampled tokens, J")
    host: Number | SkipJsonSchema[None] = _optional("Rest of the node, J, on top of value")
    recomputed: Number | SkipJsonSchema[None] = _optional("Part spent on tokens computed again after a preemption, J")
    rejected_drafts: Number | SkipJsonSchema[None] = _optional("Part spent on draft tokens that were not accepted, J")


class CarbonGrams(_Part):
    """Emissions of the request in g CO2e; the interval is that of the energy alone."""

    operational: Number | SkipJsonSchema[None] = _optional(
        "Electricity used, location-based, site overhead included when pue is given, g CO2e"
    )
    lower: Number | SkipJsonSchema[None] = _optional("operational at the lower end of the energy interval, g CO2e")
    upper: Number | SkipJsonSchema[None] = _optional("operational at the upper end of the energy interval, g CO2e")
    operational_market: Number | SkipJsonSchema[None] = _optional(
        "The same electricity by intensity_market, beside operational and never added to it, g CO2e"
    )
    embodied: Number | SkipJsonSchema[None] = _optional("Share of making the hardware, g CO2e")
    total: Number | SkipJsonSchema[None] = _optional("operational + embodied, where both are known, g CO2e")


class Sci(_Part):
    """Software Carbon Intensity (ISO/IEC 21031): (operational + embodied) per functional unit, of the inference server.

    Location-based; absent where embodied is not known. Idle time is not in it.
    """

    per_request: Number = Field(description="g CO2e per API call")
    per_1000_tokens: Number | SkipJsonSchema[None] = _optional(
        "g CO2e per 1000 tokens computed to some use: not again, not drafts in vain"
    )


class Intensity(_Part):
    """Carbon intensity of the electricity."""

    grams_per_kwh: Number = Field(description="g CO2e/kWh")
    zone: str | SkipJsonSchema[None] = _optional("Grid zone as its source names it; WORLD for the world average")
    method: Literal["average", "marginal"]
    basis: Literal["location", "market"]
    factors: Literal["lifecycle", "direct"] | SkipJsonSchema[None] = _optional("What counts; absent: not said")
    source: str = Field(description="Where the value comes from")
    estimated: bool = Field(description="Modelled, forecast, or a stand-in for the site or the hour")
    age_seconds: Number | SkipJsonSchema[None] = _optional("Since it was last known to hold; absent: without a time")


class Embodied(_Part):
    """How carbon_grams.embodied came about."""

    model: Literal["product", "components", "llmcarbon"] = Field(description="Whose figures of parts are added up")
    held_seconds: Number = Field(description="Time of the engine's whole hardware that the request held, s")
    lifetime_years: Number = Field(description="Of the devices, years")
    host_lifetime_years: Number | SkipJsonSchema[None] = _optional("Of the host, years; absent: no host counted")
    idle: Literal["line", "busy"] = Field(description="Idle time is a line of its own, or busy time carries it")
    utilisation_ratio: Number | SkipJsonSchema[None] = _optional("Planned busy part of the hardware's life, for busy")
    omitted: list[str] = Field(description="Parts no figure is known of; they are not 0")


class NodeOverhead(_Part):
    """What the rest of the node takes, counted in carbon_grams."""

    host_ratio: Number | SkipJsonSchema[None] = _optional("CPUs and memory, per joule of the devices")
    host_source: str | SkipJsonSchema[None] = _optional("settings, or the meter that measured it (rapl)")
    auxiliary_ratio: Number | SkipJsonSchema[None] = _optional("Fans, network, losses, per joule of devices and host")


class Tokens(_Part):
    """Tokens the figures cover."""

    prefill: Count = Field(description="Computed tokens whose values were already known")
    cached: Count = Field(description="Prompt tokens found in the prefix cache, not computed")
    recomputed: Count = Field(description="Tokens computed again after a preemption, also in prefill")
    decode: Count = Field(description="Sampled tokens and drafts computed")
    rejected_drafts: Count | SkipJsonSchema[None] = _optional("Draft tokens computed and not accepted")


class Annotation(_Part):
    """Energy and carbon of one API call, all its engine requests together."""

    schema_version: Literal["llmco2/1"] = Field(alias="schema", description="Version of this shape")
    method: Literal["1.0"] = Field(description="Version of the attribution and accounting rules")
    basis: Literal["predicted", "measured", "mixed"] = Field(description="What carbon_grams rests on")
    attribution: Literal["step-kernel/1"] = Field(description="How the energy of a step is split over requests")
    estimate: Estimate
    energy_joules: MeasuredEnergy | SkipJsonSchema[None] = _optional("Metered energy; absent without a meter")
    carbon_grams: CarbonGrams | SkipJsonSchema[None] = _optional("Absent while neither part is known")
    sci: Sci | SkipJsonSchema[None] = _optional("Software Carbon Intensity; absent while a part of it is not known")
    intensity: Intensity | SkipJsonSchema[None] = _optional("Location-based; absent while no source knows it")
    intensity_market: Intensity | SkipJsonSchema[None] = _optional("What contracts say; absent where none is stated")
    embodied: Embodied | SkipJsonSchema[None] = _optional("Absent where no figure of the hardware is known")
    pue: Number | SkipJsonSchema[None] = _optional("Power usage effectiveness of the site; absent: the IT load alone")
    pue_source: str | SkipJsonSchema[None] = _optional("settings, or whose published figure it is")
    node_overhead: NodeOverhead | SkipJsonSchema[None] = _optional("Rest of the node; absent: devices alone")
    tokens: Tokens
    meter: str = Field(description="Meter in place, none without one")
    meter_reason: str | SkipJsonSchema[None] = _optional("Why there is no meter, or why it does not measure now")
    coverage_ratio: Number | SkipJsonSchema[None] = _optional("Metered part of energy_joules, 0 to 1")
    predictor: str = Field(description="Method and version of the predictor")
    in_distribution: bool = Field(description="Every step was like those the predictor was calibrated on")

    def json_text(self) -> str:
        """Compact JSON on one line, unknown parts left out."""
        return self.model_dump_json(exclude_none=True)

    def document(self) -> dict[str, Any]:
        """The same as a dict."""
        return self.model_dump(exclude_none=True)


def annotate(ledgers: Sequence[RequestLedger], accounting: Accounting) -> Annotation | None:
    """The annotation of a call made of these engine requests; None when a part of their sum is not known.

    The sum is known when there is a ledger and every ledger is complete and says how it came about.
    """
    sources = [ledger.provenance for ledger in ledgers if ledger.complete and ledger.provenance is not None]
    if not sources or len(sources) != len(ledgers):
        return None
    ledger = total(item.ledger for item in ledgers)
    metered = total_figure((item.ledger, item.metered) for item in ledgers)
    if metered is not None and metered.coverage_ratio == 0.0:
        metered = None  # no window covers any of it: a prediction, and nothing else
    grams = _carbon_grams(ledger, metered, accounting)
    document = {
        "schema": SCHEMA,
        "method": METHOD,
        "basis": _basis(metered),
        "attribution": ATTRIBUTION,
        "estimate": _estimate(ledger, accounting),
        "energy_joules": None if metered is None else _measured(metered, accounting),
        "carbon_grams": grams or None,
        "sci": _sci(grams, ledger),
        **intensity_documents(accounting),
        "embodied": _embodied(ledger, accounting),
        "pue": accounting.node.pue,
        "pue_source": accounting.node.pue_source,
        "node_overhead": node_document(accounting),
        "tokens": _tokens(ledger),
        "meter": _names(source.meter for source in sources),
        "meter_reason": _names(source.meter_reason for source in sources) or None,
        "coverage_ratio": None if metered is None else metered.coverage_ratio,
        "predictor": _names(source.predictor for source in sources),
        "in_distribution": ledger.in_distribution,
    }
    return Annotation.model_validate(document)


def intensity_documents(accounting: Accounting) -> dict[str, Any]:
    """The carbon intensities in use, as the annotation shows them."""
    return {
        "intensity": _intensity(accounting.intensity, accounting.age_seconds),
        "intensity_market": _intensity(accounting.market, None),
    }


def _intensity(figure: Any, age_seconds: float | None) -> dict[str, Any] | None:
    if figure is None:
        return None
    names = Intensity.model_fields.keys() - {"age_seconds"}
    return {**{name: getattr(figure, name) for name in names}, "age_seconds": age_seconds}


def _estimate(ledger: Ledger, accounting: Accounting) -> dict[str, float | str | None]:
    overhead = accounting.node.host_ratio
    return {
        "energy_joules": ledger.energy_joules,
        "prefill_joules": ledger.prefill_joules,
        "decode_joules": ledger.decode_joules,
        "host_joules": None if overhead is None else host_joules(ledger.energy_joules, overhead),
        "lower": ledger.lower_joules,
        "upper": ledger.upper_joules,
        "when": "before_execution",
    }


def _basis(metered: Figure | None) -> str:
    if metered is None:
        return "predicted"
    return "measured" if metered.coverage_ratio == 1.0 else "mixed"


def _measured(metered: Figure, accounting: Accounting) -> dict[str, float | None]:
    overhead = accounting.node.host_ratio
    return {
        "value": metered.energy_joules,
        "lower": max(0.0, metered.energy_joules - metered.half_width_joules),
        "upper": metered.energy_joules + metered.half_width_joules,
        "prefill": metered.prefill_joules,
        "decode": metered.decode_joules,
        "host": None if overhead is None else host_joules(metered.energy_joules, overhead),
        "recomputed": metered.recomputed_joules or None,
        "rejected_drafts": metered.rejected_draft_joules or None,
    }


def _carbon_grams(ledger: Ledger, metered: Figure | None, accounting: Accounting) -> dict[str, float]:
    """What is known of it; empty when nothing is."""
    joules = (ledger.energy_joules, ledger.lower_joules, ledger.upper_joules)
    if metered is not None:
        value, width = metered.energy_joules, metered.half_width_joules
        joules = (value, max(0.0, value - width), value + width)
    grams = dict(zip(("operational", "lower", "upper"), map(accounting.operational_grams, joules), strict=True))
    grams["operational_market"] = accounting.market_grams(joules[0])
    grams["embodied"] = accounting.embodied_grams(ledger.held_seconds) if ledger.held_seconds else None
    known = {name: value for name, value in grams.items() if value is not None}
    if "operational" in known and "embodied" in known:
        known["total"] = known["operational"] + known["embodied"]
    return known


def _sci(grams: Mapping[str, float], ledger: Ledger) -> dict[str, float | None] | None:
    if "total" not in grams:
        return None
    tokens = max(0, ledger.useful_tokens)
    parts = grams["operational"], grams["embodied"]
    return {"per_request": sci_grams(*parts), "per_1000_tokens": sci_grams(*parts, tokens / 1000) if tokens else None}


def _embodied(ledger: Ledger, accounting: Accounting) -> dict[str, Any] | None:
    hardware = accounting.hardware
    if hardware is None or not ledger.held_seconds or accounting.embodied_grams(0.0) is None:
        return None
    return {
        "model": hardware.model,
        "held_seconds": ledger.held_seconds,
        "lifetime_years": hardware.lifetimes.devices_years,
        "host_lifetime_years": None if "host" in hardware.omitted else hardware.lifetimes.host_years,
        "idle": hardware.idle,
        "utilisation_ratio": accounting.utilisation_ratio if hardware.idle == "busy" else None,
        "omitted": list(hardware.omitted),
    }


def node_document(accounting: Accounting) -> dict[str, float | str | None] | None:
    """What the rest of the node adds, as the annotation shows it; None when nothing is counted."""
    node = accounting.node
    if node.host_ratio is None and node.auxiliary_ratio is None:
        return None
    return {"host_ratio": node.host_ratio, "host_source": node.host_source, "auxiliary_ratio": node.auxiliary_ratio}


def _tokens(ledger: Ledger) -> dict[str, int | None]:
    return {
        "prefill": ledger.prefill_tokens,
        "cached": ledger.cached_tokens,
        "recomputed": ledger.recomputed_tokens,
        "decode": ledger.decode_tokens,
        "rejected_drafts": ledger.rejected_draft_tokens or None,
    }


def _names(names: Iterable[str]) -> str:
    """Distinct names in order: engines of one server may differ while a predictor is being replaced."""
    return ", ".join(dict.fromkeys(name for name in names if name))


def json_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of the annotation."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Annotation.model_json_schema()}


if __name__ == "__main__":
    print(json.dumps(json_schema(), indent=2))
