"""Move what a multimodal teacher knows into a unimodal language model, at cluster scale."""
