"""From the windows of a sample store to what each model took in each hour."""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Final

import numpy as np

from llmco2_vllm.core.embodied import split_idle
from llmco2_vllm.core.metering import Doubt
from llmco2_vllm.core.units import SECONDS_PER_DAY, SECONDS_PER_HOUR
from llmco2_vllm.reporting.held import EmbodiedChoice, Rate
from llmco2_vllm.reporting.hours import Record, Selection, Use, Window, chosen_model, period, pieces
from llmco2_vllm.store.sample import STEP_COLUMNS, Sample

WORST_WINDOWS: Final = 10
# A window is seconds long, hours when the meter was away; what claims more was never measured.
LONGEST_SECONDS: Final = 31 * SECONDS_PER_DAY
# The last moment that a date has a name for.
_LAST_EPOCH_SECONDS = 253402300799.0
_SHARE, _DURATION, _PREDICTED, _PREFILL, _DECODE = (
    STEP_COLUMNS.index(name)
    for name in ("window_share", "duration_seconds", "predicted_joules", "prefill_tokens", "decode_tokens")
)
_UNKNOWN = (
    "requests: samples are of windows, not of requests; aborted, recomputed and rejected energy is not in them",
    "tokens computed again after a preemption and rejected drafts: samples do not tell them apart, so those there were "
    "are still in what SCI and figures per 1000 tokens are divided by",
    "prefill and decode of steps that hold both: samples do not hold the model to split them by, they are a line apart",
)
_NOTES = (
    "Totals are of the windows that were stored: a store is bounded, leaves windows out once it is full, and nothing "
    "was scaled up for what is missing.",
    "Inside a window the energy of its steps goes by predicted joules; the part that its steps do not explain is not "
    "stored apart and stays with them.",
    "Embodied carbon is of the device time inside stored windows, busy and idle.",
)


def read(samples: Iterable[Sample], selection: Selection, embodied: EmbodiedChoice, source: str) -> Record:
    """The record of samples; the model of a selection is the begin of a fingerprint.

    Raises ValueError with one line when there is none, none of these days, or none of that model.
    """
    tally = _Tally(selection.bounds(), embodied)
    for sample in samples:
        tally.add(sample)
    if not tally.samples:
        raise ValueError(f"{source}: no samples; they are stored there while a meter is open")
    model = chosen_model(selection.model, tally.models, prefix=True)
    uses = [use for use in tally.uses() if model is None or use.model == model]
    if not uses:
        raise ValueError(f"{source}: none of its {tally.samples} samples lies in the days asked for")
    found = [window for window in tally.windows if model is None or window.model == model]
    return Record(
        f"samples, {source}",
        period((use.hour for use in uses), selection.bounds()),
        uses,
        [*_NOTES, *tally.notes()],
        [*_UNKNOWN, *tally.unknown()],
        heapq.nlargest(WORST_WINDOWS, found, key=lambda window: abs(window.error_joules)),
    )


