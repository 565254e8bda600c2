"""The model against Hugging Face's on random weights, its loading of published weights, and its own promises."""

import argparse
import pickle
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertForMaskedLM, BertModel, ViTConfig, ViTModel

from harness.weights import EXTRA_TOKENS, WeightsError, load_pretrained
from model import PRESETS, Attention, FeatureQueue, ModelConfig, MomentumModel, VisionLanguageModel, VisionTransformer
from photos.prompts import SYMBOLS

SMALL = ModelConfig(image_size=32, patch_size=8, width=48, heads=4, vision_layers=3, text_layers=2, fusion_layers=2,
                    embed_dim=16, max_length=20, vocab_size=60)  # fmt: skip


def randomise(module):
    """Every parameter random, biases and norms too: a zero bias would hide a missing one."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.2)
    return module.eval()


def make_model(config=SMALL, seed=0):
    torch.manual_seed(seed)
    return randomise(VisionLanguageModel(config))


def hf_vit(config=SMALL):
    return randomise(
        ViTModel(
            ViTConfig(
                hidden_size=config.width, num_hidden_layers=config.vision_layers, num_attention_heads=config.heads,
                intermediate_size=4 * config.width, image_size=config.image_size, patch_size=config.patch_size,
                layer_norm_eps=1e-6,
            ),
            add_pooling_layer=False,
        )
    )  # fmt: skip


def bert_config(config=SMALL, layers=None, **more):
    return BertConfig(
        vocab_size=config.vocab_size, hidden_size=config.width, num_attention_heads=config.heads,
        num_hidden_layers=config.text_layers + config.fusion_layers if layers is None else layers,
        intermediate_size=4 * config.width, **more,
    )  # fmt: skip


def texts(batch=3, length=11):
    token_ids = torch.randint(0, SMALL.vocab_size, (batch, length))
    attention_mask = torch.ones(batch, length, dtype=torch.long)
    attention_mask[1, 7:] = 0
    attention_mask[2, 3:] = 0
    return token_ids, attention_mask


def close(ours, theirs, keep=None):
    if keep is not None:
        ours, theirs = ours[keep.bool()], theirs[keep.bool()]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


# --------------------------------------------------------------------------------------------- parity


def test_vit_equals_hugging_face(tmp_path):
    reference, model = hf_vit(), make_model()
    save_file(reference.state_dict(), tmp_path / "vit.safetensors")
    report = load_pretrained(model, vision=tmp_path / "vit.safetensors")
    assert not report.skipped and all(not name.startswith("vision.") or "registers" in name for name in report.missing)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        close(model.encode_image(images), reference(images).last_hidden_state)


def test_text_encoder_equals_bert(tmp_path):
    reference = randomise(BertModel(bert_config(layers=SMALL.text_layers), add_pooling_layer=False))
    save_file(reference.state_dict(), tmp_path / "bert.safetensors")
    model = make_model()
    load_pretrained(model, text=tmp_path / "bert.safetensors")
    token_ids, attention_mask = texts()
    with torch.no_grad():
        theirs = reference(token_ids, attention_mask=attention_mask).last_hidden_state
        close(model.encode_text(token_ids, attention_mask), theirs, attention_mask)


def test_fusion_equals_bert_with_cross_attention(tmp_path):
    """Text layers, then layers with cross-attention: BertModel's, the causal mask taken out, in two halves."""
    reference = randomise(BertModel(bert_config(is_decoder=True, add_cross_attention=True), add_pooling_layer=False))
    reference.config.is_decoder = False  # keeps cross-attention, drops the causal mask
    for layer in reference.encoder.layer:
        layer.attention.self.is_causal = False
    lower, upper = reference.encoder.layer[: SMALL.text_layers], reference.encoder.layer[SMALL.text_layers :]
    save_file(reference.state_dict(), tmp_path / "bert.safetensors")
    model = make_model()
    load_pretrained(model, text=tmp_path / "bert.safetensors")
    (token_ids, attention_mask), image_embeds = texts(), torch.randn(3, 17, SMALL.width)
    with torch.no_grad():
        reference.encoder.layer = lower
        hidden = reference(token_ids, attention_mask=attention_mask).last_hidden_state
        reference.encoder.layer = upper
        mask = attention_mask[:, None, None, :].bool().expand(-1, 1, token_ids.shape[1], -1)
        for layer in upper:
            layer.is_decoder = True
            out = layer(hidden, attention_mask=mask, encoder_hidden_states=image_embeds)
            hidden = out[0] if isinstance(out, tuple) else out
        ours = model.fuse(model.encode_text(token_ids, attention_mask), attention_mask, image_embeds)
        close(ours, hidden, attention_mask)


