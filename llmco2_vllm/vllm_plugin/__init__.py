"""Entry point of the plugin, group ``vllm.general_plugins``.

vLLM calls :func:`register` in every one of its processes. It is idempotent and inert: it adds
two flags, and everything else waits until one of them, ``additional_config`` or the environment
asks for the meter.
"""

from __future__ import annotations


def register() -> None:
    """Wrap the argument parser and the engine configuration. Never raises."""
    try:
        from llmco2_vllm.vllm_plugin import flags

        flags.install()
    except Exception as error:
        import logging

        logging.getLogger("vllm.llmco2").error("llmco2: not loaded (%s: %s)", type(error).__name__, error)
