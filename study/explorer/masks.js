// Section 2: masks side by side. A word or patch is masked from some share on, which Python has found by masking.py; so
// what a slider hides is looked up, not computed.

const MASKS = { random: "Random", sync: "Synchronized", true: "True" };
const MADE = { random: "drawn at random", sync: "by attention", true: "by what the photo shows" };
const HIDDEN = [128, 129, 134, 255];
let softWord = 0;

const shareOf = (id) => Number(element(id).value);
/** The slider's stop nearest to a share. */
function nearestShare(share) {
  const away = data.run.shares.map((one) => Math.abs(one - 100 * share));
  return data.run.shares[away.indexOf(Math.min(...away))];
}

/** The words and the patches of a photo that masks of one kind hide. */
function hiddenBy(kind, photo, patchShare, wordShare) {
  const { words, patches } = data.masks[kind][photo];
  const at = data.run.shares.indexOf(wordShare) * grid * grid;
  const upTo = (shares, limit) => [...shares.keys()].filter((number) => shares[number] <= limit);
  const ofPatches = bytes(patches).subarray(at, at + grid * grid);
  return { words: upTo(bytes(words), wordShare), patches: upTo(ofPatches, patchShare) };
}

/** Of some hidden words and patches: hits and of how many, as masking.cooccurrence counts. */
function countHits(photo, hidden) {
  const { words, named } = data.photos[photo];
  const sum = (key) => hidden.words.reduce((total, word) => total + words[word][key], 0);
  const onNamed = hidden.patches.filter((patch) => named.includes(patch));
  return { words: [sum("shown"), sum("named")], patches: [onNamed.length, hidden.patches.length] };
}

/** Over all photos of the page: the share that is right, of words and of patches. */
function shareRight(kind, patchShare, wordShare) {
  const sums = { words: [0, 0], patches: [0, 0] };
  data.photos.forEach((_, photo) => {
    const counts = countHits(photo, hiddenBy(kind, photo, patchShare, wordShare));
    for (const what of ["words", "patches"]) sums[what] = sums[what].map((sum, i) => sum + counts[what][i]);
  });
  const share = ([hits, of]) => hits / Math.max(1, of);
  return { words: share(sums.words), patches: share(sums.patches) };
}

function panel(kind, title, how) {
  const view = make("div", { className: "view" }), text = make("p", { className: "caption" });
  return make("figure", { dataset: { kind } },
    make("h3", { text: title }), make("p", { className: "note how", text: how }), view, text);
}

function maskedWord(photo, hidden) {
  return (string, number) => make(hidden.words.includes(number) ? "mark" : "span",
    { className: kindOf(photo, number), text: string, dataset: { word: number } });
}

function drawMask(kind) {
  const { photo } = chosen, figure = element("panels").querySelector(`[data-kind="${kind}"]`);
  const hidden = hiddenBy(kind, photo, shareOf("patch-share"), shareOf("word-share"));
  showPatches(figure.querySelector(".view"), data.photos[photo].image, `photo ${photo + 1}, ${kind} mask`,
    (patch) => (hidden.patches.includes(patch) ? HIDDEN : null));
  figure.dataset.patches = hidden.patches.join(" ");
  showText(figure.querySelector(".caption"), photo, maskedWord(photo, hidden));
}

function drawSoft() {
  const { photo } = chosen, figure = element("panels").querySelector('[data-kind="soft"]');
  const soft = bytes(data.soft[photo]).subarray(softWord * grid * grid), strength = shareOf("strength") / 100;
  const said = `photo ${photo + 1}, soft mask of ${wordOf(photo, softWord)}`;
  showPatches(figure.querySelector(".view"), data.photos[photo].image, said,
    (patch) => [...HIDDEN.slice(0, 3), strength * soft[patch]]);
  figure.querySelector(".how").textContent = `of “${wordOf(photo, softWord)}”; choose another word`;
  press(figure.querySelector(".caption"), figure.querySelector(`[data-word="${softWord}"]`));
}

