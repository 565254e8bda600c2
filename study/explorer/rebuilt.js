// Section 4: what the model restores, with the right text or photo and with another one.

let shownToken = 0;

const otherOf = (photo) => data.rebuilt[photo].other;

function paintedPanel(title, source, description, note) {
  const view = make("div", { className: "view" }, image(source, description));
  return make("figure", {}, make("h3", { text: title }), view, make("figcaption", { text: note }));
}

function maskedPanel(photo) {
  const made = paintedPanel("Masked", data.photos[photo].image, "", "what the model sees");
  showPatches(made.querySelector(".view"), data.photos[photo].image, `photo ${photo + 1}, masked`,
    (patch) => (data.rebuilt[photo].hidden.includes(patch) ? HIDDEN : null));
  return made;
}

function drawPainted() {
  const { photo } = chosen, { painted_own: own, painted_elsewhere: elsewhere } = data.rebuilt[photo];
  if (own === undefined) {
    say("painted-note", `Recipe ${data.run.recipe} has not learnt to paint; there is nothing to show.`);
    return;
  }
  const error = (found) => `mean squared error ${found.error.toFixed(3)}`;
  element("painted").replaceChildren(
    maskedPanel(photo),
    paintedPanel("Own text", own.image, "painted with its own text", error(own)),
    paintedPanel("Another text", elsewhere.image, "painted with another text", error(elsewhere)),
    paintedPanel("The photo", data.photos[photo].image, `photo ${photo + 1}`, "what is to be painted"),
  );
  say("painted-note", "The model predicts each patch up to mean and deviation of its pixels, which are here those of",
    "the photo, as in MAE: judge colours and shapes inside a patch. The errors are of the hidden patches, each with a",
    `deviation of 1. The other text is: “${textOf(otherOf(photo))}”`);
}

const textOf = (photo) => data.photos[photo].parts.map(([string]) => string).join("").trim();

/** The likeliest words; below them the right one where it is not among them. */
function bars({ best: guesses, right }, word) {
  const shown = guesses.some(([guess]) => guess === word) ? guesses : [...guesses, [word, right]];
  return shown.map(([guess, chance]) => make("li", { className: guess === word ? "right" : "" },
    make("span", { text: guess === word ? `${guess} ✓` : guess }),
    make("span", {}, make("i", { attributes: { style: `width:${100 * chance}%` } })),
    make("b", { text: percent(chance, 1) })));
}

function source(photo, said) {
  return [image(data.photos[photo].image, `photo ${photo + 1}`), make("span", { text: said })];
}

function showToken(number) {
  shownToken = number;
  const { photo } = chosen, { tokens, own, elsewhere } = data.rebuilt[photo], word = tokens[number][0];
  element("own-photo").replaceChildren(...source(photo, "with its own photo"));
  element("other-photo").replaceChildren(...source(otherOf(photo), "with another photo"));
  element("own-guesses").replaceChildren(...bars(own[number], word));
  element("other-guesses").replaceChildren(...bars(elsewhere[number], word));
  press(element("rebuilt-caption"), element("rebuilt-caption").querySelector(`[data-token="${number}"]`));
  say("rebuilt-live", `“${word}”: ${percent(own[number].right, 1)} with its own photo,`,
    `${percent(elsewhere[number].right, 1)} with another one.`);
}

/** The text with its masked words as buttons, one a piece. */
function maskedText(photo) {
  const { tokens } = data.rebuilt[photo];
  return (string, number) => {
    const pieces = [...tokens.keys()].filter((token) => tokens[token][1] === number);
    if (!pieces.length) return string;
    return make("span", {}, ...pieces.map((token) => make("button", {
      type: "button", className: kindOf(photo, number), dataset: { token },
      text: pieces.length > 1 ? tokens[token][0] : string,
      onclick: () => showToken(token), onfocus: () => showToken(token), onpointerenter: () => showToken(token),
    })));
  };
}

function drawRebuilt() {
  const { photo } = chosen, { tokens } = data.rebuilt[photo];
  drawPainted();
  showText(element("rebuilt-caption"), photo, maskedText(photo));
  if (tokens.length) {
    showToken(0);
    return;
  }
  for (const id of ["own-photo", "other-photo", "own-guesses", "other-guesses"]) element(id).replaceChildren();
  say("rebuilt-live", "No word of this text is masked.");
}

function answerRebuilt() {
  const sum = (count) => data.rebuilt.reduce((total, found) => total + count(found), 0);
  const hits = (found, way) => found.tokens.filter(([word], i) => found[way][i].best[0][0] === word).length;
  const right = (way) => sum((found) => hits(found, way));
  say("rebuilt-answer", "Those that name what one sees at once, such as colour, change most;",
    "what no photo shows stays a guess.",
    `Of ${sum((found) => found.tokens.length)} masked tokens on this page the best guess is right`,
    `for ${right("own")} with their own photo, for ${right("elsewhere")} with another one;`,
    "the difference is what the photo adds.");
}

function startRebuilt() {
  rove(element("rebuilt-caption"));
  answerRebuilt();
  drawings.push(drawRebuilt);
}
