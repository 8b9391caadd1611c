"""Exports: pairs in the columns of other trainers (`pairs`, `formats`), students in the Hub's format (`student`)."""

from mint_ray.exports.formats import FORMATS
from mint_ray.exports.pairs import export_pairs
from mint_ray.exports.student import export_student

__all__ = ["FORMATS", "export_pairs", "export_student"]
