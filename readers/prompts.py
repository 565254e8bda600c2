"""Prefixes and prompts around captions, and category symbols: after FashionSAP and Fashion-FINE."""

import re

import numpy as np

# What the text encoder reads, in segments: a prefix or prompt, then a caption or value, then a prompt, and so on.
# Every second segment, from the second on, is a caption or value. Only words of these segments are ever masked:
#
#     "[tops] the image description is", "Red tee. V neckline.", "[SEP] the image season is", "winter"
Text = tuple[str, ...]

CAPTION_PREFIX = "the image description is"
DIFFERENCE_PREFIX = "the difference between two images are"  # Fashion-FINE's words, for text-guided retrieval
VISIBLE_ATTRIBUTES = ("colour", "pattern", "sleeve", "neck")
ATTRIBUTES = ("category", "subcategory", "name", "composition", "gender", "season", *VISIBLE_ATTRIBUTES)

# symbol -> the words of a category or sub-category that mean it, as a regular expression. The categories of FashionGen
# get the symbols that FashionSAP (Han et al. 2023) gives them.
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
    "others": r"(?!)",  # matches no word
}


def category_symbol(category: str, subcategory: str = "") -> str:
    """Choose one of SYMBOLS for a category, or for the sub-category where no word of the category means a symbol.

    The last word that means one counts, so "bag accessories" are accessories. -> "others" where no word means one
    """
    for name in (category, subcategory):
        for word in reversed(re.findall(r"[a-z]+", name.lower())):
            for symbol, words in SYMBOLS.items():
                if re.fullmatch(words, word):
                    return symbol
    return "others"


def prompt_text(caption: str, symbol: str, attributes: dict[str, str], rng: np.random.Generator) -> Text:
    """Compose the text that Fashion-FINE (Jin et al. 2024) pretrains on, with a prompt for each known attribute.

    "[symbol] the image description is … [SEP] the image season is … the image category is …"
    attributes: name -> value, "" where unknown · rng: draws the order of the prompts
    """
    known_names = [name for name in ATTRIBUTES if attributes.get(name)]
    segments = [f"[{symbol}] {CAPTION_PREFIX}", caption]
    separator = "[SEP] "  # in front of the first prompt alone
    for name in rng.permutation(known_names).tolist():
        spoken_name = name.replace("subcategory", "sub category")
        segments.append(f"{separator}the image {spoken_name} is")
        segments.append(attributes[name])
        separator = ""
    return tuple(segments)
