"""The synthetic wardrobe: which garments there are, what a product can look like, and how it is described."""

import re
from dataclasses import dataclass, replace

import numpy as np

# Garment space: x to the right, y down, the whole garment inside [−1, 1]². An outline is the right half of
# the garment from (0, top) to (0, bottom); the left half mirrors it.

COLOURS = {
    "black": (35, 35, 38), "white": (246, 246, 242), "grey": (140, 142, 145), "navy": (28, 40, 92),
    "blue": (52, 120, 215), "red": (204, 36, 40), "green": (38, 132, 66), "yellow": (244, 206, 52),
    "orange": (240, 128, 36), "purple": (122, 58, 160), "pink": (244, 150, 184), "brown": (112, 70, 42),
    "beige": (216, 194, 158), "teal": (22, 146, 150),
}  # fmt: skip
PATTERNS = {
    "striped": ("Striped pattern", "Horizontal stripes"), "pinstriped": ("Pinstriped pattern", "Pinstripes"),
    "checked": ("Check pattern", "Checks"), "dotted": ("Polka dot pattern", "Dots"),
    "zigzag": ("Zigzag pattern", "Zigzags"), "diamond": ("Argyle pattern", "Diamonds"),
}  # fmt: skip
SLEEVES = {
    "sleeveless": [],
    "short": [(0.33, -0.56), (0.62, -0.27), (0.48, -0.12), (0.33, -0.26)],
    "long": [(0.33, -0.56), (0.66, 0.30), (0.50, 0.36), (0.33, -0.16)],
}
NECKS = {
    "crew": ("Crew neck", "Round neckline"), "v": ("V-neck", "V-neckline"),
    "spread": ("Spread collar", "Pointed collar"), "turtle": ("Turtleneck", "Rollneck collar"),
    "hood": ("Hood", "Drawstring hood"),
}  # fmt: skip
GRAPHICS = ("star", "heart", "circle", "triangle", "cross")
# Details a description may name: wordings, and the views that show them.
# `{…}` marks the words that the truth is about; COLOUR and SHAPE stand for the product's own.
DETAILS = {
    "pocket": (("{Patch pocket} at chest", "{Pocket} at breast"), ("front",)),
    "logo": (("{Logo patch} in {COLOUR} at front", "{COLOUR logo} at front"), ("front",)),
    "graphic": (("{SHAPE graphic} in {COLOUR} at back", "{COLOUR SHAPE print} at back"), ("back",)),
    "badge": (("{SHAPE badge} in {COLOUR} at front", "{COLOUR SHAPE appliqué} at front"), ("front",)),
    "belt": (("{Belt} in {COLOUR} at waist", "{COLOUR belt} at waist"), ("front", "back")),
    "buttons": (("{Button closure} at front", "{Buttons} in {COLOUR} at front"), ("front",)),
    "zip": (("{Zip closure} at front", "{Zip} in {COLOUR} at front"), ("front",)),
    "hem": (("{Contrast hem} in {COLOUR}", "{COLOUR trim} at hem"), ("front", "back")),
    "cuffs": (("{Ribbed cuffs} in {COLOUR}", "{COLOUR cuffs}"), ("front", "back")),
    "stripe": (("{Side stripe} in {COLOUR}", "{COLOUR band} at sides"), ("front", "back")),
    "knees": (("{Knee patches} in {COLOUR}", "{COLOUR panels} at knees"), ("front",)),
    "label": (("{Leather label} at back", "{Label} in {COLOUR} at back"), ("back",)),
}  # fmt: skip
UNSEEN = ("Tonal stitching", "Fully lined", "Cotton poplin", "Organic cotton", "Soft handle", "Dry clean")


@dataclass(frozen=True)
class Garment:
    """A sub-category: its outline and which attributes it can have. Heights (y) of waist and hem, chest centre."""

    category: str
    outline: tuple
    details: str  # keys of DETAILS
    sleeves: tuple = ()
    necks: tuple = ()
    waist: float = 0.0
    hem: float = 0.5
    chest: tuple = (0.0, -0.18)
    extras: tuple = ()  # more polygons of the same cloth: straps, handles, brims


def pick(rng: np.random.Generator, options: tuple):
    return options[int(rng.integers(len(options)))]


def _torso(waist: float, hem: float, bottom: float) -> tuple:
    return ((0, -0.6), (0.16, -0.6), (0.38, -0.54), (0.36, -0.12), (waist, 0.08), (hem, bottom), (0, bottom))