def test_mlm_head_equals_bert(tmp_path):
    reference = randomise(BertForMaskedLM(bert_config(layers=2)))
    save_file({k: v for k, v in reference.state_dict().items() if "decoder" not in k}, tmp_path / "bert.safetensors")
    model = make_model()
    load_pretrained(model, text=tmp_path / "bert.safetensors")
    tokens = torch.randn(5, SMALL.width)
    with torch.no_grad():
        close(model.mlm_logits(tokens), reference.cls(tokens))


def test_attention_is_the_same_with_and_without_probabilities():
    attention = randomise(Attention(32, 4))
    x, context, keep = torch.randn(2, 5, 32), torch.randn(2, 7, 32), torch.rand(2, 7) > 0.3
    fast, none = attention(x, context, keep)
    slow, probabilities = attention(x, context, keep, return_attention=True)
    assert none is None and probabilities.shape == (2, 4, 5, 7)
    close(fast, slow)
    close(probabilities.sum(-1), torch.ones(2, 4, 5))
    assert (probabilities.masked_select(~keep[:, None, None, :].expand_as(probabilities)) == 0).all()


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    model = VisionLanguageModel(ModelConfig(dropout=0.5))
    token_ids, attention_mask = texts()
    differ = lambda: (
        not torch.equal(model.encode_text(token_ids, attention_mask), model.encode_text(token_ids, attention_mask))
    )
    assert model.train() and differ()
    assert model.eval() and not differ()


# ------------------------------------------------------------------------------------------- promises


def test_shapes_and_unit_length_features():
    model = make_model()
    token_ids, attention_mask = texts()
    image_embeds = model.encode_image(torch.randn(3, 3, 32, 32))
    text_embeds = model.encode_text(token_ids, attention_mask)
    fused, attention = model.fuse(text_embeds, attention_mask, image_embeds, return_attention=True)
    assert image_embeds.shape == (3, 17, 48) and text_embeds.shape == fused.shape == (3, 11, 48)
    assert [a.shape for a in attention] == [(3, 4, 11, 17)] * 2
    close(model.project_image(image_embeds).norm(dim=-1), torch.ones(3))
    close(model.project_text(text_embeds).norm(dim=-1), torch.ones(3))
    assert model.itm_logits(fused).shape == (3, 2) and model.mlm_logits(fused).shape == (3, 11, 60)


def test_padding_does_not_change_an_output():
    model, (token_ids, attention_mask) = make_model(), texts()
    image_embeds = torch.randn(3, 17, 48)
    longer = torch.nn.functional.pad(token_ids, (0, 6), value=7), torch.nn.functional.pad(attention_mask, (0, 6))
    with torch.no_grad():
        short = model.fuse(model.encode_text(token_ids, attention_mask), attention_mask, image_embeds)
        padded = model.fuse(model.encode_text(*longer), longer[1], image_embeds)
    close(short, padded[:, :11], attention_mask)


def test_keep_encodes_exactly_the_chosen_patches():
    vit, images = make_model().vision, torch.randn(2, 3, 32, 32)
    everything = torch.arange(16).expand(2, -1)
    with torch.no_grad():
        close(vit(images, everything), vit(images))
        keep = torch.tensor([[0, 5, 9], [3, 2, 15]])
        some, changed = vit(images, keep), images.clone()
        changed[0, :, 8:16, 0:8] += 1  # patch 4 is not kept
        close(vit(changed, keep), some)
    assert some.shape == (2, 4, 48)


