"""Unmodified nvidia-ml-py, and our meter over it, against a libnvidia-ml.so.1 of our own in a child process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.nvml_shim import shim

ROOT = Path(__file__).resolve().parent.parent.parent
Run = Callable[..., Any]

PRELUDE = """
import json, os, struct, sys, mmap
from llmco2_vllm.meters.base import *
from llmco2_vllm.meters.nvml import NvmlLibrary, NvmlMeter, open_nvml, Clocks
import pynvml
file = open(os.environ["SHIM_CONTROL"], "r+b")
memory = mmap.mmap(file.fileno(), 0)
def at(seconds): struct.pack_into("<d", memory, 0, seconds)
def virtual(): return struct.unpack_from("<d", memory, 0)[0]
def clocks(): return Clocks(virtual, virtual)
def say(**values): print(json.dumps(values))
def handle():
    pynvml.nvmlInit()
    return pynvml.nvmlDeviceGetHandleByIndex(0)
def failure(function, *arguments):
    try:
        function(*arguments)
    except (MeterError, pynvml.NVMLError) as error:
        return [type(error).__name__, str(error)]
"""


@pytest.fixture
def control(tmp_path: Path) -> Iterator[shim.Control]:
    with shim.Control(tmp_path / "control") as control:
        yield control


@pytest.fixture
def run(shim_folder: Path, tmp_path: Path, control: shim.Control) -> Run:
    """``run(code, trace, **settings)``: what code after the prelude says, beside the shim in virtual time."""
    call_log = tmp_path / "calls"

    def start(
        code: str, trace: list[shim.Row] | None = None, environ: dict[str, str] | None = None, **options: Any
    ) -> Any:
        settings = shim.Settings(virtual=True, **options)
        file = shim.write_trace(tmp_path / "trace.csv", trace) if trace is not None else None
        extra = shim.environment(shim_folder, settings, file, control, call_log)
        answer = subprocess.run(
            [sys.executable, "-c", PRELUDE + textwrap.dedent(code)],
            env={**os.environ, **extra, **(environ or {})},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert answer.returncode == 0, answer.stderr
        return json.loads(answer.stdout)

    return start


def test_the_shim_counts_the_trace_to_the_millijoule(run: Run) -> None:
    said = run(
        """
        h = handle()
        def mj(t): at(t); return pynvml.nvmlDeviceGetTotalEnergyConsumption(h)
        say(span=mj(11.0) - mj(3.0), inside=mj(3.09) - mj(3.05), next=mj(3.11) - mj(3.09), reset=[mj(19.95), mj(20.5)],
            off=(at(22.5), failure(mj, 22.5))[1], on=mj(23.5), lost=failure(mj, 24.5))
        """,
        shim.serving_trace(),
    )
    assert abs(said["span"] - 3_990_864) <= 1
    assert abs(said["span"] - 1e3 * shim.energy_of(shim.serving_trace(), 3.0, 11.0)) <= 5
    assert said["inside"] == 0 and said["next"] > 10_000
    assert said["reset"][0] > 123_456_789 > said["reset"][1]
    assert said["off"][0] == "NVMLError_NotSupported" and said["on"] > 0
    assert said["lost"][0] == "NVMLError_GpuIsLost"


def test_a_part_time_sensor_sees_the_end_of_each_tick(run: Run) -> None:
    wave = [shim.Row(0.05 * k, power_watts=600.0 if k % 2 else 100.0) for k in range(200)]
    said = run(
        """
        h = handle()
        def mj(t): at(t); return pynvml.nvmlDeviceGetTotalEnergyConsumption(h)
        say(span=mj(6.0) - mj(2.0))
        """,
        wave,
        duty=0.25,
    )
    assert said["span"] == pytest.approx(4.0 * 600.0 * 1e3)


def test_the_meter_reads_energy_and_power_in_one_call(run: Run, tmp_path: Path) -> None:
    said = run(
        """
        at(5.0); meter, = open_nvml(None, clocks()); at(7.0)
        reading = meter.read()
        say(reading=reading, identity=meter.identity, vitals=meter.vitals(), name=meter.name,
            outside=meter.stamps.outside)
        """,
        [shim.Row(0.0, power_watts=200.0)],
    )
    assert said["reading"] == [7.0, pytest.approx(123456.789 + 1400.0, abs=0.01), 200.0]
    assert said["identity"][:5] == [shim.H200.split("|")[1], "NVIDIA H200", "gpu", False, "instant power"]
    assert said["vitals"] == [45.0, 1980.0] and said["name"] == "nvml" and said["outside"] == 0
    calls = (tmp_path / "calls").read_text()
    assert calls.count("FieldValues") == 2  # the probe and the reading
    assert "Processes" not in calls


@pytest.mark.parametrize(
    ("fields", "basis", "energy", "power"),
    [
        ([], "instant power", True, True),
        ([83], "instant power", False, True),
        ([83, 186], "average power", False, True),
        ([186], "average power", True, True),
        ([83, 185, 186], "none", False, False),
    ],
)
def test_fields_that_are_missing_degrade_one_by_one(
    run: Run, fields: list[int], basis: str, energy: bool, power: bool
) -> None:
    trace = [shim.Row(0.0, power_watts=90.0)]
    trace += [shim.Row(0.0, event=shim.FAIL, field=field, code=shim.NOT_SUPPORTED) for field in fields]
    said = run("at(3.0); m, = open_nvml(None, clocks()); say(r=m.read(), i=m.identity)", trace)
    assert said["i"][4] == basis
    assert (said["r"][1] is not None, said["r"][2] is not None) == (energy, power)


def test_a_power_field_that_goes_away_is_replaced_by_the_next(run: Run) -> None:
    trace = [shim.Row(0.0, power_watts=90.0), shim.Row(5.0, event=shim.FAIL, field=186, code=shim.NOT_SUPPORTED)]
    said = run("at(3.0); m, = open_nvml(None, clocks()); at(6.0); say(r=[m.read(), m.read()], i=m.identity)", trace)
    assert [reading[2] for reading in said["r"]] == [None, 90.0]
    assert said["i"][4] == "average power"


def test_a_device_that_answers_for_its_module_alone_is_one(run: Run) -> None:
    said = run("at(3.0); m, = open_nvml(None, clocks()); say(r=m.read(), i=m.identity)", scope=1)
    assert said["i"][2] == "module" and None not in said["r"]


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (shim.LOST, "DeviceLostError"),
        (shim.RESET_REQUIRED, "DeviceLostError"),
        (shim.TIMEOUT, "SkippedReadingError"),
        (shim.UNKNOWN, "SkippedReadingError"),
        (shim.NOT_SUPPORTED, "NotSupportedError"),
    ],
)
def test_return_codes_become_errors_that_say_what_to_do(run: Run, code: int, kind: str) -> None:
    trace = [shim.Row(0.0, power_watts=90.0), shim.Row(5.0, event=shim.FAIL, code=code)]
    said = run("at(3.0); m, = open_nvml(None, clocks()); at(6.0); say(error=failure(m.read))", trace)
    assert said["error"][0] == kind and f"({code})" in said["error"][1]


def test_a_field_that_is_lost_is_not_taken_for_unsupported(run: Run) -> None:
    trace = [shim.Row(0.0, power_watts=90.0), shim.Row(5.0, event=shim.FAIL, field=83, code=shim.LOST)]
    said = run("at(3.0); m, = open_nvml(None, clocks()); at(6.0); say(error=failure(m.read))", trace)
    assert said["error"][0] == "DeviceLostError"


def test_a_forked_child_initialises_for_itself(run: Run) -> None:
    said = run(
        """
        at(3.0); meter, = open_nvml(None, clocks()); raw = meter._handle; at(4.0)
        here, there = os.pipe()
        if os.fork() == 0:
            strict = failure(pynvml.nvmlDeviceGetTotalEnergyConsumption, raw)
            os.write(there, json.dumps([strict[0], meter.read()]).encode())
            os._exit(0)
        os.wait()
        say(child=json.loads(os.read(here, 9999)), parent=meter.read())
        """
    )
    assert said["child"][0] == "NVMLError_Uninitialized"
    assert said["child"][1] == said["parent"]


def test_a_lost_device_is_read_again_once_it_is_back_and_the_other_was_never_gone(run: Run) -> None:
    trace = [shim.Row(0.0, d, 100.0) for d in (0, 1)]
    trace += [shim.Row(5.0, 0, event=shim.FAIL, code=shim.LOST), shim.Row(8.0, 0, event=shim.MEND)]
    said = run(
        """
        at(3.0); a, b = open_nvml(None, clocks()); at(6.0)
        lost = [failure(a.read), failure(a.reopen)]; other = b.read(); at(9.0); a.reopen()
        say(lost=lost, other=other, back=a.read())
        """,
        trace,
        devices=(shim.H200, shim.H100),
    )
    assert [error[0] for error in said["lost"]] == ["DeviceLostError"] * 2
    assert said["other"][1] == pytest.approx(123456.789 + 600.0)
    assert said["back"][1] == pytest.approx(123456.789 + 900.0)


def test_time_stamps_are_on_the_monotonic_clock_whatever_the_wall_clock_does(run: Run) -> None:
    said = run(
        """
        wall = [0.0]
        meter, = (at(100.0), open_nvml(None, Clocks(virtual, lambda: virtual() + wall[0])))[1]
        times = []
        for t, step in ((101.0, 0.0), (102.5, 0.0), (104.0, 3600.0)):
            wall[0] = step; at(t); times.append(meter.read().time_seconds)
        say(times=times, steps=meter.stamps.steps, outside=meter.stamps.outside)
        """
    )
    assert said["times"] == [101.0, 102.5, 104.0]
    assert said["steps"] == 1 and said["outside"] == 1


TOKENS = {
    "all": None,
    "index": [1],
    "two, in the order given": [1, 0],
    "index as text": ["1"],
    "UUID": [shim.H100.split("|")[1]],
    "abbreviated": ["GPU-1b2c"],
    "as torch gives it": [shim.H100.split("|")[1].removeprefix("GPU-")],
}


@pytest.mark.parametrize("name", TOKENS)
def test_tokens_name_devices(run: Run, name: str) -> None:
    code = f"at(1.0); say(uuids=[m.identity.uuid for m in open_nvml({TOKENS[name]!r}, clocks())])"
    said = run(code, devices=(shim.H200, shim.H100), environ={"CUDA_DEVICE_ORDER": "PCI_BUS_ID"})
    first, second = shim.H200.split("|")[1], shim.H100.split("|")[1]
    expected = {"all": [first, second], "two, in the order given": [second, first]}
    assert said["uuids"] == expected.get(name, [second])


def test_an_instance_is_weighed_by_its_gpu_which_is_shared(run: Run) -> None:
    said = run(
        """
        at(1.0); library = NvmlLibrary(); instances = library.installed()[0].instances
        meters = open_nvml(instances, clocks())
        say(instances=instances, identity=[m.identity for m in meters], energy=meters[0].read()[1])
        """,
        mig=True,
    )
    assert len(said["instances"]) == 2 and all(name.startswith("MIG-") for name in said["instances"])
    assert len(said["identity"]) == 1
    assert said["identity"][0][0] == shim.H200.split("|")[1] and said["identity"][0][3] is True
    assert said["energy"] is not None


def test_the_unofficial_binding_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "pynvml.py").write_text("class NVMLError(Exception): ...\ndef nvmlInit(): ...\n")
    said = run(
        """
        del sys.modules["pynvml"]; sys.path.insert(0, os.path.dirname(os.environ["SHIM_CONTROL"]))
        official, error = pynvml, None
        try: open_nvml()
        except MeterError as e: error = [type(e).__name__, str(e)]
        say(error=error)
        """
    )
    assert said["error"][0] == "MeterUnavailableError" and "nvidia-ml-py" in said["error"][1]


def test_a_missing_library_is_a_reason() -> None:
    from llmco2_vllm.meters.base import MeterUnavailableError
    from llmco2_vllm.meters.nvml import open_nvml

    try:
        open_nvml()[0].close()
    except MeterUnavailableError as error:
        assert "NVML" in str(error)
    else:
        pytest.skip("this machine has NVML")


SAMPLER = """
from llmco2_vllm.meters.sampler import EdgeSampler, Timing
import time
at(100.0)
sampler = EdgeSampler(lambda: open_nvml(None, clocks()), Timing(virtual, suspended=lambda: 0.0))
def go(until):
    while virtual() < until:
        at(max(virtual() + 5e-5, min(sampler.poll_once(), until) + 1e-4))
