"""Ledger codec, annotation, request log and metrics; knows nothing of vLLM."""