def test_patches_are_reconstructed_from_the_visible_ones_and_the_text():
    model = make_model()
    images, ids, keep = torch.randn(2, 3, 32, 32), torch.randint(0, 60, (2, 7)), torch.ones(2, 7, dtype=torch.long)
    keep[1, 5:] = 0
    visible = torch.tensor([[0, 3, 9, 12, 15], [1, 2, 8, 10, 11]])

    def pixels(images, ids, visible=visible):
        return model.reconstruct_patches(
            model.encode_image(images, visible), visible, model.encode_text(ids, keep), keep
        )

    with torch.no_grad():
        before = pixels(images, ids)
        assert before.shape == (2, 16, 3 * 8 * 8)
        # the order in which visible patches are listed does not matter, nor do patches that are not listed
        torch.testing.assert_close(before, pixels(images, ids, visible.flip(1)), atol=1e-4, rtol=1e-4)
        changed = images.clone()
        changed[:, :, 0:8, 8:16][0] += 1.0  # patch 1: masked in the first photo, not in the second
        changed[1, :, 0:8, 0:8] += 1.0  # patch 0: masked in the second
        torch.testing.assert_close(before, pixels(changed, ids))
        changed[1, :, 0:8, 8:16] += 1.0  # patch 1: visible there
        assert not torch.allclose(before[1], pixels(changed, ids)[1])
        # every patch looks at the words, and not at the padding
        other = ids.clone()
        other[:, 2] = (other[:, 2] + 1) % 60
        assert ((before - pixels(images, other)).abs().amax(2) > 1e-4).all()
        other = ids.clone()
        other[1, 5:] = (other[1, 5:] + 1) % 60
        torch.testing.assert_close(before, pixels(images, other))


def test_without_cls_context_the_text_looks_at_patches_only():
    model = make_model(replace(SMALL, cls_context=False))
    image_embeds, text_embeds, keep = torch.randn(2, 17, 48), torch.randn(2, 7, 48), torch.ones(2, 7)
    with torch.no_grad():
        fused, attentions = model.fuse(text_embeds, keep, image_embeds, return_attention=True)
        for attention in attentions:
            assert attention.shape == (2, 4, 7, 17) and (attention[..., 0] == 0).all()
            torch.testing.assert_close(attention.sum(-1), torch.ones(2, 4, 7))
        image_embeds[:, 0] += 1
        torch.testing.assert_close(fused, model.fuse(text_embeds, keep, image_embeds))


def test_patch_layer_puts_out_earlier_patches_and_the_last_cls():
    torch.manual_seed(0)
    whole = randomise(VisionTransformer(SMALL))
    early = randomise(VisionTransformer(replace(SMALL, patch_layer=1)))
    early.load_state_dict(whole.state_dict())
    images, seen = torch.randn(2, 3, 32, 32), []
    whole.layers[0].register_forward_hook(lambda _, __, x: seen.append(x))
    with torch.no_grad():
        full, short = whole(images), early(images)
        torch.testing.assert_close(short[:, :1], full[:, :1])
        torch.testing.assert_close(short[:, 1:], whole.norm(seen[0])[:, 1:])


def test_registers_take_part_and_are_dropped():
    torch.manual_seed(0)
    vit = randomise(VisionTransformer(ModelConfig(registers=3)))
    images = torch.randn(2, 3, 64, 64)
    before = vit(images)
    assert before.shape == (2, 65, 128)
    with torch.no_grad():
        vit.registers += 1
    assert not torch.allclose(vit(images), before)


@pytest.mark.parametrize(
    "sizes",
    [
        {"image_size": 30},
        {"heads": 5},
        {"dropout": 1.0},
        {"patch_size": 0},
        {"heads": 0},
        {"width": -4},
        {"registers": -1},
        {"max_length": 2},
        {"vocab_size": 0},
    ],
)
def test_impossible_sizes_are_refused(sizes):
    with pytest.raises(ValueError, match=next(iter(sizes))):
        ModelConfig(**sizes)


def test_base_is_vit_b_and_bert_base():
    with torch.device("meta"):
        model = VisionLanguageModel(PRESETS["base"])
    assert model.config.grid**2 == 256
    assert sum(p.numel() for p in model.vision.parameters()) == pytest.approx(86e6, rel=0.01)
    assert len(model.text.layers) == len(model.fusion.layers) == 6


