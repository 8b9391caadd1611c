"""Comparisons on equal terms: configs (`plan`), runs (`run`), statistics (`statistics`), report (`summary`)."""
