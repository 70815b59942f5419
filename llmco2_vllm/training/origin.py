"""Where an observation comes from: its deployment, its engine's era, and slow campaigns. Without torch."""

from __future__ import annotations

from dataclasses import replace

from llmco2_vllm.core.features import GraphFeatures
from llmco2_vllm.training.observation import Observation

# Engines of this year are like today's; older ones have a host time of their own on each device.
ERA = "2025"


def features_of(observation: Observation) -> GraphFeatures:
    """Features of the deployment an observation was made on."""
    model = replace(observation.model, block_quantised=observation.block_quantised)
    era = "" if observation.era == ERA else observation.era
    return GraphFeatures.of(model, observation.device, observation.topology, era)


def campaign(observation: Observation) -> str | None:
    """Rows of a source that ran slower than others of the same model for a reason their columns do not tell.

    ML.ENERGY v3, gpqa on one B200: 20 to 30 ms a step on top of what chat rows of the same model and batch take, at
    300 W: its host, not its GPU. All but gpt-oss. Fitted apart, and never part of a prediction for a deployment.
    """
    deployment = observation.deployment
    slow = observation.source == "mlenergy-v3" and deployment.workload == "gpqa" and deployment.device == "b200"
    return "mlenergy-v3/gpqa/b200" if slow and deployment.n_gpu == 1 and deployment.precision != "mxfp4" else None
