"use strict";
// What all sections share: the data, the chosen photo, and a few ways to build the page. No library, no network.

const data = JSON.parse(document.getElementById("data").textContent);
const grid = data.run.grid;
const knowsTruth = data.photos[0].words !== null;
const chosen = { photo: 0 };
const drawings = []; // what is drawn anew when another photo is chosen, a function a section

const element = (id) => document.getElementById(id);
const bytes = (packed) => Uint8Array.from(atob(packed), (letter) => letter.charCodeAt(0));
const floats = (packed) => new Float32Array(bytes(packed).buffer);
const percent = (share, digits = 0) => `${(100 * share).toFixed(digits)}\u00a0%`;
const say = (id, ...sentences) => { element(id).textContent = sentences.join(" "); };
const range = (count) => [...Array(count).keys()];

/** An element with properties (text, className, dataset, …), attributes and children. Text is never read as markup. */
function make(tag, { attributes = {}, dataset = {}, text, ...properties } = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  Object.assign(made.dataset, dataset);
  if (text !== undefined) made.textContent = text;
  made.append(...children);
  return made;
}

/** The same in SVG, where everything is an attribute. */
function draw(tag, attributes = {}) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

/** In a box of its own, which scrolls where the page is narrow. */
function table(title, head, rows) {
  const cells = (row, tag) => row.map((cell, column) =>
    make(column ? tag : "th", { text: cell, scope: tag === "th" ? "col" : "row" }));
  const made = make("table", { attributes: { "aria-label": title } },
    make("thead", {}, make("tr", {}, ...cells(head, "th"))),
    make("tbody", {}, ...rows.map((row) => make("tr", {}, ...cells(row, "td")))));
  return make("div", { className: "scroll", tabIndex: 0, attributes: { role: "region", "aria-label": title } }, made);
}

const image = (source, description) => make("img", { src: source, alt: description });

/** A photo with a layer of patches above it; colour(patch) -> [red, green, blue, alpha], or nothing. */
function showPatches(view, source, description, colour) {
  const canvas = make("canvas", { width: grid, height: grid, attributes: { "aria-hidden": "true" } });
  const pen = canvas.getContext("2d"), pixels = pen.createImageData(grid, grid);
  for (let patch = 0; patch < grid * grid; patch++) pixels.data.set(colour(patch) || [0, 0, 0, 0], 4 * patch);
  pen.putImageData(pixels, 0, 0);
  view.replaceChildren(image(source, description), canvas);
}

/** Tab reaches a group once; arrow keys, Home and End move inside it. */
function rove(group) {
  group.addEventListener("keydown", (event) => {
    const all = [...group.querySelectorAll("button")], at = all.indexOf(document.activeElement);
    const next = at + 1, last = all.length - 1;
    const to = { ArrowRight: next, ArrowDown: next, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: last };
    if (at < 0 || !(event.key in to)) return;
    event.preventDefault();
    all[(to[event.key] + all.length) % all.length].focus();
  });
  group.addEventListener("focusin", (event) => settle(group, event.target));
}

function settle(group, target) {
  for (const button of group.querySelectorAll("button")) button.tabIndex = button === target ? 0 : -1;
}

/** Marks one button of a group as the chosen one. */
function press(group, target) {
  for (const button of group.querySelectorAll("button")) button.setAttribute("aria-pressed", button === target);
  if (!group.contains(document.activeElement)) settle(group, target);
}

/** A text: build(string, number) makes what stands for a word that may be masked; the rest is plain. */
function showText(target, photo, build) {
  const made = [];
  for (const [string, number] of data.photos[photo].parts) {
    if (number !== null) {
      made.push(make("span", { className: string.length < 20 ? "unbroken" : "" }, build(string, number)));
      continue;
    }
    const stop = made.at(-1) instanceof Element ? string.match(/^[.,;:!?)]*/)[0] : "";
    if (stop) made.at(-1).append(stop); // or a line could begin with it
    made.push(string.slice(stop.length));
  }
  target.replaceChildren(...made);
}

/** underlined: the photo shows what the word names; dashed: it names what the photo does not show. */
function kindOf(photo, number) {
  if (!knowsTruth) return "word";
  const { named, shown } = data.photos[photo].words[number];
  return shown ? "word shown" : named ? "word unshown" : "word";
}

const wordOf = (photo, number) => data.photos[photo].parts.find((part) => part[1] === number)[0];
const wordCount = (photo) => data.photos[photo].parts.filter((part) => part[1] !== null).length;

/** The word to begin with: the first for a detail that the photo shows, if there is one. */
function firstDetail(photo) {
  return Math.max(0, (data.photos[photo].words || []).findIndex(({ shown, detail }) => shown && detail));
}

/** The chosen photo with nothing above it. */
const showAlone = (view) => view.replaceChildren(image(data.photos[chosen.photo].image, `photo ${chosen.photo + 1}`));

function choosePhoto(number) {
  chosen.photo = number;
  for (const strip of document.querySelectorAll(".strip")) press(strip, strip.children[number]);
  for (const drawing of drawings) drawing();
}

function fillStrips() {
  for (const strip of document.querySelectorAll(".strip")) {
    strip.append(...data.photos.map((photo, number) => make("button", {
      type: "button", onclick: () => choosePhoto(number), attributes: { "aria-label": `photo ${number + 1}` },
    }, image(photo.image, ""))));
    rove(strip);
  }
}

/** Options [value, text] of a menu. */
function fillMenu(menu, options, value) {
  menu.replaceChildren(...options.map(([of, text]) => make("option", { value: of, text })));
  menu.value = value;
}

function start() {
  const { recipe, data: photos, preset, step } = data.run;
  say("about", `Recipe ${recipe}, preset ${preset}, data ${photos}, ${step.toLocaleString("en")} steps.`,
    `${data.photos.length} photos of products that were held out of training.`,
    "All computed beforehand, in fp32; nothing leaves this page.");
  document.body.classList.toggle("no-truth", !knowsTruth);
  document.body.classList.toggle("no-soft", data.soft === null);
  fillStrips();
  startWords();
  startMasks();
  startNegatives();
  startRebuilt();
  choosePhoto(0);
}

document.addEventListener("DOMContentLoaded", start);