"""


def test_the_sampler_recovers_from_a_lost_gpu_and_conserves_what_it_knows(run: Run) -> None:
    trace = [shim.Row(0.0, power_watts=300.0), shim.Row(106.0, event=shim.FAIL, code=shim.LOST)]
    trace += [shim.Row(109.0, event=shim.MEND), shim.Row(115.0, event=shim.RESET)]
    said = run(SAMPLER + "go(120.0); say(windows=list(sampler.windows), state=sampler.state())", trace)
    windows = said["windows"]
    assert all(a[2] == b[1] for a, b in pairwise(windows))
    unknown = {w[5] for w in windows if w[3] is None}
    assert unknown == {"device lost", "counter decreased"}
    known = [w for w in windows if w[3] is not None]
    assert sum(w[3] for w in known) == pytest.approx(300.0 * sum(w[2] - w[1] for w in known), rel=0.005)
    assert said["state"]["devices"][0]["faults"] == {"device lost": 1, "counter decreased": 1}


def test_the_sampler_believes_a_counter_that_froze_again_once_it_counts(run: Run) -> None:
    trace = [shim.Row(0.0, power_watts=300.0), shim.Row(106.0, event=shim.FREEZE), shim.Row(110.0, event=shim.MEND)]
    code = "sampler.activity.busy(99.0)\ngo(125.0); say(windows=list(sampler.windows), state=sampler.state())"
    said = run(SAMPLER + code, trace)
    windows = said["windows"]
    assert all(a[2] == b[1] for a, b in pairwise(windows))
    assert {w[5] for w in windows if 110.1 < w[1] < 114.5} == {"integrated power, no counter"}
    assert {w[5] for w in windows if w[1] > 116.0} == {""}
    known = [w for w in windows if w[3] is not None]
    assert sum(w[3] for w in known) == pytest.approx(300.0 * sum(w[2] - w[1] for w in known), rel=0.005)
    assert said["state"]["devices"][0]["faults"] == {"counter frozen while busy": 1}


def test_a_sampler_is_started_anew_in_a_forked_child(run: Run) -> None:
    said = run(
        """
        import time
        from llmco2_vllm.meters.sampler import EdgeSampler
        sampler = EdgeSampler(lambda: open_nvml(None))
        sampler.start(); sampler.answered.wait(60)
        here, there = os.pipe()
        if os.fork() == 0:
            alive, calls = sampler.state()["alive"], sampler.state()["devices"][0]["calls"]
            sampler.start()
            while sampler.state()["devices"][0]["calls"] < calls + 20: time.sleep(0.05)
            state = sampler.state()
            os.write(there, json.dumps([alive, state["alive"], state["devices"][0]["faults"]]).encode())
            os._exit(0)
        os.wait()
        say(child=json.loads(os.read(here, 9999)), stopped=sampler.stop(10))
        """
    )
    assert said["child"][:2] == [False, True] and "device lost" not in said["child"][2]
    assert said["stopped"] is True


def test_power_that_changes_while_running_is_followed(run: Run, control: shim.Control) -> None:
    control.virtual_seconds = 104.0
    control.power(500.0)
    said = run(SAMPLER + "go(109.0); say(state=sampler.state(), e=sampler.energy_between(101.0, 108.0))")
    assert said["e"][0] == pytest.approx(75 * 3 + 500 * 4, rel=0.01)
    assert said["state"]["devices"][0]["power_watts"] == 500.0
    assert said["state"]["devices"][0]["cross_check_ratio"] == pytest.approx(1.0, rel=0.1)
