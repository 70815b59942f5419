"""Reports of what serving took: from stored samples or Prometheus to tables, hour by hour."""
