"""The explorer: its page holds what Python's functions give, shows it in a browser, and can be used from the keyboard."""

import base64
import json
import os
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from playwright.sync_api import sync_playwright
from small import FAST_FOR, lines
from small import run as train_small

import data
from data import build_dataset, build_tokenizer, normalise, telling_pieces
from harness.config import parse_config
from harness.run import build_run
from harness.wiring import synchronize, teach
from losses import pick_negatives, same_pairs
from masking import (
    cooccurrence,
    first_pieces,
    momentum_attention,
    pointing,
    random_patch_mask,
    random_word_mask,
    reduce_heads,
    soft_mask,
    true_mask,
)
from measures import truth
from measures.truth import shown_masks, word_truth
from study import explore
from study.explored import SHARES, drawn_anew, painted

PHOTOS = 6
HOSTILE = '</script><img src=x onerror="document.title=1">'


def page_of(path):
    """The data of a page."""
    return json.loads(re.search(r'id="data">(.*?)</script>', path.read_text(encoding="utf-8"), re.S)[1])


def unpacked(packed, kind=np.uint8):
    return torch.from_numpy(np.frombuffer(base64.b64decode(packed), kind).copy())


def sharpen(checkpoint):
    """After so few steps all words of a text look alike at a photo; with larger weights each looks elsewhere."""
    state = torch.load(checkpoint, weights_only=True)
    for name, weight in [*state["momentum"].items(), *state["model"].items()]:
        if re.search(r"fusion.*cross_attention\.(query|key)\.weight", name):
            weight *= 6
    torch.save(state, checkpoint)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small run with its page, and what Python makes of the same photos."""
    out = tmp_path_factory.mktemp("explored")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "VAL_PRODUCTS", 60)
        patch.setattr(truth, "CHOICE_PRODUCTS", 6)
        flags = ["--fusion-layers", "2", "--steps", "4", "--log-every", "1", "--val-every", "2", "--mask-warmup", "1"]
        train_small(out, *flags, "--products", "30")
        sharpen(out / "last.pt")
        file = out / "explore.html"  # where it is put by default
        explore.main(["--checkpoint", str(out / "last.pt"), "--photos", str(PHOTOS)])
        run, dataset = explore.open_run(out / "last.pt", None, "cpu")
    run.config, dataset.truths = replace(run.config, precision="fp32"), True
    run.model.eval()
    found = page_of(file)
    batch = run.collate([dataset[photo["row"]] for photo in found["photos"]])
    with torch.no_grad():
        teacher = teach(run, batch | {"images": normalise(batch["images"])})
        attention = reduce_heads(shown_masks(run, batch, drawn_anew(run))[0], run.config.mask_heads)
    return SimpleNamespace(out=out, file=file, run=run, dataset=dataset, found=found, batch=batch, teacher=teacher,
                           attention=attention, known=word_truth(batch, run.config.model.grid))  # fmt: skip


def python_masks(made, kind, patch_share, word_share):
    """The masks of a kind, (B, P) and (B, L), for shares in per cent, by the functions that training uses."""
    words, grid = made.batch["words"], made.run.config.model.grid
    p, w, draws = patch_share / 100, word_share / 100, drawn_anew(made.run)
    if kind == "random":
        return random_patch_mask(len(words), grid**2, p, draws), random_word_mask(words, w, draws)
    if kind == "true":
        return true_mask(made.known.regions, words, p, w, draws)
    run = replace(made.run, config=replace(made.run.config, mim_ratio=p, mlm_ratio=w))
    run.worth = made.run.worth
    return synchronize(run, made.batch, made.teacher, draws)[1:]


@torch.no_grad()
def maps_by_python(made):
    """Two of the readings: the one of the run, and the last layer's attention of the words as they stand there."""
    clean = made.teacher.photos, made.teacher.text_embeds
    plain = momentum_attention(made.run.momentum, made.batch, *clean, "attention", made.run.mask_id)[1]
    return {("hidden", 0): made.attention, ("attention", 2): reduce_heads(plain)}


