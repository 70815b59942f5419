"""Carbon intensity of the electricity: who says it, for which hour, of which kind, and what stands in for it."""
