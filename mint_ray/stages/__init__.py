"""The stages: one module, one function, one Ray job each; they meet only through artifacts."""
