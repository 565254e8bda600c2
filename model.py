"""The vision-language model: ViT, BERT-style text encoder, cross-attention fusion encoder, and their momentum model.

Two encoders turn an image and its caption into tokens; in the fusion encoder every text token attends to every image
token. This file imports no other file of the project: training is elsewhere.

Legend of the dimension letters in shape comments
    B batch · N image tokens (CLS + patches) · P patches · P′ patches that are not masked · M masked patches
    L text tokens · D width · h heads · E shared embedding of the contrastive space · V vocabulary · p patch size

Sources: ViT (Dosovitskiy et al. 2021), BERT (Devlin et al. 2019), ALBEF (Li et al. 2021, §3.1), local tokens and
phrases (Fashion-FINE, Jin et al. 2024). Sizes and norms follow them, so published weights load.
"""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, fields

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

EMBED_DIM = 256  # width E of the contrastive space
# Fashion-FINE (Jin et al. 2024): shares in a feature, see `mix`
IMAGE_LOCAL = 0.05  # pooled patches, mixed with CLS
TEXT_LOCAL = 0.25  # pooled words, mixed with [CLS]
PHRASE_SHARE = 0.05  # phrases, mixed with the category symbol
INIT_STD = 0.02  # BERT and ViT initialise with normal(0.02)