# -------------------------------------------------------------------------------------------- momentum


def test_momentum_follows_by_the_decay_and_never_trains():
    model = make_model()
    momentum = MomentumModel(model, decay=0.9)
    before = momentum.model.vision.norm.weight.clone()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    momentum.update(model)
    close(momentum.model.vision.norm.weight, before + 0.1)
    momentum.update(model, decay=0.0)
    for ours, theirs in zip(momentum.parameters(), model.parameters(), strict=True):
        close(ours, theirs)
    assert not any(p.requires_grad for p in momentum.parameters())
    assert not momentum.train().model.training
    images = torch.randn(1, 3, 32, 32)
    close(momentum.encode_image(images), model.encode_image(images))


def test_queue_keeps_the_newest_in_a_ring():
    queue = FeatureQueue(5, 2)
    features = torch.arange(16.0).reshape(8, 2)
    queue.push(features[:3], -features[:3], torch.arange(3))
    assert queue.filled()[2].tolist() == [0, 1, 2]
    queue.push(features[3:7], -features[3:7], torch.arange(3, 7))
    image_feat, text_feat, products = queue.filled()
    assert products.tolist() == [5, 6, 2, 3, 4]
    close(image_feat, features[products])
    close(text_feat, -features[products])
    queue.push(features, features, torch.arange(8))  # more than fits: the last five stay
    assert sorted(queue.filled()[2].tolist()) == [3, 4, 5, 6, 7]
    empty = FeatureQueue(0, 2)
    empty.push(features, features, torch.arange(8))
    assert len(empty.filled()[0]) == 0


# ------------------------------------------------------------------------------------ pretrained weights


def timm_names(vit):
    """Our ViT's weights under timm's names, which DeiT, MAE and ALBEF share."""
    state = {"cls_token": vit.cls_token, "pos_embed": vit.position_embed}
    for part in ("weight", "bias"):
        state[f"patch_embed.proj.{part}"] = getattr(vit.patch_embed, part)
        state[f"norm.{part}"] = getattr(vit.norm, part)
        for i, layer in enumerate(vit.layers):
            a = layer.attention
            state[f"blocks.{i}.attn.qkv.{part}"] = torch.cat([getattr(m, part) for m in (a.query, a.key, a.value)])
            for name, module in (("attn.proj", a.output), ("norm1", layer.norm1), ("norm2", layer.norm2),
                                 ("mlp.fc1", layer.mlp[0]), ("mlp.fc2", layer.mlp[2])):  # fmt: skip
                state[f"blocks.{i}.{name}.{part}"] = getattr(module, part)
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def bert_names(model):
    """Our text and fusion encoders under BERT's names, as ALBEF stores them."""
    table = model.text.position_embeddings
    state = {
        "embeddings.word_embeddings.weight": model.text.word_embeddings.weight,
        "embeddings.position_embeddings.weight": torch.cat([table, torch.zeros(9, table.shape[1])]),
        "embeddings.token_type_embeddings.weight": torch.zeros(2, table.shape[1]),
        "embeddings.position_ids": torch.arange(29)[None],
        "embeddings.LayerNorm.weight": model.text.norm.weight,
        "embeddings.LayerNorm.bias": model.text.norm.bias,
    }
    for i, layer in enumerate([*model.text.layers, *model.fusion.layers]):
        for ours, theirs in (("attention", "attention"), ("cross_attention", "crossattention")):
            if not hasattr(layer, ours):
                continue
            module = getattr(layer, ours)
            for part in ("weight", "bias"):
                for piece in ("query", "key", "value"):
                    state[f"encoder.layer.{i}.{theirs}.self.{piece}.{part}"] = getattr(getattr(module, piece), part)
                state[f"encoder.layer.{i}.{theirs}.output.dense.{part}"] = getattr(module.output, part)
                state[f"encoder.layer.{i}.{theirs}.output.LayerNorm.{part}"] = getattr(
                    getattr(layer, f"{ours}_norm"), part
                )
        for part in ("weight", "bias"):
            state[f"encoder.layer.{i}.intermediate.dense.{part}"] = getattr(layer.mlp[0], part)
            state[f"encoder.layer.{i}.output.dense.{part}"] = getattr(layer.mlp[2], part)
            state[f"encoder.layer.{i}.output.LayerNorm.{part}"] = getattr(layer.mlp_norm, part)
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def hub_vit_names(vit):
    """Hugging Face's names as they stand in published ViT files."""
    state = {}
    for name, tensor in timm_names(vit).items():
        name = name.replace("cls_token", "vit.embeddings.cls_token").replace(
            "pos_embed", "vit.embeddings.position_embeddings"
        )
        name = name.replace("patch_embed.proj", "vit.embeddings.patch_embeddings.projection").replace(
            "blocks.", "vit.encoder.layer."
        )
        name = name.replace("norm1", "layernorm_before").replace("norm2", "layernorm_after")
        name = (
            name.replace("attn.proj", "attention.output.dense")
            .replace("mlp.fc1", "intermediate.dense")
            .replace("mlp.fc2", "output.dense")
        )
        if name.startswith("norm."):
            name = "vit.layernorm." + name.removeprefix("norm.")
        if "attn.qkv" in name:
            for piece, t in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                state[name.replace("attn.qkv", f"attention.attention.{piece}")] = t.clone()
        else:
            state[name] = tensor
    return state


