"""Carbon accounting: one pure function per equation, its source in the docstring."""

from __future__ import annotations

from llmco2_vllm.core.units import joules_to_kwh


def host_joules(device_joules: float, node_overhead_ratio: float) -> float:
    """Energy of CPUs and memory of the node in joules, as a fraction of the energy of its devices.

    Source: the definition of the setting ``node_overhead``, or measured: RAPL over NVML since the start.
    """
    return device_joules * node_overhead_ratio


def node_joules(device_joules: float, node_overhead_ratio: float, auxiliary_ratio: float) -> float:
    """IT energy of the node: devices, host, and fans, network and losses as a fraction of both.

    Source: the definitions of the settings ``node_overhead`` and ``auxiliary``. The site's overhead is PUE, apart.
    """
    return (device_joules + host_joules(device_joules, node_overhead_ratio)) * (1.0 + auxiliary_ratio)


def operational_grams(energy_joules: float, grams_per_kwh: float, pue: float = 1.0) -> float:
    """Grams CO2e of using ``energy_joules`` of IT energy: O = E * PUE * I.

    Args:
        energy_joules: energy of the IT equipment.
        grams_per_kwh: carbon intensity of the electricity, g CO2e/kWh.
        pue: power usage effectiveness of the site (ISO/IEC 30134-2), 1 or more.

    Source: Software Carbon Intensity, ISO/IEC 21031, ``E x I``
    (https://github.com/Green-Software-Foundation/sci/blob/main/SPEC.md).
    """
    return joules_to_kwh(energy_joules) * pue * grams_per_kwh


def sci_grams(operational_grams: float, embodied_grams: float, functional_units: float = 1.0) -> float:
    """Software Carbon Intensity, g CO2e per functional unit: SCI = ((E * I) + M) / R.

    Args:
        operational_grams: E * I with a location-based intensity, average or marginal; neither a market-based intensity
            nor an offset may lower it.
        embodied_grams: M of the same use.
        functional_units: R, how many requests, thousands of tokens or units of one's own it served; more than 0.

    Raises ValueError for units that are not more than 0.
    Source: ISO/IEC 21031:2024, https://github.com/Green-Software-Foundation/sci/blob/main/SPEC.md.
    """
    if not functional_units > 0.0:
        raise ValueError(f"functional_units={functional_units!r} is not possible; allowed: more than 0")
    return (operational_grams + embodied_grams) / functional_units
