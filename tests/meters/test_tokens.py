"""Every form of a device token names one GPU, or one line says which token does not and what exists."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmco2_vllm.meters.base import MeterUnavailableError
from llmco2_vllm.meters.tokens import InstalledDevice, choose_devices

UUIDS = [f"GPU-{k}{k}aabbcc-1111-2222-3333-44445555666{k}" for k in range(4)]
MIG = "MIG-c7384736-a75d-5afc-978f-d2f1294409fd"
ALIKE = [InstalledDevice(k, uuid, "NVIDIA H200") for k, uuid in enumerate(UUIDS)]
MIXED = [*ALIKE[:3], InstalledDevice(3, UUIDS[3], "NVIDIA L4", (MIG,))]


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["index", "text", "uuid", "short", "bare", " spaced "]))))
def test_tokens_of_any_form_name_each_gpu_once_in_order(picks: list[tuple[int, str]]) -> None:
    def token(k: int, form: str) -> str | int:
        forms = {"index": k, "text": str(k), "uuid": UUIDS[k], "short": UUIDS[k][:6], "bare": UUIDS[k][4:]}
        return forms.get(form, f" {UUIDS[k]} ")

    if picks:
        chosen = choose_devices([token(*pick) for pick in picks], ALIKE, pci_order=False)
        assert [device.number for device in chosen] == list(dict.fromkeys(k for k, _ in picks))


@pytest.mark.parametrize("token", [MIG, f"MIG-{UUIDS[3]}/1/0"])
def test_an_instance_stands_for_its_gpu(token: str) -> None:
    assert choose_devices([token], MIXED, pci_order=False) == [MIXED[3]]


def test_without_tokens_all_gpus_are_meant() -> None:
    assert choose_devices(None, MIXED, pci_order=False) == MIXED


@pytest.mark.parametrize("token", ["4", "GPU-ff", "GPU-", "gpu0", "MIG-0", "", "-1"])
def test_a_token_that_names_nothing_is_told_with_what_exists(token: str) -> None:
    with pytest.raises(MeterUnavailableError) as caught:
        choose_devices([token], ALIKE, pci_order=True)
    assert repr(token) in str(caught.value) and all(uuid in str(caught.value) for uuid in UUIDS)


def test_an_abbreviation_of_several_gpus_is_refused() -> None:
    twins = [InstalledDevice(k, f"GPU-aa{k}", "NVIDIA H200") for k in range(2)]
    with pytest.raises(MeterUnavailableError, match="'GPU-aa' names several GPUs"):
        choose_devices(["GPU-aa"], twins, pci_order=True)


def test_an_index_among_different_gpus_needs_pci_order() -> None:
    assert choose_devices(["3"], MIXED, pci_order=True) == [MIXED[3]]
    with pytest.raises(MeterUnavailableError, match="CUDA_DEVICE_ORDER=PCI_BUS_ID"):
        choose_devices(["3"], MIXED, pci_order=False)


@pytest.mark.parametrize(("tokens", "installed"), [([], ALIKE), (None, []), (["0"], [])])
def test_no_gpu_is_a_reason(tokens: list[str] | None, installed: list[InstalledDevice]) -> None:
    with pytest.raises(MeterUnavailableError, match="no GPU is"):
        choose_devices(tokens, installed, pci_order=True)
