"""One Grafana dashboard, recording and alert rules and the list of metrics, all made from the metric table."""
