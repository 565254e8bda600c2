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

function hardNegative(anchor) {
  return best(range(items.length).filter((other) => mayServe(anchor, other)), (other) => cosine(anchor, other));
}

/** The most similar one below the line; where none is, the least similar one. */
function semihardNegative(anchor) {
  const candidates = range(items.length).filter((other) => mayServe(anchor, other));
  const below = candidates.filter((other) => cosine(anchor, other) < lineOf(anchor));
  if (below.length) return best(below, (other) => cosine(anchor, other));
  return best(candidates, (other) => -cosine(anchor, other));
}

function rolesOf(other, hard, semihard) {
  const holds = {
    own: other === asked, hard: other === hard, semihard: other === semihard, false: isFalse(asked, other),
  };
  return Object.keys(holds).filter((role) => holds[role]);
}

/** The nearest candidates, and the own pair and both negatives wherever they stand. */
function listed(hard, semihard) {
  const order = range(items.length).sort((a, b) => cosine(asked, b) - cosine(asked, a));
  return order.filter((other, place) => place < LISTED || [asked, hard, semihard].includes(other));
}

function neighbour(other, roles) {
  const tags = roles.map((role) => make("span", { className: `tag ${role}`, text: TAGS[role] }));
  const right = !mayServe(asked, other) && other !== asked;
  if (right) tags.push(make("span", { className: "tag", text: "same product or wording" }));
  return make("li", { dataset: { item: other, roles: roles.join(" ") } },
    make("button", { type: "button", onclick: () => ask(other) },
      make("span", { className: "cosine", text: cosine(asked, other).toFixed(3) }), image(items[other].image, ""),
      make("p", {}, ...tags, ` ${items[other].text}`)));
}

/** The list, with a line where the own pair's cosine minus the margin is. */
function drawList(hard, semihard) {
  const line = lineOf(asked), all = listed(hard, semihard);
  const entries = all.map((other) => neighbour(other, rolesOf(other, hard, semihard)));
  const below = all.findIndex((other) => cosine(asked, other) < line);
  const said = `below ${line.toFixed(3)}, the own pair minus the margin: semi-hard`;
  const none = `none is below ${line.toFixed(3)}, the own pair minus the margin: the least similar one is taken`;
  entries.splice(below < 0 ? all.length : below, 0, make("li", { className: "line", text: below < 0 ? none : said }));
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
  const size = role ? 2 : 1.3, square = { x: x - size, y: y - size, width: 2 * size, height: 2 * size };
  const shape = kind === "photo" ? draw("circle", { cx: x, cy: y, r: size }) : draw("rect", square);
  shape.setAttribute("class", `dot ${role}`);
  shape.append(draw("title", {}, title));
  shape.addEventListener("click", () => ask(number));
  return shape;
}

/** Labels [x, y, text] on the side of their places that lies away from x = `from`, moved down off each other. */
function spread(labels, from) {
  let free = 0;
  return labels.sort((a, b) => a[1] - b[1]).map(([x, y, text]) => {
    const at = Math.max(free, y + 1.2), left = x > 76 || (x < from && x > 24);
    free = at + 5.6;
    return draw("text", { x: left ? x - 3 : x + 3, y: at, "text-anchor": left ? "end" : "start" }, text);
  });
}

function drawMap(hard, semihard) {
  const placed = places(), own = asksPhoto() ? "photo" : "text", others = asksPhoto() ? "text" : "photo";
  const lines = [], dots = [], labels = [], [fromX, fromY] = placed[own][asked];
  items.forEach(({ text }, number) => {
    const roles = rolesOf(number, hard, semihard), [x, y] = placed[others][number];
    if (number !== asked) dots.push(dot(own, placed[own][number], "", text, number));
    dots.push(dot(others, [x, y], roles.join(" "), text, number));
    for (const role of roles.filter((one) => one !== "false")) {
      lines.push(draw("line", { class: role, x1: fromX, y1: fromY, x2: x, y2: y }));
    }
    if (roles.length) labels.push([x, y, roles.map((role) => TAGS[role].split(" ")[0]).join(", ")]);
  });
  dots.push(dot(own, [fromX, fromY], "asked", items[asked].text, asked));
  dots.sort((one, other) => one.classList.length - other.classList.length); // those that matter above the rest
  element("map").replaceChildren(...lines, ...dots, ...spread(labels, fromX));
}

function drawAsked() {
  const { image: source, text } = items[asked], photo = asksPhoto();
  const said = photo ? image(source, `photo of item ${asked + 1}`) : make("p", { text: `“${text}”` });
  const note = `asks for the most similar wrong ${photo ? "text" : "photo"}`;
  element("asked").replaceChildren(said, make("p", { className: "note", text: note }));
}

function drawNegatives() {
  const hard = hardNegative(asked), semihard = semihardNegative(asked);
  say("margin-value", chosenMargin().toFixed(2));
  element("anchor").value = asked;
  Object.assign(element("neighbours").dataset, { hard, semihard });
  drawAsked();
  drawList(hard, semihard);
  drawMap(hard, semihard);
}

function sayNegatives() {
  const similar = (other) => `cosine ${cosine(asked, other).toFixed(3)}${isFalse(asked, other) ? ", false" : ""}`;
  const name = (other) => (other < 0 ? "none" : `item ${other + 1}, ${similar(other)}`);
  say("negatives-live", `Item ${asked + 1}, own pair ${similar(asked)}.`,
    `Hard: ${name(hardNegative(asked))}. Semi-hard: ${name(semihardNegative(asked))}.`);
}

function ask(number) {
  const inList = element("neighbours").contains(document.activeElement);
  asked = number;
  drawNegatives();
  sayNegatives();
  if (inList) element("neighbours").querySelector(`[data-item="${number}"] button`).focus();
}

const takesFalse = (pick, anchor) => pick(anchor) >= 0 && isFalse(anchor, pick(anchor));

function answerNegatives() {
  const { mode, margin } = data.negatives;
  const said = `This run chose them by the mode ${mode}${mode === "semihard" ? `, with a margin of ${margin}` : ""}.`;
  if (!wouldBeFalse) return say("negatives-answer", said);
  const all = range(items.length), count = (pick) => all.filter((anchor) => takesFalse(pick, anchor)).length;
  const trapped = all.filter((anchor) => all.some((other) => isFalse(anchor, other))).length;
  const whole = data.figures.find(([, key]) => key === "false_negative_rate_hard");
  return say("negatives-answer", `Here ${count(hardNegative)} of ${items.length} hard negatives are false,`,
    `and ${count(semihardNegative)} of the semi-hard ones.`, said,
    "So many, since these are neighbouring products, one photo of each, and neighbours are sisters, which differ in one",
    `thing: for ${trapped} of the photos there is a text here of another product that describes them, too.`,
    whole ? `In a batch few sisters meet, even in hard ones: there ${percent(whole[2], 2)} are false (part 5).` : "");
}

function startNegatives() {
  const short = (text) => (text.length > 40 ? `${text.slice(0, 40)}…` : text);
  fillMenu(element("anchor"), items.map(({ text }, number) => [number, `${number + 1}: ${short(text)}`]), 0);
  element("margin").value = Math.round(100 * data.negatives.margin);
  element("anchor").onchange = (event) => ask(Number(event.target.value));
  element("way").onchange = () => ask(asked);
  element("margin").oninput = () => { drawNegatives(); sayNegatives(); };
  answerNegatives();
  asked = Math.max(0, range(items.length).findIndex((anchor) => takesFalse(hardNegative, anchor)));
  drawNegatives();
}
