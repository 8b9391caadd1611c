"""Pretrained weights: bundled, from the Hub or in folders; architectures and vision processors."""
