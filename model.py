"""The vision-language model: ViT, BERT-style text encoder, cross-attention fusion, momentum twin.

Two encoders turn a photo and its description into tokens; the fusion encoder lets every text token look at every image
token. Everything about *training* the model is elsewhere: this file imports no other file of the project.

Legend of the dimension letters in shape comments
    B batch · N image tokens (CLS + patches) · P patches · L text tokens · D width · h heads
    E shared embedding of the contrastive space · K queue length · V vocabulary · M any number of rows

Sources: ViT (Dosovitskiy et al. 2021), BERT (Devlin et al. 2019), ALBEF (Li et al. 2021, §3.1), registers (Darcet et
al. 2024), local tokens and phrases (Fashion-FINE, Jin et al. 2024). Sizes, norms and initialisation follow them, so
published weights load.
"""

import contextlib
import copy
from dataclasses import dataclass, field, fields

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

EMBED_DIM = 256  # width E of the contrastive space
IMAGE_LOCAL, TEXT_LOCAL = 0.05, 0.25  # shares of patches and words in a feature (Fashion-FINE)
NARROW_STD = 0.02  # BERT's and ViT's normal(0.02), for what shall start small


def setting(default, help: str, low: float = 1, high: float = 4096):
    """A field of `ModelConfig` with its meaning and the range that it must lie in."""
    return field(default=default, metadata={"help": help, "low": low, "high": high})


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the model. Vision, text and fusion share one width, as ViT-B and BERT-base do."""

    image_size: int = setting(64, "side of the square photo the ViT sees, pixels")
    patch_size: int = setting(8, "side of a patch, pixels")
    width: int = setting(128, "token width D of all three encoders")
    heads: int = setting(4, "attention heads")
    vision_layers: int = setting(4, "ViT layers")
    text_layers: int = setting(2, "text encoder layers")
    fusion_layers: int = setting(2, "fusion encoder layers")
    patch_layer: int = setting(0, "ViT layer whose patch tokens are put out; 0: the last", low=0)
    registers: int = setting(0, "register tokens in the ViT, dropped at its output", low=0)
    cls_context: bool = setting(True, "fusion also looks at the image's CLS token", low=0)
    local_tokens: bool = setting(False, "patches and words have a share in the features, beside CLS and [CLS]", low=0)
    alignment: bool = setting(False, "category symbol and phrases are aligned with the photo", low=0)
    detector: bool = setting(False, "head that tells replaced words", low=0)
    max_length: int = setting(64, "longest description, tokens", low=3)  # [CLS], a word, [SEP]
    dropout: float = setting(0.0, "dropout in text and fusion layers (BERT: 0.1)", low=0, high=0.5)
    vocab_size: int = setting(2048, "WordPiece vocabulary, at most (a given --vocab decides)", low=6, high=10**7)
    classes: int = 0  # of the recognition head; 0: there is none. No flag: the labels are counted

    def __post_init__(self):
        for spec in (spec for spec in fields(self) if spec.metadata):
            value, low, high = getattr(self, spec.name), spec.metadata["low"], spec.metadata["high"]
            if not low <= value <= high:  # nor what is not a number
                bound = f"more than {high}" if value >= low else f"not {low} or more"
                raise ValueError(f"{spec.name} {value} is {bound}")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.width % 4:
            raise ValueError(f"width {self.width} is not a multiple of 4")
        if self.patch_layer > self.vision_layers:
            raise ValueError(f"patch_layer {self.patch_layer}: there are {self.vision_layers} ViT layers")

    @property
    def grid(self) -> int:
        """Patches along one side of the photo."""
        return self.image_size // self.patch_size


PRESETS = {
    "tiny": ModelConfig(),  # minutes on two CPU cores
    # one small GPU; the width of DeiT-S and MiniLM-L12-H384
    "small": ModelConfig(image_size=128, patch_size=16, width=384, heads=6, vision_layers=12, text_layers=6,
                         fusion_layers=6, max_length=96, dropout=0.1, vocab_size=8192),
    # ALBEF: ViT-B/16 at 256 px, BERT-base split into 6 text and 6 fusion layers
    "base": ModelConfig(image_size=256, patch_size=16, width=768, heads=12, vision_layers=12, text_layers=6,
                        fusion_layers=6, max_length=96, dropout=0.1, vocab_size=30522),
}  # fmt: skip


def fused_is_slow(q: Tensor) -> bool:
    """On a CPU in bf16 the backward pass of the fused kernel takes 2 to 10 times as long as that of plain products, at
    all lengths from 40 to 577 (experiments/results.md)."""
    return q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.requires_grad


class Attention(nn.Module):
    """Multi-head attention of `x` to itself, or to `context` (Vaswani et al. 2017, §3.2). Probabilities are formed
    explicitly only when asked for, or where that is faster; the output is the same either way."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.skipped = 0  # tokens of a context that are not looked at, at its beginning
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))

    def project_kv(self, context: Tensor) -> Tensor:
        """Compute the keys and values of a context (B, N, D), side by side. -> (B, N, 2D)"""
        return together(context[:, self.skipped :], self.key, self.value)

    def forward(
        self, x: Tensor, seen: Tensor | None = None, keep: Tensor | None = None, return_attention: bool = False,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """x (B, L, D), seen (B, N, 2D) as `look` makes it or None for self-attention, keep (B, N) bool, True where a
        key may be attended to -> output (B, L, D), probabilities (B, h, L, N) or None.

        rows (B,): which row of seen (C, N, 2D) each x looks at.
        """
        if seen is None:
            q, k, v = together(x, self.query, self.key, self.value).chunk(3, dim=-1)
        else:
            q, (k, v) = self.query(x), (seen if rows is None else seen.index_select(0, rows)).chunk(2, dim=-1)
        q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=self.heads) for t in (q, k, v))
        mask = None if keep is None else keep[:, None, None, :]  # (B, 1, 1, N)
        dropout = self.dropout if self.training else 0.0
        attention = None
        if return_attention or fused_is_slow(q):
            # A = softmax(q kᵀ / √d): kept in the graph, so that Grad-CAM can take its gradient
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
            if mask is not None:
                scores = scores + torch.zeros_like(mask, dtype=scores.dtype).masked_fill(~mask, float("-inf"))
            # in full precision for who reads them, or masks would fall by rounding
            dtype = torch.promote_types(scores.dtype, torch.float32) if return_attention else None
            probabilities = scores.softmax(dim=-1, dtype=dtype)  # (B, h, L, N)
            if return_attention:
                attention = F.pad(probabilities, [self.skipped, 0])
                probabilities = attention[..., self.skipped :]
            out = F.dropout(probabilities, dropout).to(v.dtype) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return self.output(rearrange(out, "b h l d -> b l (h d)")), attention


