"""The model against Hugging Face's on random weights, its loading of published weights, and its own promises."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertForMaskedLM, BertModel, ViTConfig, ViTModel

from engine.weights import load_pretrained
from model import (
    PRESETS,
    Attention,
    FeatureQueue,
    ModelConfig,
    MomentumModel,
    VisionLanguageModel,
    sincos_pos_embed_2d,
    sincos_pos_embed,
)

DEPTHS = dict(vision_layers=3, text_layers=2, fusion_layers=2)
SMALL = ModelConfig(image_size=32, patch_size=8, width=48, heads=4, max_length=20, vocab_size=60, **DEPTHS)


def randomise(module):
    """Every parameter random, biases and norms too: a zero bias would hide a missing one."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.2)
    return module.eval()


def make_model(config=SMALL, seed=0):
    torch.manual_seed(seed)
    return randomise(VisionLanguageModel(config))


def test_at_the_start_places_are_alike_to_their_neighbours_and_as_large_as_words():
    text = VisionLanguageModel(ModelConfig()).text
    places, words = text.position_embeddings, text.word_embeddings.weight
    torch.testing.assert_close(places.norm(dim=1), torch.ones(len(places)))
    assert words.norm(dim=1).mean().item() == pytest.approx(1, abs=0.05)
    alike = places @ places.T
    assert all(alike[10, 10 + step] > alike[10, 11 + step] for step in range(3)) and alike[10].argmax() == 10
    torch.testing.assert_close(alike.diagonal(5), alike[0, 5].expand(len(places) - 5))  # only the distance counts
    grid = sincos_pos_embed_2d(4, 16).view(4, 4, 2, 8)  # row, column, of which
    for place in range(4):
        assert torch.equal(grid[place, :, 0], sincos_pos_embed(4, 8)[place].expand(4, 8))
        assert torch.equal(grid[:, place, 1], sincos_pos_embed(4, 8)[place].expand(4, 8))


def sizes(config, layers):
    """Hugging Face's names for a transformer's sizes."""
    heads = dict(num_attention_heads=config.heads, num_hidden_layers=layers)
    return dict(hidden_size=config.width, intermediate_size=4 * config.width, **heads)


def bert_config(config=SMALL, layers=None, **more):
    layers = layers or config.text_layers + config.fusion_layers
    return BertConfig(vocab_size=config.vocab_size, **sizes(config, layers), **more)


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


def test_vit_equals_hugging_face(tmp_path):
    photos = dict(image_size=SMALL.image_size, patch_size=SMALL.patch_size, layer_norm_eps=1e-6)
    config = ViTConfig(**photos, **sizes(SMALL, SMALL.vision_layers))
    reference, model = randomise(ViTModel(config, add_pooling_layer=False)), make_model()
    save_file(reference.state_dict(), tmp_path / "vit.safetensors")
    report = load_pretrained(model, [tmp_path / "vit.safetensors"])
    assert not report.skipped and all(not name.startswith("vision.") or "registers" in name for name in report.missing)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        close(model.vision(images), reference(images).last_hidden_state)


def test_text_encoder_equals_bert(tmp_path):
    reference = randomise(BertModel(bert_config(layers=SMALL.text_layers), add_pooling_layer=False))
    save_file(reference.state_dict(), tmp_path / "bert.safetensors")
    model = make_model()
    load_pretrained(model, [tmp_path / "bert.safetensors"])
    token_ids, attention_mask = texts()
    with torch.no_grad():
        theirs = reference(token_ids, attention_mask=attention_mask).last_hidden_state
        close(model.text(token_ids, attention_mask), theirs, attention_mask)