def masked_words(made, mask):
    """Which of each photo's words a mask (B, L) hides."""
    starts = first_pieces(made.batch["words"])
    return [mask[b][starts[b]].nonzero()[:, 0].tolist() for b in range(len(mask))]


@pytest.mark.parametrize("kind", ["random", "sync", "true"])
@torch.no_grad()
def test_masks_of_every_share_are_those_of_training(made, kind):
    entries = made.found["masks"][kind]
    shares = [(p, w) for p in SHARES for w in SHARES]
    for patch_share, word_share in (
        shares if kind != "sync" else shares[::13]
    ):  # each of these takes passes of the model
        patch_mask, word_mask = python_masks(made, kind, patch_share, word_share)
        words = masked_words(made, word_mask)
        for b, entry in enumerate(entries):
            patches = unpacked(entry["patches"]).view(len(SHARES), -1)[SHARES.index(word_share)] <= patch_share
            assert torch.equal(patches, patch_mask[b])
            assert (unpacked(entry["words"]) <= word_share).nonzero()[:, 0].tolist() == words[b]


@torch.no_grad()
def test_maps_are_what_the_momentum_model_attends_to(made):
    starts = first_pieces(made.batch["words"])
    assert [(one["source"], one["layer"]) for one in made.found["readings"]] == [
        ("attention", 1), ("attention", 2), ("attention", 0), ("gradcam", 1), ("hidden", 1), ("hidden", 2), ("hidden", 0),
    ]  # fmt: skip
    for reading in made.found["readings"]:
        heat = maps_by_python(made).get((reading["source"], reading["layer"]))
        if heat is None:
            continue
        for b, shown in enumerate(reading["photos"]):
            rows = heat[b][starts[b]]
            drawn = unpacked(shown["map"]).view(rows.shape).float()
            assert shown["peaks"] == rows.argmax(dim=1).tolist() == drawn.argmax(dim=1).tolist()
            assert shown["times"] == pytest.approx((rows.amax(dim=1) / rows.mean(dim=1)).tolist())
            assert (drawn == 255).sum(dim=1).tolist() == [1] * len(rows)
            assert (drawn / 255 - rows / rows.amax(dim=1, keepdim=True)).abs().max() < 2 / 255


def test_soft_masks_and_facts(made):
    run, words, starts = made.run, made.batch["words"], first_pieces(made.batch["words"])
    clean = made.teacher.photos, made.teacher.text_embeds
    heat = momentum_attention(run.momentum, made.batch, *clean, "gradcam", run.mask_id)[0]
    for b, photo in enumerate(made.found["photos"]):
        places = starts[b].nonzero()[:, 0].tolist()
        soft = unpacked(made.found["soft"][b]).view(len(places), -1)
        assert made.dataset.captions[photo["row"]] == "".join(string for string, _ in photo["parts"]).strip()
        assert [number for _, number in photo["parts"] if number is not None] == list(range(len(places)))
        for number, place in enumerate(places):
            whole = soft_mask(heat, torch.ones_like(heat), torch.full((len(words),), place))[b]
            assert torch.equal(soft[number], (255 * whole).round().byte())
            fact, pieces = photo["words"][number], words[b] == place + 1
            assert fact["region"] == made.known.regions[b, place].nonzero()[:, 0].tolist()
            assert fact["named"] == (made.known.attribute[b] & pieces).sum()
            assert fact["shown"] == (made.known.visible[b] & pieces).sum()