@pytest.mark.parametrize("naming", [timm_names, hub_vit_names])
@pytest.mark.parametrize("wrapped", [False, True])
def test_vision_weights_in_every_naming(tmp_path, naming, wrapped):
    source, target = make_model(seed=1), make_model(seed=2)
    state = naming(source.vision) | {"head.weight": torch.zeros(3, 48), "decoder_blocks.0.norm1.weight": torch.zeros(9)}
    torch.save({"model": state, "args": argparse.Namespace(lr=1)} if wrapped else state, tmp_path / "vit.pth")
    report = load_pretrained(target, vision=tmp_path / "vit.pth")
    assert set(report.skipped) == {"head.weight", "decoder_blocks.0.norm1.weight"}
    for (name, ours), theirs in zip(target.vision.named_parameters(), source.vision.parameters(), strict=True):
        assert name == "registers" or torch.equal(ours, theirs)
    assert "text.norm.weight" in report.missing and "vision.norm.weight" in report.loaded


def test_position_embeddings_are_interpolated_to_the_grid(tmp_path):
    finer = ModelConfig(**{**SMALL.__dict__, "image_size": 64})
    source, target = make_model(seed=1), make_model(finer)
    with torch.no_grad():  # a smooth table: interpolation must keep it smooth
        ramp = torch.linspace(0, 1, 4).repeat_interleave(4)[:, None].expand(16, 48)
        source.vision.position_embed[0, 1:] = ramp
    torch.save(timm_names(source.vision), tmp_path / "vit.pth")
    load_pretrained(target, vision=tmp_path / "vit.pth")
    table = target.vision.position_embed[0]
    assert table.shape == (65, 48)
    close(table[0], source.vision.position_embed[0, 0])
    rows = table[1:].reshape(8, 8, 48)[:, 0, 0]
    assert (rows.diff() > -0.02).all() and rows[0] < 0.1 and rows[-1] > 0.9


@pytest.mark.parametrize("wrapper", ["", "module."])
def test_whole_albef_checkpoint(tmp_path, wrapper):
    source, target = make_model(seed=1), make_model(seed=2)
    state = {f"visual_encoder.{k}": v for k, v in timm_names(source.vision).items()}
    state |= {f"text_encoder.bert.{k}": v for k, v in bert_names(source).items()}
    own = dict(source.named_parameters())
    for name in ("vision_proj", "text_proj", "itm_head"):
        state |= {f"{name}.{part}": own[f"{name}.{part}"].detach() for part in ("weight", "bias")}
    state["temp"] = source.temp.detach()
    state |= {"text_encoder.cls.predictions.bias": source.mlm_bias.detach(), "image_queue": torch.zeros(4, 9)}
    state |= {
        f"text_encoder.cls.predictions.transform.dense.{p}": getattr(source.mlm_head[0], p).detach()
        for p in ("weight", "bias")
    }
    state |= {
        f"text_encoder.cls.predictions.transform.LayerNorm.{p}": getattr(source.mlm_head[2], p).detach()
        for p in ("weight", "bias")
    }
    state |= {f"visual_encoder_m.{k}": v + 1 for k, v in timm_names(source.vision).items()}
    state |= {f"text_encoder_m.bert.{k}": v + 1 for k, v in bert_names(source).items()}
    torch.save({"model": {wrapper + k: v for k, v in state.items()}, "epoch": 3}, tmp_path / "albef.pth")
    report = load_pretrained(target, whole=tmp_path / "albef.pth")
    assert [name for name in report.missing if not name.startswith("decoder.")] == ["vision.registers"]
    for (name, ours), theirs in zip(target.named_parameters(), source.parameters(), strict=True):
        assert name.startswith("decoder.") or torch.equal(ours, theirs), name
    assert "image_queue" in report.skipped


