"""A bundle survives the disk, and what is not one is refused with a reason."""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llmco2_vllm.predictor.bundle import Bundle, shipped
from llmco2_vllm.predictor.calibration import Interval


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle.load()


def rewritten(bundle: Bundle, path: Path, **changes: object) -> Path:
    """The bundle on disk with some keys of its JSON changed; None takes a key away."""
    bundle.save(path)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    meta = json.loads(parts["bundle.json"])
    meta.update(changes)
    parts["bundle.json"] = json.dumps({key: value for key, value in meta.items() if value is not None}).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    return path


def test_a_bundle_survives_the_disk(bundle: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "b.npz"
    bundle.save(path)
    again = Bundle.load(path)
    assert (again.version, again.devices, again.seen) == (bundle.version, bundle.devices, bundle.seen)
    assert (again.intervals, again.provenance) == (bundle.intervals, bundle.provenance)
    assert again.arrays.keys() == bundle.arrays.keys()
    assert all(np.array_equal(again.arrays[name], bundle.arrays[name]) for name in bundle.arrays)
    assert bundle.offsets is not None and again.offsets is not None
    assert np.array_equal(again.offsets.at(bundle.offsets.rows), bundle.offsets.at(bundle.offsets.rows))


def test_the_same_bundle_is_the_same_bytes(bundle: Bundle, tmp_path: Path) -> None:
    for name in ("a.npz", "b.npz"):
        bundle.save(tmp_path / name)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_a_save_that_fails_leaves_the_old_bundle_and_no_litter(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "b.npz"
    bundle.save(path)
    before = path.read_bytes()

    def full(*_args: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        bundle.save(path)
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["b.npz"]


def test_the_shipped_bundle_is_small_holds_no_pickle_and_says_where_it_comes_from(bundle: Bundle) -> None:
    data = shipped().read_bytes()
    assert len(data) < 5_000_000
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for name in archive.namelist():
            assert name == "bundle.json" or np.load(io.BytesIO(archive.read(name)), allow_pickle=False) is not None
    assert {"rows", "recipe", "attribution", "left_out_architecture"} <= set(bundle.provenance)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"schema": 2}, "schema=2"),
        ({"features_version": "0"}, "features_version='0'"),
        ({"version": "a,b"}, "without a comma"),
        ({"devices": ["h100-sxm"]}, "default"),
        ({"devices": None}, "'devices' is missing"),
        ({"intervals": {"decode": [0.5, 2], "mixed": [0.5, 2]}}, "'unknown' is missing"),
        ({"intervals": {"decode": [1.5, 2], "mixed": [0.5, 2], "unknown": [0.5, 2]}}, "0 < lower <= 1 <= upper"),
        ({"offsets": {"architecture": [], "deployment": [], "workload": []}}, "do not belong together"),
    ],
)
def test_a_wrong_key_is_named(bundle: Bundle, tmp_path: Path, changes: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Bundle.load(rewritten(bundle, tmp_path / "b.npz", **changes))


@pytest.mark.parametrize("data", [b"", b"not a bundle", b"PK\x05\x06" + bytes(18)])
def test_what_is_no_bundle_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "b.npz"
    path.write_bytes(data)
    with pytest.raises(ValueError, match="not readable"):
        Bundle.load(path)


@pytest.mark.parametrize("name", ["input", "log_host", "power", "second_bias"])
def test_an_array_that_is_missing_misshapen_or_not_finite_is_named(bundle: Bundle, name: str) -> None:
    less = {key: value for key, value in bundle.arrays.items() if key != name}
    with pytest.raises(ValueError, match=name):
        replace(bundle, arrays=less)
    for wrong in (bundle.arrays[name][:-1], bundle.arrays[name] * np.nan, bundle.arrays[name].astype(np.float32)):
        with pytest.raises(ValueError, match=name):
            replace(bundle, arrays={**bundle.arrays, name: wrong})


def test_intervals_must_hold_the_prediction(bundle: Bundle) -> None:
    with pytest.raises(ValueError, match=r"intervals\.mixed"):
        replace(bundle, intervals={**bundle.intervals, "mixed": Interval(0.5, 0.9)})
