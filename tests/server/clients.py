"""The official clients and raw HTTP against one server, its metrics, and the laws every annotation obeys."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.resources import files
from typing import Any, Self

import httpx
from anthropic import Anthropic
from anthropic import DefaultHttpxClient as AnthropicHttpx
from jsonschema import Draft202012Validator
from openai import DefaultHttpxClient, OpenAI
from prometheus_client.parser import text_string_to_metric_families
from pytest import approx

MODEL = "smol"
ENERGY = "llmco2_predicted_energy_joules_total"
ABORTED = "llmco2_predicted_aborted_energy_joules_total"
REQUESTS = "llmco2_request_predicted_energy_joules_sum"
STEPS = "llmco2_steps_total"
# Annotations carry six significant digits: half a unit in the last one is 5e-6 at most, and grams have one more.
SIX_DIGITS = 1e-5
TIMEOUT_SECONDS = 60.0

_SCHEMA = Draft202012Validator(
    json.loads(files("llmco2_vllm").joinpath("data/annotation.schema.json").read_text(encoding="utf-8"))
)


def checked(carbon: Any) -> dict[str, Any]:
    """``carbon`` after it was held against the published schema and the arithmetic every annotation obeys."""
    found = _lawful(carbon)
    assert found["meter"] == "none"
    assert found["meter_reason"]
    assert "energy_joules" not in found, "without a meter nothing is presented as measured"
    return found


def checked_metered(carbon: Any) -> dict[str, Any]:
    """The same where NVML is read: what is called measured is covered, and what is not covered is not."""
    found = _lawful(carbon)
    assert found["meter"] == "nvml"
    if "coverage_ratio" not in found:
        assert (found["basis"], "energy_joules" in found) == ("predicted", False)
        return found
    covered, energy = found["coverage_ratio"], found["energy_joules"]
    assert 0 < covered <= 1
    assert found["basis"] == ("measured" if covered == 1 else "mixed")
    assert covered < 1 or "meter_reason" not in found, "a meter that does not measure says why, and no other"
    assert energy["lower"] <= energy["value"] <= energy["upper"]
    assert energy["value"] == approx(energy["prefill"] + energy["decode"], rel=SIX_DIGITS)
    return found


def _lawful(carbon: Any) -> dict[str, Any]:
    _SCHEMA.validate(carbon)
    estimate, grams = carbon["estimate"], carbon["carbon_grams"]
    assert estimate["energy_joules"] > 0
    assert estimate["energy_joules"] == approx(estimate["prefill_joules"] + estimate["decode_joules"], rel=SIX_DIGITS)
    assert estimate["lower"] <= estimate["energy_joules"] <= estimate["upper"]
    grams_per_joule = carbon["intensity"]["grams_per_kwh"] * carbon.get("pue", 1.0) / 3.6e6
    figure = carbon.get("energy_joules", {**estimate, "value": estimate["energy_joules"]})
    for joules, part in (("value", "operational"), ("lower", "lower"), ("upper", "upper")):
        assert grams[part] == approx(figure[joules] * grams_per_joule, rel=SIX_DIGITS)
    assert isinstance(carbon, dict)
    return carbon


def joules(carbon: Mapping[str, Any]) -> float:
    """Predicted energy of a call."""
    return float(carbon["estimate"]["energy_joules"])


def metered_joules(carbon: Mapping[str, Any]) -> float:
    """Metered energy of a call."""
    return float(carbon["energy_joules"]["value"])


def assert_tokens(carbon: Mapping[str, Any], prompt: int, completion: int, sequences: int = 1) -> None:
    """The tokens charged are those of the usage object: each sequence computes all but its last token.

    prompt: prompt tokens of all sequences; completion: sampled tokens of all of them.
    """
    tokens = carbon["tokens"]
    assert tokens["prefill"] + tokens["cached"] == prompt
    assert tokens["decode"] == completion - sequences
    assert tokens["recomputed"] == 0


class Metrics:
    """The ``llmco2_*`` samples of one scrape."""

    def __init__(self, text: str) -> None:
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        self.samples = [sample for sample in samples if sample.name.startswith("llmco2")]

    def total(self, name: str, **labels: str) -> float:
        """Sum over the samples of this name that carry these labels."""
        return sum(
            sample.value for sample in self.samples if sample.name == name and labels.items() <= sample.labels.items()
        )

    def values(self, name: str, label: str) -> set[str]:
        """The values a label takes in the samples of this name."""
        return {sample.labels[label] for sample in self.samples if sample.name == name}


class Clients:
    """Everything that talks to the server at ``url``; a context manager that closes its connections."""

    def __init__(self, url: str, key: str = "none") -> None:
        self.url = url
        self.headers = {"Authorization": f"Bearer {key}"}
        self.http = self.fresh()
        self.openai = OpenAI(
            base_url=f"{url}/v1", api_key=key, max_retries=0, http_client=DefaultHttpxClient(trust_env=False)
        )
        self.anthropic = Anthropic(
            base_url=url, auth_token=key, max_retries=0, http_client=AnthropicHttpx(trust_env=False)
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for client in (self.http, self.openai, self.anthropic):
            client.close()

    def fresh(self) -> httpx.Client:
        """A client with connections of its own."""
        return httpx.Client(base_url=self.url, headers=self.headers, timeout=TIMEOUT_SECONDS, trust_env=False)

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        """JSON answer of a POST of ``body`` and the model's name."""
        answer = self.http.post(path, json={"model": MODEL, **body}).raise_for_status().json()
        assert isinstance(answer, dict)
        return answer

    def events(self, path: str, **body: Any) -> list[Any]:
        """Data of the events of a streamed POST, ``[DONE]`` as text."""
        text = self.http.post(path, json={"model": MODEL, "stream": True, **body}).raise_for_status().text
        data = [line.removeprefix("data:").strip() for line in text.splitlines() if line.startswith("data:")]
        return [json.loads(item) if item.startswith("{") else item for item in data]

    def found(self, response_id: str) -> Any:
        """The annotation kept for a response id."""
        answer = self.http.get(f"/carbon/requests/{response_id}").raise_for_status().json()
        assert answer["id"] == response_id
        return answer["carbon"]

    def engines(self) -> list[dict[str, Any]]:
        """Cumulative figures of every engine, asked now."""
        engines = self.http.get("/carbon").raise_for_status().json()["engines"]
        assert isinstance(engines, list)
        return engines

    def engine(self) -> dict[str, Any]:
        """Cumulative figures of the only engine, asked now."""
        (engine,) = self.engines()
        return engine

    def final(self, response_id: str) -> dict[str, Any]:
        """The annotation kept for a response, once all of it is measured."""
        self.wait_until(lambda: self.found(response_id)["basis"] == "measured", f"{response_id} is measured")
        return checked_metered(self.found(response_id))

    def wait_trusted(self, windows: int = 3) -> None:
        """Return once the engine's meter has delivered so many more windows that nothing is wrong with."""

        def trusted() -> int:
            metered = self.engine()["metered"]
            return int(metered["windows"] - metered["doubtful_windows"])

        begin = trusted()
        self.wait_until(lambda: trusted() >= begin + windows, "windows are trusted")

    def engine_total(self, field: str) -> float:
        """One figure, added up over the engines."""
        return float(sum(engine[field] for engine in self.engines()))

    def metrics(self) -> Metrics:
        """One scrape."""
        return Metrics(self.http.get("/metrics").raise_for_status().text)

    def settled(self) -> Metrics:
        """A scrape of an idle server that shows its last step."""
        scrapes: list[Metrics] = []

        def current() -> bool:
            engines = self.engines()
            scrapes.append(self.metrics())
            idle = not any(engine["running_requests"] for engine in engines)
            return idle and scrapes[-1].total(STEPS) == sum(engine["steps"] for engine in engines)

        self.wait_until(current, "the server is idle and its metrics show the last step")
        return scrapes[-1]

    def wait_until(self, holds: Callable[[], bool], what: str) -> None:
        """Return once ``holds()``; AssertionError after a while."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not holds():
            assert time.monotonic() < deadline, f"never came true: {what}"
            time.sleep(0.1)

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        """With the hook off, and on again afterwards."""
        self.switch(False)
        try:
            yield
        finally:
            self.switch(True)

    def switch(self, on: bool) -> None:
        """Turn the hook of every engine on or off."""
        answer = self.http.put("/carbon/hook", json={"on": on}).raise_for_status().json()
        assert answer["on"] is on
        assert all(answer["engines"])


def ask(question: str) -> Any:
    """Messages of a chat with one question."""
    return [{"role": "user", "content": question}]
