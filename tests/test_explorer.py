"""The explorer: its page holds the values of the project's functions, shows them, and works by keyboard."""

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
HOSTILE = "</script <img src=x onerror=document.title=1 "  # not closed, or the reader would remove it


def read_page_data(path):
    """Read the data of a page."""
    return json.loads(re.search(r'id="data">(.*?)</script>', path.read_text(encoding="utf-8"), re.S)[1])


@pytest.fixture(scope="session", autouse=True)
def few_images():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(explore, "IMAGES", IMAGES)
        yield


@pytest.fixture(scope="session")
def explored(tmp_path_factory):
    """A small run with its page, the data of the page, and a batch of its images."""
    out = tmp_path_factory.mktemp("explored")
    train_small(out, "--fusion-layers", "2", "--steps", "2", "--mask-warmup", "1", "--num-products", "30")
    explore.main(["--checkpoint", str(out / "last.pt")])
    run, dataset = explore.open_run(out / "last.pt", None, "cpu")
    run.config, dataset.with_ground_truth = replace(run.config, precision="fp32"), True
    run.model.eval()
    file = out / "explore.html"
    batch = run.collate([dataset[row] for row in first_images(dataset, IMAGES)])
    batch["images"] = normalise(batch["images"])
    return SimpleNamespace(out=out, file=file, run=run, page_data=read_page_data(file), batch=batch)


def make_sync_masks(explored, source="masked", ratio=0.5):
    """Attention and synchronized masks, as training makes them."""
    config = explored.run.config
    config = replace(config, mask_source=source, mim_ratio=ratio, mlm_ratio=ratio)
    run = replace(explored.run, config=config)
    return synchronized_masks(run, explored.batch, torch.Generator().manual_seed(config.seed))


def test_masks_of_every_stop_are_those_of_training(explored):
    masks = explored.page_data["masks"]
    for stop in range(5):
        _, patch_mask, word_mask = make_sync_masks(explored, ratio=explore.MASK_RATIOS[stop])
        assert masks["Synchronized"][stop]["patches"] == patch_mask.int().tolist()
        assert masks["Synchronized"][stop]["words"] == word_mask.int().tolist()
        first = first_pieces(explored.batch["maskable"])
        random_words, sync_words = (torch.tensor(masks[kind][stop]["words"]) for kind in ("Random", "Synchronized"))
        assert torch.equal((random_words * first).sum(dim=1), (sync_words * first).sum(dim=1))
    assert [sum(patches) for patches in masks["Random"][3]["patches"]] == [round(0.7 * 16)] * IMAGES


def test_maps_and_words_are_those_of_the_caption(explored):
    labels = token_labels(explored.batch, explored.run.config.model.grid)
    for source in ("masked", "clean"):
        attention = make_sync_masks(explored, source)[0]
        scaled = attention / attention.amax(dim=2, keepdim=True)
        for b, caption in enumerate(explored.page_data["captions"]):
            words = [word for word in caption if "index" in word]
            indices = torch.tensor([word["index"] for word in words])
            assert torch.equal(indices, first_pieces(explored.batch["maskable"])[b].nonzero()[:, 0])
            drawn = torch.tensor([word[source] for word in words]) / 255
            assert (drawn - scaled[b][indices]).abs().max() < 1 / 255
            assert [word["is_attribute"] for word in words] == labels.attribute[b][indices].tolist()
            assert [any(word["region"]) for word in words] == labels.visible[b][indices].tolist()
            assert max(max(word["soft"]) for word in words) == 255


def test_negatives_of_five_margins_are_those_of_training(explored):
    negatives = explored.page_data["negatives"]
    cosines = torch.tensor(negatives["cosines"])
    positives = positive_pairs(explored.batch["product_ids"], explored.batch["caption_ids"])
    assert len(negatives["margins"]) == 5 and explored.run.config.margin in negatives["margins"]
    assert negatives["hard"] == pick_negatives(cosines, positives, "hard").tolist()
    for margin, chosen in zip(negatives["margins"], negatives["semihard"], strict=True):
        assert chosen == pick_negatives(cosines, positives, "semihard", None, margin).tolist()


@pytest.fixture(scope="session")
def hostile(tmp_path_factory):
    """A page of images without ground truth; some of their captions are markup."""
    out, folder = tmp_path_factory.mktemp("out"), tmp_path_factory.mktemp("files")
    texts = [f"red shirt {HOSTILE}", "<!-- blue <b>dress</b>, long", "caf\u00e9 \u2028 {{data}}", "!!!", HOSTILE]
    records = [{"image": f"{n}.png", "caption": text, "product_id": n} for n, text in enumerate(texts)]
    write_jsonl(folder, train=records, val=records)
    run_files(out, folder, "--recipe", "albef", "--steps", "1")
    explore.main(["--checkpoint", str(out / "last.pt")])
    return SimpleNamespace(file=out / "explore.html", page_data=read_page_data(out / "explore.html"))