def _legs(thigh: float, ankle: float, bottom: float) -> tuple:
    return ((0, -0.8), (0.27, -0.8), (thigh, -0.35), (ankle, bottom), (max(ankle - 0.24, 0.03), bottom), (0, -0.22))


def _skirt(hip: float, hem: float, bottom: float) -> tuple:
    return ((0, -0.6), (0.25, -0.6), (hip, -0.25), (hem, bottom), (0, bottom))


_LOW = {"waist": -0.54, "chest": (0.0, -0.15)}
_HIGH = {"waist": -0.74, "chest": (0.0, -0.5)}
_TOTE = ((0, -0.2), (0.5, -0.2), (0.42, 0.62), (0, 0.62))
_HANDLE = ((0.2, -0.2), (0.15, -0.72), (0, -0.72), (0, -0.65), (0.1, -0.65), (0.14, -0.2))
_PACK = ((0, -0.62), (0.26, -0.6), (0.4, -0.4), (0.44, 0.6), (0, 0.62))
_STRAP = ((0.34, -0.3), (0.56, -0.1), (0.56, 0.4), (0.5, 0.4), (0.48, -0.05), (0.36, -0.15))
_CROWN = ((0, -0.5), (0.22, -0.46), (0.42, -0.25), (0.48, 0.1), (0, 0.16))
_BRIM = ((0, 0.08), (0.46, 0.06), (0.62, 0.28), (0.3, 0.36), (0, 0.38))
_BEANIE = ((0, -0.6), (0.2, -0.56), (0.42, -0.3), (0.46, 0.3), (0, 0.3))
_POMPOM = ((0, -0.78), (0.1, -0.74), (0.12, -0.6), (0, -0.56))
_TOP = "pocket logo graphic badge hem cuffs"
_SHIRT = _TOP + " buttons"
_COAT = "pocket logo graphic belt buttons zip hem cuffs"
_LEG = "belt stripe label hem logo"
_ANY, _LONG, _ROUND = tuple(SLEEVES), ("long",), ("crew", "v")
GARMENTS = {
    "t-shirt": Garment("TOPS", _torso(0.36, 0.37, 0.5), _TOP, ("short",), _ROUND),
    "tank top": Garment("TOPS", _torso(0.33, 0.35, 0.5), _TOP, ("sleeveless",), _ROUND),
    "shirt": Garment("SHIRTS", _torso(0.34, 0.38, 0.58), _SHIRT, _ANY[1:], ("spread",), hem=0.58),
    "polo": Garment("SHIRTS", _torso(0.36, 0.37, 0.5), _SHIRT, _ANY[1:], ("spread",)),
    "sweater": Garment("KNITWEAR", _torso(0.38, 0.34, 0.48), _TOP, _LONG, ("crew", "v", "turtle"), hem=0.48),
    "cardigan": Garment("KNITWEAR", _torso(0.38, 0.36, 0.55), _SHIRT, _LONG, ("v",), hem=0.55),
    "hoodie": Garment("SWEATSHIRTS", _torso(0.4, 0.35, 0.52), _TOP + " zip", _LONG, ("hood",), hem=0.52),
    "bomber": Garment("JACKETS", _torso(0.42, 0.33, 0.4), "pocket logo graphic zip cuffs", _LONG, ("crew",), hem=0.4),
    "coat": Garment("COATS", _torso(0.36, 0.46, 0.86), _COAT, _LONG, ("spread", "turtle"), hem=0.86),
    "parka": Garment("COATS", _torso(0.42, 0.44, 0.72), _COAT, _LONG, ("hood",), hem=0.72),
    "mini dress": Garment("DRESSES", _torso(0.25, 0.44, 0.52), _COAT, _ANY, _ROUND, hem=0.52),
    "maxi dress": Garment("DRESSES", _torso(0.25, 0.56, 0.9), _COAT, _ANY, _ROUND, hem=0.9),
    "mini skirt": Garment("SKIRTS", _skirt(0.34, 0.44, 0.12), "belt buttons zip hem label logo", **_LOW, hem=0.12),
    "midi skirt": Garment("SKIRTS", _skirt(0.34, 0.5, 0.72), "belt buttons zip hem label badge", **_LOW, hem=0.72),
    "trousers": Garment("PANTS", _legs(0.33, 0.3, 0.88), _LEG + " knees", **_HIGH, hem=0.88),
    "flared pants": Garment("PANTS", _legs(0.31, 0.46, 0.9), _LEG + " knees", **_HIGH, hem=0.9),
    "shorts": Garment("SHORTS", _legs(0.36, 0.42, 0.08), _LEG, **_HIGH, hem=0.08),
    "tote bag": Garment("BAGS", _TOTE, "logo badge graphic hem zip", hem=0.62, chest=(0, 0.2), extras=(_HANDLE,)),
    "backpack": Garment("BAGS", _PACK, "logo badge graphic pocket zip", hem=0.6, chest=(0, 0.1), extras=(_STRAP,)),
    "cap": Garment("HATS", _CROWN, "logo badge label hem", hem=0.1, chest=(0, -0.2), extras=(_BRIM,)),
    "beanie": Garment("HATS", _BEANIE, "logo badge label hem", hem=0.3, chest=(0, -0.1), extras=(_POMPOM,)),
}


