"""Pretrained models: their ids, downloads and checks, architectures, and the processors of vision-language models."""
