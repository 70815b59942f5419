"""Settings: every way in, precedence, and errors of one line that name the key and what is allowed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmco2_vllm.assemble import check_settings
from llmco2_vllm.config import (
    NOT_SHOWN,
    ConfigError,
    Settings,
    build_settings,
    enabled_by_environment,
    environment_settings,
    parse_settings,
)
from llmco2_vllm.vllm_plugin.flags import requested

IMPOSSIBLE = {
    "zone": "france",
    "region": "eu-west-3",
    "provider": "the weather",
    "intensity": -1,
    "intensity_file": "no/such.csv",
    "key_file": "no/such/key",
    "intensity_method": "median",
    "intensity_factors": "all",
    "market_intensity": -1,
    "provider_url": "ftp://example.org",
    "embodied": "guess",
    "lifetime_years": 2,
    "host_lifetime_years": 6,
    "embodied_idle": "nobody",
    "utilisation": 0,
    "pue": 0.9,
    "device": "",
    "node_overhead": -0.1,
    "auxiliary": 6,
    "predictor": "no/such/file.json",
    "calibration": "no/such/file.json",
    "meter": "wattmeter",
    "headers": "perhaps",
    "switch": "perhaps",
    "live": "perhaps",
}


def message_of(values: object) -> str:
    with pytest.raises(ConfigError) as caught:
        build_settings(("--carbon-config", parse_settings(values, "--carbon-config")))
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("key", IMPOSSIBLE)
def test_an_impossible_value_is_named_with_what_is_allowed(key: str) -> None:
    text = message_of({key: IMPOSSIBLE[key]})
    if key in NOT_SHOWN:
        assert f"{key}=... is not possible" in text and str(IMPOSSIBLE[key]) not in text, "it may be a secret"
    else:
        assert f"{key}={IMPOSSIBLE[key]!r}" in text
    assert f"allowed: {Settings.model_fields[key].description}" in text


def test_every_setting_can_be_impossible_in_some_way(tmp_path: Path) -> None:
    assert IMPOSSIBLE.keys() | {"samples", "cache"} == Settings.model_fields.keys()
    file = tmp_path / "file"
    file.write_text("")
    for key in ("samples", "cache"):
        assert f"{key}=" in message_of({key: str(file)})


def test_an_unknown_key_is_named_with_the_nearest_one() -> None:
    text = message_of({"zoen": "FR"})
    assert "unknown key 'zoen' (did you mean 'zone'?)" in text
    assert "intensity" in text


@given(st.text(max_size=12).filter(lambda key: key not in Settings.model_fields))
def test_any_unknown_key_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match="unknown key"):
        parse_settings({key: 1}, "test")


@pytest.mark.parametrize("text", ["{", "[1]", '"FR"', "3", "FR"])
def test_what_is_no_json_object_is_refused(text: str) -> None:
    assert message_of(text).startswith("--carbon-config:")


@pytest.mark.parametrize("key", ["intensity", "pue", "market_intensity", "utilisation", "lifetime_years", "zone"])
def test_yes_is_no_number(key: str) -> None:
    assert f"{key}=True is not possible" in message_of({key: True})


def test_not_a_number_is_no_intensity() -> None:
    assert "intensity=nan" in message_of({"intensity": float("nan")})


def test_the_flag_wins_over_the_call_and_the_call_over_the_environment() -> None:
    environ = {"LLMCO2_ZONE": "DE", "LLMCO2_PUE": "1.5", "LLMCO2_INTENSITY": "300", "PATH": "/bin"}
    settings = requested(True, ['{"zone": "FR"}'], {"carbon": {"zone": "ES", "pue": 1.2}}, environ)
    assert (settings.zone, settings.pue, settings.intensity) == ("FR", 1.2, 300.0)


@pytest.mark.parametrize(
    ("flag", "values", "additional", "environ", "on"),
    [
        (False, None, None, {}, False),
        (False, None, {"carbon": False}, {}, False),
        (False, None, {"carbon": False}, {"LLMCO2_CARBON": "1"}, False),
        (True, None, {"carbon": False}, {}, True),
        (False, None, {"other": 1}, {"LLMCO2_ZONE": "FR"}, False),
        (True, None, None, {"LLMCO2_CARBON": "0"}, True),
        (False, ["{}"], None, {}, True),
        (False, None, {"carbon": {}}, {}, True),
        (False, None, {"carbon": True}, {}, True),
        (False, None, None, {"LLMCO2_CARBON": "1"}, True),
    ],
)
def test_the_meter_is_on_when_something_asks_for_it(
    flag: bool, values: object, additional: object, environ: dict[str, str], on: bool
) -> None:
    assert (requested(flag, values, additional, environ) is not None) is on


def test_an_unknown_variable_of_ours_is_named() -> None:
    with pytest.raises(ConfigError, match=r"LLMCO2_ZOEN.*LLMCO2_ZONE"):
        environment_settings({"LLMCO2_ZOEN": "FR"})


def test_a_switch_that_is_neither_yes_nor_no_is_refused() -> None:
    with pytest.raises(ConfigError, match="LLMCO2_CARBON='perhaps'"):
        enabled_by_environment({"LLMCO2_CARBON": "perhaps"})


def test_an_unknown_device_is_refused_with_the_catalog() -> None:
    with pytest.raises(ConfigError, match=r"device='h1000'.*h100-sxm"):
        check_settings(Settings(device="h1000"))


def test_a_malformed_bundle_is_refused_with_its_key(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle.json"
    bundle.write_text(json.dumps({"schema": 1}))
    with pytest.raises(ConfigError, match=r"predictor=.*version"):
        check_settings(Settings(predictor=str(bundle)))


def test_settings_survive_a_process_boundary() -> None:
    import pickle

    settings = Settings(zone="FR", intensity=56, samples=Path("/tmp"))
    assert pickle.loads(pickle.dumps(settings)) == settings