class _Tally:
    """Adds up samples between ``bounds``."""

    def __init__(self, bounds: tuple[float, float], embodied: EmbodiedChoice) -> None:
        self.samples = 0
        self.models: set[str] = set()
        self.windows: list[Window] = []
        self._bounds, self._embodied = bounds, embodied
        self._amounts: dict[tuple[int, str], defaultdict[str, float]] = {}
        self._engines: dict[tuple[int, str, int], int] = {}
        self._left_out = 0
        self._doubts: Counter[str] = Counter()
        self._rates: dict[str, Rate] = {}

    def add(self, sample: Sample) -> None:
        """One more window, by its share in each hour between the bounds."""
        self.samples += 1
        begin, end = sample.began_epoch_seconds, sample.began_epoch_seconds + sample.duration_seconds
        if end > _LAST_EPOCH_SECONDS or sample.duration_seconds > LONGEST_SECONDS:
            self._left_out += 1
            return
        model = sample.model_fingerprint
        self.models.add(model)
        amounts, counted = self._of(sample), False
        for hour, share in pieces(begin, end):
            if self._bounds[0] <= hour * SECONDS_PER_HOUR < self._bounds[1]:
                counted = True
                found = self._amounts.setdefault((hour, model), defaultdict(float))
                for name, amount in amounts.items():
                    found[name] += share * amount
                self._engines[hour, model, sample.engine] = sample.topology.engine_devices
        if counted:
            self._judge(sample)

    def uses(self) -> list[Use]:
        """By hour and model. What some window of an hour does not tell is unknown of the hour."""
        for (hour, model, _), devices in self._engines.items():
            self._amounts[hour, model]["present_device_seconds"] += devices * SECONDS_PER_HOUR
        found = []
        for (hour, model), amounts in sorted(self._amounts.items()):
            known = dict(amounts)
            for flag, names in (
                ("without_embodied", ("embodied_busy_grams", "embodied_idle_grams")),
                ("without_prediction", ("predicted_joules",)),
            ):
                if known.pop(flag, 0.0):
                    known = {name: amount for name, amount in known.items() if name not in names}
            found.append(Use(hour, model, known))
        return found

    def notes(self) -> list[str]:
        """What devices there were, and which windows are doubtful."""
        found = [f"Embodied, {rate.note}." for rate in self._rates.values() if rate.grams_per_second is not None]
        listed = ", ".join(f"{count} {doubt}" for doubt, count in self._doubts.most_common())
        return [*found, *([f"Windows in doubt count as well: {listed}."] if listed else [])]

    def unknown(self) -> list[str]:
        """Embodied figures that there are not, and windows that could not be."""
        found = [f"embodied carbon: {rate.note}" for rate in self._rates.values() if rate.grams_per_second is None]
        impossible = f"{self._left_out} windows without a possible time were left out"
        return [*found, *([impossible] if self._left_out else [])]

    def _of(self, sample: Sample) -> dict[str, float]:
        """Sums over the whole window."""
        device_seconds = sample.duration_seconds * sample.devices
        found = {
            "energy_joules": sample.energy_joules,
            "variance_square_joules": sample.sigma_joules**2,
            "doubtful_joules": sample.energy_joules if sample.doubt else 0.0,
            "recorded_device_seconds": device_seconds,
            **_parts(sample),
            **_tokens(sample),
        }
        found["without_prediction"] = float(sample.predicted_joules is None)
        found["predicted_joules"] = sample.predicted_joules or 0.0
        error = sample.relative_error
        if error is not None and not sample.doubt:
            found["compared_predicted_joules"] = sample.predicted_joules or 0.0
            found["compared_metered_joules"] = sample.energy_joules - (sample.idle_joules or 0.0)
        rate = self._rate(sample.device).grams_per_second
        found["without_embodied"] = float(rate is None)
        if rate is not None:
            idle = min(sample.idle_seconds, sample.duration_seconds) * sample.devices
            busy_grams, idle_grams = split_idle(rate, device_seconds - idle, idle)
            found |= {"embodied_busy_grams": busy_grams, "embodied_idle_grams": idle_grams}
        return found

    def _rate(self, device: str) -> Rate:
        if device not in self._rates:
            self._rates[device] = self._embodied.rate(device)
        return self._rates[device]

    def _judge(self, sample: Sample) -> None:
        """Keep the worst predicted of those that are trusted."""
        self._doubts.update([sample.doubt] if sample.doubt else [])
        if sample.doubt or sample.relative_error is None:
            return
        metered = sample.energy_joules - (sample.idle_joules or 0.0)
        predicted = sample.predicted_joules or 0.0
        self.windows.append(
            Window(sample.began_epoch_seconds, sample.duration_seconds, sample.model_fingerprint, metered, predicted)
        )


def _parts(sample: Sample) -> dict[str, float]:
    """Joules by part of a window: lambda_w * sum of f_ws * e_s over the steps of each kind (METERING section 5)."""
    names = ("prefill", "decode", "mixed", "idle", "sleeping", "unattributed")
    found = {f"{name}_joules": 0.0 for name in names}
    if sample.idle_joules is None:
        return {**found, "unsplit_joules": sample.energy_joules}
    found["sleeping_joules" if sample.doubt == Doubt.SLEEPING else "idle_joules"] = sample.idle_joules
    rest, weights = sample.energy_joules - sample.idle_joules, _weights(sample)
    total = float(weights.sum())
    if not total or sample.doubt == Doubt.SHARED:
        found["unattributed_joules"] = rest
        return found
    prefill, decode = sample.steps[:, _PREFILL] > 0, sample.steps[:, _DECODE] > 0
    for name, kind in (("prefill", ~decode), ("decode", decode & ~prefill), ("mixed", decode & prefill)):
        found[f"{name}_joules"] = rest * float(weights[kind].sum()) / total
    return found


def _weights(sample: Sample) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """What each step weighs, shape (n,): predicted joules, or measured duration where one of them is not known."""
    share = sample.steps[:, _SHARE]
    weights = share * sample.steps[:, _PREDICTED]
    if np.isnan(weights).any() or not weights.sum():
        weights = share * sample.steps[:, _DURATION]
    found: np.ndarray[tuple[int], np.dtype[np.float64]] = weights if weights.sum() else share
    return found


def _tokens(sample: Sample) -> Mapping[str, float]:
    """Tokens computed. Every device of an engine sees all steps: each counts for its part of them."""
    part = sample.devices / sample.topology.engine_devices
    prefill, decode = (sample.steps[:, _SHARE] @ sample.steps[:, [_PREFILL, _DECODE]]).tolist()
    return {"prefill_tokens": part * prefill, "decode_tokens": part * decode}