def test_weights_of_another_size_are_refused_and_partial_fits_reported(tmp_path):
    other = make_model(ModelConfig(**{**SMALL.__dict__, "width": 64}))
    target = make_model()
    torch.save(timm_names(other.vision), tmp_path / "vit.pth")
    with pytest.raises(WeightsError, match="none of its tensors fits"):
        load_pretrained(target, vision=tmp_path / "vit.pth")
    state = bert_names(make_model(seed=3))
    state["embeddings.word_embeddings.weight"] = torch.zeros(99, 48)
    torch.save(state, tmp_path / "bert.bin")
    report = load_pretrained(target, text=tmp_path / "bert.bin")
    assert "shape (99, 48), this model has (60, 48)" in str(report)
    assert "text.word_embeddings.weight" in report.missing


class Malicious:
    def __reduce__(self):
        return (print, ("ran pickled code",))


@pytest.mark.parametrize("kind", ["absent", "text", "pickle", "safetensors", "truncated", "list"])
def test_unreadable_weights_are_one_clear_line(tmp_path, kind, capsys):
    path = tmp_path / ("x.safetensors" if kind == "safetensors" else "x.pth")
    if kind in ("text", "safetensors"):
        path.write_text("not weights at all, but long enough to be read as a header of some kind")
    elif kind == "pickle":
        path.write_bytes(pickle.dumps({"model": Malicious()}))
    elif kind == "truncated":
        torch.save(timm_names(make_model().vision), path)
        path.write_bytes(path.read_bytes()[:2000])
    elif kind == "list":
        torch.save([1, 2], path)
    with pytest.raises(WeightsError, match=str(path.name)) as caught:
        load_pretrained(make_model(), vision=path)
    assert "\n" not in str(caught.value) and "ran pickled code" not in capsys.readouterr().out


# -------------------------------------------------------------------------------------- nothing computed twice


@pytest.mark.parametrize("layers, cls_context", [(1, True), (2, False), (3, True)])
def test_pairs_that_share_photos_or_ask_for_cls_alone_fuse_as_if_on_their_own(layers, cls_context):
    model = make_model(replace(SMALL, fusion_layers=layers, cls_context=cls_context))
    (token_ids, keep), image_embeds = texts(), torch.randn(3, 17, SMALL.width, requires_grad=True)
    text_embeds = model.encode_text(token_ids, keep).detach().requires_grad_()
    rows, photos = torch.tensor([0, 1, 2, 2, 0]), torch.tensor([0, 2, 2, 1, 0])
    plain = model.fuse(text_embeds[rows], keep[rows], image_embeds[photos])
    shared = model.fuse(text_embeds[rows], keep[rows], image_embeds, photos=photos)
    cls, rest = model.fuse(text_embeds[rows], keep[rows], image_embeds, photos=photos, only_cls=3)
    assert cls.shape == (3, 1, SMALL.width) and rest.shape == (2, *plain.shape[1:])
    close(shared, plain)
    close(cls, plain[:3, :1])
    close(rest, plain[3:])
    weigh = torch.randn_like(plain)
    weigh[:3, 1:] = 0
    inputs = (text_embeds, image_embeds, model.fusion.layers[0].cross_attention.key.weight)
    theirs = torch.autograd.grad((plain * weigh).sum(), inputs)
    mine = torch.autograd.grad((cls * weigh[:3, :1]).sum() + (rest * weigh[3:]).sum(), inputs)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    every, none = model.fuse(text_embeds, keep, image_embeds, only_cls=3)
    close(every, model.fuse(text_embeds, keep, image_embeds)[:, :1])
    assert none.shape[0] == 0


