"""What the meter costs a real server: one ``vllm serve``, hook off and on in alternating pairs.

    python -m benchmarks.serving_ab [--pairs 20] [--clients 8] [--tokens 48] [--json]

Two server starts differ by more than the effect, so one server is measured against itself: the
hook is switched by ``PUT /carbon/hook`` between rounds, off-on and on-off in turn. A round is
``clients`` streams at once; it gives tokens per second, and medians of time to first token (TTFT)
and time per output token (TPOT). Reported are medians of the on/off ratios of the pairs with
bootstrap 95 % intervals; a ratio of throughput below 1 means that the hook costs something.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
from collections.abc import Sequence
from statistics import median
from time import perf_counter
from typing import Any

import httpx
from rich.console import Console
from rich.progress import track

from llmco2_vllm.demo.preflight import choose_port
from llmco2_vllm.demo.server import VllmServer
from llmco2_vllm.demo.weights import model_folder

MODEL = "demo"


async def stream(client: httpx.AsyncClient, seed: int, tokens: int) -> tuple[float, float]:
    """(TTFT, TPOT) in seconds of one streamed completion of exactly ``tokens`` tokens."""
    # Distinct words: the prefix cache must not make later rounds cheaper.
    rng = random.Random(seed)
    prompt = " ".join(str(rng.randrange(10_000)) for _ in range(32))
    body = {
        "model": MODEL,
        "prompt": prompt,
        "max_tokens": tokens,
        "ignore_eos": True,
        "stream": True,
        "temperature": 0,
    }
    begin = perf_counter()
    async with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        times = [perf_counter() async for line in response.aiter_lines() if line.startswith("data: {")]
    return times[0] - begin, (times[-1] - times[0]) / (len(times) - 1)


async def measure(client: httpx.AsyncClient, seed: int, clients: int, tokens: int) -> dict[str, float]:
    """One round: ``clients`` streams at once."""
    begin = perf_counter()
    rows = await asyncio.gather(*(stream(client, seed * 1000 + i, tokens) for i in range(clients)))
    seconds = perf_counter() - begin
    return {
        "tokens_per_second": clients * tokens / seconds,
        "ttft_seconds": median(row[0] for row in rows),
        "tpot_seconds": median(row[1] for row in rows),
    }


async def run(url: str, arguments: argparse.Namespace) -> list[dict[str, dict[str, float]]]:
    """The pairs, each with a round ``off`` and a round ``on``."""
    pairs = []
    async with httpx.AsyncClient(base_url=url, timeout=300) as client:
        await measure(client, 0, arguments.clients, arguments.tokens)
        for pair in track(range(arguments.pairs), "pairs", console=Console(stderr=True)):
            rounds = {}
            for on in (False, True) if pair % 2 else (True, False):
                (await client.put("/carbon/hook", json={"on": on})).raise_for_status()
                seed = 2 * pair + on + 1
                rounds["on" if on else "off"] = await measure(client, seed, arguments.clients, arguments.tokens)
            pairs.append(rounds)
    return pairs


def interval(ratios: Sequence[float], draws: int = 10_000) -> tuple[float, float]:
    """Bootstrap 95 % interval of the median of ``ratios``; seeded."""
    rng = random.Random(1)
    medians = sorted(median(rng.choices(ratios, k=len(ratios))) for _ in range(draws))
    return medians[int(0.025 * draws)], medians[int(0.975 * draws)]


def summary(pairs: Sequence[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Median on/off ratio and its interval, and the median of each side, by measure."""
    rows = {}
    for name in pairs[0]["on"]:
        ratios = [pair["on"][name] / pair["off"][name] for pair in pairs]
        low, high = interval(ratios)
        rows[name] = {
            "off_median": median(pair["off"][name] for pair in pairs),
            "on_median": median(pair["on"][name] for pair in pairs),
            "ratio_median": median(ratios),
            "ratio_low": low,
            "ratio_high": high,
        }
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--json", action="store_true", help="print one JSON object, every pair in it")
    arguments = parser.parse_args()
    flags = ["--served-model-name", MODEL, "--carbon", "--carbon-config.switch", "true"]
    with VllmServer(model_folder(), flags, port=choose_port(None)) as server:
        server.wait_ready(300)
        pairs = asyncio.run(run(server.url, arguments))
    rows = summary(pairs)
    if arguments.json:
        print(json.dumps({"pairs": pairs, "summary": rows}))
        return
    print(f"{len(pairs)} pairs, {arguments.clients} streams of {arguments.tokens} tokens each")
    for name, row in rows.items():
        print(
            f"{name:20} off {row['off_median']:8.4g}  on {row['on_median']:8.4g}  "
            f"on/off {row['ratio_median']:.4f} [{row['ratio_low']:.4f}, {row['ratio_high']:.4f}]"
        )


if __name__ == "__main__":
    main()
