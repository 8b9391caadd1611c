"""The fusion head: one feature vector per modality, any of which may be missing, to one logit per label."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional

from mint_ray.teachers.config import Fusion

Tensor = torch.Tensor

NUM_HEADS = 4
"""Attention heads of `fusion: attention`."""
MIN_STD = 1e-4
"""Minimum standard deviation that a feature is divided by, so that nearly constant features are not blown up."""


class FusionHead(nn.Module):
    """Network from features (B, size of the modality) of each modality to logits (B, labels).

    The logits are the sum of one linear classifier per modality and of a classifier of the fused modalities. So the
    head is at least as good as the linear models, which need few records, and learns interactions of modalities.
    """

    def __init__(self, config: Fusion, feature_sizes: Mapping[str, int], num_labels: int) -> None:
        super().__init__()
        hidden_size = config.hidden_size
        self.fusion, self.modalities = config.fusion, list(feature_sizes)
        for modality, size in feature_sizes.items():
            self.register_buffer(f"mean_{modality}", torch.zeros(size))
            self.register_buffer(f"std_{modality}", torch.ones(size))
        self.projections = nn.ModuleDict(
            {modality: nn.Linear(size, hidden_size) for modality, size in feature_sizes.items()}
        )
        self.unimodal_classifiers = nn.ModuleDict(
            {modality: nn.Linear(size, num_labels, bias=False) for modality, size in feature_sizes.items()}
        )
        for weight in self.unimodal_classifiers.parameters():
            nn.init.zeros_(weight)
        # learned projections of a missing modality
        self.missing = nn.ParameterDict(
            {modality: nn.Parameter(torch.zeros(hidden_size)) for modality in feature_sizes}
        )
        if config.fusion == "concat":
            self.mix = nn.Linear(hidden_size * len(feature_sizes), hidden_size)
        if config.fusion == "gated":
            self.gates = nn.ModuleDict({modality: nn.Linear(hidden_size, 1) for modality in feature_sizes})
        if config.fusion == "attention":
            self.query = nn.Parameter(torch.randn(hidden_size) * 0.02)
            self.modality_embeddings = nn.ParameterDict(
                {modality: nn.Parameter(torch.randn(hidden_size) * 0.02) for modality in feature_sizes}
            )
            self.attention = nn.MultiheadAttention(hidden_size, NUM_HEADS, batch_first=True)
        self.classifier = nn.Linear(hidden_size, num_labels)

    def set_normalization(self, modality: str, mean: Tensor, std: Tensor) -> None:
        """Set mean and standard deviation of a modality's features over the training split."""
        self.get_buffer(f"mean_{modality}").copy_(mean)
        self.get_buffer(f"std_{modality}").copy_(std.clamp(min=MIN_STD))

    def forward(
        self, features: Mapping[str, Tensor], present: Mapping[str, Tensor], dropout_mask: Tensor | None
    ) -> Tensor:
        """Return logits (B, labels).

        Args:
            features: Features (B, size) of each modality; rows of records without it may hold any values.
            present: Booleans (B,) for each modality: the records that have it.
            dropout_mask: Factors (B, hidden_size) of the fused features, 0 or 1 / (1 - dropout); None in evaluation.
        """
        projected, logits = [], []
        for modality in self.modalities:
            mean, std = self.get_buffer(f"mean_{modality}"), self.get_buffer(f"std_{modality}")
            scaled = (features[modality] - mean) / std
            mask = present[modality][:, None]
            projected.append(torch.where(mask, self.projections[modality](scaled), self.missing[modality]))
            # torch.where and not a product: the features of a missing modality may be NaN
            logits.append(torch.where(mask, self.unimodal_classifiers[modality](scaled), 0.0))
        fused = functional.gelu(self._fuse(projected))
        if dropout_mask is not None:
            fused = fused * dropout_mask
        out: Tensor = self.classifier(fused) + sum(logits)
        return out

    def _fuse(self, projected: list[Tensor]) -> Tensor:
        if self.fusion == "concat":
            mixed: Tensor = self.mix(torch.cat(projected, dim=1))
            return mixed
        projected_BMH = torch.stack(projected, dim=1)  # B records, M modalities, H hidden size
        if self.fusion == "gated":
            weight_BM = torch.cat(
                [self.gates[modality](value) for modality, value in zip(self.modalities, projected, strict=True)], dim=1
            ).softmax(dim=1)
            mean: Tensor = (weight_BM[:, :, None] * projected_BMH).sum(dim=1)
            return mean
        keys_BMH = projected_BMH + torch.stack([self.modality_embeddings[modality] for modality in self.modalities])
        query_B1H = self.query.expand(len(projected_BMH), 1, -1)
        attended_B1H = self.attention(query_B1H, keys_BMH, keys_BMH, need_weights=False)[0]
        attended: Tensor = attended_B1H[:, 0] + projected_BMH.mean(dim=1)
        return attended
