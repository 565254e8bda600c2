// Section 3: which wrong pair ITM would be shown, chosen from the cosines by the rule of losses.pick_negatives.

const { items } = data.negatives;
const cosines = floats(data.negatives.sim), forbidden = bytes(data.negatives.forbidden);
const wouldBeFalse = data.negatives.false ? bytes(data.negatives.false) : null;
const LISTED = 8;
const TAGS = { own: "own pair", hard: "hard", semihard: "semi-hard", false: "false negative" };
let asked = 0;

const asksPhoto = () => element("way").value === "photo";
/** The place of a pair in the matrices, whose rows are photos and whose columns are texts. */
const pairAt = (anchor, other) => (asksPhoto() ? anchor * items.length + other : other * items.length + anchor);
const cosine = (anchor, other) => cosines[pairAt(anchor, other)];
const mayServe = (anchor, other) => !forbidden[pairAt(anchor, other)];
const isFalse = (anchor, other) => Boolean(wouldBeFalse && wouldBeFalse[pairAt(anchor, other)]);
const chosenMargin = () => Number(element("margin").value) / 100;
/** The line below which a negative is semi-hard, in single precision, as Python has it. */
const lineOf = (anchor) => Math.fround(cosine(anchor, anchor) - Math.fround(chosenMargin()));

/** The first candidate with the highest score, or −1 where there is none. */
function best(candidates, score) {
  return candidates.reduce((top, one) => (top < 0 || score(one) > score(top) ? one : top), -1);
}

function hardNegative(anchor) {
  return best(range(items.length).filter((other) => mayServe(anchor, other)), (other) => cosine(anchor, other));
}

/** The most similar one below the line; where none is, the least similar one. */
function semihardNegative(anchor) {
  const candidates = range(items.length).filter((other) => mayServe(anchor, other));
  const below = candidates.filter((other) => cosine(anchor, other) < lineOf(anchor));
  return below.length ? best(below, (other) => cosine(anchor, other)) : best(candidates, (other) => -cosine(anchor, other));
}

function rolesOf(other, hard, semihard) {
  return Object.entries({ own: other === asked, hard: other === hard, semihard: other === semihard, false: isFalse(asked, other) })
    .filter(([, holds]) => holds).map(([role]) => role);
}

/** The nearest candidates, and the own pair and both negatives wherever they stand. */
function listed(hard, semihard) {
  const order = range(items.length).sort((a, b) => cosine(asked, b) - cosine(asked, a));
  return order.filter((other, place) => place < LISTED || [asked, hard, semihard].includes(other));
}

function neighbour(other, roles) {
  const tags = roles.map((role) => make("span", { className: `tag ${role}`, text: TAGS[role] }));
  if (!mayServe(asked, other) && other !== asked) tags.push(make("span", { className: "tag", text: "same product or wording" }));
  return make("li", { dataset: { item: other, roles: roles.join(" ") } }, make("button",
    { type: "button", onclick: () => ask(other), attributes: { "aria-label": `${cosine(asked, other).toFixed(3)}, ${roles.map((role) => TAGS[role]).join(", ")} item ${other + 1}: ${items[other].text}` } },
    make("span", { className: "cosine", text: cosine(asked, other).toFixed(3) }), image(items[other].image, ""),
    make("p", {}, ...tags, items[other].text)));
}

function drawList(hard, semihard) {
  const line = lineOf(asked), entries = [];
  let above = true;
  for (const other of listed(hard, semihard)) {
    if (above && cosine(asked, other) < line) {
      entries.push(make("li", { className: "line", text: `below ${line.toFixed(3)}, the own pair minus the margin: semi-hard` }));
      above = false;
    }
    entries.push(neighbour(other, rolesOf(other, hard, semihard)));
  }
  element("neighbours").replaceChildren(...entries);
}

/** Places of photos and texts on the map, in per cent of its sides. */
function places() {
  const all = [...data.negatives.photos, ...data.negatives.texts];
  const scale = (axis) => {
    const values = all.map((point) => point[axis]), low = Math.min(...values), high = Math.max(...values);
    return (point) => (100 * (point[axis] - low)) / Math.max(1e-9, high - low);
  };
  const x = scale(0), y = scale(1), placed = (point) => [x(point), 100 - y(point)];
  return { photo: data.negatives.photos.map(placed), text: data.negatives.texts.map(placed) };
}

