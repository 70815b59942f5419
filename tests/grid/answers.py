"""Answers in the shapes the providers document; values are made up."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

# 2026-03-14, 15:10 UTC.
NOW = datetime(2026, 3, 14, 15, 10, tzinfo=UTC).timestamp()
HOUR = NOW - 600.0


def when(epoch_seconds: float) -> str:
    return datetime.fromtimestamp(epoch_seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def electricity_maps(begin: float = HOUR, value: Any = 302, **changes: Any) -> dict[str, Any]:
    return {
        "zone": "DE",
        "carbonIntensity": value,
        "datetime": when(begin),
        "updatedAt": when(begin + 400),
        "createdAt": when(begin - 86400),
        "emissionFactorType": "lifecycle",
        "isEstimated": True,
        "estimationMethod": "TIME_SLICER_AVERAGE",
        **changes,
    }


def electricity_maps_history(hours: int = 24, **changes: Any) -> dict[str, Any]:
    rows = [
        electricity_maps(HOUR - 3600 * back, 300 + back, isEstimated=False, **changes) for back in range(hours, 0, -1)
    ]
    return {"zone": "DE", "history": rows}


def watttime(values: list[tuple[float, Any]], **changes: Any) -> dict[str, Any]:
    meta = {
        "data_point_period_seconds": 300,
        "region": "CAISO_NORTH",
        "signal_type": "co2_moer",
        "model": {"date": "2023-03-01"},
        "units": "lbs_co2_per_mwh",
        "warnings": [],
        **changes,
    }
    return {"data": [{"point_time": when(at).replace(".000Z", "+00:00"), "value": v} for at, v in values], "meta": meta}


def uk(begin: float, forecast: Any, actual: Any) -> dict[str, Any]:
    minutes = "%Y-%m-%dT%H:%MZ"
    times = [datetime.fromtimestamp(at, UTC).strftime(minutes) for at in (begin, begin + 1800)]
    intensity = {"forecast": forecast, "actual": actual, "index": "moderate"}
    return {"from": times[0], "to": times[1], "intensity": intensity}
