"""Clusters and the jobs on them."""
