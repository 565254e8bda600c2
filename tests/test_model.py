"""The model against Hugging Face's on random weights, its loading of published weights, and its own properties."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertForMaskedLM, BertModel, ViTConfig, ViTModel

from engine.weights import load_pretrained, split_qkv
from model import (
    PRESETS,
    Attention,
    ModelConfig,
    MomentumModel,
    VisionLanguageModel,
    sincos_pos_embed,
    sincos_pos_embed_2d,
)

SMALL = ModelConfig(image_size=32, patch_size=8, width=48, heads=4, vision_layers=3, max_length=20, vocab_size=60)
FINE = replace(SMALL, local_tokens=True, alignment=True, detector=True)


def randomise(module):
    """Every parameter random, biases and norms too: a zero bias would hide a missing one."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.2)
    return module.eval()


def make_model(config=SMALL, seed=0):
    torch.manual_seed(seed)
    return randomise(VisionLanguageModel(config))


def load(model, reference, path):
    """Load a Hugging Face model's weights by way of a file."""
    state = {name: tensor for name, tensor in reference.state_dict().items() if "decoder" not in name}
    save_file(state, path / "weights.safetensors")
    return load_pretrained(model, [path / "weights.safetensors"])


def sizes(config, layers):
    """Hugging Face's names for a transformer's sizes."""
    return dict(
        hidden_size=config.width,
        intermediate_size=4 * config.width,
        num_attention_heads=config.heads,
        num_hidden_layers=layers,
    )


def bert_config(config=SMALL, layers=None, **more):
    layers = layers or config.text_layers + config.fusion_layers
    return BertConfig(vocab_size=config.vocab_size, **sizes(config, layers), **more)


def texts():
    token_ids = torch.randint(0, SMALL.vocab_size, (3, 11))
    attention_mask = torch.ones(3, 11, dtype=torch.long)
    attention_mask[1, 7:] = 0
    attention_mask[2, 3:] = 0
    return token_ids, attention_mask


def close(ours, theirs, attention_mask=None):
    if attention_mask is not None:
        ours, theirs = ours[attention_mask.bool()], theirs[attention_mask.bool()]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_initial_positions_resemble_their_neighbours_and_are_as_long_as_words():
    text = VisionLanguageModel(ModelConfig()).text
    positions, words = text.position_embeddings, text.word_embeddings.weight
    torch.testing.assert_close(positions.norm(dim=1), torch.ones(len(positions)))
    assert words.norm(dim=1).mean().item() == pytest.approx(1, abs=0.05)
    similarity = positions @ positions.T
    assert similarity[10].argmax() == 10 and (similarity[10, 10:15].diff() < 0).all()
    grid = sincos_pos_embed_2d(4, 16).view(4, 4, 2, 8)  # row, column, which of the two is embedded
    side = sincos_pos_embed(4, 8)
    assert torch.equal(grid[:, :, 0], side[:, None].expand(4, 4, 8))
    assert torch.equal(grid[:, :, 1], side[None].expand(4, 4, 8))


@torch.no_grad()
def test_vit_equals_hugging_face(tmp_path):
    images = dict(image_size=SMALL.image_size, patch_size=SMALL.patch_size, layer_norm_eps=1e-6)
    config = ViTConfig(**images, **sizes(SMALL, SMALL.vision_layers))
    reference, model = randomise(ViTModel(config, add_pooling_layer=False)), make_model()
    report = load(model, reference, tmp_path)
    assert not report.skipped
    assert [name for name in report.missing if name.startswith("vision.")] == []
    images = torch.randn(2, 3, 32, 32)
    close(model.vision(images), reference(images).last_hidden_state)