def together(x: Tensor, *layers: nn.Linear) -> Tensor:
    """What several linear layers make of the same x, side by side and in one product. (…, D) -> (…, their widths)."""
    return F.linear(x, torch.cat([layer.weight for layer in layers]), torch.cat([layer.bias for layer in layers]))


def mlp(width: int) -> nn.Sequential:
    """The two-layer perceptron of a transformer block, four times as wide inside, GELU (erf)."""
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


def word_head(width: int, *more: nn.Module) -> nn.Sequential:
    """BERT's transform of a token before a decision about it."""
    return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width, eps=1e-12), *more)


def unit(x: Tensor) -> Tensor:
    """(B, E), unit length; in float32 at least, since bf16 would be off by 0.2 %."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


def mix(one: Tensor, other: Tensor, r: float) -> Tensor:
    """norm((1 − r)·one + r·other). (B, E), (B, E) -> (B, E)."""
    return F.normalize((1 - r) * one + r * other, dim=-1)


def initialise(model: "VisionLanguageModel") -> None:
    """Zero biases, and weights that let narrow models learn too (choice; BERT's 0.02 everywhere suits width 768, and
    at width 128 makes the contrastive loss stand still for hundreds of steps).

    Encoders and fusion: Xavier-uniform, as the original ViT and MAE; the photo then counts at once when words are
    restored. Queries and keys of fusion, adapter: normal(0.02), as BERT; at first all patches weigh alike, and what is
    looked at later was learnt. MLM head, detector: normal(0.02). Words: normal(1/√D), so that the tied MLM decoder
    starts with logits of unit variance.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
            asks = name.startswith("fusion") and name.endswith(("query", "key"))
            if asks or name.startswith(("mlm_head", "adapter", "detector")):
                nn.init.normal_(module.weight, std=NARROW_STD)
            else:
                nn.init.xavier_uniform_(module.weight.flatten(1))  # the patch embedding counts as one matrix
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.normal_(model.text.word_embeddings.weight, std=model.config.width**-0.5)


