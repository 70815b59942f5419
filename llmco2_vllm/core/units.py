"""The only place a unit is converted. Inside everything is in joules, watts, seconds, bytes, FLOP/s and grams.

``tera`` is 1e12, never ``2**40``; a gigabyte is 1e9 bytes, as on the data sheets of memory and links.
"""

from __future__ import annotations

JOULES_PER_KWH = 3.6e6
SECONDS_PER_HOUR = 3600.0
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
