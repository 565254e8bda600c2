"""How a description is framed: the symbols, lead and prompts of FashionSAP and Fashion-FINE."""

import re

import numpy as np

Text = tuple[str, ...]  # pieces by turns: frame, own words, frame, own words, …; only own words are ever masked
# The frames of FashionSAP (Han et al. 2023) and Fashion-FINE (Jin et al. 2024): a symbol for the kind of garment, a
# lead, and one prompt an attribute.
DESCRIPTION, DIFFERENCE = "the image description is", "the difference between two images are"
VISIBLE_ATTRIBUTES = ("colour", "pattern", "sleeve", "neck")
ATTRIBUTES = ("category", "subcategory", "name", "composition", "gender", "season", *VISIBLE_ATTRIBUTES)
# Which words of a category or sub-category mean which symbol; categories as FashionSAP divides FashionGen's.
SYMBOLS = {
    "tops": r"(?:tank|crop)?tops?|\w*shirts?|tees?|polos?|sweaters?|knits?|knitwear|hoodies?|cardigans?|blouses?"
    r"|kurt\w+|tunics?|pullovers?|camisoles?|turtlenecks?|vests?|waistcoats?",
    "pants": r"\w*pants?|trousers?|jeans?|shorts?|leggings?|jeggings?|tights|capris?|chinos?|culottes?",
    "skirts": r"skirts?",
    "dresses": r"dress(?:es)?|gowns?|suits?|blazers?|jumpsuits?|sarees?",
    "coats": r"coats?|jackets?|parkas?|bombers?|trench\w*|outerwear",
    "shoes": r"\w*shoes?|footwear|sneakers?|trainers?|slippers?|clogs?|boots?|heels?|flats?|flops?|sandals?|loafers?"
    r"|espadrilles?|moccasins?|monkstraps?|ups|oxfords?",
    "bags": r"\w*bags?|backpacks?|clutches|totes?|pouch(?:es)?|holders?|briefcases?|satchels?|wallets?",
    "accessories": r"accessor\w+|jewell?e?ry|ties?|bars?|eyewear|sunglasses|hats?|headwear|caps?|beanies?|belts?"
    r"|suspenders?|keychains?|blankets?|gloves?|socks?|scar(?:f|ves)|mufflers?|stoles?|watch(?:es)?|cufflinks?"
    r"|umbrellas?|\w*rings?",
    "others": r"(?!)",
}


def category_symbol(category: str, subcategory: str = "") -> str:
    """The one of SYMBOLS for a category, or else for a sub-category: by its last word that means one ("bag accessories"
    are accessories), "others" if none does."""
    for name in (category, subcategory):
        for word in reversed(re.findall(r"[a-z]+", name.lower())):
            for symbol, words in SYMBOLS.items():
                if re.fullmatch(words, word):
                    return symbol
    return "others"


def prompt_text(caption: str, symbol: str, attributes: dict[str, str], rng: np.random.Generator) -> Text:
    """The text that Fashion-FINE pretrains on: "[symbol] the image description is … [SEP] the image season is … the
    image category is …", a prompt for each attribute that is known, in random order."""
    known = [name for name in ATTRIBUTES if attributes.get(name)]
    text = [f"[{symbol}] {DESCRIPTION}", caption]
    for name in rng.permutation(known).tolist():
        frame = f"the image {name.replace('subcategory', 'sub category')} is"
        text.append(frame if len(text) > 2 else f"[SEP] {frame}")
        text.append(attributes[name])
    return tuple(text)
