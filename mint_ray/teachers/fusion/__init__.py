"""A trained network over image, text, coded fields and coded phenotypes, any of which a record may lack."""

from mint_ray.teachers.fusion.teacher import FusionImageTeacher, FusionTeacher, build_fusion

__all__ = ["FusionImageTeacher", "FusionTeacher", "build_fusion"]
