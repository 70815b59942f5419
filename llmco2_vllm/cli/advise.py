"""``llmco2 advise``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.table import Table

from llmco2_vllm.advice.front import FIGURES, best
from llmco2_vllm.advice.held import HOLDS, Ownership
from llmco2_vllm.advice.plot import AXES, PlotError, check_plot, draw
from llmco2_vllm.advice.slo import Slo
from llmco2_vllm.advice.sweep import Advice, Question, Row, advise
from llmco2_vllm.advice.workload import open_workload
from llmco2_vllm.advice.zones import ZoneIntensity, zone_intensities
from llmco2_vllm.assemble import model_config
from llmco2_vllm.cli.options import FiniteRange
from llmco2_vllm.cli.progress import watched
from llmco2_vllm.core.embodied import LIFETIME_YEARS, MODELS
from llmco2_vllm.core.hardware import DeviceSpec, device_by_name, device_names
from llmco2_vllm.core.model import ModelSpec
from llmco2_vllm.grid.regions import region as find_region
from llmco2_vllm.telemetry.accounting import Node


@click.command()
@click.option("--model", required=True, type=click.Path(exists=True, path_type=Path), help="config.json or its folder.")
@click.option("--workload", required=True, help="azure-conv, azure-code, or a CSV or JSONL file of requests.")
@click.option("--devices", required=True, help="Devices of the catalog, with commas: h100-sxm,l4; or all.")
@click.option("--zones", help="Grid zones, with commas: FR,DE,US-CAL-CISO. [WORLD]")
@click.option("--region", help="Cloud region instead of zones: aws:eu-west-3. Its PUE is taken, where one is known.")
@click.option("--slo", default="", help="Upper bounds on means, in s or ms: ttft=1,tpot=50ms,latency=20.")
@click.option("--intensity-file", multiple=True, help="ZONE=FILE, hourly: adds the best and worst hour of the day.")
@click.option("--tp", "sizes", default="1,2,4,8", show_default=True, help="Tensor-parallel sizes, with commas.")
@click.option("--max-num-batched-tokens", "token_budget", default=8192, type=click.IntRange(1), show_default=True)
@click.option("--by", default="total", show_default=True, type=click.Choice(list(FIGURES)), help="What makes the best.")
@click.option(
    "--hold", default="devices", show_default=True, type=click.Choice(HOLDS), help="What hardware is charged."
)
@click.option("--embodied", default="product", show_default=True, type=click.Choice(MODELS), help="Embodied model.")
@click.option("--lifetime-years", default=4.0, type=FiniteRange(*LIFETIME_YEARS), show_default=True, help="Of devices.")
@click.option("--host-lifetime-years", type=FiniteRange(*LIFETIME_YEARS), help="Of their hosts. [as --lifetime-years]")
@click.option("--pue", type=FiniteRange(1, 5), help="Power usage effectiveness. [that of --region, else 1]")
@click.option("--node-overhead", type=FiniteRange(0, 5), help="Host as a fraction of device energy.")
@click.option("--auxiliary", type=FiniteRange(0, 5), help="Fans, network, losses as a fraction of devices and host.")
@click.option("--predictor", default="gnn", show_default=True, help="gnn, roofline, or a bundle file.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with every row.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw the Pareto front into this image.")
@click.option("--plot-against", "against", default="tpot", show_default=True, type=click.Choice(list(AXES)))
def command(as_json: bool, plot: Path | None, against: str, by: str, **options: Any) -> None:
    """Predict grams per 1000 output tokens over devices, tensor parallelism, batch limits, zones and hours.

    Figures are of an engine whose batch is always full, and of the means of the workload; a queue before it is left
    out. None of them is measured.
    """
    try:
        if plot is not None:
            _check_plot(plot)
        question = _question(**options)
        found = advise(question, watch=_with_bar)
        _check_feasible(found)
        if plot is not None:
            _plot(found, plot, against)
    except (OSError, ValueError) as error:
        raise click.ClickException(" ".join(str(error).split())) from None
    if as_json:
        click.echo(json.dumps(document(question, found, by), indent=2))
        return
    _show(question, found, by)


def _question(model: Path, workload: str, devices: str, **options: Any) -> Question:
    """What was asked for. Raises OSError, and ValueError in one line that names the option's value."""
    files = dict(_zone_file(text) for text in options["intensity_file"])
    names = device_names() if devices.strip() == "all" else _words(devices, "devices")
    zones = _zones(options["zones"], options["region"])
    named = None if options["region"] is None or options["pue"] is not None else find_region(options["region"])
    pue, source = (options["pue"], None) if named is None else (named.pue, named.pue_source)
    return Question(
        model=ModelSpec.from_config(model_config(model)),
        workload=open_workload(workload),
        devices=list({spec.name: spec for spec in map(device_by_name, names)}.values()),
        zones=zone_intensities(zones, files),
        slo=Slo.parse(options["slo"]),
        ownership=Ownership(
            options["hold"], options["embodied"], options["lifetime_years"], options["host_lifetime_years"]
        ),
        site=Node.stated(pue, options["node_overhead"], options["auxiliary"], source),
        predictor=options["predictor"],
        token_budget=options["token_budget"],
        tensor_parallel=_sizes(options["sizes"]),
        notes=() if named is None or named.pue_note is None else (named.pue_note,),
    )


