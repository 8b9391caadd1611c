"""Compare methods on equal terms: the methods (`plan`), running them (`run`), the numbers (`judge`, `summary`)."""
