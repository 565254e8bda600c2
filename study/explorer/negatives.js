// Section 3: which wrong pair ITM would be shown, as losses.pick_negatives chose it for each of five margins.

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
const stop = () => Number(element("margin").value);
const chosenMargin = () => data.negatives.margins[stop()];
const lineOf = (anchor) => cosine(anchor, anchor) - chosenMargin();
const chosenFor = () => data.negatives.chosen[element("way").value];
const hardNegative = (anchor) => chosenFor().hard[anchor];
const semihardNegative = (anchor) => chosenFor().semihard[stop()][anchor];

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
  return say("negatives-answer", `Here ${count(hardNegative)} of ${items.length} hard negatives are false,`,
    `and ${count(semihardNegative)} of the semi-hard ones.`, said,
    "So many, since these are neighbouring products, one photo of each, and neighbours are sisters, which differ in one",
    `thing: for ${trapped} of the photos there is a text here of another product that describes them, too.`,
    "In a batch of training few sisters meet, even in hard ones (false_negative_rate in metrics.jsonl).");
}

function startNegatives() {
  const short = (text) => (text.length > 40 ? `${text.slice(0, 40)}…` : text);
  fillMenu(element("anchor"), items.map(({ text }, number) => [number, `${number + 1}: ${short(text)}`]), 0);
  element("margin").value = 2; // the margin of the run
  element("anchor").onchange = (event) => ask(Number(event.target.value));
  element("way").onchange = () => ask(asked);
  element("margin").oninput = () => { drawNegatives(); sayNegatives(); };
  answerNegatives();
  asked = Math.max(0, range(items.length).findIndex((anchor) => takesFalse(hardNegative, anchor)));
  drawNegatives();
}
