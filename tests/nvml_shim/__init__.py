"""A libnvidia-ml.so.1 of our own that answers from a trace: what NVML does, without a GPU."""
