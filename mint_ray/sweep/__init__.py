"""Hyperparameter sweeps: loop (`run`), Optuna study (`study`), search space (`space`), Ray Tune trials (`trials`)."""