@dataclass(frozen=True)
class Product:
    """One synthetic product: what it is, and its description with `{key|words}` marking what words are about."""

    garment: str
    colour: str
    pattern: tuple[str, str] | None  # kind, colour
    sleeve: str | None
    neck: str | None
    details: tuple  # (key, colour, graphic shape)
    marked_caption: str = ""

    @staticmethod
    def draw(rng: np.random.Generator) -> "Product":
        """A random product and its wording."""
        name, colour = pick(rng, tuple(GARMENTS)), pick(rng, tuple(COLOURS))
        garment = GARMENTS[name]
        others = tuple(c for c in COLOURS if c != colour)
        pattern = (pick(rng, tuple(PATTERNS)), pick(rng, others)) if rng.random() < 0.5 else None
        sleeve = pick(rng, garment.sleeves) if garment.sleeves else None
        neck = pick(rng, garment.necks) if garment.necks else None
        options = [key for key in garment.details.split() if key != "cuffs" or sleeve == "long"]
        chosen = set(rng.permutation(options)[: int(rng.integers(2, 4))].tolist())
        if "buttons" in chosen:
            chosen.discard("zip")
        free = tuple(c for c in others if not pattern or c != pattern[1])
        shape = lambda key: pick(rng, GRAPHICS) if key in ("graphic", "badge") else ""
        ink = lambda key: colour if key == "pocket" else pick(rng, free)
        details = tuple((key, ink(key), shape(key)) for key in sorted(chosen))
        product = Product(name, colour, pattern, sleeve, neck, details)
        return replace(product, marked_caption=product.describe(rng))

    def attributes(self) -> dict[str, object]:
        """What is true of it: a value for every key it has."""
        named = {"garment": self.garment, "colour": self.colour}
        named |= {"pattern": self.pattern, "sleeve": self.sleeve, "neck": self.neck}
        return named | {key: (colour, shape) for key, colour, shape in self.details}

    def describe(self, rng: np.random.Generator) -> str:
        """A random wording, in which {key|words} marks what words are about."""
        tag = lambda key, words: f"{{{key}|{words}}}"
        garment, colour = tag("garment", self.garment), tag("colour", self.colour)
        title = pick(rng, (f"{garment} in {colour}", f"{colour} {garment}"))
        if self.sleeve:
            sleeve = tag("sleeve", self.sleeve if self.sleeve == "sleeveless" else f"{self.sleeve} sleeve")
            title = pick(rng, (f"{sleeve} {title}", f"{title}. {sleeve}"))
        sentences = []
        if self.pattern:
            (long, short), ink = PATTERNS[self.pattern[0]], self.pattern[1]
            sentences.append(
                pick(rng, (f"{{{long}}} in {{{ink}}} throughout", f"{{{ink} {short.lower()}}} throughout"))
            )
            sentences[-1] = sentences[-1].replace("{", "{pattern|")
        parts = [tag("neck", pick(rng, NECKS[self.neck]))] if self.neck else []
        for key, ink, shape in self.details:
            words = pick(rng, DETAILS[key][0]).replace("COLOUR", ink).replace("SHAPE", shape)
            parts.append(words.replace("{", f"{{{key}|"))
        parts.append(tag("unseen", pick(rng, UNSEEN)))
        return ". ".join([title, *sentences, *rng.permutation(parts).tolist()]) + "."

    def caption_and_spans(self) -> tuple[str, list[tuple[int, int, str]]]:
        """The description, and (start, end, key) of every stretch of it that names an attribute."""
        caption, spans = "", []
        for marked, key, words, plain in re.findall(r"(\{(\w+)\|([^}]*)\})|([^{]+)", self.marked_caption):
            if marked:
                if not caption or caption.endswith(". "):
                    words = words[0].upper() + words[1:]
                spans.append((len(caption), len(caption) + len(words), key))
            caption += words if marked else plain
        return caption, spans
