"""Serving a predictor: numpy only, no torch."""
