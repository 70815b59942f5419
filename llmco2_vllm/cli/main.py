"""The command ``llmco2``. Each subcommand is a module of its own, imported only when it is called for."""

from __future__ import annotations

import importlib
from typing import Final

import click

COMMANDS: Final = {
    "advise": "Predict grams per 1000 tokens over devices, tensor parallelism, batch limits, zones and hours.",
    "calibrate": "Measure a running server where it matters and write a calibration of its predictions.",
    "dashboards": "Write the Grafana dashboard, Prometheus rules and the list of metrics.",
    "demo": "Serve a small real model with --carbon, send requests, show what they cost.",
    "evaluate": "Score predictions against a table of measurements.",
    "lifecycle": "Model the carbon of a language model's life by LLMCarbon.",
    "model": "Convert the demo's model to safetensors and print its folder.",
    "predict": "Predict energy and carbon of a batch of requests on a device.",
    "report": "Report energy and carbon by day and model, from samples or Prometheus.",
    "samples": "List, show, export and import metered samples.",
    "train": "Train the network on tables of measurements and write a bundle.",
    "plan": "Say which steps to measure next, by error x traffic and coverage.",
}


class LazyGroup(click.Group):
    """A group whose subcommand NAME is ``command`` in module ``llmco2_vllm.cli.NAME``."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names, without importing anything."""
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the module of one subcommand; None for an unknown name."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"llmco2_vllm.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the subcommands from the table above, so that help imports none of them."""
        with formatter.section("Commands"):
            formatter.write_dl(sorted(COMMANDS.items()))


@click.group(cls=LazyGroup)
@click.version_option(package_name="llmco2-vllm")
def main() -> None:
    """A carbon meter for LLM serving: vllm serve MODEL --carbon."""
