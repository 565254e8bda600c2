// Section 5: the curves of metrics.jsonl, and held-out figures beside chance.

const PLOT = { left: 42, right: 350, top: 10, bottom: 180 }; // of a chart 360 by 210
const DASHES = ["", "7 3", "2 3", "9 3 2 3", "4 2", "12 4"];

const isRandom = (key) => key.endsWith("_random");
const nameOf = (key) => key.replace(/^val_/, "").replace(/_random$/, ", random").replaceAll("_", " ");

/** The look of each curve; a random counterpart has the colour of the one before it, dotted. */
function styles(curves) {
  let number = -1;
  return curves.map(([key]) => {
    if (!isRandom(key)) number += 1;
    const look = Math.max(0, number) % DASHES.length;
    return { class: `c${look}`, "stroke-dasharray": isRandom(key) ? "1 4" : DASHES[look] };
  });
}

function scales(title, curves) {
  const points = curves.flatMap(([, all]) => all), values = points.map(([, value]) => value);
  const high = title.includes("held-out") ? 1 : Math.max(...values, 1e-9), low = Math.min(0, ...values);
  const last = Math.max(...points.map(([step]) => step), 1);
  return {
    high, low, last,
    x: (step) => PLOT.left + ((PLOT.right - PLOT.left) * step) / last,
    y: (value) => PLOT.bottom - ((PLOT.bottom - PLOT.top) * (value - low)) / (high - low),
  };
}

function axes({ high, low, last, x, y }) {
  const ticks = [low, (low + high) / 2, high].map((value) => [
    draw("line", { class: "axis", x1: PLOT.left, x2: PLOT.right, y1: y(value), y2: y(value) }),
    draw("text", { x: PLOT.left - 6, y: y(value) + 4, "text-anchor": "end" }, value.toPrecision(2)),
  ]);
  const steps = [[0, "start", "0"], [last, "end", `step ${last}`]].map(([step, anchor, text]) =>
    draw("text", { x: x(step), y: PLOT.bottom + 18, "text-anchor": anchor }, text));
  return [...ticks.flat(), ...steps];
}

function curve(points, look, key, { x, y }) {
  const places = points.map(([step, value]) => `${x(step).toFixed(2)},${y(value).toFixed(2)}`);
  const line = draw("polyline", { ...look, "data-key": key, points: places.join(" ") });
  if (points.length >= 10) return [line];
  // of few points each is marked: one alone makes no line
  const mark = ([step, value]) => draw("circle", { class: look.class, cx: x(step), cy: y(value), r: 3 });
  return [line, ...points.map(mark)];
}

function chart(title, curves) {
  const scale = scales(title, curves), looks = styles(curves);
  const drawn = curves.flatMap(([key, points], number) => curve(points, looks[number], key, scale));
  const picture = draw("svg", {
    viewBox: "0 0 360 210", role: "img", "aria-label": `${title}; the numbers are below`,
    "data-range": [scale.last, scale.low, scale.high].join(" "),
  }, ...axes(scale), ...drawn);
  return make("figure", {}, make("h3", { text: title }), picture, keysOf(curves, looks), numbers(title, curves));
}

function keysOf(curves, looks) {
  const entries = curves.map(([key, points], number) => {
    const line = draw("line", { ...looks[number], x1: 0, x2: 30, y1: 5, y2: 5 });
    const sample = draw("svg", { viewBox: "0 0 30 10", "aria-hidden": "true" }, line);
    return make("li", {}, sample, make("span", { text: `${nameOf(key)} ${points.at(-1)[1].toPrecision(3)}` }));
  });
  return make("ul", { className: "keys" }, ...entries);
}

function numbers(title, curves) {
  const steps = [...new Set(curves.flatMap(([, points]) => points.map(([step]) => step)))].sort((a, b) => a - b);
  const byStep = curves.map(([, points]) => new Map(points));
  const digits = (value) => (value === undefined ? "" : value.toPrecision(3));
  const byKey = curves.map(([key], at) => [nameOf(key), ...steps.map((step) => digits(byStep[at].get(step)))]);
  const long = [["step", ...steps], ...byKey]; // a row a curve, or where there are more steps than curves, a row a step
  const [head, ...rows] = steps.length > curves.length ? long[0].map((_, at) => long.map((row) => row[at])) : long;
  return make("details", {}, make("summary", { text: "numbers" }), table(`${title}, numbers`, head, rows));
}

function figures() {
  const given = (share, digits) => (share === null ? "not known" : percent(share, digits));
  const rows = data.figures.map(([name, key, ...both]) =>
    [name, ...both.map((share) => given(share, key.startsWith("false") ? 2 : 1))]); // of these there are few
  const head = ["held out, at the last validation", "this run", "by chance, or random masks"];
  return table("Held-out figures of the last validation", head, rows);
}

function startRun() {
  if (data.curves === null) {
    const none = "There is no metrics.jsonl beside the checkpoint, so there are no curves.";
    element("charts").append(make("p", { text: none }));
    return;
  }
  if (data.figures.length) element("figures").append(figures());
  else element("figures").append(make("p", { text: "The run has not been validated yet." }));
  element("charts").append(...data.curves.map(([title, curves]) => chart(title, curves)));
  const gain = data.figures.find(([, key]) => key === "val_photo_gain");
  if (gain) say("run-answer", `Here ${percent(gain[2], 1)} of held-out masked words are owed to it.`);
}
