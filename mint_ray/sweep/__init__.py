"""Find the best spec: a search around the pipeline (`run`), its record (`study`), its trials (`trials`)."""
