"""Architectures that people have, without weights: at full size for the table, and small, of the same classes, for the tests.

Those of transformers and of this file need nothing else; torchvision's and timm's are for an environment that has them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, Any]


@dataclass(frozen=True)
class Row:
    """One architecture.

    Attributes:
        name: As the table has it.
        source: The library that its class comes from.
        build: Given whether it is to be small, the network and a function from a batch size to its inputs.
        layer: The layer that becomes Bayesian; None for the first one.
        first: What the first layer is called.
        batch: Examples in a step at full size.
        options: What `bayesianize` is told beside that.
    """

    name: str
    source: str
    build: Callable[[bool], tuple[nn.Module, Callable[[int], Any]]]
    first: str
    layer: str | None = None
    batch: int = 8
    options: Mapping[str, Any] = field(default_factory=dict)


def images(size: int) -> Callable[[int], Tensor]:
    """Random images."""
    return lambda count: torch.randn(count, 3, size, size)


def sentences(vocabulary: int, length: int) -> Callable[[int], dict[str, Tensor]]:
    """Random sentences, the second half of every other one padding."""

    def make(count: int) -> dict[str, Tensor]:
        mask = torch.ones(count, length, dtype=torch.long)
        mask[1::2, length // 2 :] = 0
        return {"input_ids": torch.randint(5, vocabulary, (count, length)), "attention_mask": mask}

    return make


class WideBlock(nn.Module):
    """A block of a wide residual network: normalisation and activation before each convolution."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(channels_in), nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(channels), nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(channels_in, channels, 1, stride, bias=False) if channels_in != channels else None

    def forward(self, x: Tensor) -> Tensor:
        """The block's output."""
        active = torch.relu(self.norm1(x))
        inner = self.conv2(torch.relu(self.norm2(self.conv1(active))))
        return inner + (x if self.shortcut is None else self.shortcut(active))


def wide_resnet(depth: int, width: int, classes: int = 10) -> nn.Module:
    """A wide residual network for small images (Zagoruyko and Komodakis, 2016)."""
    blocks = (depth - 4) // 6
    sizes = [16, 16 * width, 32 * width, 64 * width]
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False)]
    for stage in range(3):
        for index in range(blocks):
            first = index == 0
            layers.append(WideBlock(sizes[stage + (not first)], sizes[stage + 1], 2 if first and stage else 1))
    layers += [nn.BatchNorm2d(sizes[3]), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(sizes[3], classes)]
    return nn.Sequential(*layers)