def test_patches_of_an_earlier_layer_are_not_computed_further():
    """With the last layer's patches computed all the same, CLS and patches are what they are without them."""
    model, images = make_model(replace(SMALL, patch_layer=2, registers=2)), torch.randn(2, 3, 32, 32)
    tokens = []
    for number in (1, 2):
        model.vision.layers[number].register_forward_hook(lambda _, __, x: tokens.append(x))
    embeds = model.encode_image(images)
    assert [x.shape[1] for x in tokens] == [1 + 16 + 2, 1]
    whole = model.vision.layers[2](tokens[0])
    close(embeds[:, :1], model.vision.norm(whole[:, :1]))
    close(embeds[:, 1:], model.vision.norm(tokens[0][:, 1:17]))


# ------------------------------------------------------------------------- local tokens, phrases, symbols

FINE = replace(SMALL, local_image=0.05, local_text=0.25, alignment=True, detector=True)


def same_in_float64(ours, naive, inputs):
    torch.testing.assert_close(ours, naive)
    theirs = torch.autograd.grad(naive.sum(), inputs)
    for mine, other in zip(torch.autograd.grad(ours.sum(), inputs), theirs, strict=True):
        torch.testing.assert_close(mine, other)


def test_adapter_equals_a_loop_and_is_one_for_both_modalities():
    model = make_model(FINE).double()
    adapter, keep = model.adapter, torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    tokens = torch.randn(2, 5, FINE.width, dtype=torch.float64, requires_grad=True)
    naive = []
    for x, kept in zip(tokens, keep, strict=True):
        hidden = [torch.tanh(adapter.score[0].weight @ row + adapter.score[0].bias) for row in x[kept]]
        weights = [torch.exp((adapter.score[2].weight @ h)[0]) for h in hidden]
        naive.append(sum(w / sum(weights) * row for w, row in zip(weights, x[kept], strict=True)))
    same_in_float64(adapter(tokens, keep), torch.stack(naive), (tokens, adapter.score[0].weight))
    text, image = model.text_feature(tokens, keep), model.image_feature(tokens)
    used = (
        torch.autograd.grad(text.sum(), adapter.score[2].weight)[0],
        torch.autograd.grad(image.sum(), adapter.score[2].weight)[0],
    )
    assert all(gradient.any() for gradient in used)


def test_phrases_equal_a_loop():
    phrases = make_model(FINE).double().phrases
    keep = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]).bool()
    tokens = torch.randn(2, 6, FINE.width, dtype=torch.float64, requires_grad=True)
    naive = []
    for x, kept in zip(tokens, keep, strict=True):
        at = lambda place, x=x, kept=kept: x[place] if 0 <= place < 6 and kept[place] else torch.zeros_like(x[0])
        found = []
        for place in kept.nonzero()[:, 0].tolist():
            # kernel 1: the word; 2: the two beside it; 3: the word and those two places away
            near = [[place], [place - 1, place + 1], [place - 2, place, place + 2]]
            spoken = [
                torch.tanh(conv.bias + sum(conv.weight[:, :, k] @ at(p) for k, p in enumerate(places)))
                for conv, places in zip(phrases.convs, near, strict=True)
            ]
            found.append(torch.stack(spoken).amax(dim=0))
        naive.append(torch.stack(found).mean(dim=0))
    same_in_float64(phrases(tokens, keep), torch.stack(naive), (tokens, phrases.convs[2].weight))


