"""Discovery opens what works, says why when nothing does, and never waits long."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from llmco2_vllm.meters import discover
from llmco2_vllm.meters.base import DeviceLostError, MeterError, MeterUnavailableError, SkippedReadingError
from llmco2_vllm.meters.discover import Discovery, Search, open_meter
from llmco2_vllm.meters.sampler import Timing
from llmco2_vllm.testing import FakeClock, FakeMeter
from tests.meters.test_rapl import zone
from tests.meters.virtual import Bench
from tests.nvml_shim import shim

ROOT = Path(__file__).resolve().parent.parent.parent


def test_an_unknown_choice_names_what_is_allowed() -> None:
    with pytest.raises(ValueError, match="meter='dcgm' is not possible; allowed: auto, nvml, rapl, none"):
        open_meter("dcgm")


def test_a_meter_that_is_switched_off_says_so() -> None:
    assert open_meter("none") == (None, "none", "switched off by the setting meter=none")


def test_on_a_cpu_the_packages_are_metered(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0")
    found = open_meter("auto", search=Search(accelerator=False, powercap=tmp_path))
    assert found.sampler is not None and found[1:] == ("rapl", None)
    assert found.sampler.stop(10.0)


def test_on_a_cpu_without_rapl_the_reason_says_why(tmp_path: Path) -> None:
    found = open_meter("auto", search=Search(accelerator=False, powercap=tmp_path))
    assert found.sampler is None and found.name == "none"
    assert found.reason is not None and found.reason.startswith("RAPL: no package under")


def in_child(shim_folder: Path, code: str, settings: shim.Settings, call_log: Path | None = None) -> Any:
    environ = {**os.environ, **shim.environment(shim_folder, settings, call_log=call_log)}
    prelude = "import json, time\nfrom llmco2_vllm.meters.discover import Search, open_meter\n"
    answer = subprocess.run(
        [sys.executable, "-c", prelude + textwrap.dedent(code)],
        env=environ,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout)


REPORT = "print(json.dumps([found.name, found.reason, found.sampler is not None]))"


def test_on_an_accelerator_nvml_is_opened_in_a_thread_of_its_own(shim_folder: Path, tmp_path: Path) -> None:
    log = tmp_path / "calls"
    code = f"""
    import threading
    found = open_meter("auto", ["0"], Search(answer_seconds=60))
    while found.sampler.state()["devices"][0]["calls"] < 20: time.sleep(0.05)
    state = found.sampler.state()
    stopped = found.sampler.stop(10)
    threads = {{line.split()[1] for line in open({str(log)!r})}}
    print(json.dumps([found.name, found.reason, stopped, len(threads), threading.get_native_id() in map(int, threads)]))
    """
    assert in_child(shim_folder, code, shim.Settings(), log) == ["nvml", None, True, 1, False]


def test_a_token_that_names_nothing_is_the_reason(shim_folder: Path) -> None:
    code = 'found = open_meter("nvml", ["7"], Search(answer_seconds=60))\n' + REPORT
    name, reason, sampling = in_child(shim_folder, code, shim.Settings())
    assert name == "none" and not sampling
    assert reason.startswith("nvml: device '7' names no GPU; there are: 0 GPU-")


def test_a_host_without_a_driver_is_the_reason(shim_folder: Path) -> None:
    script = 'found = open_meter("auto", None, Search(answer_seconds=60))\n' + REPORT
    name, reason, sampling = in_child(shim_folder, script, shim.Settings(init_code=9))
    assert name == "none" and not sampling and reason.startswith("NVML: ") and "(9)" in reason


def test_a_driver_that_fails_in_passing_is_asked_again_and_its_refusal_is_the_reason_till_then(
    shim_folder: Path,
) -> None:
    script = """
    found = open_meter("auto", None, Search(answer_seconds=60))
    print(json.dumps([found.name, found.reason, found.now(), found.sampler.state()["alive"]]))
    """
    name, reason, now, alive = in_child(shim_folder, script, shim.Settings(init_code=999))
    assert name == "nvml" and alive
    assert reason.startswith("NVML: ") and "(999)" in reason and now == ["none", reason]


def test_a_driver_that_failed_in_passing_is_metered_once_it_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    refusals = [SkippedReadingError("NVML: unknown error (999)")] * 3
    clock = FakeClock()

    def open_nvml(_: object) -> list[FakeMeter]:
        if refusals:
            raise refusals.pop()
        return [FakeMeter(clock)]

    monkeypatch.setattr(discover, "open_nvml", open_nvml)
    search = Search(answer_seconds=60.0, timing=Timing(clock, clock.advance, lambda: 0.0))
    found = open_meter("nvml", search=search)
    assert found.sampler is not None
    deadline = time.monotonic() + 60.0
    while found.now() != ("nvml", "") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert found.now() == ("nvml", "") and not refusals
    assert found.sampler.stop(10.0)


def test_a_driver_that_does_not_answer_is_not_waited_for(shim_folder: Path) -> None:
    code = """
    found = open_meter("auto", None, Search(answer_seconds=0.2))
    first = [found.name, found.reason, found.now()]
    found.sampler.answered.wait(60)
    print(json.dumps([*first, found.now()]))
    """
    name, reason, before, after = in_child(shim_folder, code, shim.Settings(init_delay=3.0))
    assert (name, reason) == ("nvml", "nvml did not answer within 0.2 s; still waiting")
    assert (before, after) == (["none", "nvml: no answer yet"], ["nvml", ""])


def test_a_driver_that_answers_late_with_a_refusal_is_the_reason_from_then_on(shim_folder: Path) -> None:
    code = """
    found = open_meter("auto", None, Search(answer_seconds=0.2))
    found.sampler.answered.wait(60)
    print(json.dumps(found.now()))
    """
    name, reason = in_child(shim_folder, code, shim.Settings(init_delay=3.0, init_code=9))
    assert name == "none" and reason.startswith("NVML: ") and "(9)" in reason


def test_what_is_said_of_a_meter_follows_its_devices() -> None:
    bench = Bench()
    meter, other = (bench.add(FakeMeter(bench.clock)) for _ in range(2))
    found = Discovery(bench.sampler, "nvml", None)
    assert found.now() == ("none", "nvml: no answer yet")
    bench.run(3.0)
    assert found.now() == ("nvml", "")
    meter.failures, meter.reopen_failures = [DeviceLostError("lost")], [DeviceLostError("lost")] * 3
    bench.run(3.0)
    assert found.now() == ("nvml", "nvml: device 0: device lost: lost")
    other.counting = other.powering = False
    bench.run(3.0)
    assert found.now() == ("nvml", "nvml: device 0: device lost: lost; device 1: not supported")
    other.powering = True
    bench.run(30.0)
    assert found.now() == ("nvml", "") and bench.sampler.state()["fault"] is None


def test_a_driver_that_holds_its_reader_up_is_told_of() -> None:
    bench = Bench()
    bench.add(FakeMeter(bench.clock))
    found = Discovery(bench.sampler, "nvml", None)
    bench.run(3.0)
    bench.clock.advance(60.0)
    assert found.now() == ("nvml", "nvml: device 0: its driver does not answer")
    bench.run(1.0)
    assert found.now() == ("nvml", "")


def test_a_driver_that_holds_its_first_reading_up_is_told_of() -> None:
    bench = Bench()
    bench.add(FakeMeter(bench.clock)).failures = [SkippedReadingError("timeout")]
    found = Discovery(bench.sampler, "nvml", None)
    bench.sampler.poll_once()
    assert found.now() == ("nvml", "")
    bench.clock.advance(60.0)
    assert found.now() == ("nvml", "nvml: device 0: its driver does not answer")


def test_a_meter_whose_code_fails_at_every_look_says_with_what_until_it_succeeds() -> None:
    bench = Bench()
    meter = bench.add(FakeMeter(bench.clock))
    meter.failures = [KeyError("fieldId")] * 5
    found = Discovery(bench.sampler, "nvml", None)
    for _ in range(4):
        assert not bench.run(2.0) and found.now() == ("nvml", "nvml: device 0: fails with KeyError: 'fieldId'")
    assert bench.sampler.state()["fault"] == "device 0: fails with KeyError: 'fieldId'"
    assert bench.run(60.0) and found.now() == ("nvml", "")


def test_a_meter_that_fails_after_each_reading_says_so_and_its_last_power_is_not_that_of_now(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = Bench()
    meter = bench.add(FakeMeter(bench.clock))
    found = Discovery(bench.sampler, "nvml", None)
    bench.run(3.0)
    assert found.now() == ("nvml", "") and bench.state["power_watts"] == pytest.approx(100.0)
    monkeypatch.setattr(meter, "vitals", lambda: 1 // 0)
    bench.run(3.0)
    assert "fails with ZeroDivisionError: " in found.now()[1] and bench.state["power_watts"] is None
    monkeypatch.undo()
    bench.run(3.0)
    assert found.now() == ("nvml", "") and bench.state["power_watts"] == pytest.approx(100.0)


def test_what_fails_is_told_in_one_line_of_bounded_length_and_once_for_all_devices_alike() -> None:
    bench = Bench()
    for _ in range(8):
        bench.add(FakeMeter(bench.clock)).failures = [ValueError("a\nb " + "x" * 10_000)] * 99
    found = Discovery(bench.sampler, "nvml", None)
    bench.run(2.0)
    reason = found.now()[1]
    assert reason.startswith("nvml: device 0, 1, 2, 3, 4, 5, 6, 7: fails with ValueError: a b xxx")
    assert len(reason) < 200


@pytest.mark.parametrize("error", [MeterUnavailableError, SkippedReadingError])
def test_a_device_that_is_given_up_says_what_it_answered(error: type[MeterError]) -> None:
    bench = Bench()
    bench.add(FakeMeter(bench.clock)).failures = [error("no permission")] * 99
    bench.run(3.0)
    assert Discovery(bench.sampler, "nvml", None).now() == ("nvml", "nvml: device 0: device lost: no permission")


def test_devices_that_are_fewer_than_the_engines_are_no_meter_of_it_however_late_they_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    meters, answer = [FakeMeter(FakeClock())], threading.Event()
    monkeypatch.setattr(discover, "open_nvml", lambda _: meters if answer.wait(60.0) else [])
    found = open_meter("nvml", search=Search(answer_seconds=0.0, least_devices=2))
    assert found.sampler is not None
    answer.set()
    assert found.sampler.answered.wait(60.0)
    assert found.now() == ("none", "nvml: 1 of this engine's 2 devices are on this host")
    assert found.sampler.stop(10.0) and meters[0].closed
    again = open_meter("nvml", search=Search(answer_seconds=60.0, least_devices=2))
    assert again == (None, "none", "nvml: 1 of this engine's 2 devices are on this host")


def test_a_meter_that_never_opened_goes_on_saying_why() -> None:
    assert Discovery(None, "none", "RAPL: no package").now() == ("none", "RAPL: no package")


def test_the_default_wait_is_under_two_seconds() -> None:
    assert Search().answer_seconds < 2.0
