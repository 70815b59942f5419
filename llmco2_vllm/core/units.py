"""The only place a unit is converted. Inside everything is in joules, watts, seconds, bytes, FLOP/s and grams.

``tera`` is 1e12, never ``2**40``; a gigabyte is 1e9 bytes, as on the data sheets of memory and links.
"""

from __future__ import annotations

JOULES_PER_KWH = 3.6e6
SECONDS_PER_HOUR = 3600.0
SECONDS_PER_DAY = 24 * SECONDS_PER_HOUR
# A year of carbon accounting has 365 days: 1 t over 4 years is 28.5 g per hour (SCI, worked example).
SECONDS_PER_YEAR = 365 * SECONDS_PER_DAY
GRAMS_PER_KILOGRAM = 1e3
MEGA = 1e6
GIGA = 1e9
TERA = 1e12
BYTES_PER_KIBIBYTE = 1024


def joules_to_kwh(energy_joules: float) -> float:
    """Energy in kWh; 1 kWh is 3.6e6 J exactly."""
    return energy_joules / JOULES_PER_KWH


def kwh_to_joules(energy_kwh: float) -> float:
    """Energy in joules."""
    return energy_kwh * JOULES_PER_KWH


def kwh_per_hour_to_watts(energy_kwh_per_hour: float) -> float:
    """Mean power in watts of an energy in kWh used each hour."""
    return kwh_to_joules(energy_kwh_per_hour) / SECONDS_PER_HOUR


def milli(value: float) -> float:
    """``value`` milli-units in units: milli(700_000) mW are 700 W."""
    return value / 1e3


def micro(value: float) -> float:
    """``value`` micro-units in units: micro(1e6) uJ are 1 J."""
    return value / 1e6


def kilograms_to_grams(mass_kilograms: float) -> float:
    """Mass in grams."""
    return mass_kilograms * GRAMS_PER_KILOGRAM


def tera(value: float) -> float:
    """``value`` tera-units in units: tera(989.4) TFLOP/s are 9.894e14 FLOP/s."""
    return value * TERA


def giga(value: float) -> float:
    """``value`` giga-units in units: giga(3350) GB/s are 3.35e12 bytes/s."""
    return value * GIGA


def mega(value: float) -> float:
    """``value`` mega-units in units: mega(2500) MHz are 2.5e9 Hz."""
    return value * MEGA


# Dimension and size of every unit that a data file may name.
_UNITS = {
    "mg": ("mass", 1e-3),
    "g": ("mass", 1.0),
    "kg": ("mass", GRAMS_PER_KILOGRAM),
    "t": ("mass", 1e6),
    "lb": ("mass", 453.59237),  # avoirdupois pound, exact since 1959
    "J": ("energy", 1.0),
    "kWh": ("energy", JOULES_PER_KWH),
    "MWh": ("energy", 1e3 * JOULES_PER_KWH),
    "W": ("power", 1.0),
    "FLOP": ("work", 1.0),
    "TFLOP": ("work", TERA),
    "byte": ("data", 1.0),
    "GB": ("data", GIGA),
    "TB": ("data", TERA),
    "mm2": ("area", 1e-2),
    "cm2": ("area", 1.0),
    "s": ("time", 1.0),
    "h": ("time", SECONDS_PER_HOUR),
    "day": ("time", SECONDS_PER_DAY),
    "year": ("time", SECONDS_PER_YEAR),
    "part": ("count", 1.0),
    "ratio": ("number", 1.0),
}


def convert(value: float, unit: str, wanted: str) -> float:
    """``value`` of ``unit`` in ``wanted``: convert(0.29, "kg/GB", "g/byte") is 2.9e-7.

    A unit is one of the table above or a quotient of two. Raises ValueError when one of the two is unknown or
    when they are not of the same dimension.
    """
    dimension, size = _resolve(unit)
    wanted_dimension, wanted_size = _resolve(wanted)
    if dimension != wanted_dimension:
        raise ValueError(f"unit {unit!r} is {dimension}, {wanted!r} is {wanted_dimension}: no conversion between them")
    return value * (size / wanted_size)


def _resolve(unit: str) -> tuple[str, float]:
    """Dimension and size of ``unit``. Raises ValueError that lists the known units."""
    if unit in _UNITS:
        return _UNITS[unit]
    above, slash, below = unit.partition("/")
    if not slash or above not in _UNITS or below not in _UNITS:
        raise ValueError(f"unit {unit!r} is not known; allowed: {', '.join(_UNITS)}, or a quotient a/b of two of them")
    return f"{_UNITS[above][0]} per {_UNITS[below][0]}", _UNITS[above][1] / _UNITS[below][1]