def test_negatives_are_given_in_full_precision_and_false_ones_by_the_truth(made):
    found, count = made.found["negatives"], 3 * PHOTOS
    rows = [item["row"] for item in found["items"]]
    batch = made.run.collate([made.dataset[row] for row in rows])
    with torch.no_grad():
        teacher = teach(made.run, batch | {"images": normalise(batch["images"])})
    assert torch.equal(unpacked(found["sim"], np.float32).view(count, count), teacher.image_feat @ teacher.text_feat.T)
    forbidden = same_pairs(batch["product_ids"], batch["caption_ids"])
    assert torch.equal(unpacked(found["forbidden"]).view(count, count).bool(), forbidden)
    false = unpacked(found["false"]).view(count, count)
    products = batch["product_ids"].tolist()
    assert 0 < false.sum() == sum(made.dataset.describes(p, row) for p in products for row in rows) - count
    spread = torch.tensor(found["photos"] + found["texts"]).var(dim=0)
    assert spread[0] >= spread[1] > 0


@torch.no_grad()
def test_guesses_and_painting_are_the_models(made):
    run, batch, found = made.run, made.batch, made.found["rebuilt"]
    _, patch_mask, word_mask = shown_masks(run, batch, drawn_anew(run))
    images = normalise(batch["images"])
    for b, item in enumerate(found):
        assert item["hidden"] == patch_mask[b].nonzero()[:, 0].tolist()
        ids, keep = batch["token_ids"][b : b + 1], batch["attention_mask"][b : b + 1]
        masked = run.model.encode_text(ids.masked_fill(word_mask[b], run.mask_id), keep)
        assert batch["product_ids"][item["other"]] != batch["product_ids"][b]
        for way, photo in (("own", b), ("elsewhere", item["other"])):
            fused = run.model.fuse(masked, keep, run.model.encode_image(images[photo : photo + 1]))
            chances = run.model.mlm_logits(fused)[0, word_mask[b]].softmax(dim=1)
            for row, guess, token in zip(chances, item[way], ids[0, word_mask[b]], strict=True):
                assert guess["right"] == pytest.approx(row[token].item(), abs=1e-5)
                assert [p for _, p in guess["best"]] == pytest.approx(row.topk(5).values.tolist(), abs=1e-5)
        assert item["painted_own"]["error"] > 0 and item["painted_own"]["image"].startswith("data:image/jpeg;base64,")


def test_painting_puts_patches_where_they_belong(made):
    """What is predicted exactly is the photo again."""
    images, side = normalise(made.batch["images"]), made.run.config.model.patch_size
    hidden = torch.tensor([[1, 6, 15]]).repeat(len(images), 1)
    patches = images.unfold(2, side, side).unfold(3, side, side).permute(0, 2, 3, 4, 5, 1).flatten(1, 2).flatten(2)
    target = torch.nn.functional.layer_norm(patches, patches.shape[2:], eps=1e-6)
    pixels = target[:, hidden[0]]
    again = painted(images, pixels, hidden)
    assert (again.int() - made.batch["images"].int()).abs().max() <= 1
    assert not torch.equal(painted(images, -pixels, hidden), again)


def test_curves_and_figures_are_those_of_metrics_jsonl(made):
    logged = lines(made.out)
    for _, curves in made.found["curves"]:
        for key, points in curves:
            assert points == [[line["step"], line[key]] for line in logged if key in line and not line.get("final")]
    assert {"loss", "held-out recall"} <= {title for title, _ in made.found["curves"]}
    figures = {key: (value, chance) for _, key, value, chance in made.found["figures"]}
    assert figures["val_i2t_r1"] == (logged[-1]["val_i2t_r1"], 1 / 10)  # --val-products 10
    assert figures["pointing"] == (logged[-1]["pointing"], logged[-1]["pointing_random"])
    chance = logged[-1]["false_negative_rate_random"]
    assert figures["false_negative_rate_hard"] == (logged[-1]["false_negative_rate_hard"], chance)


def test_the_page_of_the_default_size_is_small(made):
    """All but maps grows little from here: 16 photos of 64 patches have 11 times the maps of 6 of 16 patches."""
    maps = sum(len(json.dumps(made.found[key])) for key in ("readings", "masks", "soft"))
    assert made.file.stat().st_size + 11 * maps < 3 * 2**20


