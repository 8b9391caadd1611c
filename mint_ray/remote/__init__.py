"""Clusters and the jobs that run on them: submission, diagnosis, fault injection."""