def _zones(zones: str | None, region: str | None) -> tuple[str, ...]:
    """The zones to compare. Raises ValueError for zones beside a region."""
    if region is None:
        return _words("WORLD" if zones is None else zones, "zones")
    if zones is not None:
        raise ValueError(f"region={region!r} and zones={zones!r} are both there; allowed: one of them")
    return (find_region(region).zone,)


def _words(text: str, option: str) -> tuple[str, ...]:
    found = tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    if not found:
        raise ValueError(f"{option}={text!r} is not possible; allowed: one or more names with commas between them")
    return found


def _sizes(text: str) -> tuple[int, ...]:
    words = _words(text, "tp")
    if not all(word.isascii() and word.isdigit() and int(word) > 0 for word in words):
        raise ValueError(f"tp={text!r} is not possible; allowed: whole numbers of 1 or more with commas between them")
    return tuple(sorted({int(word) for word in words}))


def _zone_file(text: str) -> tuple[str, Path]:
    zone, equals, path = text.partition("=")
    if not zone or not equals or not path:
        raise ValueError(f"intensity-file={text!r} is not possible; allowed: ZONE=FILE, such as DE=de-2024.csv")
    return zone, Path(path)


def _check_feasible(found: Advice) -> None:
    """Raises ValueError when nothing is left, with what came nearest."""
    if not found.rows:
        # What failed last: the objectives before memory, and memory before the layout.
        last = max(found.infeasible, key=lambda one: ("layout", "memory", "slo").index(one.reason))
        device, size, limit = last.configuration
        wanted = "the objectives" if last.reason == "slo" else "this model and workload"
        raise ValueError(
            f"no configuration is possible with {wanted}; for example {device}, TP {size}, batch {limit}: "
            f"{last.reason}, {last.detail}"
        )


def _check_plot(path: Path) -> None:
    try:
        check_plot(path)
    except PlotError as error:
        raise ValueError(f"--plot {path}: {error}") from None


def _plot(found: Advice, path: Path, against: str) -> None:
    try:
        draw(found.rows, path, against)
    except PlotError as error:
        raise ValueError(f"--plot: {error}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"--plot {path}: {error}") from None


def document(question: Question, found: Advice, by: str) -> dict[str, Any]:
    """All of an advice, for JSON; what is not known is left out."""
    ownership, site = question.ownership, question.site
    chosen = best(found.rows, by).values()
    added = {
        "pue_source": site.pue_source,
        "node_overhead_ratio": site.host_ratio,
        "auxiliary_ratio": site.auxiliary_ratio,
    }
    return {
        "schema": "llmco2-advice/1",
        "basis": "predicted",
        "unit": "1000 output tokens, the prefill of their prompts included",
        "workload": question.workload.to_dict(),
        "slo": question.slo.to_dict(),
        "embodied": {
            "model": ownership.model,
            "hold": ownership.hold,
            "lifetime_years": ownership.lifetime_years,
            "host_lifetime_years": ownership.host_years,
        },
        "site": {"pue": site.pue or 1.0, **{key: value for key, value in added.items() if value is not None}},
        "zones": [_zone_document(zone) for zone in question.zones],
        "best_by": by,
        "best": [row.to_dict() for row in chosen],
        "best_by_operational": sorted({row.configuration.device for row in chosen if FIGURES[by](row) is None}),
        "rows": [row.to_dict() for row in found.rows],
        "infeasible": [
            {**one.configuration._asdict(), "reason": one.reason, "detail": one.detail} for one in found.infeasible
        ],
        "notes": list(found.notes),
    }


def _zone_document(zone: ZoneIntensity) -> dict[str, Any]:
    told = {
        "zone": zone.zone,
        "grams_per_kwh": zone.grams_per_kwh,
        "source": zone.source,
        "method": zone.kind.method,
        "factors": zone.kind.factors,
        "estimated": zone.estimated,
        "year": zone.year,
        "age_seconds": zone.age_seconds,
    }
    return {key: value for key, value in told.items() if value is not None}


def _show(question: Question, found: Advice, by: str) -> None:
    console = Console()

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False)

    workload = question.workload
    say(f"{workload.name}: {workload.prompt_mean:.0f} prompt and {workload.output_mean:.0f} output tokens in the mean")
    chosen = best(found.rows, by)
    for zone in question.zones:
        rows = [row for (name, _), row in chosen.items() if name == zone.zone]
        rows.sort(key=lambda row: _order(row, by))
        console.print(
            _table(f"{zone.zone}, {zone.grams_per_kwh:.0f} g/kWh ({zone.source}): {_ranking(rows, by)}", rows)
        )
        for row in rows:
            if row.best_hour is not None and row.worst_hour is not None:
                hours = [
                    f"{hour.hour_utc:02}:00 UTC {_number(hour.operational_grams)}"
                    for hour in (row.best_hour, row.worst_hour)
                ]
                say(f"{row.configuration.device}: operational g at the best hour, {hours[0]}; at the worst, {hours[1]}")
    for line in (*_products(found.rows), *_ruled_out(found), *found.notes):
        say(line)
    flagged = any(not row.steady.in_distribution for row in chosen.values())
    say(
        "TTFT and TPOT in ms; J with its 90 % interval, and g CO2e, of 1000 output tokens with the prefill of their "
        "prompts; an engine with a full batch, without a queue before it"
    )
    say(f"predicted, not measured{'; *: outside of what the predictor was trained on' if flagged else ''}")


