"""OpenTelemetry: the span that the host writes for a request carries what is known of it at its finish.

The host writes a span as soon as its request ends, one for each engine request; the last steps are often not metered
by then, as ``llmco2.basis`` and ``llmco2.coverage_ratio`` say. Without tracing the host never comes here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

from llmco2_vllm.telemetry.annotation import annotate
from llmco2_vllm.telemetry.ledger import RequestLedger
from llmco2_vllm.vllm_plugin import compat
from llmco2_vllm.vllm_plugin.frontend import CarbonFrontEnd

PREFIX = "llmco2."
# Name of the attribute, and where the annotation has it; what is absent there is no attribute.
ATTRIBUTES = {
    "basis": ("basis",),
    "energy_joules": ("energy_joules", "value"),
    "prefill_joules": ("energy_joules", "prefill"),
    "decode_joules": ("energy_joules", "decode"),
    "coverage_ratio": ("coverage_ratio",),
    "predicted_energy_joules": ("estimate", "energy_joules"),
    "predicted_prefill_joules": ("estimate", "prefill_joules"),
    "predicted_decode_joules": ("estimate", "decode_joules"),
    "carbon_grams": ("carbon_grams", "operational"),
    "market_carbon_grams": ("carbon_grams", "operational_market"),
    "embodied_carbon_grams": ("carbon_grams", "embodied"),
    "intensity_grams_per_kwh": ("intensity", "grams_per_kwh"),
    "intensity_source": ("intensity", "source"),
    "zone": ("intensity", "zone"),
    "meter": ("meter",),
    "predictor": ("predictor",),
    "in_distribution": ("in_distribution",),
    "schema": ("schema",),
}
# Of the request whose span is being written.
_SPAN: ContextVar[Mapping[str, Any] | None] = ContextVar("llmco2_span", default=None)


def enable(current: Callable[[], CarbonFrontEnd | None]) -> None:
    """Wrap what writes the span. current: the front end of this process."""

    def do_tracing(original: Callable[..., Any]) -> Callable[..., Any]:
        def do_tracing(self: Any, engine_core_output: Any, req_state: Any, *args: Any, **kwargs: Any) -> Any:
            token = _SPAN.set(_attributes(current(), req_state))
            try:
                return original(self, engine_core_output, req_state, *args, **kwargs)
            finally:
                _SPAN.reset(token)

        return do_tracing

    if compat.wrap("request_span", _request_span):
        compat.wrap("do_tracing", do_tracing)


def _request_span(original: Callable[..., Any]) -> Callable[..., Any]:
    def instrument_manual(*args: Any, **kwargs: Any) -> Any:
        ours = _SPAN.get()
        if ours and isinstance(theirs := kwargs.get("attributes"), dict):
            kwargs["attributes"] = {**theirs, **ours}
        return original(*args, **kwargs)

    return instrument_manual


def _attributes(front: CarbonFrontEnd | None, state: Any) -> Mapping[str, Any] | None:
    """Attributes of the span of a request that ends now; None where there are none. Never raises."""
    ledger = getattr(state, "llmco2_ledger", None)
    if front is None or ledger is None or not front.guard.active:
        return None
    try:
        return attributes(front, ledger)
    except Exception as error:
        front.failed("span", error)  # costs the attributes, not the span
        return None


def attributes(front: CarbonFrontEnd, ledger: RequestLedger) -> dict[str, Any]:
    """The ``llmco2.*`` attributes of one engine request that ends now; empty while its figures are not known."""
    whole = front.at_finish(ledger)
    annotation = annotate([whole], front.accounting_of([whole]))
    if annotation is None:
        return {}
    document = annotation.document()
    found = {name: _part(document, path) for name, path in ATTRIBUTES.items()}
    return {PREFIX + name: value for name, value in found.items() if value is not None}


def _part(document: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        document = document.get(key) if document is not None else None
    return document
