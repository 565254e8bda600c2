"""A step of a recipe by itself, to be counted and timed: ours, and ALBEF's put together from library parts."""

import contextlib
import copy
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from data import TOKEN_KEYS, Collate, build_dataset, build_tokenizer, normalise, to_device
from harness.config import TrainConfig
from harness.run import Run, autocast, build_run
from losses import itc_loss, itc_targets, itm_loss, mlm_loss
from model import ModelConfig
from train import RECIPES


def open_step(config: TrainConfig, batches: int, tokens: int = 0) -> tuple[Run, list[dict]]:
    """A run past its warm-ups, and batches of synthetic photos for it, on its device; texts padded to `tokens` tokens,
    unless the longest of a batch is longer."""
    products = 2 + batches * config.batch_size // 3
    dataset = build_dataset("synthetic", None, "train", config.model.image_size, config.seed, products, False)
    dataset.prompts = config.prompts
    spoken = [" ".join(dataset.text(row)[1::2]) for row in range(len(dataset))]
    tokenizer = build_tokenizer(spoken, config.model.vocab_size, config.model.max_length, config.vocab, config.prompts)
    unused = config.model.vocab_size - tokenizer.get_vocab_size()  # synthetic texts have but a few hundred words
    tokenizer.add_tokens([f"[unused{i}]" for i in range(unused)])
    run = build_run(config, dataset, tokenizer)
    run.step = 10**9  # past every warm-up
    run.generator = torch.Generator(run.device).manual_seed(config.seed)
    rows = np.random.default_rng(config.seed).permutation(len(dataset))[: batches * config.batch_size]
    found = []
    for chosen in rows.reshape(batches, -1):
        batch = to_device(Collate(tokenizer)([dataset[int(row)] for row in chosen]), run.device)
        missing = max(0, tokens - batch["token_ids"].shape[1])
        padded = {key: F.pad(batch[key], [0, missing]) for key in TOKEN_KEYS if key in batch}
        found.append(batch | padded | {"images": normalise(batch["images"])})
    return run, found


def our_step(run: Run, phases: dict[str, list[float]]) -> Callable[[dict], Tensor]:
    """The step of train.py's loop; seconds of its phases are noted in `phases`."""

    def step(batch: dict) -> Tensor:
        """One step. -> its loss."""
        times = [now(run.device)]
        with autocast(run):
            losses, _ = RECIPES[run.config.recipe](run, batch)
        loss = sum(losses.values())
        times.append(now(run.device))
        loss.backward()
        times.append(now(run.device))
        nn.utils.clip_grad_norm_(run.model.parameters(), run.config.clip)
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        run.model.clamp_temp()
        run.momentum.update(run.model)
        times.append(now(run.device))
        for phase, start, end in zip(("forward", "backward", "update"), times, times[1:], strict=False):
            phases.setdefault(phase, []).append(end - start)
        return loss

    return step


def now(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def count_step(run: Run, batch: dict) -> dict[str, float]:
    """What a step of the run's recipe does per photo: how many photos or texts pass each part of the model, and of the
    momentum model (…_m); multiply-adds (in millions) forward and in the whole step; MiB kept for the backward pass.
    And how often a step would make the host wait for a GPU."""
    counts: dict[str, float] = {}
    count = len(batch["token_ids"])

    def counter(key: str) -> Callable:
        def hook(_module: nn.Module, args: tuple) -> None:
            counts[key] = counts.get(key, 0) + len(args[0]) / count

        return hook

    hooks = [
        getattr(model, part).register_forward_pre_hook(counter(part + suffix))
        for model, suffix in ((run.model, ""), (run.momentum, "_m"))
        for part in ("vision", "text", "fusion", "decoder")
    ]
    with counted() as flops:
        losses, _ = RECIPES[run.config.recipe](run, batch)
        counts["forward"] = flops.get_total_flops() / 2e6 / count
        sum(losses.values()).backward()
    counts["step"] = flops.get_total_flops() / 2e6 / count
    for hook in hooks:
        hook.remove()
    with Waits() as waits:
        our_step(run, {})(batch)
    counts["waits"] = len(waits.found)

    kept = {p.untyped_storage().data_ptr(): 0 for p in run.model.parameters()}  # these are there anyway

    def note(saved: Tensor) -> Tensor:
        kept.setdefault(saved.untyped_storage().data_ptr(), saved.untyped_storage().nbytes())
        return saved

    noted = torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved)
    with torch.compiler.set_stance("force_eager"), noted, autocast(run):
        RECIPES[run.config.recipe](run, batch)
    counts["kept"] = sum(kept.values()) / 2**20 / count
    run.optimizer.zero_grad()
    return counts