def _order(row: Row, by: str) -> tuple[bool, float]:
    """Ascending in ``by``; devices of which it is not known come last."""
    value = FIGURES[by](row)
    return value is None, row.operational_grams if value is None else value


def _ranking(rows: Sequence[Row], by: str) -> str:
    """By what rows are the best: ``by``, or operational carbon where that needs an embodied figure nobody knows."""
    known = [FIGURES[by](row) is not None for row in rows]
    if not any(known):
        return f"least operational, as {by} needs an embodied figure that is not known"
    return f"least {by}" + ("" if all(known) else "; least operational where no embodied figure is known")


def _table(title: str, rows: Sequence[Row]) -> Table:
    # Without vertical lines it fits 80 columns; a figure must never be cut.
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    table.add_column("device", no_wrap=True)
    names = ("TP", "batch", "TTFT", "TPOT", "tok/s", "J", "90 %", "oper.", "emb.", "total")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        engine, (device, size, limit) = row.steady, row.configuration
        table.add_row(
            device + ("" if engine.in_distribution else " *"), str(size), str(limit),
            _milliseconds(engine.ttft_seconds), _milliseconds(engine.tpot_seconds),
            f"{engine.output_tokens_per_second:.0f}", f"{row.energy_joules:.0f}",
            _interval(row), _number(row.operational_grams),
            _number(row.embodied_grams), _number(row.total_grams),
        )  # fmt: skip
    return table


def _interval(row: Row) -> str:
    low, high = row.lower_joules / row.energy_joules - 1, row.upper_joules / row.energy_joules - 1
    return f"{low:+.0%}{high:+.0%}".replace("%", "", 1)


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.0f}" if seconds >= 0.1 else f"{1e3 * seconds:.1f}"


def _number(grams: float | None) -> str:
    return "-" if grams is None else f"{grams:.3g}"


def _products(rows: Sequence[Row]) -> Iterator[str]:
    """For each device the configurations with the least EDP, CDP and CEP, which no zone changes."""
    named = {name: best(rows, name) for name in ("edp", "cdp", "cep")}
    for device in dict.fromkeys(row.configuration.device for row in rows):
        parts = []
        for name, found in named.items():
            row = next((row for (_, own), row in found.items() if own == device), None)
            if row is not None and FIGURES[name](row) is not None:
                parts.append(
                    f"{name.upper()} TP {row.configuration.tensor_parallel} batch {row.configuration.batch_limit}"
                )
        yield f"{device}: least {', '.join(parts)}"


def _ruled_out(found: Advice) -> Iterator[str]:
    """Infeasible configurations, the batch limits of a device, size and reason in one line."""
    groups: dict[tuple[str, int, str], list[tuple[int, str]]] = {}
    for (device, size, limit), reason, detail in found.infeasible:
        groups.setdefault((device, size, reason), []).append((limit, detail))
    for (device, size, reason), limits in groups.items():
        first, last = limits[0], limits[-1]
        span = f"batch {first[0]}" if len(limits) == 1 else f"batch {first[0]} to {last[0]}"
        yield f"not possible: {device}, TP {size}, {span}: {reason}, {first[1]}"


def _with_bar(layouts: Sequence[tuple[DeviceSpec, int]]) -> Iterator[tuple[DeviceSpec, int]]:
    return watched("configurations", layouts, len(layouts))
