"""Configs: the loader and the settings of pipelines, comparisons and sweeps."""
