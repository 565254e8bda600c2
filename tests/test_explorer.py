"""The explorer: its page holds what Python's functions give, shows it in a browser, and can be used from the keyboard."""

import json
import os
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from playwright.sync_api import sync_playwright

from data import normalise
from evaluation.ground_truth import synchronized_masks, token_labels
from evaluation.pictures import first_images
from losses import pick_negatives, positive_pairs
from masking import first_pieces
from tests.small import run as train_small
from tests.small import run_files, write_jsonl
from tutorial import explore

IMAGES = 5
HOSTILE = '</script><img src=x onerror="document.title=1">'


def page_of(path):
    """The data of a page."""
    return json.loads(re.search(r'id="data">(.*?)</script>', path.read_text(encoding="utf-8"), re.S)[1])


@pytest.fixture(scope="session", autouse=True)
def few_images():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(explore, "IMAGES", IMAGES)
        yield


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A small run with its page, and the same images as training encodes them."""
    out = tmp_path_factory.mktemp("explored")
    train_small(out, "--fusion-layers", "2", "--steps", "2", "--mask-warmup", "1", "--num-products", "30")
    explore.main(["--checkpoint", str(out / "last.pt")])
    run, dataset = explore.open_run(out / "last.pt", None, "cpu")
    run.config, dataset.with_ground_truth = replace(run.config, precision="fp32"), True
    run.model.eval()
    file = out / "explore.html"
    batch = run.collate([dataset[row] for row in first_images(dataset, IMAGES)])
    batch["images"] = normalise(batch["images"])
    return SimpleNamespace(out=out, file=file, run=run, found=page_of(file), batch=batch)


def by_python(made, source="masked", share=0.5):
    """Attention and synchronized masks, as training makes them."""
    run = replace(made.run, config=replace(made.run.config, mask_source=source, mim_ratio=share, mlm_ratio=share))
    return synchronized_masks(run, made.batch, torch.Generator().manual_seed(run.config.seed))


def test_masks_of_every_stop_are_those_of_training(made):
    found = made.found["masks"]
    for stop in range(5):
        _, patch_mask, word_mask = by_python(made, share=explore.SHARES[stop])
        assert found["Synchronized"][stop]["patches"] == patch_mask.int().tolist()
        assert found["Synchronized"][stop]["words"] == word_mask.int().tolist()
    assert [sum(patches) for patches in found["Random"][3]["patches"]] == [round(0.7 * 16)] * IMAGES


def test_maps_and_words_are_those_of_the_caption(made):
    known = token_labels(made.batch, made.run.config.model.grid)
    for source in ("masked", "clean"):
        attention = by_python(made, source)[0]
        scaled = attention / attention.amax(dim=2, keepdim=True)
        for b, caption in enumerate(made.found["captions"]):
            words = [word for word in caption if "place" in word]
            places = torch.tensor([word["place"] for word in words])
            assert torch.equal(places, first_pieces(made.batch["maskable"])[b].nonzero()[:, 0])
            drawn = torch.tensor([word[source] for word in words]) / 255
            assert (drawn - scaled[b][places]).abs().max() < 1 / 255
            assert [word["named"] for word in words] == known.attribute[b][places].tolist()
            assert [any(word["region"]) for word in words] == known.visible[b][places].tolist()
            assert max(max(word["soft"]) for word in words) == 255


def test_negatives_come_computed_for_five_margins(made):
    found = made.found["negatives"]
    cosines = torch.tensor(found["cosines"])
    positives = positive_pairs(made.batch["product_ids"], made.batch["caption_ids"])
    assert len(found["margins"]) == 5 and made.run.config.margin in found["margins"]
    assert found["hard"] == pick_negatives(cosines, positives, "hard").tolist()
    for margin, chosen in zip(found["margins"], found["semihard"], strict=True):
        assert chosen == pick_negatives(cosines, positives, "semihard", None, margin).tolist()


@pytest.fixture(scope="session")
def hostile(tmp_path_factory):
    """A page of images whose ground truth is not known, and some captions of which are markup."""
    out, folder = tmp_path_factory.mktemp("out"), tmp_path_factory.mktemp("files")
    texts = [f"red shirt {HOSTILE}", "<!-- blue <b>dress</b>, long", "caf\u00e9 \u2028 {{data}}", "!!!", HOSTILE]
    records = [{"image": f"{n}.png", "caption": text, "product_id": n} for n, text in enumerate(texts)]
    write_jsonl(folder, train=records, val=records)
    run_files(out, folder, "--recipe", "albef", "--steps", "1")
    explore.main(["--checkpoint", str(out / "last.pt")])
    return SimpleNamespace(file=out / "explore.html", found=page_of(out / "explore.html"))


def test_a_caption_stays_text_and_without_truth_there_is_a_page(hostile):
    source = hostile.file.read_text(encoding="utf-8")
    assert "<img src=x" not in source and source.count("</script>") == 2
    assert "".join(word["text"] for word in hostile.found["captions"][4]).startswith("</script><img")
    assert not hostile.found["ground_truth"] and "patch_precision" not in hostile.found["masks"]["Random"][0]


def test_a_refusal_is_one_line():
    with pytest.raises(SystemExit, match="/nowhere.pt: no such checkpoint"):
        explore.main(["--checkpoint", "/nowhere.pt"])


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
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert requests == [file.as_uri() for file in files]
    for number, caption in enumerate(hostile.found["captions"]):
        page.locator("#strip button").nth(number).click()
        assert page.text_content("#caption").split() == [word["text"] for word in caption]
    assert page.title() != "1"


def test_sliders_choose_what_python_computed(made, page):
    page.goto(made.file.as_uri())
    page.locator("#strip button").nth(1).click()
    page.locator("#share").fill("3")
    canvas = page.locator("#masks figure", has_text="Synchronized").locator("canvas")
    pixels = canvas.evaluate("canvas => [...canvas.getContext('2d').getImageData(0, 0, 4, 4).data]")
    assert [opacity // 255 for opacity in pixels[3::4]] == made.found["masks"]["Synchronized"][3]["patches"][1]
    page.locator("#margin").fill("4")
    negatives = made.found["negatives"]
    for tag, other in (("hard", negatives["hard"][1]), ("semi-hard", negatives["semihard"][4][1])):
        caption = " ".join(word["text"] for word in made.found["captions"][other])
        tagged = page.locator("#captions li", has=page.locator(".tag", has_text=re.compile(rf"(^|, ){tag}\b")))
        assert tagged.count() == 1 and caption in tagged.text_content()


def test_the_keyboard_reaches_words_and_sliders(made, page):
    page.goto(made.file.as_uri())
    page.focus("#caption button:last-of-type")
    page.keyboard.press("Enter")
    assert page.get_attribute("#caption button:last-of-type", "aria-pressed") == "true"
    page.focus("#share")
    page.keyboard.press("ArrowRight")
    assert page.text_content("#share-value") == "70 %"