def test_a_caption_stays_text_and_a_page_needs_no_ground_truth(hostile):
    source = hostile.file.read_text(encoding="utf-8")
    assert "<img src=x" not in source and source.count("</script") == 2
    assert "".join(word["text"] for word in hostile.page_data["captions"][4]).startswith("</script")
    assert not hostile.page_data["ground_truth"] and "patch_precision" not in hostile.page_data["masks"]["Random"][0]


def test_a_refusal_is_one_line():
    with pytest.raises(SystemExit, match="/nowhere.pt: no such checkpoint"):
        explore.main(["--checkpoint", "/nowhere.pt"])


# In the browser

TIMEOUT = 60_000  # milliseconds, for a slow machine


@pytest.fixture(scope="session")
def chromium():
    """The machine's own browser, without a window."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not path:
        if os.environ.get("BROWSER_REQUIRED"):
            pytest.fail("the explorer's page needs Chromium: apt-get install chromium")
        pytest.skip("the explorer's page needs Chromium: apt-get install chromium")
    flags = ["--disable-gpu", "--disable-quic", "--disable-sync"]  # besides Playwright's own
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=flags, timeout=TIMEOUT)
        yield browser
        browser.close()


@pytest.fixture
def page(chromium):
    """A browser page for one test; errors and warnings of the page fail the test."""
    page, messages = chromium.new_page(viewport={"width": 1280, "height": 900}), []

    def listen(message):
        if message.type in ("error", "assert", "warning"):
            messages.append(message.text)

    page.set_default_timeout(TIMEOUT)
    page.on("console", listen)
    page.on("pageerror", lambda error: messages.append(str(error)))
    yield page
    page.close()
    assert messages == []


@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_fits_and_loads_nothing_else(explored, hostile, page, width):
    requests, files = [], (explored.file, hostile.file)
    page.on("request", lambda request: requests.append(request.url))
    page.set_viewport_size({"width": width, "height": 900})
    for file in files:
        page.goto(file.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert requests == [file.as_uri() for file in files]
    for number, caption in enumerate(hostile.page_data["captions"]):
        page.locator("#strip button").nth(number).click()
        assert page.text_content("#caption").split() == [word["text"] for word in caption]
    assert page.title() != "1"


def test_sliders_choose_what_python_computed(explored, page):
    page.goto(explored.file.as_uri())
    page.locator("#strip button").nth(1).click()
    page.locator("#ratio").fill("3")
    canvas = page.locator("#masks figure", has_text="Synchronized").locator("canvas")
    pixels = canvas.evaluate("canvas => [...canvas.getContext('2d').getImageData(0, 0, 4, 4).data]")
    assert [opacity // 255 for opacity in pixels[3::4]] == explored.page_data["masks"]["Synchronized"][3]["patches"][1]
    page.locator("#margin").fill("4")
    negatives = explored.page_data["negatives"]
    for tag, other in (("hard", negatives["hard"][1]), ("semi-hard", negatives["semihard"][4][1])):
        caption = " ".join(word["text"] for word in explored.page_data["captions"][other])
        tagged = page.locator("#captions li", has=page.locator(".tag", has_text=re.compile(rf"(^|, ){tag}\b")))
        assert tagged.count() == 1 and caption in tagged.text_content()


def test_the_keyboard_reaches_words_and_sliders(explored, page):
    page.goto(explored.file.as_uri())
    page.focus("#caption button:last-of-type")
    page.keyboard.press("Enter")
    assert page.get_attribute("#caption button:last-of-type", "aria-pressed") == "true"
    page.focus("#ratio")
    page.keyboard.press("ArrowRight")
    assert page.text_content("#ratio-value") == "70 %"


def test_ground_truth_is_shown_where_it_is_known(explored, hostile, page):
    for file, is_known in ((explored.file, True), (hostile.file, False)):
        page.goto(file.as_uri())
        titles = page.locator("#maps h3").all_text_contents()
        assert ("Ground truth" in titles) == is_known
        assert page.locator("#counts").is_visible() == is_known
        for note in page.locator("#masks .ground-truth").all():
            assert note.is_visible() == is_known
    page.goto(explored.file.as_uri())
    assert re.match(r"precision: words \d+ %, patches \d+ %", page.text_content("#masks .ground-truth"))
