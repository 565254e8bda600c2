"use strict";
// Draws what explore.py computed. No library, no network.

const data = JSON.parse(document.getElementById("data").textContent);
const knowsTruth = "false" in data.negatives;
const MAPS = { masked: "Attention while masked", clean: "Attention as it stands", soft: "Soft mask" };
const MASKS = { random: "Random", masked: "Synchronized, masked", clean: "Synchronized, clean" };
const LISTED = 8;
let chosenImage = 0;

const element = (id) => document.getElementById(id);
const percent = (share) => `${(100 * share).toFixed(0)} %`;
const captionOf = (image) => data.captions[image].map((word) => word.text).join(" ");

/** An element with properties and children. Text is never read as markup. */
function make(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

/** The chosen image under a layer of grey. opacities: one number from 0 to 255 for each patch. */
function covered(opacities) {
  const canvas = make("canvas", { width: data.grid, height: data.grid });
  const pen = canvas.getContext("2d");
  const pixels = pen.createImageData(data.grid, data.grid);
  opacities.forEach((opacity, patch) => pixels.data.set([60, 60, 66, opacity], 4 * patch));
  pen.putImageData(pixels, 0, 0);
  const image = make("img", { src: data.images[chosenImage], alt: `image ${chosenImage + 1}` });
  return make("div", { className: "view" }, image, canvas);
}

/** A list of patches as one number for each patch. */
function marked(patches, inside, outside) {
  const values = Array(data.grid ** 2).fill(outside);
  for (const patch of patches) values[patch] = inside;
  return values;
}

/** Underlined: the image shows the attribute. Dashed: the image does not show it. */
function classOf(word) {
  if (!word.named) return "word";
  return word.region.length ? "word shown" : "word unshown";
}

/** The caption of the chosen image; build(word) makes the element of a word that may be masked. */
function withWords(paragraph, build) {
  paragraph.replaceChildren();
  for (const word of data.captions[chosenImage]) {
    paragraph.append("place" in word ? build(word) : word.text, " ");
  }
  return paragraph;
}

function press(button) {
  for (const other of button.parentNode.querySelectorAll("button")) other.ariaPressed = other === button;
}

function chooseImage(image) {
  chosenImage = image;
  press(element("strip").children[image]);
  withWords(element("caption"), (word) => make("button", {
    className: classOf(word), textContent: word.text, onclick: (event) => chooseWord(word, event.target),
  }));
  element("maps").replaceChildren();
  const buttons = [...element("caption").querySelectorAll("button")];
  const first = buttons.find((button) => button.classList.contains("shown")) || buttons[0];
  if (first) first.click();
  drawMasks();
  drawNegatives();
}

function chooseWord(word, button) {
  press(button);
  const layers = {
    masked: word.masked.map((value) => 230 - 0.9 * value),
    clean: word.clean.map((value) => 230 - 0.9 * value),
    soft: word.soft,
  };
  const panels = Object.entries(layers).map(([name, opacities]) =>
    make("figure", {}, make("h3", { textContent: MAPS[name] }), covered(opacities)));
  if (knowsTruth) {
    const truth = covered(marked(word.region, 0, 230));
    panels.push(make("figure", {}, make("h3", { textContent: "Ground truth" }), truth));
  }
  element("maps").replaceChildren(...panels);
}

function maskPanel(kind, mask) {
  const patches = mask.patches[chosenImage];
  const tokens = mask.tokens[chosenImage];
  const figure = make("figure", {},
    make("h3", { textContent: MASKS[kind] }),
    covered(marked(patches, 255, 0)),
    withWords(make("p", { className: "caption" }), (word) => make("span", {
      className: `${classOf(word)} ${tokens.includes(word.place) ? "masked" : ""}`, textContent: word.text,
    })));
  if (knowsTruth) {
    const said = `precision: words ${percent(mask.word_precision)}, patches ${percent(mask.patch_precision)}`;
    figure.append(make("figcaption", { textContent: said }));
  }
  figure.dataset.kind = kind;
  figure.dataset.patches = patches.join(" ");
  return figure;
}

function reconstructedPanel(source) {
  const image = make("img", { src: source, alt: `image ${chosenImage + 1}, reconstructed` });
  const said = "from the unmasked patches and the caption; mean and deviation of each patch are those of the image";
  return make("figure", {},
    make("h3", { textContent: "Reconstructed by MIM" }),
    make("div", { className: "view" }, image),
    make("figcaption", { textContent: said }));
}

function drawMasks() {
  const stop = Number(element("share").value);
  element("share-value").textContent = percent(data.shares[stop]);
  const panels = Object.keys(MASKS).map((kind) => maskPanel(kind, data.masks[kind][stop]));
  for (const mask of [data.masks.masked[stop], data.masks.clean[stop]]) {
    if (mask.reconstructed) panels.push(reconstructedPanel(mask.reconstructed[chosenImage]));
  }
  element("masks").replaceChildren(...panels);
}

function drawNegatives() {
  const { cosines, margins, chosen } = data.negatives;
  const byImage = element("anchor").value === "image";
  const stop = Number(element("margin").value);
  const hard = chosen[element("anchor").value].hard;
  const semihard = chosen[element("anchor").value].semihard[stop];
  const cosine = (other) => (byImage ? cosines[chosenImage][other] : cosines[other][chosenImage]);
  const isFalse = (anchor, other) =>
    knowsTruth && other >= 0 && (byImage ? data.negatives.false[anchor][other] : data.negatives.false[other][anchor]);
  const tagsOf = (other) => [
    other === chosenImage && "own pair",
    other === hard[chosenImage] && "hard",
    other === semihard[chosenImage] && "semi-hard",
    isFalse(chosenImage, other) && "false negative",
  ].filter(Boolean);

  element("margin-value").textContent = margins[stop].toFixed(2);
  const countFalse = (negatives) => negatives.filter((other, anchor) => isFalse(anchor, other)).length;
  element("counts").textContent = knowsTruth
    ? `Of ${hard.length} hard negatives ${countFalse(hard)} are false, of the semi-hard ones ${countFalse(semihard)}.`
    : "";
  const order = [...data.images.keys()].sort((a, b) => cosine(b) - cosine(a));
  const listed = order.filter((other, rank) => rank < LISTED || tagsOf(other).some((tag) => tag !== "false negative"));
  element("neighbours").replaceChildren(...listed.map((other) => make("li", {},
    make("span", { textContent: cosine(other).toFixed(3) }),
    make("img", { src: data.images[other], alt: "" }),
    make("span", {}, make("span", { className: "tag", textContent: tagsOf(other).join(", ") }), " ", captionOf(other)))));
  element("neighbours").dataset.hard = hard[chosenImage];
  element("neighbours").dataset.semihard = semihard[chosenImage];
}

const { recipe, preset, step } = data.run;
element("about").textContent = `Recipe ${recipe}, preset ${preset}, data ${data.run.data}, ${step} steps; `
  + `${data.images.length} images of held-out products.`;
document.body.classList.toggle("without-truth", !knowsTruth);
data.images.forEach((source, number) => element("strip").append(
  make("button", { onclick: () => chooseImage(number) }, make("img", { src: source, alt: `image ${number + 1}` }))));
element("share").oninput = drawMasks;
element("margin").oninput = drawNegatives;
element("anchor").onchange = drawNegatives;
chooseImage(0);