def test_fusion_equals_bert_with_cross_attention(tmp_path):
    """Text layers, then layers with cross-attention: BertModel's, the causal mask taken out, in two halves."""
    reference = randomise(BertModel(bert_config(is_decoder=True, add_cross_attention=True), add_pooling_layer=False))
    reference.config.is_decoder = False  # keeps cross-attention, drops the causal mask
    for layer in reference.encoder.layer:
        layer.attention.self.is_causal = False
    lower, upper = reference.encoder.layer[: SMALL.text_layers], reference.encoder.layer[SMALL.text_layers :]
    save_file(reference.state_dict(), tmp_path / "bert.safetensors")
    model = make_model()
    load_pretrained(model, [tmp_path / "bert.safetensors"])
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
        ours = model.fusion(
            model.text(token_ids, attention_mask), attention_mask, model.fusion.project_image_kv(image_embeds)
        )
        close(ours, hidden, attention_mask)


def test_mlm_head_equals_bert(tmp_path):
    reference = randomise(BertForMaskedLM(bert_config(layers=2)))
    save_file({k: v for k, v in reference.state_dict().items() if "decoder" not in k}, tmp_path / "bert.safetensors")
    model = make_model()
    load_pretrained(model, [tmp_path / "bert.safetensors"])
    tokens = torch.randn(5, SMALL.width)
    with torch.no_grad():
        close(model.mlm_logits(tokens), reference.cls(tokens))


def test_attention_is_the_same_with_and_without_probabilities():
    attention = randomise(Attention(32, 4))
    x, context, keep = torch.randn(2, 5, 32), torch.randn(2, 7, 32), torch.rand(2, 7) > 0.3
    seen = attention.project_kv(context)
    fast, none = attention(x, seen, keep)
    slow, probabilities = attention(x, seen, keep, return_attention=True)
    assert none is None and probabilities.shape == (2, 4, 5, 7)
    close(fast, slow)
    with torch.autocast("cpu", torch.bfloat16):  # in bf16 a CPU forms them when it is to learn, and not otherwise
        learning, fused = attention(x, seen, keep)[0], attention(x.detach(), seen.detach(), keep)[0]
        torch.testing.assert_close(learning.float(), slow, atol=0.02, rtol=0.05)
        torch.testing.assert_close(fused.float(), slow, atol=0.02, rtol=0.05)
    close(probabilities.sum(-1), torch.ones(2, 4, 5))
    assert (probabilities.masked_select(~keep[:, None, None, :].expand_as(probabilities)) == 0).all()


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
    hidden = torch.tensor([[p for p in range(16) if p not in row] for row in visible.tolist()])

    def pixels(images, ids, visible=visible, hidden=hidden):
        seen, words = model.vision(images, visible), model.text(ids, keep)
        return model.decoder(seen, visible, hidden, words, keep)

    with torch.no_grad():
        before = pixels(images, ids)
        assert before.shape == (2, 11, 3 * 8 * 8)
        # hidden patches come in the order in which they are asked for
        torch.testing.assert_close(before.flip(1), pixels(images, ids, hidden=hidden.flip(1)), atol=1e-4, rtol=1e-4)
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


IMPOSSIBLE = dict(image_size=30, heads=5, dropout=1.0, patch_size=0, registers=-1, max_length=2, vocab_size=0)


@pytest.mark.parametrize(("name", "size"), [*IMPOSSIBLE.items(), ("dropout", 1.5)])
def test_impossible_sizes_are_refused(name, size):
    with pytest.raises(ValueError, match=name):
        ModelConfig(**{name: size})


def test_base_is_vit_b_and_bert_base():
    with torch.device("meta"):
        model = VisionLanguageModel(PRESETS["base"])
    assert model.config.grid**2 == 256
    assert sum(p.numel() for p in model.vision.parameters()) == pytest.approx(86e6, rel=0.01)
    assert len(model.text.layers) == len(model.fusion.layers) == 6


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
    close(momentum.model.vision(images), model.vision(images))