@torch.no_grad()
def test_text_encoder_and_fusion_equal_bert_with_cross_attention(tmp_path):
    """BertModel in two halves, without the causal mask: text layers, then layers with cross-attention."""
    reference = randomise(BertModel(bert_config(is_decoder=True, add_cross_attention=True), add_pooling_layer=False))
    model = make_model()
    load(model, reference, tmp_path)
    reference.config.is_decoder = False  # keeps cross-attention, drops the causal mask
    for layer in reference.encoder.layer:
        layer.attention.self.is_causal = False
    token_ids, attention_mask = texts()
    image_embeds = torch.randn(3, 17, SMALL.width)
    upper = reference.encoder.layer[SMALL.text_layers :]
    reference.encoder.layer = reference.encoder.layer[: SMALL.text_layers]
    hidden = reference(token_ids, attention_mask=attention_mask).last_hidden_state
    text_embeds, image_kv = model.text(token_ids, attention_mask), model.fusion.project_image_kv(image_embeds)
    close(text_embeds, hidden, attention_mask)
    mask = attention_mask[:, None, None, :].bool().expand(-1, 1, token_ids.shape[1], -1)
    for layer in upper:
        out = layer(hidden, attention_mask=mask, encoder_hidden_states=image_embeds)
        hidden = out[0] if isinstance(out, tuple) else out
    close(model.fusion(text_embeds, attention_mask, image_kv), hidden, attention_mask)


@torch.no_grad()
def test_mlm_head_equals_bert(tmp_path):
    reference, model = randomise(BertForMaskedLM(bert_config(layers=2))), make_model()
    load(model, reference, tmp_path)
    tokens = torch.randn(5, SMALL.width)
    close(model.mlm_logits(tokens), reference.cls(tokens))


def test_queries_keys_and_values_are_initialised_each_for_itself():
    """Xavier's bound is that of a third of `qkv`; queries and keys of the fusion encoder have deviation 0.02."""
    model = VisionLanguageModel(ModelConfig())
    bound = (6 / (2 * model.config.width)) ** 0.5
    for name, weight in split_qkv(dict(model.named_parameters())).items():
        if name.startswith("fusion") and name.endswith(("query.weight", "key.weight")):
            assert weight.std().item() == pytest.approx(0.02, rel=0.05), name
        elif name.endswith(("query.weight", "key.weight", "value.weight")):
            assert weight.abs().max().item() == pytest.approx(bound, rel=0.01), name


def test_attention_is_the_same_with_and_without_probabilities():
    attention = randomise(Attention(32, 4))
    x, context, mask = torch.randn(2, 5, 32), torch.randn(2, 7, 32), torch.rand(2, 7) > 0.3
    kv = attention.project_kv(context)
    fused, none = attention(x, kv, mask)
    explicit, probabilities = attention(x, kv, mask, return_attention=True)
    assert none is None and probabilities.shape == (2, 4, 5, 7)
    close(fused, explicit)
    close(probabilities.sum(-1), torch.ones(2, 4, 5))
    assert (probabilities.permute(0, 3, 1, 2)[~mask] == 0).all()


def test_attention_in_bf16_on_a_cpu_is_that_of_float32_but_for_rounding():
    attention = randomise(Attention(32, 4))
    x, mask = torch.randn(2, 5, 32, requires_grad=True), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    for attention_mask in (None, mask):
        exact, _ = attention(x, attention_mask=attention_mask)
        with torch.autocast("cpu", torch.bfloat16):
            rounded, _ = attention(x, attention_mask=attention_mask)
        torch.testing.assert_close(rounded.float(), exact, atol=0.05, rtol=0.05)
        gradients = [torch.autograd.grad(out.float().sum(), x)[0] for out in (rounded, exact)]
        torch.testing.assert_close(*gradients, atol=0.05, rtol=0.05)


@torch.no_grad()
def test_vit_encodes_exactly_the_patches_to_keep():
    vit, images = make_model().vision, torch.randn(2, 3, 32, 32)
    close(vit(images, torch.arange(16).expand(2, -1)), vit(images))
    ids_keep = torch.tensor([[0, 5, 9], [3, 2, 15]])
    some, changed = vit(images, ids_keep), images.clone()
    changed[0, :, 8:16, 0:8] += 1  # patch 4 is not kept
    close(vit(changed, ids_keep), some)
    assert some.shape == (2, 4, 48)