function chooseSoft(number, aloud) {
  softWord = number;
  drawSoft();
  const word = wordOf(chosen.photo, number);
  if (aloud) say("mask-live", `Soft mask of “${word}”: the more a patch has to do with it, the greyer.`);
}

function drawSoftText() {
  const { photo } = chosen;
  const figure = element("panels").querySelector('[data-kind="soft"]'), text = figure.querySelector(".caption");
  showText(text, photo, (string, number) => make("button", {
    type: "button", className: kindOf(photo, number), text: string, dataset: { word: number },
    onclick: () => chooseSoft(number, true), onfocus: () => chooseSoft(number, true),
  }));
  if (wordCount(photo)) chooseSoft(firstDetail(photo), false);
  else {
    figure.querySelector(".how").textContent = "of no word: none may be masked";
    showAlone(figure.querySelector(".view"));
  }
}

/** Skill: how far on the way from random masks to perfect ones, (value − random) / (1 − random). */
const skill = (value, random) => (value - random) / Math.max(1e-9, 1 - random);

/** A table for words and one for patches, which fit a narrow screen. -> the rows of both. */
function drawCounts() {
  const shares = [shareOf("patch-share"), shareOf("word-share")], random = shareRight("random", ...shares);
  const rows = (what) => Object.keys(data.masks).map((kind) => {
    const here = countHits(chosen.photo, hiddenBy(kind, chosen.photo, ...shares)), all = shareRight(kind, ...shares);
    return [MASKS[kind], here[what].join(" of "), percent(all[what], 1), skill(all[what], random[what]).toFixed(2)];
  });
  const made = { words: rows("words"), patches: rows("patches") };
  element("mask-tables").replaceChildren(...Object.entries(made).map(([what, found]) =>
    table(`${what}, co-occurrence and skill`, [what, "this photo", "all photos", "skill"], found)));
  return made;
}

function drawMasks() {
  say("patch-share-value", `${shareOf("patch-share")} %`);
  say("word-share-value", `${shareOf("word-share")} %`);
  Object.keys(data.masks).forEach(drawMask);
  if (knowsTruth) drawCounts();
}

function sayMasks() {
  const counts = knowsTruth ? drawCounts().words.map((row) => `${row[0].toLowerCase()} ${row[2]}`).join(", ") : "";
  say("mask-live", `${shareOf("patch-share")} % of the patches, ${shareOf("word-share")} % of the words hidden.`,
    counts && `Words that their photos show: ${counts}.`);
}

function answerMasks() {
  const { patch_share: patchShare, word_share: wordShare, pool } = data.run;
  const right = () => shareRight("random", nearestShare(patchShare), nearestShare(wordShare)).words;
  say("masks-answer", "A description tells of the whole product, a photo shows one side of it, or a part.", knowsTruth
    ? `On these photos ${percent(right())}; every other masked word that names something is a guess.`
    : "How much random masks miss is known only where the truth is, on synthetic photos.",
  `This run's shares are ${percent(patchShare)} of the patches and ${percent(wordShare)} of the words.`,
  `Synchronized masks draw words among the best ${percent(Math.max(pool, wordShare))}.`);
}

function startMasks() {
  const panels = Object.keys(data.masks).map((kind) => panel(kind, MASKS[kind], MADE[kind]));
  const soft = data.soft ? [panel("soft", "Soft", "")] : [];
  panels.splice(2, 0, ...soft);
  element("panels").append(...panels);
  element("patch-share").value = nearestShare(data.run.patch_share);
  element("word-share").value = nearestShare(data.run.word_share);
  for (const id of ["patch-share", "word-share"]) element(id).oninput = () => { drawMasks(); sayMasks(); };
  const strength = () => {
    say("strength-value", `${shareOf("strength")} %`);
    if (wordCount(chosen.photo)) drawSoft();
  };
  if (data.soft) {
    element("strength").oninput = strength;
    say("strength-value", "100 %");
    rove(panels[2].querySelector(".caption"));
    drawings.push(drawSoftText);
  }
  answerMasks();
  drawings.push(drawMasks);
}
