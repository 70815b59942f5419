"""``llmco2 train``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import Progress

from llmco2_vllm.training.dataset import read

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command()
@click.argument("tables", nargs=-1, required=True, type=_FILE)
@click.option("--model-configs", type=_FILE, help="Sizes by model name; by default model_configs.json beside a table.")
@click.option("--kernel-times", type=_FILE, help="Times of single kernels: Vidur's profiles, vidur_kernels.csv.gz.")
@click.option("--collective-times", type=_FILE, help="Times of all-reduces: vidur_network.csv.gz.")
@click.option("--write", required=True, type=click.Path(dir_okay=False, path_type=Path), help="Bundle file to write.")
@click.option("--version", "version", default="gnn/1", show_default=True, help="Published with every figure.")
@click.option("--steps", default=120, type=click.IntRange(1), show_default=True, help="Optimisation steps of a fit.")
@click.option("--seed", default=0, type=click.IntRange(0), show_default=True)
@click.option("--skip-bad", is_flag=True, help="Leave bad rows out instead of stopping.")
def command(tables: tuple[Path, ...], model_configs: Path | None, write: Path, **options: Any) -> None:
    """Train the network on tables of measurements and write a bundle.

    A table is a CSV with the columns of mlenergy_v3.csv, mlenergy_v2.csv or splitwise_latency.csv.
    """
    from llmco2_vllm.training.export import build, fits
    from llmco2_vllm.training.fit import Recipe
    from llmco2_vllm.training.kernel_times import read_kernel_times

    if options["collective_times"] and not options["kernel_times"]:
        raise click.UsageError("--collective-times belongs to --kernel-times, which is missing")
    console = Console(stderr=True)
    recipe = Recipe(steps=options["steps"], seed=options["seed"])
    try:
        observations = [o for path in tables for o in read(path, model_configs, options["skip_bad"]).observations]
        kernels = options["kernel_times"]
        times = read_kernel_times(kernels, options["collective_times"]) if kernels else []
        with Progress(console=console) as progress:
            bar = progress.add_task("training", total=fits(observations) * recipe.steps)
            bundle = build(observations, options["version"], recipe, lambda: progress.advance(bar), times)
        bundle.save(write)
    except (OSError, ValueError) as error:
        raise click.ClickException(str(error)) from None
    left_out = bundle.provenance["left_out_architecture"]
    console.print(f"{write}: {bundle.version}, {sum(bundle.provenance['rows'].values())} rows, unseen architecture:")
    console.print(
        f"step energy MAPE {left_out['mape']:.1f} %, median {left_out['median_ape']:.1f} %, n {left_out['n']}"
    )