def test_queue_keeps_the_newest_in_a_ring():
    queue = FeatureQueue(5, 2)
    features = torch.arange(16.0).reshape(8, 2)
    push = lambda features, numbers: queue.push(features, -features, numbers, numbers + 10)
    push(features[:3], torch.arange(3))
    assert queue.filled()[2].tolist() == [0, 1, 2]
    push(features[3:7], torch.arange(3, 7))
    image_feat, text_feat, products, captions = queue.filled()
    assert products.tolist() == [5, 6, 2, 3, 4]
    close(image_feat, features[products])
    close(text_feat, -features[products])
    close(captions, products + 10)
    push(features, torch.arange(8))  # more than fits: the last five stay
    assert sorted(queue.filled()[2].tolist()) == [3, 4, 5, 6, 7]


@pytest.mark.parametrize("layers, cls_context", [(1, True), (2, False), (3, True)])
def test_pairs_that_share_photos_or_ask_for_cls_alone_fuse_as_if_on_their_own(layers, cls_context):
    model = make_model(replace(SMALL, fusion_layers=layers, cls_context=cls_context))
    (token_ids, keep), image_embeds = texts(), torch.randn(3, 17, SMALL.width, requires_grad=True)
    text_embeds = model.text(token_ids, keep).detach().requires_grad_()
    texts_of, rows = torch.tensor([0, 1, 2, 2, 0]), torch.tensor([0, 2, 2, 1, 0])
    image_kv = model.fusion.project_image_kv(image_embeds)
    plain = model.fusion(text_embeds[texts_of], keep[texts_of], model.fusion.project_image_kv(image_embeds[rows]))
    shared = model.fusion(text_embeds[texts_of], keep[texts_of], image_kv, rows)
    cls = model.fusion(text_embeds[texts_of], keep[texts_of], image_kv, rows, cls_only=True)
    assert cls.shape == (5, 1, SMALL.width)
    close(shared, plain)
    close(cls, plain[:, :1])
    weigh = torch.randn_like(plain)
    inputs = (text_embeds, image_embeds, model.fusion.layers[0].cross_attention.key.weight)
    for ours, weights in ((shared, weigh), (cls, weigh[:, :1])):
        mine = torch.autograd.grad((ours * weights).sum(), inputs, retain_graph=True)
        theirs = torch.autograd.grad((plain[:, : weights.shape[1]] * weights).sum(), inputs, retain_graph=True)
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    image_kv = model.fusion.project_image_kv(image_embeds)
    close(model.fusion(text_embeds, keep, image_kv, cls_only=True), model.fusion(text_embeds, keep, image_kv)[:, :1])


def test_patches_of_an_earlier_layer_are_not_computed_further():
    """With the last layer's patches computed all the same, CLS and patches are what they are without them."""
    model, images = make_model(replace(SMALL, patch_layer=2, registers=2)), torch.randn(2, 3, 32, 32)
    tokens = []
    for number in (1, 2):
        model.vision.layers[number].register_forward_hook(lambda _, __, x: tokens.append(x))
    embeds = model.vision(images)
    assert [x.shape[1] for x in tokens] == [1 + 16 + 2, 1]
    whole = model.vision.layers[2](tokens[0])
    close(embeds[:, :1], model.vision.norm(whole[:, :1]))
    close(embeds[:, 1:], model.vision.norm(tokens[0][:, 1:17]))


FINE = replace(SMALL, local_tokens=True, alignment=True, detector=True)


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
    for feature in (model.text_feature(tokens, keep), model.image_feature(tokens)):
        assert torch.autograd.grad(feature.sum(), adapter.score[2].weight)[0].any()


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


def test_features_with_local_tokens_by_hand_and_padding_is_ignored():
    model = make_model(FINE)
    (token_ids, keep), image_embeds = texts(), torch.randn(3, 17, SMALL.width)
    unit = lambda x: x / x.norm(dim=-1, keepdim=True)
    with torch.no_grad():
        text_embeds = model.text(token_ids, keep)
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
        plain = make_model()
        assert torch.equal(plain.image_feature(image_embeds), plain.project_image(image_embeds))
        assert torch.equal(plain.text_feature(text_embeds, keep), plain.project_text(text_embeds))