class MixerBlock(nn.Module):
    """A block of an MLP-Mixer: one perceptron over places, one over channels."""

    def __init__(self, places: int, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.over_places = nn.Sequential(nn.Linear(places, channels // 2), nn.GELU(), nn.Linear(channels // 2, places))
        self.over_channels = nn.Sequential(
            nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        """The block's output, (B, places, channels)."""
        x = x + self.over_places(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.over_channels(self.norm2(x))


class Mixer(nn.Module):
    """MLP-Mixer (Tolstikhin et al., 2021)."""

    def __init__(self, image: int, patch: int, channels: int, blocks: int, classes: int = 10) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, channels, patch, patch)
        self.blocks = nn.Sequential(*(MixerBlock((image // patch) ** 2, channels) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(channels), nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes)."""
        return self.head(self.norm(self.blocks(self.patches(x).flatten(2).transpose(1, 2))).mean(1))


class GraphConvolution(nn.Module):
    """A graph convolution: every node takes the mean of its neighbours' features."""

    def __init__(self, features_in: int, features: int) -> None:
        super().__init__()
        self.own, self.others = nn.Linear(features_in, features), nn.Linear(features_in, features, bias=False)

    def forward(self, nodes: Tensor, adjacency: Tensor) -> Tensor:
        """New features (B, nodes, features)."""
        neighbours = adjacency / adjacency.sum(2, keepdim=True).clamp_min(1)
        return self.own(nodes) + self.others(neighbours @ nodes)


class GraphNetwork(nn.Module):
    """Graph classification: forward takes nodes' features and the adjacency."""

    def __init__(self, features: int, hidden: int, depth: int, classes: int = 10) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(GraphConvolution(hidden if i else features, hidden) for i in range(depth))
        self.head = nn.Linear(hidden, classes)

    def forward(self, nodes: Tensor, adjacency: Tensor) -> Tensor:
        """Logits (B, classes)."""
        for convolution in self.convolutions:
            nodes = torch.relu(convolution(nodes, adjacency))
        return self.head(nodes.mean(1))


def _graphs(nodes: int, features: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    return lambda count: (torch.randn(count, nodes, features), (torch.rand(count, nodes, nodes) < 0.2).float())


def _transformers(model: str, config: str, small: Mapping[str, Any], full: Mapping[str, Any] | None = None) -> Any:
    def make(is_small: bool) -> nn.Module:
        import transformers  # noqa: PLC0415 - only where it is asked for

        options = {"num_labels": 10, **(small if is_small else full or {})}
        return getattr(transformers, model)(getattr(transformers, config)(**options))

    return make


def _row_of_images(make: Callable[[bool], nn.Module], small: int = 32, full: int = 224) -> Any:
    return lambda is_small: (make(is_small), images(small if is_small else full))


def _row_of_text(make: Callable[[bool], nn.Module], vocabulary: int) -> Any:
    return lambda is_small: (make(is_small), sentences(99 if is_small else vocabulary, 12 if is_small else 64))


_BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 99}
_BERT_ROW = _row_of_text(
    _transformers("BertForSequenceClassification", "BertConfig", {**_BERT, "max_position_embeddings": 16}), 30522
)
_DISTIL = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "vocab_size": 99, "max_position_embeddings": 16}
_DISTIL_ROW = _row_of_text(_transformers("DistilBertForSequenceClassification", "DistilBertConfig", _DISTIL), 30522)
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99, "n_positions": 16, "pad_token_id": 0}
_GPT_TOKENS = {"bos_token_id": 1, "eos_token_id": 2}
_GPT_ROW = _row_of_text(
    _transformers("GPT2ForSequenceClassification", "GPT2Config", {**_GPT, **_GPT_TOKENS}, {"pad_token_id": 50256}),
    50256,
)
_WHISPER = {
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "max_source_positions": 20,
    "num_mel_bins": 8,
}


def _whisper(is_small: bool) -> tuple[nn.Module, Callable[[int], Tensor]]:
    make = _transformers("WhisperForAudioClassification", "WhisperConfig", {**_WHISPER, **_BOUNDS}, _BASE_WHISPER)
    bins, frames = (8, 40) if is_small else (80, 3000)
    return make(is_small), lambda count: torch.randn(count, bins, frames)


_BOUNDS = {"vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
_BASE_WHISPER = {"d_model": 512, "encoder_layers": 6, "encoder_attention_heads": 8, "encoder_ffn_dim": 2048}

ROWS = [
    Row(
        "ResNet-50",
        "transformers",
        _row_of_images(
            _transformers(
                "ResNetForImageClassification",
                "ResNetConfig",
                {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1]},
            )
        ),
        "resnet.embedder.embedder.convolution",
    ),
    Row("Wide-ResNet-28-10", "own", lambda s: (wide_resnet(10, 1) if s else wide_resnet(28, 10), images(32)), "0"),
    Row(
        "ConvNeXt-T",
        "transformers",
        _row_of_images(
            _transformers(
                "ConvNextForImageClassification",
                "ConvNextConfig",
                {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
            )
        ),
        "convnext.embeddings.patch_embeddings",
    ),
    Row(
        "EfficientNet-B0",
        "transformers",
        _row_of_images(
            _transformers(
                "EfficientNetForImageClassification",
                "EfficientNetConfig",
                {"num_block_repeats": [1] * 7, "depth_coefficient": 0.1, "width_coefficient": 0.25, "hidden_dim": 320},
                {"width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280},
            )
        ),
        "efficientnet.embeddings.convolution",
    ),
    Row(
        "ViT-B/16",
        "transformers",
        _row_of_images(
            _transformers(
                "ViTForImageClassification",
                "ViTConfig",
                {
                    "image_size": 32,
                    "patch_size": 8,
                    "hidden_size": 32,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 4,
                    "intermediate_size": 64,
                },
            )
        ),
        "vit.embeddings.patch_embeddings.projection",
    ),
    Row(
        "MLP-Mixer-B/16",
        "own",
        lambda s: (Mixer(32, 8, 16, 2) if s else Mixer(224, 16, 768, 12), images(32 if s else 224)),
        "patches",
    ),
    Row("BERT-base", "transformers", _BERT_ROW, "bert.embeddings.word_embeddings"),
    Row(
        "BERT-base, positions",
        "transformers",
        _BERT_ROW,
        "bert.embeddings.word_embeddings",
        layer="bert.embeddings.position_embeddings",
    ),
    Row(
        "BERT-base, first query",
        "transformers",
        _BERT_ROW,
        "bert.embeddings.word_embeddings",
        layer="bert.encoder.layer.0.attention.self.query",
    ),
    Row("DistilBERT", "transformers", _DISTIL_ROW, "distilbert.embeddings.word_embeddings"),
    Row(
        "DistilBERT, positions",
        "transformers",
        _DISTIL_ROW,
        "distilbert.embeddings.word_embeddings",
        layer="distilbert.embeddings.position_embeddings",
    ),
    Row("GPT-2", "transformers", _GPT_ROW, "transformer.wte"),
    Row("GPT-2, positions", "transformers", _GPT_ROW, "transformer.wte", layer="transformer.wpe"),
    Row("Whisper-base encoder", "transformers", _whisper, "encoder.conv1", batch=2),
    Row(
        "graph network",
        "own",
        lambda s: (GraphNetwork(5, 16, 2) if s else GraphNetwork(32, 256, 4), _graphs(6, 5) if s else _graphs(64, 32)),
        "convolutions.0.own",
    ),
]


def elsewhere() -> list[Row]:
    """The same architectures by torchvision and timm, for an environment that has them."""
    try:
        import torchvision  # noqa: PLC0415
    except RuntimeError:
        # Its compiled part belongs to another build of torch: two operators, which no network here uses, are missing.
        missing = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            missing.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: PLC0415
    import timm  # noqa: PLC0415

    def vision(name: str) -> Any:
        return lambda _: (getattr(torchvision.models, name)(num_classes=10), images(224))

    def by_timm(name: str) -> Any:
        return lambda _: (timm.create_model(name, num_classes=10), images(224))

    rows = [
        Row(label, "torchvision", vision(name), first)
        for label, name, first in (
            ("ResNet-50", "resnet50", "conv1"),
            ("ConvNeXt-T", "convnext_tiny", "features.0.0"),
            ("EfficientNet-B0", "efficientnet_b0", "features.0.0"),
            ("ViT-B/16", "vit_b_16", "conv_proj"),
        )
    ]
    for label, name in (
        ("ResNet-50", "resnet50"),
        ("ConvNeXt-T", "convnext_tiny"),
        ("EfficientNet-B0", "efficientnet_b0"),
        ("ViT-B/16", "vit_base_patch16_224"),
        ("MLP-Mixer-B/16", "mixer_b16_224"),
    ):
        # timm says itself what a model's first layer is.
        first = timm.get_pretrained_cfg(name).first_conv
        rows.append(Row(label, "timm", by_timm(name), first))
    return rows