def setting(default, help: str, low: float = 1, high: float = 4096):
    """Declare a field of `ModelConfig` with its meaning and its range."""
    return field(default=default, metadata={"help": help, "low": low, "high": high})


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the model. Vision, text and fusion share one width, as ViT-B and BERT-base do."""

    image_size: int = setting(64, "side of the square image, pixels")
    patch_size: int = setting(8, "side of a patch, pixels")
    width: int = setting(128, "token width D of all three encoders")
    heads: int = setting(4, "attention heads")
    vision_layers: int = setting(4, "ViT layers")
    text_layers: int = setting(2, "text encoder layers")
    fusion_layers: int = setting(2, "fusion encoder layers")
    local_tokens: bool = setting(False, "patches and words have a share in the features, beside [CLS]", low=0)
    alignment: bool = setting(False, "align the category symbol and phrases with the image (C-CmA)", low=0)
    detector: bool = setting(False, "head that detects replaced words (RTD)", low=0)
    max_length: int = setting(64, "longest caption, tokens", low=3)  # [CLS], a word, [SEP]
    dropout: float = setting(0.0, "dropout in text and fusion layers (BERT: 0.1)", low=0, high=0.5)
    vocab_size: int = setting(2048, "WordPiece tokens at most; --vocab brings its own number", low=6, high=10**7)
    classes: int = 0  # of the recognition head, counted from the labels; 0 means no head. It has no flag

    def __post_init__(self):
        for spec in fields(self):
            if "low" not in spec.metadata:
                continue
            value = getattr(self, spec.name)
            low = spec.metadata["low"]
            high = spec.metadata["high"]
            if not low <= value <= high:  # also refuses NaN
                raise ValueError(f"{spec.name} {value} is not between {low} and {high}")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.width % 4:
            raise ValueError(f"width {self.width} is not a multiple of 4")

    @property
    def grid(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size


PRESETS = {
    "tiny": ModelConfig(),  # minutes on two CPU cores
    # one small GPU; the width of DeiT-S and MiniLM-L12-H384
    "small": ModelConfig(
        image_size=128,
        patch_size=16,
        width=384,
        heads=6,
        vision_layers=12,
        text_layers=6,
        fusion_layers=6,
        max_length=96,
        dropout=0.1,
        vocab_size=8192,
    ),
    # ALBEF: ViT-B/16 at 256 px, BERT-base split into 6 text and 6 fusion layers
    "base": ModelConfig(
        image_size=256,
        patch_size=16,
        width=768,
        heads=12,
        vision_layers=12,
        text_layers=6,
        fusion_layers=6,
        max_length=96,
        dropout=0.1,
        vocab_size=30522,
    ),
}


class Attention(nn.Module):
    """Multi-head attention of tokens to themselves or to a context (Vaswani et al. 2017, §3.2)."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0):
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.qkv = nn.Linear(width, 3 * width)  # queries, keys and values, as in timm
        self.output = nn.Linear(width, width)

    def project_kv(self, context: Tensor) -> Tensor:
        """Compute the keys and values of a context (B, N, D), side by side. -> kv (B, N, 2D)"""
        width = context.shape[-1]
        return F.linear(context, self.qkv.weight[width:], self.qkv.bias[width:])

    def forward(
        self,
        x: Tensor,
        kv: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_attention: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from x (B, L, D) to a context, by its keys and values `kv` of `project_kv`, or to x itself.

        attention_mask (B, N): bool, True where a key may be attended to
        -> output (B, L, D); attention probabilities (B, h, L, N) with `return_attention`, else None
        """
        if kv is None:
            q, k, v = self.qkv(x).chunk(3, dim=-1)
        else:
            width = x.shape[-1]
            q = F.linear(x, self.qkv.weight[:width], self.qkv.bias[:width])
            k, v = kv.chunk(2, dim=-1)
        q = rearrange(q, "b l (h d) -> b h l d", h=self.heads)
        k = rearrange(k, "b n (h d) -> b h n d", h=self.heads)
        v = rearrange(v, "b n (h d) -> b h n d", h=self.heads)
        mask = None
        if attention_mask is not None:
            mask = attention_mask[:, None, None, :]  # (B, 1, 1, N)
        dropout = self.dropout if self.training else 0.0

        attention = None
        if return_attention or sdpa_is_slow(q):
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # q kᵀ / √d
            scores = scores.float()  # the softmax of bf16 would round close attention values to ties
            if mask is not None:
                scores = scores.masked_fill(~mask, -torch.inf)
            attention = scores.softmax(dim=-1)
            out = F.dropout(attention, dropout).to(v.dtype) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        out = self.output(rearrange(out, "b h l d -> b l (h d)"))
        return out, attention if return_attention else None


def sdpa_is_slow(q: Tensor) -> bool:
    """Return whether PyTorch's fused attention is slower than plain products, as it is on a CPU in bf16.

    Its forward pass takes up to 2 times as long, its backward pass 2 to 10 times (lengths from 40 to 577).
    """
    return q.device.type == "cpu" and q.dtype == torch.bfloat16


class VisionLayer(nn.Module):
    """Pre-norm transformer block of ViT. With `cross=True` it also attends to the text, for the MIM decoder."""

    def __init__(self, config: ModelConfig, cross: bool = False):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=1e-6)
        self.attention = Attention(config.width, config.heads)
        if cross:
            self.cross_norm = nn.LayerNorm(config.width, eps=1e-6)
            self.cross_attention = Attention(config.width, config.heads)
        self.norm2 = nn.LayerNorm(config.width, eps=1e-6)
        self.mlp = mlp(config.width)

    def forward(
        self,
        x: Tensor,
        text_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        first: int | None = None,
    ) -> Tensor:
        """x (B, N, D), text_embeds (B, L, D), attention_mask (B, L) bool -> (B, N, D).

        first: number of leading tokens whose output is computed, at less cost -> (B, first, D)
        """
        normed = self.norm1(x)
        kv = None if first is None else self.attention.project_kv(normed)
        x = x[:, :first] + self.attention(normed[:, :first], kv)[0]
        if text_embeds is not None:
            kv = self.cross_attention.project_kv(text_embeds)
            x = x + self.cross_attention(self.cross_norm(x), kv, attention_mask)[0]
        return x + self.mlp(self.norm2(x))


class TextLayer(nn.Module):
    """Post-norm transformer block of BERT. With `cross=True` it also attends to the image, as in ALBEF."""

    def __init__(self, config: ModelConfig, cross: bool = False):
        super().__init__()
        self.attention = Attention(config.width, config.heads, config.dropout)
        self.attention_norm = nn.LayerNorm(config.width, eps=1e-12)
        if cross:
            self.cross_attention = Attention(config.width, config.heads, config.dropout)
            self.cross_attention_norm = nn.LayerNorm(config.width, eps=1e-12)
        self.mlp = mlp(config.width)
        self.mlp_norm = nn.LayerNorm(config.width, eps=1e-12)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor,
        image_kv: Tensor | None = None,
        text_index: Tensor | None = None,
        first: int | None = None,
        return_attention: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """x (B, L, D), attention_mask (B, L) bool, image_kv (B, N, 2D) by `Attention.project_kv`
        -> x (B, L, D), cross-attention probabilities (B, h, L, N) with `return_attention`, else None.

        text_index (n,): which caption each of n images is paired with, so image_kv (n, N, 2D) -> (n, L, D)
        first: number of leading tokens whose output is computed, at less cost -> (B, first, D)
        """
        kv = None if first is None else self.attention.project_kv(x)
        x = x[:, :first]
        attended, _ = self.attention(x, kv, attention_mask)
        x = self.attention_norm(x + self.dropout(attended))
        if text_index is not None:
            x = x.index_select(0, text_index)  # up to here a caption is the same whatever its image
        cross_attention = None
        if image_kv is not None:
            attended, cross_attention = self.cross_attention(x, image_kv, return_attention=return_attention)
            x = self.cross_attention_norm(x + self.dropout(attended))
        x = self.mlp_norm(x + self.dropout(self.mlp(x)))
        return x, cross_attention


def mlp(width: int) -> nn.Sequential:
    """Build the two-layer perceptron of a transformer block: four times as wide inside, GELU (erf)."""
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


class VisionTransformer(nn.Module):
    """The Vision Transformer (ViT)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.patch_size = config.patch_size
        self.patch_embed = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size)
        self.cls_token = nn.Parameter(torch.randn(1, 1, config.width) * INIT_STD)
        cls_position = torch.randn(1, config.width) * INIT_STD
        positions = torch.cat([cls_position, sincos_pos_embed_2d(config.grid, config.width)])
        self.position_embed = nn.Parameter(positions[None])  # (1, 1 + P, D)
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.vision_layers))
        self.norm = nn.LayerNorm(config.width, eps=1e-6)

    def forward(self, images: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """images (B, 3, H, W), normalised -> image_embeds (B, N, D), CLS first.

        ids_keep (B, P′): indices of the patches to encode, without the others, as in MAE; then N = 1 + P′
        """
        patches = rearrange(images, "b c (h p) (w q) -> b (h w) (c p q)", p=self.patch_size, q=self.patch_size)
        positions = self.position_embed[:, 1:]
        if ids_keep is not None:
            patches = patches.take_along_dim(ids_keep[..., None], dim=1)  # (B, P′, 3p²)
            positions = F.embedding(ids_keep, positions[0])  # (B, P′, D)
        # the convolution as a matrix product, whose backward pass is faster
        x = F.linear(patches, self.patch_embed.weight.flatten(1), self.patch_embed.bias) + positions
        cls = (self.cls_token + self.position_embed[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([cls, x], dim=1)  # (B, 1 + P, D)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class TextEncoder(nn.Module):
    """The lower half of BERT.

    BERT's token-type embedding is constant for single sentences; here it is part of the position embeddings.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.width)
        positions = sincos_pos_embed(config.max_length, config.width)
        # unit length, as `initialise` gives to words
        self.position_embeddings = nn.Parameter((2 / config.width) ** 0.5 * positions)
        self.norm = nn.LayerNorm(config.width, eps=1e-12)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(TextLayer(config) for _ in range(config.text_layers))

    def forward(self, token_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """token_ids (B, L), attention_mask (B, L; 1 = attend) -> text_embeds (B, L, D)."""
        x = self.word_embeddings(token_ids) + self.position_embeddings[: token_ids.shape[1]]
        x = self.dropout(self.norm(x))
        for layer in self.layers:
            x, _ = layer(x, attention_mask.bool())
        return x


class FusionEncoder(nn.Module):
    """The upper half of BERT with cross-attention to the image (ALBEF's multimodal encoder)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.layers = nn.ModuleList(TextLayer(config, cross=True) for _ in range(config.fusion_layers))

    def project_image_kv(self, image_embeds: Tensor) -> list[Tensor]:
        """Compute the keys and values of the image tokens (B, N, D) once, for all captions that attend to them.

        -> image_kv: (B, N, 2D) for each layer
        """
        return [layer.cross_attention.project_kv(image_embeds) for layer in self.layers]

    def forward(
        self,
        text_embeds: Tensor,
        attention_mask: Tensor,
        image_kv: list[Tensor],
        image_index: Tensor | None = None,
        text_index: Tensor | None = None,
        cls_only: bool = False,
        return_attention: bool = False,
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """text_embeds (B, L, D), attention_mask (B, L), image_kv by `project_image_kv` -> fused (B, L, D).

        image_index, text_index (n,): the image and the caption of each pair; None keeps their order -> fused (n, L, D)
        cls_only: the last layer computes [CLS] alone, at less cost -> fused (B, 1, D)
        return_attention: -> fused, and for each layer the cross-attention probabilities (B, h, L, N), which are part
            of the graph, so that Grad-CAM can take their gradient
        """
        x = text_embeds
        attention_mask = attention_mask.bool()
        attentions = []
        stance = nullcontext()
        if return_attention:  # compiled code would cut the path of the gradient from the loss to the attention
            stance = torch.compiler.set_stance("force_eager")
        with stance:
            for layer, layer_kv in zip(self.layers, image_kv, strict=True):
                if image_index is not None:
                    layer_kv = layer_kv.index_select(0, image_index)
                first = 1 if cls_only and layer is self.layers[-1] else None
                x, attention = layer(x, attention_mask, layer_kv, text_index, first, return_attention)
                attentions.append(attention)
                if text_index is not None:  # from now on each pair has tokens of its own
                    attention_mask = attention_mask.index_select(0, text_index)
                    text_index = None
        return (x, attentions) if return_attention else x


class VisionLanguageModel(nn.Module):
    """ALBEF's model: two encoders, two projections, the fusion encoder, an ITM and an MLM head; and a MIM decoder.

    Depending on the config it also has a recognition head, and Fashion-FINE's adapter, phrases and replaced-word head.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.vision = VisionTransformer(config)
        self.text = TextEncoder(config)
        self.fusion = FusionEncoder(config)
        self.vision_proj = nn.Linear(config.width, EMBED_DIM)
        self.text_proj = nn.Linear(config.width, EMBED_DIM)
        self.itm_head = nn.Linear(config.width, 2)
        self.mlm_head = word_head(config.width)
        self.mlm_bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.decoder = PatchDecoder(config)
        self.class_head = nn.Linear(config.width, config.classes) if config.classes else None
        self.adapter = LocalAdapter(config.width) if config.local_tokens else None
        self.phrases = Phrases(config.width) if config.alignment else None
        self.detector = word_head(config.width, nn.Linear(config.width, 2)) if config.detector else None
        self.temp = nn.Parameter(torch.tensor(0.07))
        initialise(self)

    def forward(self, compute: Callable, *args):
        """Call compute(*args). DistributedDataParallel averages the gradients of what passes through forward."""
        return compute(*args)

    def project_image(self, image_embeds: Tensor) -> Tensor:
        """image_embeds (B, N, D) -> image_feat (B, E), unit length, float32."""
        return l2_normalize(self.vision_proj(image_embeds[:, 0]))

    def project_text(self, text_embeds: Tensor) -> Tensor:
        """text_embeds (B, L, D) -> text_feat (B, E), unit length, float32."""
        return l2_normalize(self.text_proj(text_embeds[:, 0]))

    def itm_logits(self, fused: Tensor) -> Tensor:
        """fused (B, L, D) -> (B, 2); class 1 is "match". In float32: in bf16 many pairs would have the same score."""
        cls = fused[:, 0].float()
        with torch.autocast(cls.device.type, enabled=False):
            return self.itm_head(cls)

    def mlm_logits(self, tokens: Tensor) -> Tensor:
        """tokens (..., D) -> (..., V). Call it with the masked tokens only, since the vocabulary is large."""
        return F.linear(self.mlm_head(tokens), self.text.word_embeddings.weight, self.mlm_bias)

    @torch.no_grad()
    def clamp_temp(self) -> None:
        """Keep the learnable temperature in ALBEF's range."""
        self.temp.clamp_(0.001, 0.5)

    def image_feature(self, image_embeds: Tensor) -> Tensor:
        """Compute the feature by which images are retrieved. image_embeds (B, N, D) -> (B, E), unit length.

        It is `project_image`, or with `local_tokens` Fashion-FINE's integrated feature,
        norm((1 − r)·norm(proj(cls)) + r·norm(proj(l))), where l is the patches pooled by `LocalAdapter`.
        """
        cls_feat = self.project_image(image_embeds)
        if not self.config.local_tokens:
            return cls_feat
        local_feat = l2_normalize(self.vision_proj(self.adapter(image_embeds[:, 1:])))
        return mix(cls_feat, local_feat, IMAGE_LOCAL)

    def text_feature(self, text_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        """Compute the feature by which captions are retrieved. text_embeds (B, L, D), attention_mask (B, L) -> (B, E).

        As `image_feature`, but l pools the tokens from position 2 on, even without a category symbol at position 1 (as
        in the authors' code).
        """
        cls_feat = self.project_text(text_embeds)
        if not self.config.local_tokens:
            return cls_feat
        local_feat = l2_normalize(self.text_proj(self.adapter(text_embeds[:, 2:], attention_mask[:, 2:].bool())))
        return mix(cls_feat, local_feat, TEXT_LOCAL)

    def category_feature(self, text_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        """Compute the feature that C-CmA aligns with the image: category symbol (position 1) and phrases after it.

        norm(0.95·norm(proj(symbol)) + 0.05·norm(proj(phrase))). (B, L, D), (B, L) -> (B, E), unit length.
        """
        symbol_feat = l2_normalize(self.text_proj(text_embeds[:, 1]))
        phrase = self.phrases(text_embeds[:, 2:], attention_mask[:, 2:].bool())
        phrase_feat = l2_normalize(self.text_proj(phrase))
        return mix(symbol_feat, phrase_feat, PHRASE_SHARE)


def word_head(width: int, *more: nn.Module) -> nn.Sequential:
    """BERT's transform of a token before its classification."""
    return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width, eps=1e-12), *more)


def l2_normalize(x: Tensor) -> Tensor:
    """Scale x (B, E) to unit length, in float32: bf16 would be off by 0.2 %."""
    return F.normalize(x.float(), dim=-1)


def mix(one: Tensor, other: Tensor, r: float) -> Tensor:
    """norm((1 − r)·one + r·other). (B, E), (B, E) -> (B, E)."""
    return F.normalize((1 - r) * one + r * other, dim=-1)


class PatchDecoder(nn.Module):
    """The light decoder of masked image modelling (our choice, after MAE, He et al. 2022, §3).

    Mask tokens stand for the patches that the encoder has not seen. All image tokens attend to each other and, so that
    the task is cross-modal, to the text. Masked patches come first, and only their output is computed; the order is
    free, since positions are added.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.mask_token = nn.Parameter(torch.randn(1, 1, config.width) * INIT_STD)
        self.position_embed = nn.Parameter(sincos_pos_embed_2d(config.grid, config.width)[None])  # (1, P, D)
        self.layers = nn.ModuleList([VisionLayer(config, cross=True)])
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
        self.pixels = nn.Linear(config.width, 3 * config.patch_size**2)

    def forward(
        self,
        visible_embeds: Tensor,
        ids_keep: Tensor,
        ids_masked: Tensor,
        text_embeds: Tensor,
        attention_mask: Tensor,
    ) -> Tensor:
        """Predict the pixels of the masked patches. -> pixels (B, M, 3p²), normalised in each patch as by `mim_loss`

        visible_embeds (B, 1 + P′, D): CLS and the patches `ids_keep` (B, P′) by the ViT
        ids_masked (B, M): indices of the masked patches
        text_embeds (B, L, D), attention_mask (B, L)
        """
        masked = self.mask_token + F.embedding(ids_masked, self.position_embed[0])
        kept = visible_embeds[:, 1:] + F.embedding(ids_keep, self.position_embed[0])
        x = torch.cat([masked, visible_embeds[:, :1], kept], dim=1)  # (B, M + 1 + P′, D)
        x = self.layers[0](x, text_embeds, attention_mask.bool(), first=ids_masked.shape[1])
        return self.pixels(self.norm(x))


class LocalAdapter(nn.Module):
    """Modality-agnostic adapter (Fashion-FINE, Jin et al. 2024): the same weights pool patches and words. Padding gets
    no weight (our choice; in the authors' code it gets some).

    a_i = softmax_i(wᵀ tanh(W x_i + b)),   l = Σ_i a_i x_i
    """

    def __init__(self, width: int):
        super().__init__()
        self.score = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1, bias=False))

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """tokens (B, L, D), attention_mask (B, L) bool or None -> l (B, D)."""
        scores = self.score(tokens).squeeze(-1)  # (B, L)
        if attention_mask is not None:
            lowest = torch.finfo(scores.dtype).min  # not −∞: a caption may have no word at all
            scores = scores.masked_fill(~attention_mask, lowest)
        weights = scores.softmax(dim=1)
        return (weights[..., None] * tokens).sum(dim=1)


class Phrases(nn.Module):
    """Phrase feature of a caption (Fashion-FINE). Three convolutions combine 1, 2 and 3 words, two positions apart. The
    largest of the three outputs is averaged over the words. Our choice: padding is zero and left out of the mean.

    mean_i max_k tanh(conv_k(x))_i
    """

    def __init__(self, width: int):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv1d(width, width, k, padding=k - 1, dilation=2) for k in (1, 2, 3))

    def forward(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        """tokens (B, L, D), attention_mask (B, L) bool -> (B, D)."""
        x = rearrange(tokens * attention_mask[..., None], "b l d -> b d l")
        x = torch.stack([conv(x).tanh() for conv in self.convs]).amax(dim=0)  # (B, D, L)
        num_words = attention_mask.sum(dim=1, keepdim=True).clamp(min=1)
        return (x * attention_mask[:, None]).sum(dim=2) / num_words


class MomentumModel(nn.Module):
    """An exponential moving average of a model. It gets no gradients and is in evaluation mode, without dropout (our
    choice).

    θ_m ← decay·θ_m + (1 − decay)·θ      (He et al. 2020, eq. 2)
    """

    def __init__(self, model: VisionLanguageModel):
        super().__init__()
        self.model = copy.deepcopy(model).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, model: VisionLanguageModel, decay: float) -> None:
        """Move the average towards `model`."""
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - decay)


@torch.no_grad()
def initialise(model: VisionLanguageModel) -> None:
    """Initialise the weights so that narrow models learn too; biases are zero.

    Our choice. With BERT's normal(0.02) everywhere, which suits width 768, the contrastive loss of a model of width 128
    does not fall for hundreds of steps.
    - Words: normal(1/√D). The logits of the tied MLM head then start with unit variance.
    - Adapter, MLM head, detector, and the queries and keys of the fusion encoder: normal(0.02), as BERT. Attention then
      starts almost uniform over the patches.
    - All else: Xavier-uniform, as the original ViT and MAE. The image then helps to predict masked words at once.
    """
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
            continue
        if name.endswith("qkv"):
            queries, keys, values = module.weight.chunk(3)  # each counts as a matrix of its own
            draw_weights(queries, bert=name.startswith("fusion"))
            draw_weights(keys, bert=name.startswith("fusion"))
            draw_weights(values)
        else:
            matrix = module.weight.flatten(1)  # the patch embedding counts as one matrix
            draw_weights(matrix, bert=name.startswith(("mlm_head", "adapter", "detector")))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    nn.init.normal_(model.text.word_embeddings.weight, std=model.config.width**-0.5)


def draw_weights(matrix: Tensor, bert: bool = False) -> None:
    """Fill a matrix in place: Xavier-uniform, or normal(0.02), as BERT, where `bert`."""
    if bert:
        nn.init.normal_(matrix, std=INIT_STD)
    else:
        nn.init.xavier_uniform_(matrix)


def sincos_pos_embed(count: int, width: int) -> Tensor:
    """Sines and cosines of positions in a row (Vaswani et al. 2017, §3.5). -> (count, D)

    Our choice: learnt position embeddings start from them, and the longest wave turns by about one radian over
    the row. With the 10,000 of Vaswani et al. instead of `count`, most waves hardly change over 8 patches or 64 words.
    From random embeddings, as in BERT, attention finds neighbouring words, and MLM improves, only after hundreds of
    steps.
    """
    frequencies = count ** (-torch.arange(width // 2) / (width // 2))
    angles = torch.arange(count)[:, None] * frequencies
    return torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)


def sincos_pos_embed_2d(grid: int, width: int) -> Tensor:
    """`sincos_pos_embed` of the row, then of the column of each patch (as MAE, He et al. 2022). -> (P, D)"""
    side = sincos_pos_embed(grid, width // 2)
    rows = side.repeat_interleave(grid, dim=0)
    columns = side.repeat(grid, 1)
    return torch.cat([rows, columns], dim=1)
