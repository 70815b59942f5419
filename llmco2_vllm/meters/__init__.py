"""Meters: what devices really drew. Adapters that know nothing of vLLM (METERING sections 1 to 7)."""