def write_photos(folder, captions):
    folder.mkdir()
    for number in range(len(captions)):
        Image.new("RGB", (40, 30), (40 * number % 256, 90, 200 - 30 * number)).save(folder / f"{number}.png")
    records = [{"image": f"{n}.png", "caption": text, "product_id": n} for n, text in enumerate(captions)]
    for split in ("train", "val"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def untrained(flags, dataset):
    """A run with random weights."""
    config, _ = parse_config([*flags, "--image-size", "32", "--width", "32", "--heads", "2", "--vision-layers", "2",
                              "--text-layers", "1", "--precision", "fp32"])  # fmt: skip
    tokenizer = build_tokenizer(dataset.captions, 300, 64, frames=config.prompts)
    run = build_run(config, dataset, tokenizer)
    run.telling = telling_pieces(tokenizer, dataset.captions, 1.0)
    return run


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A page of one's own photos, whose truth is not known, some captions of which are markup; without metrics."""
    folder = tmp_path_factory.mktemp("hostile")
    texts = [
        f"red shirt {HOSTILE}",
        "<!-- blue <b>dress</b>, long",
        "caf\u00e9 \u2028 shirt {{script}}",
        "!!!",
        HOSTILE,
    ]
    write_photos(folder / "photos", texts)
    dataset = build_dataset("jsonl", folder / "photos", "val", 32)
    run = untrained(["--data", "jsonl", "--preset", "tiny", "--recipe", "albef", "--fusion-layers", "1"], dataset)
    with torch.no_grad():
        found = explore.gather(run, dataset, 5, folder / "metrics.jsonl")
    file = folder / "explore.html"
    file.write_text(explore.page(found), encoding="utf-8")
    return SimpleNamespace(file=file, found=found, texts=texts)


def test_a_caption_stays_text(hostile):
    source = hostile.file.read_text(encoding="utf-8")
    assert "<img src=x" not in source and source.count("</script>") == 2
    assert page_of(hostile.file) == hostile.found
    assert [item["text"] for item in hostile.found["negatives"]["items"]] == hostile.texts


def test_without_truth_second_fusion_layer_and_metrics(hostile):
    found = hostile.found
    assert found["soft"] is None and set(found["masks"]) == {"random", "sync"} and found["negatives"]["false"] is None
    assert {one["source"] for one in found["readings"]} == {"attention", "hidden"}
    assert found["curves"] is None and all("painted_own" not in item for item in found["rebuilt"])
    assert all(photo["words"] is None for photo in found["photos"])


@pytest.mark.parametrize("recipe", FAST_FOR)
@torch.no_grad()
def test_any_recipe(recipe, tmp_path):
    dataset = build_dataset("synthetic", None, "val", 32)
    run = untrained(["--recipe", recipe, "--fusion-layers", "2"], dataset)
    found = json.loads(json.dumps(explore.gather(run, dataset, 2, tmp_path / "none"), allow_nan=False))
    assert set(found["masks"]) == {"random", "sync", "true"} and len(found["photos"]) == len(found["soft"]) == 2
    assert all(("painted_own" in item) == (recipe == "syncmask") for item in found["rebuilt"])


def test_refusals_are_one_line(made, tmp_path, capsys):
    state = torch.load(made.out / "last.pt", weights_only=True)
    (tmp_path / "text.pt").write_text("no checkpoint")
    torch.save(state | {"config": state["config"] | {"task": "retrieval"}}, tmp_path / "tuned.pt")
    torch.save(state | {"model": {}}, tmp_path / "other.pt")
    torch.save(state, tmp_path / "last.pt")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step"')
    for flags, message in (
        (["--checkpoint", "/nowhere.pt"], "/nowhere.pt: no such checkpoint"),
        (["--checkpoint", f"{tmp_path}/text.pt"], "not a checkpoint of train.py"),
        (["--checkpoint", f"{tmp_path}/tuned.pt"], "the run is a fine-tuning"),
        (["--checkpoint", f"{tmp_path}/other.pt"], f"{tmp_path}/other.pt: model has other parts"),
        (["--checkpoint", f"{tmp_path}/last.pt", "--photos", "2"], f"{tmp_path}/metrics.jsonl line 2: not a line of"),
        (
            ["--checkpoint", f"{made.out}/last.pt", "--photos", "2", "--file", f"{tmp_path}/none/e.html"],
            f"{tmp_path}/none/e.html",
        ),
        (["--checkpoint", f"{made.out}/last.pt", "--photos", "1"], "--photos 1: from 2 to 64"),
    ):
        with pytest.raises(SystemExit) as caught:
            explore.main(flags)
        said = capsys.readouterr().err.splitlines()[-1:] if caught.value.code == 2 else [caught.value.code]
        assert len(said) == 1 and message in said[0] and "\n" not in said[0] and said[0].startswith("explore.py: ")


# In the browser

PATIENCE = 60_000  # milliseconds, for a slow machine


@pytest.fixture(scope="module")
def chromium():
    """The machine's own browser, without a window."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not program:
        if os.environ.get("BROWSER_REQUIRED"):
            pytest.fail("there is no Chromium to test the explorer's page in; apt-get install chromium")
        pytest.skip("needs Chromium: apt-get install chromium")
    flags = ["--disable-gpu", "--disable-quic", "--disable-sync"]  # besides those that Playwright gives of itself
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=flags, timeout=PATIENCE)
        yield browser
        browser.close()


@pytest.fixture
def page(chromium):
    """A page for one test, which may complain of nothing."""
    page, complaints = chromium.new_page(viewport={"width": 1280, "height": 900}), []

    def listen(message):
        if message.type in ("error", "assert", "warning"):
            complaints.append(message.text)

    page.set_default_timeout(PATIENCE)
    page.on("console", listen)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    yield page
    page.close()
    assert complaints == []


def set_slider(page, name, value):
    page.locator(f"#{name}").fill(str(value))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_fits_asks_for_nothing_and_complains_of_nothing(made, hostile, page, width, scheme):
    requests, files = [], (made.file, hostile.file)
    page.on("request", lambda request: requests.append(request.url))
    page.set_viewport_size({"width": width, "height": 900})
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    for file in files:
        page.goto(file.as_uri())
        page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        lightness = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0]")
        assert (int(lightness) > 127) == (scheme == "light")
    assert requests == [file.as_uri() for file in files]


def test_captions_run_nothing(hostile, page):
    page.goto(hostile.file.as_uri())
    for number in range(5):
        page.evaluate(f"choosePhoto({number})")
        assert page.text_content("#word-caption").strip() == hostile.texts[number]
        assert page.get_attribute("#word-map img", "alt").startswith(f"photo {number + 1}")
    assert page.evaluate("wordCount(3)") == 0 and page.locator("img[src=x]").count() == 0
    assert page.title() != "1"
    assert "There is no metrics.jsonl" in page.text_content("#run")
    assert page.evaluate("getComputedStyle(element('word-truth').parentElement).display") == "none"


def test_the_brightest_cell_is_pythons(made, page):
    page.goto(made.file.as_uri())
    assert (page.input_value("#source"), page.input_value("#layer")) == ("hidden", "0")
    starts, different = first_pieces(made.batch["words"]), 0
    for (source, layer), heat in maps_by_python(made).items():
        page.select_option("#source", source)
        page.select_option("#layer", str(layer))
        for b in range(PHOTOS):
            page.evaluate(f"choosePhoto({b})")
            found = page.evaluate("""[...element('word-caption').querySelectorAll('button')].map((word) => {
                word.dispatchEvent(new Event('pointerenter'));
                const canvas = element('word-map').querySelector('canvas');
                const pixels = canvas.getContext('2d').getImageData(0, 0, grid, grid).data;
                const alpha = range(grid * grid).map((patch) => pixels[4 * patch + 3]);
                return [alpha.indexOf(Math.max(...alpha)), Number(element('word-map').dataset.peak)];
            })""")
            peaks = heat[b][starts[b]].argmax(dim=1).tolist()
            assert found == [[peak, peak] for peak in peaks]
            different += len(set(peaks))
        hits, expected, total = pointing(heat, made.known.regions, made.known.visible & made.known.detail & starts)
        counted = page.evaluate("pointing(chosenReading())")
        assert (counted["hits"], counted["total"]) == (hits, total)
        assert counted["expected"] == pytest.approx(expected.item())
    assert different > 5 * PHOTOS  # words of a photo look at different patches, or this would show little


@torch.no_grad()
def test_sliders_choose_the_sets_of_python(made, page):
    page.goto(made.file.as_uri())
    named, everywhere = made.known.regions.any(dim=1), torch.ones(1, dtype=torch.bool)
    for patch_share, word_share in ((50, 30), (5, 95), (75, 15), (35, 60)):
        set_slider(page, "patch-share", patch_share)
        set_slider(page, "word-share", word_share)
        right = {}
        for kind in ("random", "sync", "true"):
            patch_mask, word_mask = python_masks(made, kind, patch_share, word_share)
            words = masked_words(made, word_mask)
            for b in range(PHOTOS):
                page.evaluate(f"choosePhoto({b})")
                figure = f"document.querySelector('[data-kind={kind}]')"
                assert (
                    page.evaluate(f"{figure}.dataset.patches.split(' ').map(Number)")
                    == patch_mask[b].nonzero()[:, 0].tolist()
                )
                marked = page.evaluate(
                    f"[...{figure}.querySelectorAll('mark')].map((mark) => Number(mark.dataset.word))"
                )
                assert marked == words[b]
            hits = [cooccurrence(word_mask, made.known.attribute, made.known.visible),
                    cooccurrence(patch_mask, everywhere.expand_as(named), named)]  # fmt: skip
            right[kind] = [(hit / of.clamp(min=1)).item() for hit, of in hits]
        tables = page.evaluate("""[...element('mask-tables').querySelectorAll('tbody')].map((body) =>
            [...body.rows].map((row) => [...row.cells].map((cell) => cell.textContent)))""")
        for rows, shares, chance in zip(tables, zip(*right.values(), strict=True), right["random"], strict=True):
            for (_, _, percent, skill), share in zip(rows, shares, strict=True):
                assert percent.endswith("\u00a0%") and float(percent[:-2]) == pytest.approx(100 * share, abs=0.051)
                assert float(skill) == pytest.approx((share - chance) / max(1e-9, 1 - chance), abs=0.006)


def test_a_soft_mask_says_of_which_word_and_hides_none(made, page):
    page.goto(made.file.as_uri())
    soft = page.locator("[data-kind=soft]")
    word = soft.locator("button[data-word='1']")
    word.click()
    assert soft.locator(".how").text_content() == f"of “{word.text_content()}”; choose another word"
    style = "(one) => [getComputedStyle(one).backgroundColor, getComputedStyle(one).color]"
    other = soft.locator("button[data-word='0']")
    page.mouse.move(0, 0)
    assert word.get_attribute("aria-pressed") == "true" and word.evaluate(style) == other.evaluate(style)


def test_why_so_many_hard_negatives_are_false_here(made, page):
    page.goto(made.file.as_uri())
    count = 3 * PHOTOS
    false = unpacked(made.found["negatives"]["false"]).view(count, count).bool()
    said, hard = page.text_content("#negatives-answer"), lines(made.out)[-1]["false_negative_rate_hard"]
    assert f"for {int(false.any(dim=1).sum())} of the photos there is a text here of another product" in said
    assert f"there {100 * hard:.2f}\u00a0% are false" in said


def test_negatives_are_those_of_pick_negatives(made, page):
    page.goto(made.file.as_uri())
    count = 3 * PHOTOS
    sim = unpacked(made.found["negatives"]["sim"], np.float32).view(count, count)
    forbidden = unpacked(made.found["negatives"]["forbidden"]).view(count, count).bool()
    for way, scores in (("photo", sim), ("text", sim.T)):
        page.select_option("#way", way)
        for margin in (0, 1, 20, 37, 80):
            set_slider(page, "margin", margin)
            found = page.evaluate("""range(items.length).map((anchor) => {
                ask(anchor);
                return [element('neighbours').dataset.hard, element('neighbours').dataset.semihard].map(Number);
            })""")
            chosen = [
                pick_negatives(scores, forbidden, None, mode, None, margin / 100) for mode in ("hard", "semihard")
            ]
            assert found == torch.stack(chosen, dim=1).tolist()
    roles = page.evaluate(
        "[...element('neighbours').querySelectorAll('[data-roles*=hard]')].map((one) => one.dataset.roles)"
    )
    assert any("hard" in role for role in roles)


def test_curves_are_drawn_at_their_points(made, page):
    page.goto(made.file.as_uri())
    drawn = page.evaluate("""[...document.querySelectorAll('#charts svg[data-range]')].flatMap((chart) => {
        const [last, low, high] = chart.dataset.range.split(' ').map(Number);
        return [...chart.querySelectorAll('polyline')].map((line) => [line.dataset.key, line.getAttribute('points').split(' ').map((point) => {
            const [x, y] = point.split(',').map(Number);
            return [last * (x - PLOT.left) / (PLOT.right - PLOT.left), low + (high - low) * (PLOT.bottom - y) / (PLOT.bottom - PLOT.top)];
        }), high - low]);
    })""")
    logged = [line for line in lines(made.out) if not line.get("final")]
    assert len(drawn) == sum(len(curves) for _, curves in made.found["curves"]) > 10
    for key, points, height in drawn:
        expected = [(line["step"], line[key]) for line in logged if key in line]
        assert np.abs(np.array(points) - expected).max(axis=0) == pytest.approx([0, 0], abs=0.001 * max(height, 4))


def tab_through(page):
    """Tab from the start of the page to its end. -> numbers of what was focused, among all elements."""
    page.evaluate(
        "document.activeElement.blur(); window.scrollTo(0, 0); globalThis.every = [...document.querySelectorAll('*')]"
    )
    reached = []
    for _ in range(200):
        page.keyboard.press("Tab")
        at = page.evaluate("document.activeElement === document.body ? -1 : every.indexOf(document.activeElement)")
        if at < 0 or at in reached:
            return reached
        reached.append(at)
    raise AssertionError("Tab does not come to an end")


def test_keyboard_alone_reaches_every_control_and_word(made, page):
    page.goto(made.file.as_uri())
    reached = tab_through(page)
    wanted = page.evaluate("""every.filter((one) => one.matches('a, button, select, input, summary, [tabindex]')
        && one.tabIndex >= 0 && one.checkVisibility()).map((one) => every.indexOf(one))""")
    assert set(wanted) <= set(reached) and len(wanted) > 30
    # words: into the text by Tab, from word to word by the arrow keys
    page.evaluate("element('word-caption').querySelector('[tabindex=\"0\"]').focus()")
    page.keyboard.press("Home")
    count, visited = page.evaluate("wordCount(0)"), []
    for _ in range(count):
        visited.append(page.evaluate("[Number(document.activeElement.dataset.word), shownWord]"))
        page.keyboard.press("ArrowRight")
    assert visited == [[word, word] for word in range(count)]
    assert len(page.text_content("#word-live")) > 20
    # a slider, and another photo
    page.focus("#patch-share")
    page.keyboard.press("ArrowRight")
    assert page.text_content("#patch-share-value") == "55 %"
    assert page.text_content("#mask-live").startswith("55 % of the patches")
    page.evaluate("document.querySelector('.strip [tabindex=\"0\"]').focus()")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert page.evaluate("chosen.photo") == 1
    assert page.locator(".strip [aria-pressed=true]").count() == 3