def test_category_feature_equals_a_loop_in_float64():
    model = make_model(FINE).double()
    tokens = torch.randn(2, 5, FINE.width, dtype=torch.float64, requires_grad=True)
    keep, naive = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]), []
    for x, length in zip(tokens, (4, 5), strict=True):
        phrase = model.phrases(x[None, 2:length], torch.ones(1, length - 2).bool())[0]
        parts = [model.text_proj.weight @ one + model.text_proj.bias for one in (x[1], phrase)]
        mixed = sum(share * part / part.norm() for share, part in zip((0.95, 0.05), parts, strict=True))
        naive.append(mixed / mixed.norm())
    inputs = (tokens, model.text_proj.weight, model.phrases.convs[1].weight)
    weigh = torch.randn(2, FINE.embed_dim, dtype=torch.float64)  # the sum alone would hide a direction
    same_in_float64(model.category_feature(tokens, keep) * weigh, torch.stack(naive) * weigh, inputs)


def test_features_with_local_tokens_by_hand_and_padding_is_ignored():
    model = make_model(FINE)
    (token_ids, keep), image_embeds = texts(), torch.randn(3, 17, SMALL.width)
    unit = lambda x: x / x.norm(dim=-1, keepdim=True)
    with torch.no_grad():
        text_embeds = model.encode_text(token_ids, keep)
        cls, local = unit(model.vision_proj(image_embeds[:, 0])), model.adapter(image_embeds[:, 1:])
        close(model.image_feature(image_embeds), unit(0.95 * cls + 0.05 * unit(model.vision_proj(local))))
        cls, local = unit(model.text_proj(text_embeds[:, 0])), model.adapter(text_embeds[:, 2:], keep[:, 2:].bool())
        close(model.text_feature(text_embeds, keep), unit(0.75 * cls + 0.25 * unit(model.text_proj(local))))
        phrase = model.phrases(text_embeds[:, 2:], keep[:, 2:].bool())
        symbol = unit(model.text_proj(text_embeds[:, 1]))
        close(model.category_feature(text_embeds, keep), unit(0.95 * symbol + 0.05 * unit(model.text_proj(phrase))))
        changed = torch.where(keep[..., None].bool(), text_embeds, torch.randn_like(text_embeds))
        close(model.text_feature(changed, keep), model.text_feature(text_embeds, keep))
        close(model.category_feature(changed, keep), model.category_feature(text_embeds, keep))
        two = torch.tensor([[1, 1, 0]])  # a text without words
        assert model.text_feature(text_embeds[:1, :3], two).isfinite().all()
        assert model.category_feature(text_embeds[:1, :3], two).isfinite().all()
        longer, more = (
            torch.nn.functional.pad(text_embeds, (0, 0, 0, 4), value=9.0),
            torch.nn.functional.pad(keep, (0, 4)),
        )
        close(model.text_feature(longer, more), model.text_feature(text_embeds, keep))
        close(model.category_feature(longer, more), model.category_feature(text_embeds, keep))
        plain = make_model()
        assert torch.equal(plain.image_feature(image_embeds), plain.project_image(image_embeds))
        assert torch.equal(plain.text_feature(text_embeds, keep), plain.project_text(text_embeds))
    with pytest.raises(ValueError, match="local_text 1.5 is a share of more than 1"):
        replace(SMALL, local_text=1.5)


def test_published_words_fill_a_vocabulary_that_ends_with_the_symbols(tmp_path):
    state = bert_names(make_model(seed=3))
    torch.save(state, tmp_path / "bert.bin")
    target = make_model(replace(SMALL, vocab_size=SMALL.vocab_size + 9))
    before = target.text.word_embeddings.weight.detach().clone()
    report = load_pretrained(target, text=tmp_path / "bert.bin")
    after, words = target.text.word_embeddings.weight, state["embeddings.word_embeddings.weight"]
    assert torch.equal(after[:-9], words) and torch.equal(after[-9:], before[-9:])
    assert "text.word_embeddings.weight" in report.loaded
    narrow = make_model(replace(SMALL, vocab_size=SMALL.vocab_size + 9, width=32, text_layers=1))
    state["cls.predictions.bias"] = torch.zeros(SMALL.vocab_size)
    torch.save(state, tmp_path / "bert.bin")
    assert "shape (60, 48), this model has (69, 32)" in str(load_pretrained(narrow, text=tmp_path / "bert.bin"))
    assert len(SYMBOLS) == EXTRA_TOKENS
