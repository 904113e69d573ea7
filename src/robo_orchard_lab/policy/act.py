"""ACT: action chunks from camera images, by a transformer with a CVAE (Zhao et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from robo_orchard_lab.policy.policy import (
    IMAGES,
    STATE,
    Normalizer,
    Policy,
    Statistics,
    feature_of,
    mean_without_padding,
    sinusoidal_embedding,
    statistics_of,
)


class ACT(Policy):
    """Transformer from the state and camera images to a chunk of actions.

    In training, a transformer encodes the demonstrated chunk to a latent variable ("style"), with
    a KL penalty towards a standard normal; `predict_actions` uses a latent of zeros. One ResNet
    without pretrained weights encodes all cameras, with group normalization for small batches.

    Args:
        statistics: of the dataset, by feature: ``{from_data: statistics}`` in a file.
        inputs: names of vector features that are concatenated to the state.
        cameras: names of image features; None for all ``observation.images.*``.
        chunk_size: predicted frames, T.
        n_action_steps: frames that are executed before the next prediction.
        dim: width of the transformers, a multiple of 4 and of ``heads``.
        heads: attention heads.
        feedforward_dim: hidden width of the feed-forward layers.
        encoder_layers: layers of the encoder and of the CVAE encoder.
        decoder_layers: layers of the decoder.
        latent_dim: size of the latent variable.
        dropout: probability of dropout.
        kl_weight: weight of the KL divergence in the loss.
        backbone: torchvision ResNet with basic blocks: ``resnet18`` or ``resnet34``.
    """

    def __init__(
        self,
        statistics: Statistics,
        inputs: Sequence[str] = (STATE,),
        cameras: Sequence[str] | None = None,
        chunk_size: int = 8,
        n_action_steps: int = 4,
        dim: int = 256,
        heads: int = 8,
        feedforward_dim: int = 1024,
        encoder_layers: int = 4,
        decoder_layers: int = 1,
        latent_dim: int = 32,
        dropout: float = 0.1,
        kl_weight: float = 10.0,
        backbone: str = "resnet18",
    ) -> None:
        if cameras is None:
            cameras = sorted(name for name in statistics if name.startswith(IMAGES))
        if not cameras:
            raise ValueError(
                f"expected at least one camera, found no statistics of {IMAGES}*; use "
                "BehaviorCloning or DiffusionPolicy for datasets without images"
            )
        super().__init__(
            statistics,
            inputs=inputs,
            chunk_size=chunk_size,
            n_action_steps=n_action_steps,
            cameras=[*cameras],
            dim=dim,
            heads=heads,
            feedforward_dim=feedforward_dim,
            encoder_layers=encoder_layers,
            decoder_layers=decoder_layers,
            latent_dim=latent_dim,
            dropout=dropout,
            kl_weight=kl_weight,
            backbone=backbone,
        )
        if dim % heads or dim % 4:
            raise ValueError(
                f"expected a dim that 4 and heads divide, found dim={dim} and heads={heads}"
            )
        self.cameras = tuple(cameras)
        self.latent_dim = latent_dim
        self.kl_weight = kl_weight
        self.image_normalizers = nn.ModuleList(
            Normalizer(statistics_of(statistics, name)) for name in cameras
        )
        self.backbone = _resnet(backbone)
        self.image_projection = nn.Conv2d(512, dim, 1)
        self.camera_embedding = nn.Embedding(len(cameras), dim)

        def encoder(layers: int) -> nn.TransformerEncoder:
            layer = nn.TransformerEncoderLayer(
                dim, heads, feedforward_dim, dropout, "gelu", batch_first=True, norm_first=True
            )
            return nn.TransformerEncoder(
                layer, layers, nn.LayerNorm(dim), enable_nested_tensor=False
            )

        self.style_query = nn.Parameter(torch.zeros(1, 1, dim))
        self.style_state = nn.Linear(self.state_dim, dim)
        self.style_action = nn.Linear(self.action_dim, dim)
        self.style_encoder = encoder(encoder_layers)
        self.style_head = nn.Linear(dim, 2 * latent_dim)

        self.latent_projection = nn.Linear(latent_dim, dim)
        self.state_projection = nn.Linear(self.state_dim, dim)
        self.encoder = encoder(encoder_layers)
        self.decoder = nn.TransformerDecoder(
            nn.TransformerDecoderLayer(
                dim, heads, feedforward_dim, dropout, "gelu", batch_first=True, norm_first=True
            ),
            decoder_layers,
            nn.LayerNorm(dim),
        )
        self.queries = nn.Parameter(torch.randn(1, chunk_size, dim) * 0.02)
        self.action_head = nn.Linear(dim, self.action_dim)

    def forward(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the mean L1 error of normalized actions plus the weighted KL divergence."""
        actions, padding = self.normalized_actions(batch)
        state = self.normalized_state(batch)
        mean, log_variance = self._style(state, actions, padding)
        latent = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        error = (self._decode(state, self._image_tokens(batch), latent) - actions).abs()
        divergence = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum(1).mean()
        return mean_without_padding(error, padding) + self.kl_weight * divergence

    def predict_normalized(self, observation: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return normalized actions of shape (B, T, A), for a latent of zeros."""
        state = self.normalized_state(observation)
        latent = state.new_zeros(state.shape[0], self.latent_dim)
        return self._decode(state, self._image_tokens(observation), latent)

    def _style(
        self, state: torch.Tensor, actions: torch.Tensor, padding: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and log variance (B, latent_dim) of the latent of demonstrated actions."""
        query = self.style_query.expand(state.shape[0], -1, -1)
        embedded = [query, self.style_state(state).unsqueeze(1), self.style_action(actions)]
        tokens = torch.cat(embedded, dim=1)
        position = torch.arange(tokens.shape[1], device=tokens.device)
        tokens = tokens + sinusoidal_embedding(position, tokens.shape[2]).to(tokens.dtype)
        is_ignored = nn.functional.pad(padding, (2, 0), value=False)
        encoded = self.style_encoder(tokens, src_key_padding_mask=is_ignored)
        mean, log_variance = self.style_head(encoded[:, 0]).chunk(2, dim=1)
        return mean, log_variance

    def _image_tokens(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the features of all cameras as tokens (B, N, dim)."""
        tokens = []
        for index, name in enumerate(self.cameras):
            image = feature_of(batch, name)
            if image.dim() != 4 or image.shape[1] != 3:
                raise ValueError(
                    f"expected {name} of shape [batch, 3, height, width], found {[*image.shape]}"
                )
            features = self.backbone(self.image_normalizers[index](image))
            projected = self.image_projection(features)
            position = _position_in_image(projected) + self.camera_embedding.weight[index]
            tokens.append(projected.flatten(2).transpose(1, 2) + position)
        return torch.cat(tokens, dim=1)

    def _decode(
        self, state: torch.Tensor, image_tokens: torch.Tensor, latent: torch.Tensor
    ) -> torch.Tensor:
        own = torch.stack([self.latent_projection(latent), self.state_projection(state)], dim=1)
        memory = self.encoder(torch.cat([own, image_tokens], dim=1))
        decoded = self.decoder(self.queries.expand(state.shape[0], -1, -1), memory)
        actions: torch.Tensor = self.action_head(decoded)
        return actions


def _resnet(name: str) -> nn.Sequential:
    """Return a ResNet from images (B, 3, H, W) to features (B, 512, H / 32, W / 32)."""
    try:
        from torchvision import models
    except ImportError:
        raise ImportError(
            'ACT requires torchvision: pip install "robo-orchard-hooks[vision]"'
        ) from None
    if name not in ("resnet18", "resnet34"):
        raise ValueError(f"expected backbone resnet18 or resnet34, found {name!r}")
    network = models.get_model(
        name, weights=None, norm_layer=lambda channels: nn.GroupNorm(channels // 16, channels)
    )
    return nn.Sequential(*list(network.children())[:-2])  # without pooling and classifier


def _position_in_image(features: torch.Tensor) -> torch.Tensor:
    """Return sinusoidal embeddings (H * W, dim) of the rows and columns of features."""
    size, (height, width) = features.shape[1] // 2, features.shape[2:]
    row = sinusoidal_embedding(torch.arange(height, device=features.device), size)
    column = sinusoidal_embedding(torch.arange(width, device=features.device), size)
    grid = [row.unsqueeze(1).expand(-1, width, -1), column.unsqueeze(0).expand(height, -1, -1)]
    return torch.cat(grid, dim=-1).flatten(0, 1).to(features.dtype)