@torch.no_grad()
def test_masked_patches_are_predicted_from_the_kept_ones_and_the_text():
    model, images, ids = make_model(), torch.randn(2, 3, 32, 32), torch.randint(0, 59, (2, 7))
    attention_mask = torch.ones(2, 7, dtype=torch.long)
    attention_mask[1, 5:] = 0
    order = torch.stack([torch.randperm(16), torch.randperm(16)])
    ids_keep, ids_masked = order[:, :5], order[:, 5:]

    def pixels(images, ids, ids_keep=ids_keep, ids_masked=ids_masked):
        visible_embeds, text_embeds = model.vision(images, ids_keep), model.text(ids, attention_mask)
        return model.decoder(visible_embeds, ids_keep, ids_masked, text_embeds, attention_mask)

    def changed(patch):
        """The images with another patch in the second one."""
        row, column = patch // 4 * 8, patch % 4 * 8
        images_changed = images.clone()
        images_changed[1, :, row : row + 8, column : column + 8] += 1
        return images_changed

    before = pixels(images, ids)
    assert before.shape == (2, 11, 3 * 8 * 8)
    torch.testing.assert_close(before.flip(1), pixels(images, ids, ids_masked=ids_masked.flip(1)), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(before, pixels(images, ids, ids_keep=ids_keep.flip(1)), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(before, pixels(changed(ids_masked[1, 0]), ids))
    assert not torch.allclose(before[1], pixels(changed(ids_keep[1, 0]), ids)[1])
    word, padding = ids.clone(), ids.clone()
    word[:, 2] += 1
    padding[1, 5:] += 1
    assert ((before - pixels(images, word)).abs().amax(2) > 1e-4).all()
    torch.testing.assert_close(before, pixels(images, padding))


IMPOSSIBLE = dict(image_size=30, heads=5, dropout=1.0, patch_size=0, max_length=2)


@pytest.mark.parametrize("name, size", IMPOSSIBLE.items())
def test_impossible_sizes_are_refused(name, size):
    with pytest.raises(ValueError, match=name):
        ModelConfig(**{name: size})


def test_base_is_vit_b_and_bert_base():
    with torch.device("meta"):
        model = VisionLanguageModel(PRESETS["base"])
    assert model.config.grid**2 == 256
    assert sum(p.numel() for p in model.vision.parameters()) == pytest.approx(86e6, rel=0.01)
    assert len(model.text.layers) == len(model.fusion.layers) == 6


@torch.no_grad()
def test_momentum_model_follows_by_the_decay_and_is_not_trained():
    model = make_model()
    momentum = MomentumModel(model)
    before = momentum.model.vision.norm.weight.clone()
    for parameter in model.parameters():
        parameter += 1
    momentum.update(model, decay=0.9)
    close(momentum.model.vision.norm.weight, before + 0.1)
    assert not any(p.requires_grad for p in momentum.parameters()) and not momentum.model.training


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_shared_images_and_captions_and_cls_only_fuse_as_separate_ones_and_all_tokens(layers):
    model = make_model(replace(SMALL, fusion_layers=layers))
    token_ids, attention_mask = texts()
    image_embeds = torch.randn(3, 17, SMALL.width, requires_grad=True)
    text_embeds = model.text(token_ids, attention_mask).detach().requires_grad_()
    captions, image_index = torch.tensor([0, 1, 2, 2, 0]), torch.tensor([0, 2, 2, 1, 0])
    inputs = text_embeds[captions], attention_mask[captions]
    image_kv = model.fusion.project_image_kv(image_embeds)
    plain = model.fusion(*inputs, model.fusion.project_image_kv(image_embeds[image_index]))
    shared = model.fusion(*inputs, image_kv, image_index)
    cls = model.fusion(*inputs, image_kv, image_index, cls_only=True)
    of_pairs = model.fusion(text_embeds, attention_mask, image_kv, image_index, captions)
    cls_of_pairs = model.fusion(text_embeds, attention_mask, image_kv, image_index, captions, cls_only=True)
    assert cls.shape == cls_of_pairs.shape == (5, 1, SMALL.width)
    weights = torch.randn_like(plain)
    sources = text_embeds, image_embeds, model.fusion.layers[0].cross_attention.qkv.weight
    for ours, theirs in ((shared, plain), (cls, plain[:, :1]), (of_pairs, plain), (cls_of_pairs, plain[:, :1])):
        close(ours, theirs)
        ours_grad = torch.autograd.grad((ours * weights[:, : ours.shape[1]]).sum(), sources, retain_graph=True)
        theirs_grad = torch.autograd.grad((theirs * weights[:, : ours.shape[1]]).sum(), sources, retain_graph=True)
        for one, other in zip(ours_grad, theirs_grad, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def same_in_float64(ours, naive, inputs):
    torch.testing.assert_close(ours, naive)
    theirs = torch.autograd.grad(naive.sum(), inputs)
    for mine, other in zip(torch.autograd.grad(ours.sum(), inputs), theirs, strict=True):
        torch.testing.assert_close(mine, other)


def test_adapter_equals_a_loop_and_is_one_for_both_modalities():
    model = make_model(FINE).double()
    adapter, mask = model.adapter, torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    tokens = torch.randn(2, 5, FINE.width, dtype=torch.float64, requires_grad=True)
    naive = []
    for words in (tokens[0, :3], tokens[1]):
        weights = [torch.exp(adapter.score[2].weight[0] @ torch.tanh(adapter.score[0](word))) for word in words]
        naive.append(sum(weight / sum(weights) * word for weight, word in zip(weights, words, strict=True)))
    same_in_float64(adapter(tokens, mask), torch.stack(naive), (tokens, adapter.score[0].weight))
    for feature in (model.text_feature(tokens, mask), model.image_feature(tokens)):
        assert torch.autograd.grad(feature.sum(), adapter.score[2].weight)[0].any()


def test_phrases_equal_a_loop():
    phrases = make_model(FINE).double().phrases
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]).bool()
    tokens = torch.randn(2, 6, FINE.width, dtype=torch.float64, requires_grad=True)
    # kernel 1: the word; 2: the words before and after it; 3: the word and the words two places away
    offsets = [[0], [-1, 1], [-2, 0, 2]]
    naive = []
    for words in (tokens[0, :4], tokens[1]):
        found = []
        for place in range(len(words)):
            responses = []
            for conv, near in zip(phrases.convs, offsets, strict=True):
                total = conv.bias
                for k, offset in enumerate(near):
                    if 0 <= place + offset < len(words):
                        total = total + conv.weight[:, :, k] @ words[place + offset]
                responses.append(torch.tanh(total))
            found.append(torch.stack(responses).amax(dim=0))
        naive.append(torch.stack(found).mean(dim=0))
    same_in_float64(phrases(tokens, mask), torch.stack(naive), (tokens, phrases.convs[2].weight))


@torch.no_grad()
def test_features_with_local_tokens_by_hand_and_padding_is_ignored():
    model, image_embeds = make_model(FINE), torch.randn(3, 17, SMALL.width)
    token_ids, mask = texts()
    text_embeds, words = model.text(token_ids, mask), mask[:, 2:].bool()

    def norm(x):
        return x / x.norm(dim=-1, keepdim=True)

    cls, local = model.vision_proj(image_embeds[:, 0]), model.vision_proj(model.adapter(image_embeds[:, 1:]))
    close(model.image_feature(image_embeds), norm(0.95 * norm(cls) + 0.05 * norm(local)))
    cls, local = model.text_proj(text_embeds[:, 0]), model.text_proj(model.adapter(text_embeds[:, 2:], words))
    close(model.text_feature(text_embeds, mask), norm(0.75 * norm(cls) + 0.25 * norm(local)))
    symbol, phrase = model.text_proj(text_embeds[:, 1]), model.text_proj(model.phrases(text_embeds[:, 2:], words))
    close(model.category_feature(text_embeds, mask), norm(0.95 * norm(symbol) + 0.05 * norm(phrase)))
    changed = torch.where(mask[..., None].bool(), text_embeds, torch.randn_like(text_embeds))
    no_words = torch.tensor([[1, 1, 0]])
    for feature in (model.text_feature, model.category_feature):
        close(feature(changed, mask), feature(text_embeds, mask))
        assert feature(text_embeds[:1, :3], no_words).isfinite().all()
