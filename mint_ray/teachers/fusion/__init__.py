"""A network over image, text, coded fields and coded findings, any of which a record may lack."""

from mint_ray.teachers.fusion.teacher import FusionTeacher, FusionViewer

__all__ = ["FusionTeacher", "FusionViewer"]