class Waits(TorchDispatchMode):
    """Finds the operations inside that would make the host wait for a GPU: whose result has a size that only the data
    tell, whose numbers are asked for, or that copy numbers from Python's lists."""

    aten = torch.ops.aten
    asking = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.bincount, aten.lift_fresh,
              aten._unique2, aten.unique_dim, aten.unique_consecutive}  # fmt: skip

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_mask = func.overloadpacket in (self.aten.index, self.aten.index_put, self.aten.index_put_) and any(
            place is not None and place.dtype == torch.bool for place in args[1]
        )
        by_count = func is self.aten.repeat_interleave.Tensor and not (kwargs or {}).get("output_size")
        if by_mask or by_count or func.overloadpacket in self.asking:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def counted() -> Iterator[FlopCounterMode]:
    """Counts the matrix products inside, those of attention too, whose fused kernels are not counted everywhere, and
    those of compiled modules, which otherwise would be hidden."""
    uncompiled = torch.compiler.set_stance("force_eager")
    with uncompiled, FlopCounterMode(display=False) as flops, sdpa_kernel(SDPBackend.MATH):
        yield flops


class Reference(nn.Module):
    """ALBEF's model from Hugging Face's parts, with the sizes of ours; attention is theirs, "eager" or "sdpa"."""

    def __init__(self, config: ModelConfig, attention: str):
        from transformers import BertConfig, BertModel, ViTConfig, ViTModel
        from transformers.models.bert.modeling_bert import BertLayer, BertOnlyMLMHead

        super().__init__()
        sizes = dict(hidden_size=config.width, num_attention_heads=config.heads, intermediate_size=4 * config.width)
        vit = ViTConfig(
            **sizes, num_hidden_layers=config.vision_layers, image_size=config.image_size, patch_size=config.patch_size
        )
        drop = dict(hidden_dropout_prob=config.dropout, attention_probs_dropout_prob=config.dropout)
        bert = BertConfig(**sizes, **drop, num_hidden_layers=config.text_layers, vocab_size=config.vocab_size)
        vit._attn_implementation = bert._attn_implementation = attention
        cross = copy.deepcopy(bert)
        cross.is_decoder = cross.add_cross_attention = True
        self.vision, self.text = ViTModel(vit, add_pooling_layer=False), BertModel(bert, add_pooling_layer=False)
        self.fusion = nn.ModuleList(BertLayer(cross, layer_idx=i) for i in range(config.fusion_layers))
        for layer in self.fusion:
            layer.attention.self.is_causal = False
        self.vision_proj = nn.Linear(config.width, config.embed_dim)
        self.text_proj = nn.Linear(config.width, config.embed_dim)
        self.itm_head, self.mlm_head = nn.Linear(config.width, 2), BertOnlyMLMHead(bert)
        self.mlm_head.predictions.decoder.weight = self.text.embeddings.word_embeddings.weight
        self.temp = nn.Parameter(torch.tensor(0.07))

    def encode(self, images: Tensor, ids: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """image_embeds (B, N, D), text_embeds (B, L, D), their features (B, E)."""
        image_embeds = self.vision(images).last_hidden_state
        text_embeds = self.text(ids, attention_mask=keep).last_hidden_state
        image_feat = F.normalize(self.vision_proj(image_embeds[:, 0]), dim=-1)
        return image_embeds, text_embeds, image_feat, F.normalize(self.text_proj(text_embeds[:, 0]), dim=-1)

    def fuse(self, text_embeds: Tensor, keep: Tensor, image_embeds: Tensor) -> Tensor:
        """(B, L, D), (B, L), (B, N, D) -> (B, L, D)."""
        mask = (1.0 - keep[:, None, None, :].to(text_embeds.dtype)) * torch.finfo(text_embeds.dtype).min
        for layer in self.fusion:
            out = layer(text_embeds, attention_mask=mask, encoder_hidden_states=image_embeds)
            text_embeds = out[0] if isinstance(out, tuple) else out
        return text_embeds


def reference_step(run: Run, attention: str) -> Callable[[dict], Tensor]:
    """A step of ALBEF as public implementations write it: a pass for the matching pairs, one for the others, one for
    masked words; negatives drawn row by row; the vocabulary predicted for every token; plain AdamW; momentum copied one
    parameter after the other. The objectives are ours; its masks are drawn beforehand."""
    config = run.config
    torch.manual_seed(config.seed)
    model = Reference(run.model.config, attention).to(run.device).train()
    momentum = copy.deepcopy(model).requires_grad_(False)
    if config.compile:
        for part in (model.vision, model.text, *model.fusion, momentum.vision, momentum.text, *momentum.fusion):
            part.compile(dynamic=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)

    def negatives(sim: Tensor, same: Tensor) -> list[int]:
        weights = sim.detach().masked_fill(same, -1e4).softmax(dim=1)
        return [torch.multinomial(row, 1).item() for row in weights]

    def step(batch: dict) -> Tensor:
        """One step. -> its loss."""
        images, ids, keep = batch["images"], batch["token_ids"], batch["attention_mask"]
        products = batch["product_ids"]
        masked_ids, labels = run.corrupt(ids, batch["mask"])
        with autocast(run):
            image_embeds, text_embeds, image_feat, text_feat = model.encode(images, ids, keep)
            with torch.no_grad():
                image_embeds_m, _, image_feat_m, text_feat_m = momentum.encode(images, ids, keep)
                same = products[:, None] == products[None]
                targets_i2t, targets_t2i = (
                    itc_targets(same, a @ b.T / model.temp, run.alpha)
                    for a, b in ((image_feat_m, text_feat_m), (text_feat_m, image_feat_m))
                )
            sim_i2t, sim_t2i = image_feat @ text_feat_m.T / model.temp, text_feat @ image_feat_m.T / model.temp
            itc = itc_loss(sim_i2t, sim_t2i, targets_i2t, targets_t2i)
            wrong_text, wrong_image = negatives(sim_i2t, same), negatives(sim_t2i, same)
            matching = model.fuse(text_embeds, keep, image_embeds)
            others = model.fuse(
                torch.cat([torch.stack([text_embeds[j] for j in wrong_text]), text_embeds]),
                torch.cat([torch.stack([keep[j] for j in wrong_text]), keep]),
                torch.cat([image_embeds, torch.stack([image_embeds[j] for j in wrong_image])]),
            )
            logits = model.itm_head(torch.cat([matching[:, 0], others[:, 0]]))
            itm = itm_loss(logits, torch.cat([products.new_ones(len(ids)), products.new_zeros(2 * len(ids))]))
            masked_embeds = model.text(masked_ids, attention_mask=keep).last_hidden_state
            words = model.mlm_head(model.fuse(masked_embeds, keep, image_embeds))  # (B, L, V)
            words_m = None
            if run.alpha > 0:
                with torch.no_grad():
                    masked_m = momentum.text(masked_ids, attention_mask=keep).last_hidden_state
                    words_m = momentum.mlm_head(momentum.fuse(masked_m, keep, image_embeds_m)).flatten(0, 1)
            mlm = mlm_loss(words.flatten(0, 1), labels.flatten(), words_m, run.alpha)
        loss = itc + itm + mlm
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad()
        for ours, theirs in zip(momentum.parameters(), model.parameters(), strict=True):
            ours.data = ours.data * config.ema_decay + theirs.data * (1 - config.ema_decay)
        return loss

    return step
