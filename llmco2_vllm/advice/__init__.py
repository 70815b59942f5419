"""Which device, tensor-parallel size and batch limit serve a workload with the least carbon, predicted."""
