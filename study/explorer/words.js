// Section 1: the attention of a word over the photo, and whether its brightest patch lies on what the word names.

const SOURCES = { masked: "the word while it is masked", clean: "the word as it stands there" };
// brightness, then red, green, blue: inferno, which reads the same without colour
const HEAT = [[0, 0, 0, 4], [0.25, 87, 16, 110], [0.5, 188, 55, 84], [0.75, 249, 142, 9], [1, 252, 255, 164]];
const DARK = [20, 20, 24, 190];
let shownWord = 0;

function heatColour(value) {
  const above = Math.max(1, HEAT.findIndex(([at]) => at >= value));
  const [low, ...from] = HEAT[above - 1], [high, ...to] = HEAT[above];
  const mix = from.map((channel, i) => channel + ((to[i] - channel) * (value - low)) / (high - low));
  return [...mix, 60 + 130 * value];
}

const layerName = (layer) => (layer === 0 ? "what all agree on" : `layer ${layer}`);
const readingOf = (source, layer) => data.readings.find((one) => one.source === source && one.layer === layer);
const chosenReading = () => readingOf(element("source").value, Number(element("layer").value));

/** Of the words that name a detail which its photo shows: how many point at it, and how many a random patch would. */
function pointing(reading) {
  let hits = 0, expected = 0, total = 0;
  data.photos.forEach((photo, number) => photo.words.forEach(({ detail, shown, region }, word) => {
    if (!detail || !shown) return;
    total += 1;
    hits += region.includes(reading.photos[number].peaks[word]);
    expected += region.length / (grid * grid);
  }));
  return { hits, expected, total };
}

function fillLayers() {
  const source = element("source").value, before = element("layer").value;
  const layers = data.readings.filter((one) => one.source === source).map((one) => one.layer);
  const wanted = layers.includes(Number(before)) && before !== "" ? before : Math.min(...layers);
  fillMenu(element("layer"), layers.map((layer) => [layer, layerName(layer)]), wanted);
}

function showPeak(view, peak) {
  const place = { x: (peak % grid) + 0.04, y: Math.floor(peak / grid) + 0.04, width: 0.92, height: 0.92 };
  const layer = draw("svg", { viewBox: `0 0 ${grid} ${grid}`, "aria-hidden": "true" });
  layer.append(draw("rect", { class: "peak-edge", ...place }), draw("rect", { class: "peak", ...place }));
  view.append(layer);
  view.dataset.peak = peak;
}

function verdict(photo, word, peak, times) {
  const place = `row ${Math.floor(peak / grid) + 1}, column ${(peak % grid) + 1}`;
  const at = `“${wordOf(photo, word)}” looks most at ${place}, ${times.toFixed(1)} times as much as at the average patch`;
  if (!knowsTruth) return `${at}.`;
  const { named, shown, region } = data.photos[photo].words[word];
  if (!shown) return `${at}; ${named ? "this photo does not show it" : "it names nothing that a photo could show"}.`;
  const hit = region.includes(peak) ? "a hit, it is there" : "a miss, it is not there";
  return `${at}: ${hit}. A random patch would hit with ${percent(region.length / (grid * grid))}.`;
}

function showWord(word) {
  shownWord = word;
  const { photo } = chosen, { map, peaks, times } = chosenReading().photos[photo], source = data.photos[photo].image;
  const heat = bytes(map).subarray(word * grid * grid, (word + 1) * grid * grid), peak = peaks[word];
  showPatches(element("word-map"), source, `photo ${photo + 1}, attention of ${wordOf(photo, word)}`,
    (patch) => heatColour(heat[patch] / 255));
  showPeak(element("word-map"), peak);
  if (knowsTruth) showTruth(photo, word, source);
  press(element("word-caption"), element("word-caption").querySelector(`[data-word="${word}"]`));
  say("word-live", verdict(photo, word, peak, times[word]));
}

function showTruth(photo, word, source) {
  const { shown, region } = data.photos[photo].words[word];
  const said = `photo ${photo + 1}, ${shown ? "region of the word" : "which does not show it"}`;
  showPatches(element("word-truth"), source, said, (patch) => (region.includes(patch) ? null : DARK));
}

function wordButton(string, number) {
  return make("button", {
    type: "button", className: kindOf(chosen.photo, number), text: string, dataset: { word: number },
    onclick: () => showWord(number), onfocus: () => showWord(number), onpointerenter: () => showWord(number),
  });
}

function drawWords() {
  const { photo } = chosen;
  showText(element("word-caption"), photo, wordButton);
  if (wordCount(photo)) {
    showWord(firstDetail(photo));
    return;
  }
  for (const view of ["word-map", "word-truth"]) showAlone(element(view));
  say("word-live", "No word of this text is ever masked.");
}

/** How often each source is right, in what its layers agree on where there are several. */
function answerWords() {
  if (!knowsTruth) return;
  const sources = [...new Set(data.readings.map((one) => one.source))];
  const counts = sources.map((source) => [source, pointing(readingOf(source, 0) || readingOf(source, 1))]);
  const said = counts.map(([source, { hits, total }]) => `${SOURCES[source]}: ${hits} of ${total}`);
  say("words-answer", "Visible details on these photos whose word looks most at them, layers taken together:",
    `${said.join("; ")}; random patches would hit ${counts[0][1].expected.toFixed(1)}.`,
    "Pointing asks for one patch a word. A mask is of many, for several words at once: what points well can still mask",
    "little better than chance, see part 2.");
}

function startWords() {
  const sources = [...new Set(data.readings.map((one) => one.source))];
  const source = data.run.mask_source;
  fillMenu(element("source"), sources.map((name) => [name, SOURCES[name]]), source);
  fillLayers();
  element("word-map").classList.add("grey");
  const changed = () => { if (wordCount(chosen.photo)) showWord(shownWord); };
  element("source").onchange = () => { fillLayers(); changed(); };
  element("layer").onchange = changed;
  rove(element("word-caption"));
  answerWords();
  drawings.push(drawWords);
}
