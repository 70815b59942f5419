"""Learning from measurements: public data sets, splits, baselines. Nothing of this runs while a model is served."""