/** A photo is a circle, a text a square. */
function dot(kind, [x, y], role, title, number) {
  const size = role ? 2 : 1.3;
  const shape = kind === "photo" ? draw("circle", { cx: x, cy: y, r: size }) : draw("rect", { x: x - size, y: y - size, width: 2 * size, height: 2 * size });
  shape.setAttribute("class", `dot ${role}`);
  shape.append(draw("title", {}, title));
  shape.addEventListener("click", () => ask(number));
  return shape;
}

/** Labels beside their places, the lower ones moved down where they would lie on each other. */
function spread(labels) {
  let free = 0;
  return labels.sort((a, b) => a[1] - b[1]).map(([x, y, text]) => {
    const at = Math.max(free, y + 1.2), left = x > 70;
    free = at + 4.4;
    return draw("text", { x: left ? x - 3 : x + 3, y: at, "text-anchor": left ? "end" : "start" }, text);
  });
}

function drawMap(hard, semihard) {
  const placed = places(), own = asksPhoto() ? "photo" : "text", others = asksPhoto() ? "text" : "photo";
  const lines = [], dots = [], labels = [], [fromX, fromY] = placed[own][asked];
  const line = (role, [x, y]) => lines.push(draw("line", { class: role, x1: fromX, y1: fromY, x2: x, y2: y }));
  items.forEach((item, number) => {
    if (number !== asked) dots.push(dot(own, placed[own][number], "", item.text, number));
    const roles = rolesOf(number, hard, semihard), at = placed[others][number];
    dots.push(dot(others, at, roles.join(" "), item.text, number));
    for (const role of roles.filter((role) => role !== "false")) line(role, at);
    if (roles.length) labels.push([...at, roles.map((role) => TAGS[role]).join(", ")]);
  });
  dots.push(dot(own, [fromX, fromY], "asked", items[asked].text, asked));
  element("map").replaceChildren(...lines, ...dots.sort((a, b) => a.classList.length - b.classList.length), ...spread(labels));
}

function drawAsked() {
  const { image: source, text } = items[asked];
  const said = asksPhoto() ? image(source, `photo of item ${asked + 1}`) : make("p", { text: `“${text}”` });
  element("asked").replaceChildren(said, make("p", { className: "note", text: asksPhoto() ? "asks for the most similar wrong text" : "asks for the most similar wrong photo" }));
}

function drawNegatives() {
  const hard = hardNegative(asked), semihard = semihardNegative(asked);
  element("margin-value").textContent = chosenMargin().toFixed(2);
  element("anchor").value = asked;
  Object.assign(element("neighbours").dataset, { hard, semihard });
  drawAsked();
  drawList(hard, semihard);
  drawMap(hard, semihard);
}

function sayNegatives() {
  const name = (other) => (other < 0 ? "none" : `item ${other + 1}, cosine ${cosine(asked, other).toFixed(3)}${isFalse(asked, other) ? ", false" : ""}`);
  element("negatives-live").textContent = `Item ${asked + 1}, own pair ${cosine(asked, asked).toFixed(3)}. Hard: ${name(hardNegative(asked))}. `
    + `Semi-hard: ${name(semihardNegative(asked))}.`;
}

function ask(number) {
  const inList = element("neighbours").contains(document.activeElement);
  asked = number;
  drawNegatives();
  sayNegatives();
  if (inList) element("neighbours").querySelector(`[data-item="${number}"] button`).focus();
}

function answerNegatives() {
  const { mode, margin } = data.negatives;
  const said = `This run chose them by the mode ${mode}${mode === "semihard" ? `, with a margin of ${margin}` : ""}.`;
  if (!wouldBeFalse) return said;
  const count = (pick) => range(items.length).filter((anchor) => pick(anchor) >= 0 && isFalse(anchor, pick(anchor))).length;
  return `Here ${count(hardNegative)} of ${items.length} hard negatives are false, and ${count(semihardNegative)} of the semi-hard ones. ${said}`;
}

function startNegatives() {
  fillMenu(element("anchor"), items.map(({ text }, number) => [number, `${number + 1}: ${text.slice(0, 40)}${text.length > 40 ? "…" : ""}`]), 0);
  element("margin").value = Math.round(100 * data.negatives.margin);
  element("anchor").onchange = (event) => ask(Number(event.target.value));
  element("way").onchange = () => ask(asked);
  element("margin").oninput = () => { drawNegatives(); sayNegatives(); };
  element("negatives-answer").textContent = answerNegatives();
  asked = Math.max(0, range(items.length).findIndex((anchor) => hardNegative(anchor) >= 0 && isFalse(anchor, hardNegative(anchor))));
  drawNegatives();
}
