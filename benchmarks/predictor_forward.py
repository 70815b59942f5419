"""What one estimate takes, learned and Roofline, alone and after a scheduler step's worth of other work.

    python -m benchmarks.predictor_forward [--model CONFIG] [--json]

One BLAS thread. ``alone`` repeats the estimate; ``cold`` walks through 8 MB of other memory before each, as a
scheduler does between two steps. The batch changes each time, so nothing can be remembered.
"""

from __future__ import annotations

import argparse
import json
import os
from statistics import median
from time import perf_counter_ns

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

import numpy as np  # noqa: E402

from llmco2_vllm.core.batch import BatchShape, PhaseShape  # noqa: E402
from llmco2_vllm.core.estimate import Predictor  # noqa: E402
from llmco2_vllm.core.hardware import Topology, device_by_name  # noqa: E402
from llmco2_vllm.core.model import ModelSpec  # noqa: E402
from llmco2_vllm.predictor.bundle import Bundle  # noqa: E402
from llmco2_vllm.predictor.calibration import RooflineCalibration  # noqa: E402
from llmco2_vllm.predictor.gnn import GnnPredictor  # noqa: E402
from llmco2_vllm.predictor.predict import RooflinePredictor  # noqa: E402

DENSE = ModelSpec(36, 4096, 32, 8, 128, 12288, 151936)
MIXTURE = ModelSpec(
    48, 2048, 32, 4, 128, 6144, 151936, experts=128, experts_per_token=8, moe_intermediate=768, moe_layers=48
)


def microseconds(predictor: Predictor, mixed: bool, cold: bool, calls: int = 2000) -> list[float]:
    """Time of each estimate, in µs."""
    other = np.zeros(1 << 20)
    found = []
    for call in range(calls):
        requests = 1 + call % 256
        pairs = requests * (500 + call)
        decode = PhaseShape(requests, requests, pairs, pairs, requests)
        batch = BatchShape(PhaseShape(2, 1000, 250_500, 1000, 2), decode) if mixed else BatchShape(decode=decode)
        if cold:
            other += 1.0
        begin = perf_counter_ns()
        predictor.estimate(batch)
        found.append((perf_counter_ns() - begin) / 1e3)
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    device, bundle, calibration = device_by_name("h100-sxm"), Bundle.load(), RooflineCalibration.load()
    rows = []
    for name, model in (("dense", DENSE), ("mixture", MIXTURE)):
        for predictor in (
            GnnPredictor(model, device, Topology(tensor_parallel=4), bundle),
            RooflinePredictor(model, device, Topology(tensor_parallel=4), calibration),
        ):
            row: dict[str, float | str | int] = {"model": name, "predictor": predictor.name}
            row["kernels"] = len(predictor.graph.kernels)
            for mixed in (False, True):
                for cold in (False, True):
                    times = microseconds(predictor, mixed, cold)
                    key = f"{'mixed' if mixed else 'decode'}_{'cold' if cold else 'alone'}"
                    row[f"{key}_p50_us"] = round(median(times), 1)
                    row[f"{key}_p99_us"] = round(sorted(times)[int(0.99 * len(times))], 1)
            rows.append(row)
    if arguments.json:
        print(json.dumps({"rows": rows}))
        return
    for row in rows:
        print(*(f"{key}={value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
