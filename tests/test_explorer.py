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
from small import run as train_small

from data import build_dataset, build_tokenizer, normalise, telling_pieces
from harness.config import parse_config
from harness.run import build_run
from harness.wiring import synchronize, teach
from losses import pick_negatives, same_pairs
from masking import first_pieces
from measures.truth import word_truth
from study import explore
from study.explored import MARGIN_STOPS, SHARES, drawn_anew, painted

PHOTOS = 4
HOSTILE = '</script><img src=x onerror="document.title=1">'


def page_of(path):
    """The data of a page."""
    return json.loads(re.search(r'id="data">(.*?)</script>', path.read_text(encoding="utf-8"), re.S)[1])


def unpacked(packed, kind=np.uint8):
    return torch.from_numpy(np.frombuffer(base64.b64decode(packed), kind).copy())


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A small run with its page, and what Python makes of the same photos."""
    out = tmp_path_factory.mktemp("explored")
    train_small(out, "--fusion-layers", "2", "--steps", "2", "--mask-warmup", "1", "--products", "30")
    explore.main(["--checkpoint", str(out / "last.pt"), "--photos", str(PHOTOS)])
    run, dataset = explore.open_run(out / "last.pt", None, "cpu")
    run.config, dataset.truths = replace(run.config, precision="fp32"), True
    run.model.eval()
    file = out / "explore.html"  # where it is put by default
    found = page_of(file)
    batch = run.collate([dataset[photo["row"]] for photo in found["photos"]])
    with torch.no_grad():
        teacher = teach(run, batch | {"images": normalise(batch["images"])})
    return SimpleNamespace(out=out, file=file, run=run, dataset=dataset, found=found, batch=batch, teacher=teacher,
                           known=word_truth(batch, run.config.model.grid))  # fmt: skip


@torch.no_grad()
def by_python(made, patch_share=50, word_share=50):
    """Attention and synchronized masks, as training makes them."""
    config = replace(made.run.config, mim_ratio=patch_share / 100, mlm_ratio=word_share / 100)
    run = replace(made.run, config=config)
    run.worth = made.run.worth
    return synchronize(run, made.batch, made.teacher, drawn_anew(made.run))


def test_masks_of_every_stop_are_those_of_training(made):
    starts = first_pieces(made.batch["words"])
    for patch_share, word_share in ((10, 90), (50, 50), (70, 30)):
        _, patch_mask, word_mask = by_python(made, patch_share, word_share)
        for b, entry in enumerate(made.found["masks"]["sync"]):
            patches = unpacked(entry["patches"]).view(len(SHARES), -1)[SHARES.index(word_share)] <= patch_share
            assert torch.equal(patches, patch_mask[b])
            assert torch.equal(unpacked(entry["words"]) <= word_share, word_mask[b][starts[b]])
    assert set(made.found["masks"]) == {"random", "sync", "true"}


def test_maps_are_what_the_momentum_model_attends_to(made):
    read = {(one["source"], one["layer"]): one for one in made.found["readings"]}
    assert set(read) == {(source, layer) for source in ("masked", "clean") for layer in (0, 1, 2)}
    attention, starts = by_python(made)[0], first_pieces(made.batch["words"])
    for b, shown in enumerate(read["masked", 0]["photos"]):
        rows = attention[b][starts[b]]
        drawn = unpacked(shown["map"]).view(rows.shape).float()
        assert shown["peaks"] == rows.argmax(dim=1).tolist() == drawn.argmax(dim=1).tolist()
        assert (drawn / 255 - rows / rows.amax(dim=1, keepdim=True)).abs().max() < 2 / 255


def test_negatives_come_computed_for_five_margins(made):
    found, count = made.found["negatives"], 3 * PHOTOS
    sim = unpacked(found["sim"], np.float32).view(count, count)
    batch = made.run.collate([made.dataset[item["row"]] for item in found["items"]])
    forbidden = same_pairs(batch["product_ids"], batch["caption_ids"])
    assert len(found["margins"]) == len(MARGIN_STOPS) == 5 and made.run.config.margin in found["margins"]
    for way, scores in (("photo", sim), ("text", sim.T)):
        assert found["chosen"][way]["hard"] == pick_negatives(scores, forbidden, None, "hard").tolist()
        for margin, chosen in zip(found["margins"], found["chosen"][way]["semihard"], strict=True):
            assert chosen == pick_negatives(scores, forbidden, None, "semihard", None, margin).tolist()


def test_painting_puts_patches_where_they_belong(made):
    """What is predicted exactly is the photo again."""
    images, side = normalise(made.batch["images"]), made.run.config.model.patch_size
    hidden = torch.tensor([[1, 6, 15]]).repeat(len(images), 1)
    patches = images.unfold(2, side, side).unfold(3, side, side).permute(0, 2, 3, 4, 5, 1).flatten(1, 2).flatten(2)
    target = torch.nn.functional.layer_norm(patches, patches.shape[2:], eps=1e-6)
    again = painted(images, target[:, hidden[0]], hidden)
    assert (again.int() - made.batch["images"].int()).abs().max() <= 1


@pytest.fixture(scope="session")
def hostile(tmp_path_factory):
    """A page of one's own photos, whose truth is not known, some captions of which are markup."""
    folder = tmp_path_factory.mktemp("hostile")
    texts = [f"red shirt {HOSTILE}", "<!-- blue <b>dress</b>, long", "caf\u00e9 \u2028 {{script}}", "!!!", HOSTILE]
    for number in range(len(texts)):
        Image.new("RGB", (40, 30), (40 * number, 90, 200 - 30 * number)).save(folder / f"{number}.png")
    records = [{"image": f"{n}.png", "caption": text, "product_id": n} for n, text in enumerate(texts)]
    for split in ("train", "val"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    dataset = build_dataset("jsonl", folder, "val", 32)
    sizes = "--image-size 32 --width 32 --heads 2 --vision-layers 2 --text-layers 1 --fusion-layers 1"
    flags = ["--data", "jsonl", "--preset", "tiny", "--recipe", "albef", "--precision", "fp32", *sizes.split()]
    config, _ = parse_config(flags)
    tokenizer = build_tokenizer(dataset.captions, 300, 64)
    run = build_run(config, dataset, tokenizer)
    run.telling = telling_pieces(tokenizer, ["!!!"])
    with torch.no_grad():
        found = explore.gather(run, dataset, 5)
    file = folder / "explore.html"
    file.write_text(explore.page(found), encoding="utf-8")
    return SimpleNamespace(file=file, found=found, texts=texts)


def test_a_caption_stays_text_and_without_truth_there_is_a_page(hostile):
    source = hostile.file.read_text(encoding="utf-8")
    assert "<img src=x" not in source and source.count("</script>") == 2
    assert page_of(hostile.file) == hostile.found and set(hostile.found["masks"]) == {"random", "sync"}


def test_refusals_are_one_line(made, tmp_path):
    for flags, message in (
        (["--checkpoint", "/nowhere.pt"], "/nowhere.pt: no such checkpoint"),
        (["--checkpoint", f"{made.out}/last.pt", "--file", f"{tmp_path}/none/e.html"], "none/e.html"),
    ):
        with pytest.raises(SystemExit, match=message):
            explore.main([*flags, "--photos", "2"])


# In the browser

PATIENCE = 60_000  # milliseconds, for a slow machine


@pytest.fixture(scope="session")
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


@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_fits_and_asks_for_nothing(made, hostile, page, width):
    requests, files = [], (made.file, hostile.file)
    page.on("request", lambda request: requests.append(request.url))
    page.set_viewport_size({"width": width, "height": 900})
    for file in files:
        page.goto(file.as_uri())
        page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert requests == [file.as_uri() for file in files]
    for number in range(5):
        page.evaluate(f"choosePhoto({number})")
        assert page.text_content("#word-caption").strip() == hostile.texts[number]
    assert page.title() != "1"


def test_sliders_choose_what_python_computed(made, page):
    page.goto(made.file.as_uri())
    page.locator("#patch-share").fill("70")
    page.locator("#word-share").fill("30")
    _, patch_mask, _ = by_python(made, 70, 30)
    patches = page.evaluate("document.querySelector('[data-kind=sync]').dataset.patches.split(' ').map(Number)")
    assert patches == patch_mask[0].nonzero()[:, 0].tolist()
    chosen = made.found["negatives"]["chosen"]
    for way in ("photo", "text"):
        page.select_option("#way", way)
        page.locator("#margin").fill("4")
        found = page.evaluate("(ask(1), {...element('neighbours').dataset})")
        assert [int(found["hard"]), int(found["semihard"])] == [chosen[way]["hard"][1], chosen[way]["semihard"][4][1]]


def test_keyboard_alone_reaches_words_and_sliders(made, page):
    page.goto(made.file.as_uri())
    page.evaluate("element('word-caption').querySelector('[tabindex=\"0\"]').focus()")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("[Number(document.activeElement.dataset.word), shownWord]") == [1, 1]
    page.focus("#patch-share")
    page.keyboard.press("ArrowRight")
    assert page.text_content("#patch-share-value") == "70 %"
    page.evaluate("document.querySelector('.strip [tabindex=\"0\"]').focus()")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert page.evaluate("chosen.photo") == 1
