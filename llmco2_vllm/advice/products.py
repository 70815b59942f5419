"""Products that weigh carbon, energy and delay against each other; the smaller the better. One function per equation.

HotCarbon'24 (Li, Graif, Gupta, Towards Carbon-efficient LLM Life Cycle) ranks batch sizes and tensor-parallel sizes by
EDP, CDP and CEP. Its definitions are taken to be those of ACT (Gupta et al., ISCA 2022, metrics), which it builds on:
E is operational energy, D delay and C embodied carbon; recalled, and still to be compared with either text. Here E and
C are those of 1 000 output tokens and D is the latency of the mean request.
"""

from __future__ import annotations


def edp(energy_joules: float, delay_seconds: float) -> float:
    """Energy-delay product, E D, J s. Source: ACT, ISCA 2022; after Gonzalez and Horowitz, 1996."""
    return energy_joules * delay_seconds


def cdp(embodied_grams: float, delay_seconds: float) -> float:
    """Carbon-delay product, C D, g s. Source: ACT, ISCA 2022."""
    return embodied_grams * delay_seconds


def cep(embodied_grams: float, energy_joules: float) -> float:
    """Carbon-energy product, C E, g J. Source: ACT, ISCA 2022."""
    return embodied_grams * energy_joules


def tcdp(total_grams: float, delay_seconds: float) -> float:
    """Total-carbon-delay product, g s, of operational and embodied carbon. Source: CORDOBA, HPCA 2025, tCDP = tC D."""
    return total_grams * delay_seconds
