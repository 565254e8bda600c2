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
  const learnt = own !== undefined;
  element("painted-note").textContent = learnt
    ? "It predicts each patch up to its brightness and contrast, which are here the photo's own, as in MAE: judge the shapes inside a patch. "
      + `The other text is: “${textOf(otherOf(photo))}”`
    : `Recipe ${data.run.recipe} has not learnt to paint; there is nothing to show.`;
  element("painted").replaceChildren(...(learnt ? [
    maskedPanel(photo),
    paintedPanel("Own text", own.image, "painted with its own text", `error ${own.error.toFixed(3)}`),
    paintedPanel("Another text", elsewhere.image, "painted with another text", `error ${elsewhere.error.toFixed(3)}`),
    paintedPanel("The photo", data.photos[photo].image, `photo ${photo + 1}`, "mean squared error of the hidden patches, in their own deviations"),
  ] : []));
}

const textOf = (photo) => data.photos[photo].parts.map(([string]) => string).join("").trim();

/** The five likeliest words; below them the right one where it is not among them. */
function bars({ best: guesses, right }, word) {
  const listed = guesses.some(([guess]) => guess === word) ? guesses : [...guesses, [word, right]];
  return listed.map(([guess, chance]) => make("li", { className: guess === word ? "right" : "" },
    make("span", { text: guess === word ? `${guess} ✓` : guess }),
    make("span", {}, make("i", { attributes: { style: `width:${100 * chance}%` } })), make("b", { text: percent(chance, 1) })));
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
  element("rebuilt-live").textContent = `“${word}”: ${percent(own[number].right, 1)} with its own photo, `
    + `${percent(elsewhere[number].right, 1)} with another one.`;
}

/** The text with its masked words as buttons, one a piece. */
function maskedText(photo) {
  const { tokens } = data.rebuilt[photo];
  return (string, number) => {
    const pieces = [...tokens.keys()].filter((token) => tokens[token][1] === number);
    if (!pieces.length) return string;
    return make("span", {}, ...pieces.map((token, place) => make("button", {
      type: "button", className: kindOf(photo, number), dataset: { token }, text: pieces.length > 1 ? tokens[token][0] : string,
      onclick: () => showToken(token), onfocus: () => showToken(token), onpointerenter: () => showToken(token),
    })));
  };
}

function drawRebuilt() {
  const { photo } = chosen, { tokens } = data.rebuilt[photo];
  drawPainted();
  showText(element("rebuilt-caption"), photo, maskedText(photo));
  if (tokens.length) showToken(0);
  else for (const id of ["own-photo", "other-photo", "own-guesses", "other-guesses"]) element(id).replaceChildren();
}

function answerRebuilt() {
  const tokens = data.rebuilt.flatMap(({ tokens: all, own, elsewhere }) => all.map(([word], i) => [word, own[i], elsewhere[i]]));
  const right = (which) => tokens.filter((token) => token[which].best[0][0] === token[0]).length;
  element("rebuilt-answer").textContent = "Those that name what one sees at once, such as colour, change most; what no photo "
    + `shows stays a guess. Of ${tokens.length} masked tokens on this page the best guess is right for ${right(1)} with their own photo, `
    + `for ${right(2)} with another one; the difference is what the photo adds.`;
}

function startRebuilt() {
  rove(element("rebuilt-caption"));
  answerRebuilt();
  drawings.push(drawRebuilt);
}