def waves(count: int, width: int) -> Tensor:
    """Sines and cosines of places in a row (Vaswani et al. 2017, §3.5). -> (count, D)

    choice: what position embeddings start as, before they are learnt; and that the slowest turns by about 1 over the
    row. Of the waves of Vaswani et al. (10,000 instead of `count`) most hardly change over 8 patches or 64 words; from
    noise, as BERT's, words find their neighbours only after hundreds of steps, and until then MLM learns no language.
    """
    angles = torch.arange(count)[:, None] * count ** (-torch.arange(width // 2) / (width // 2))
    return torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)


def patch_waves(grid: int, width: int) -> Tensor:
    """Waves of the row, then of the column of each patch (after MAE, He et al. 2022). -> (P, D)"""
    side = waves(grid, width // 2)
    return torch.cat([side.repeat_interleave(grid, dim=0), side.repeat(grid, 1)], dim=1)


class VisionLayer(nn.Module):
    """Pre-norm transformer block of ViT; with `cross=True` it also looks at the text, for the MIM decoder."""

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
        self, x: Tensor, text_embeds: Tensor | None = None, keep: Tensor | None = None, first: int | None = None
    ) -> Tensor:
        """x (B, N, D), text_embeds (B, L, D), keep (B, L) -> (B, N, D), or of the `first` tokens alone."""
        normed = self.norm1(x)
        if first is None:
            x = x + self.attention(normed)[0]
        else:
            x = x[:, :first] + self.attention(normed[:, :first], self.attention.project_kv(normed))[0]
        if text_embeds is not None:
            x = x + self.cross_attention(self.cross_norm(x), self.cross_attention.project_kv(text_embeds), keep)[0]
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """ViT. With `patch_layer` the patches are as that layer leaves them, less global than after the last; CLS is always
    the last's."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size)
        self.cls_token = nn.Parameter(torch.randn(1, 1, config.width) * NARROW_STD)
        places = torch.cat([torch.randn(1, config.width) * NARROW_STD, patch_waves(config.grid, config.width)])
        self.position_embed = nn.Parameter(places[None])  # (1, 1 + P, D)
        self.registers = nn.Parameter(torch.randn(1, config.registers, config.width) * NARROW_STD)
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.vision_layers))
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
        self.patch_layer = config.patch_layer or config.vision_layers

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """images (B, 3, H, W), normalised -> image_embeds (B, N, D), CLS first. `keep` (B, K) lists the patches to
        encode (the others are never seen, as in MAE); then N = 1 + K."""
        side, place = self.patch_embed.kernel_size[0], self.position_embed[:, 1:]
        patches = rearrange(images, "b c (h p) (w q) -> b (h w) (c p q)", p=side, q=side)  # (B, P, 3p²)
        if keep is not None:
            patches = patches.gather(1, repeat(keep, "b k -> b k x", x=patches.shape[2]))  # (B, K, 3p²)
            place = F.embedding(keep, place[0])
        # the convolution as the matrix product that it is, whose backward pass is faster
        x = F.linear(patches, self.patch_embed.weight.flatten(1), self.patch_embed.bias) + place
        cls = (self.cls_token + self.position_embed[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([cls, x, self.registers.expand(len(x), -1, -1)], dim=1)
        for number, layer in enumerate(self.layers, start=1):
            cls_alone = number == len(self.layers) and number > self.patch_layer  # nobody reads its patches
            x = layer(x, first=1 if cls_alone else None)
            if number == self.patch_layer:
                patches = x[:, 1:]
        x = torch.cat([x[:, :1], patches], dim=1)
        return self.norm(x[:, : x.shape[1] - self.registers.shape[1]])  # registers took part in self-attention alone


class TextLayer(nn.Module):
    """Post-norm transformer block of BERT; with `cross=True` it also looks at the image, as ALBEF's."""

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
        self, x: Tensor, keep: Tensor, photos: Tensor | None = None, return_attention: bool = False,
        rows: Tensor | None = None, first: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """x (B, L, D), keep (B, L) True where a token may be attended to, photos (C, N, 2D) -> x (B, L, D), or of the
        `first` tokens alone; cross-attention (B, h, L, N) or None. rows (B,): the photo that each text looks at."""
        seen = None if first is None else self.attention.project_kv(x)
        x = x[:, :first]
        x = self.attention_norm(x + self.dropout(self.attention(x, seen, keep)[0]))
        attention = None
        if photos is not None:
            found, attention = self.cross_attention(x, photos, None, return_attention, rows)
            x = self.cross_attention_norm(x + self.dropout(found))
        return self.mlp_norm(x + self.dropout(self.mlp(x))), attention


class TextEncoder(nn.Module):
    """The lower half of BERT: token_ids (B, L), attention_mask (B, L; 1 = keep) -> text_embeds (B, L, D). BERT's
    token-type embedding is constant for single sentences; it lives inside the position embeddings."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.width)
        places = (2 / config.width) ** 0.5 * waves(config.max_length, config.width)  # as large as words
        self.position_embeddings = nn.Parameter(places)
        self.norm = nn.LayerNorm(config.width, eps=1e-12)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(TextLayer(config) for _ in range(config.text_layers))

    def forward(self, token_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.word_embeddings(token_ids) + self.position_embeddings[: token_ids.shape[1]]  # (B, L, D)
        x = self.dropout(self.norm(x))
        for layer in self.layers:
            x, _ = layer(x, attention_mask.bool())
        return x


class FusionEncoder(nn.Module):
    """The upper half of BERT with cross-attention to the image (ALBEF's multimodal encoder). Without `cls_context` the
    text does not look at the image CLS, whose probability is then 0."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.layers = nn.ModuleList(TextLayer(config, cross=True) for _ in range(config.fusion_layers))
        for layer in self.layers:
            layer.cross_attention.skipped = 0 if config.cls_context else 1

    def project_image_kv(self, image_embeds: Tensor) -> list[Tensor]:
        """Compute the keys and values of the image tokens (B, N, D) once, for all captions that attend to them.
        -> image_kv: (B, N, 2D) for each layer"""
        return [layer.cross_attention.project_kv(image_embeds) for layer in self.layers]

    def forward(
        self,
        text_embeds: Tensor,
        attention_mask: Tensor,
        image_kv: list[Tensor],
        image_index: Tensor | None = None,
        cls_only: bool = False,
        return_attention: bool = False,
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """text_embeds (B, L, D), attention_mask (B, L), image_kv by `project_image_kv` -> fused (B, L, D); with
        `return_attention` also the list, one per layer, of probabilities (B, h, L, N), kept in the graph, so that
        Grad-CAM can take their gradient.

        image_index (B,): which of C images each caption is paired with; by default number b with number b
        cls_only: the last layer computes [CLS] alone, at less cost -> fused (B, 1, D)
        """
        x, keep, attentions = text_embeds, attention_mask.bool(), []
        # compiled code would lose the way from what is made of the attention back to it
        eagerly = torch.compiler.set_stance("force_eager") if return_attention else contextlib.nullcontext()
        with eagerly:
            for layer, layer_kv in zip(self.layers, image_kv, strict=True):
                first = 1 if cls_only and layer is self.layers[-1] else None
                x, attention = layer(x, keep, layer_kv, return_attention, image_index, first)
                attentions.append(attention)
        return (x, attentions) if return_attention else x


class PatchDecoder(nn.Module):
    """The light decoder of masked image modelling (choice, after MAE, He et al. 2022, §3).

    Mask tokens take the places of the patches that the encoder has not seen; all image tokens look at each other and,
    so that the task is cross-modal, at the text. Their order is free, since positions are added: hidden ones come
    first, and of the last layer nothing else is asked for.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.mask_token = nn.Parameter(torch.randn(1, 1, config.width) * NARROW_STD)
        self.position_embed = nn.Parameter(patch_waves(config.grid, config.width)[None])  # (1, P, D)
        self.layers = nn.ModuleList([VisionLayer(config, cross=True)])
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
        self.pixels = nn.Linear(config.width, 3 * config.patch_size**2)

    def forward(
        self, visible_embeds: Tensor, visible: Tensor, hidden: Tensor, text_embeds: Tensor, attention_mask: Tensor
    ) -> Tensor:
        """visible_embeds (B, 1 + K, D) of the patches `visible` (B, K), the numbers of the `hidden` ones (B, M),
        text_embeds (B, L, D), attention_mask (B, L) -> normalised pixels of the hidden ones (B, M, 3p²)."""
        place = lambda patches: F.embedding(patches, self.position_embed[0])
        seen = visible_embeds[:, 1:] + place(visible)
        x = torch.cat([self.mask_token + place(hidden), visible_embeds[:, :1], seen], dim=1)  # (B, M + 1 + K, D)
        for layer in self.layers:
            x = layer(x, text_embeds, attention_mask.bool(), hidden.shape[1] if layer is self.layers[-1] else None)
        return self.pixels(self.norm(x))


PHRASE_SHARE = 0.05  # of the phrases in a category feature, beside the symbol (Fashion-FINE)


class LocalAdapter(nn.Module):
    """Modality-agnostic adapter (Fashion-FINE, Jin et al. 2024): the same weights sum up patches and words. Padding
    gets no weight (choice; the authors' code lets it take part).

    a_i = softmax_i(wᵀ tanh(W x_i + b)),   l = Σ_i a_i x_i
    """

    def __init__(self, width: int):
        super().__init__()
        self.score = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1, bias=False))

    def forward(self, tokens: Tensor, keep: Tensor | None = None) -> Tensor:
        """tokens (B, X, D), keep (B, X) bool or None -> (B, D)."""
        scores = self.score(tokens).squeeze(-1)  # (B, X)
        if keep is not None:  # not −∞: a text of two tokens has none to look at
            scores = scores.masked_fill(~keep, torch.finfo(scores.dtype).min)
        return (scores.softmax(dim=1)[..., None] * tokens).sum(dim=1)


class Phrases(nn.Module):
    """Phrase feature of a text (Fashion-FINE): words alone and with their neighbours, the strongest, on average.
    Kernels of 1, 2 and 3 words, dilated by 2. Padding is zero in them and left out of the mean (choice).

    mean_i max_k tanh(conv_k(x))_i
    """

    def __init__(self, width: int):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv1d(width, width, k, padding=k - 1, dilation=2) for k in (1, 2, 3))

    def forward(self, tokens: Tensor, keep: Tensor) -> Tensor:
        """tokens (B, L, D), keep (B, L) bool -> (B, D)."""
        x = rearrange(tokens * keep[..., None], "b l d -> b d l")
        x = torch.stack([conv(x).tanh() for conv in self.convs]).amax(dim=0)  # (B, D, L)
        return (x * keep[:, None]).sum(dim=2) / keep.sum(dim=1, keepdim=True).clamp(min=1)


class VisionLanguageModel(nn.Module):
    """ALBEF's model: two encoders, two projections, the fusion encoder, an ITM and an MLM head; and a MIM decoder. As
    the config says also a head for recognition, and Fashion-FINE's local tokens, phrases and replaced-word head."""

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

    def project_image(self, image_embeds: Tensor) -> Tensor:
        """image_embeds (B, N, D) -> image_feat (B, E), unit length, float32 also under autocast."""
        return unit(self.vision_proj(image_embeds[:, 0]))

    def project_text(self, text_embeds: Tensor) -> Tensor:
        """text_embeds (B, L, D) -> text_feat (B, E), unit length."""
        return unit(self.text_proj(text_embeds[:, 0]))

    def image_feature(self, image_embeds: Tensor) -> Tensor:
        """What photos are compared by, image_embeds (B, N, D) -> (B, E): `project_image`, or with `local_tokens`
        Fashion-FINE's integrated feature, f = norm((1 − r)·norm(proj(cls)) + r·norm(proj(l))), l of the patches."""
        cls_feat = self.project_image(image_embeds)
        if not self.config.local_tokens:
            return cls_feat
        return mix(cls_feat, unit(self.vision_proj(self.adapter(image_embeds[:, 1:]))), IMAGE_LOCAL)

    def text_feature(self, text_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        """The same of texts (B, L, D) with attention_mask (B, L), by `project_text` -> (B, E); l of
        the tokens from position 2 on, whether there is a symbol at position 1 or not (so do the authors)."""
        cls_feat = self.project_text(text_embeds)
        if not self.config.local_tokens:
            return cls_feat
        keep = attention_mask[:, 2:].bool()
        return mix(cls_feat, unit(self.text_proj(self.adapter(text_embeds[:, 2:], keep))), TEXT_LOCAL)

    def category_feature(self, text_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        """What C-CmA aligns with the photo: the category symbol, the token at position 1, and the phrases after it.

        t = norm(0.95·norm(proj(symbol)) + 0.05·norm(proj(phrase))). (B, L, D), (B, L) -> (B, E), unit length.
        """
        phrase = self.phrases(text_embeds[:, 2:], attention_mask[:, 2:].bool())
        return mix(unit(self.text_proj(text_embeds[:, 1])), unit(self.text_proj(phrase)), PHRASE_SHARE)

    def itm_logits(self, fused: Tensor) -> Tensor:
        """fused (B, L, D) -> (B, 2); class 1 is "match". In float32 at least: by bf16 many pairs would rank alike."""
        cls = fused[:, 0].to(torch.promote_types(fused.dtype, torch.float32))
        with torch.autocast(cls.device.type, enabled=False):
            return self.itm_head(cls)

    def mlm_logits(self, tokens: Tensor) -> Tensor:
        """tokens (..., D) -> (..., V). Give it the masked tokens only: the vocabulary is the costly part."""
        return F.linear(self.mlm_head(tokens), self.text.word_embeddings.weight, self.mlm_bias)

    @torch.no_grad()
    def clamp_temp(self) -> None:
        """Keep the learnable temperature in ALBEF's range."""
        self.temp.clamp_(0.001, 0.5)


class MomentumModel(nn.Module):
    """An exponential moving average of a model, called like the model itself and never trained; it stays in evaluation
    mode: a teacher without dropout (choice).

    θ_m ← decay·θ_m + (1 − decay)·θ      (He et al. 2020, eq. 2)
    """

    def __init__(self, model: VisionLanguageModel, decay: float = 0.995):
        super().__init__()
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self.decay = decay

    def train(self, mode: bool = True) -> "MomentumModel":
        return super().train(False)

    @torch.no_grad()
    def update(self, model: VisionLanguageModel, decay: float | None = None) -> None:
        """Move the average towards `model`, by 1 − decay (the constructor's decay unless given)."""
        ours, theirs = list(self.model.parameters()), list(model.parameters())
        torch._foreach_lerp_(ours, theirs, 1 - (self.decay if decay is None else decay))


class FeatureQueue(nn.Module):
    """The last K momentum features with their products and captions, for more ITC negatives (MoCo, ALBEF)."""

    def __init__(self, length: int, embed_dim: int = EMBED_DIM):
        super().__init__()
        self.register_buffer("image_feat", torch.zeros(length, embed_dim))
        self.register_buffer("text_feat", torch.zeros(length, embed_dim))
        self.register_buffer("product_ids", torch.full((length,), -1))
        self.register_buffer("caption_ids", torch.full((length,), -1))
        self.pushed = 0  # counted here: asking the device would wait for it

    def get_extra_state(self) -> Tensor:
        """How many were pushed, for checkpoints."""
        return torch.tensor(self.pushed)

    def set_extra_state(self, state: Tensor) -> None:
        self.pushed = int(state)

    @property
    def entries(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """image_feat (K, E), text_feat (K, E), product_ids (K,), caption_ids (K,)."""
        return self.image_feat, self.text_feat, self.product_ids, self.caption_ids

    def filled(self) -> list[Tensor]:
        """`entries`, but only those pushed so far."""
        return [entry[: self.pushed] for entry in self.entries]

    @torch.no_grad()
    def push(self, *batch: Tensor) -> None:
        """Overwrite the oldest entries with a batch of (B, E), (B, E), (B,) and (B,)."""
        if length := len(self.product_ids):
            at = (self.pushed + torch.arange(len(batch[0]), device=self.product_ids.device)) % length
            for entry, new in zip(self.entries, batch, strict=True):
                entry[at[-length:]] = new[-length:].to(entry.dtype)
            self.pushed += len(batch[0])
