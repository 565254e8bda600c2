"""The synthetic wardrobe: which garments there are, what a product can look like, and how it is described.

As in a shop, a style comes in several colours, so that no colour tells products apart; most of what is on a garment
is of its own colour, only lighter or darker; and a description says more than one photo shows. Every word that says
something varies on its own: no other word of the description gives it away.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

# Garment space: x to the right, y down, the whole garment inside [−1, 1]². An outline is the right half of
# the garment from (0, top) to (0, bottom); the left half mirrors it.

COLOURS = {
    "red": (196, 52, 52), "green": (62, 140, 80), "blue": (62, 112, 200), "purple": (134, 78, 170),
    "grey": (126, 128, 132),
}  # fmt: skip
PATTERNS = ("striped", "pinstriped", "checked", "dotted")
SLEEVES = {
    "sleeveless": [],
    "short": [(0.33, -0.56), (0.68, -0.3), (0.56, -0.1), (0.33, -0.24)],
    "long": [(0.33, -0.56), (0.9, 0.16), (0.76, 0.28), (0.33, -0.2)],
}
CLOSURES = ("zipped", "buttoned")
NOUNS = ("stripes", "pleats", "quilting", "eyelets")
# of a detail: half of its height; how far its ground, and what is on it, are from the garment's colour (`shade`)
LOOKS = {"narrow": (0.11, -0.4, 0.3), "wide": (0.28, -0.4, 0.3), "light": (0.18, 0.8, -0.3), "dark": (0.18, -0.8, 0.3)}
WHOLE = ("garment", "colour", "pattern", "sleeve")  # what one sees from afar; the other kinds are details
KINDS = (*WHOLE, "neck", "closure", "look", "noun", "place", "unseen")  # what words are about
UNSEEN = {  # what no photo shows
    "fabric": ("cotton", "wool", "linen", "silk", "nylon"),
    "fit": ("slim", "regular", "relaxed", "oversized"),
    "wash": ("machine", "hand", "cold", "gentle"),
    "lining": ("full", "half", "mesh", "quilted"),
    "season": ("spring", "summer", "autumn", "winter"),
}


@dataclass(frozen=True)
class Garment:
    """A sub-category: its outline and which attributes it can have."""

    category: str
    outline: tuple
    places: dict[str, float]  # where at the front a detail can be: the height (y) of its middle
    hem: float  # its height
    sleeves: tuple = ()
    necks: tuple = ()
    closures: tuple = ()
    extras: tuple = ()  # more polygons of the same cloth: straps, handles, brims


def pick(rng: np.random.Generator, options: tuple):
    return options[int(rng.integers(len(options)))]


def _torso(waist: float, hem: float, bottom: float) -> tuple:
    return ((0, -0.6), (0.16, -0.6), (0.38, -0.54), (0.36, -0.12), (waist, 0.08), (hem, bottom), (0, bottom))


def _legs(thigh: float, ankle: float, bottom: float) -> tuple:
    return ((0, -0.8), (0.27, -0.8), (thigh, -0.35), (ankle, bottom), (max(ankle - 0.24, 0.03), bottom), (0, -0.22))


def _skirt(hip: float, hem: float, bottom: float) -> tuple:
    return ((0, -0.6), (0.25, -0.6), (hip, -0.25), (hem, bottom), (0, bottom))


_TOTE = ((0, -0.2), (0.5, -0.2), (0.42, 0.62), (0, 0.62))
_HANDLE = ((0.2, -0.2), (0.15, -0.72), (0, -0.72), (0, -0.65), (0.1, -0.65), (0.14, -0.2))
_PACK = ((0, -0.62), (0.26, -0.6), (0.4, -0.4), (0.44, 0.6), (0, 0.62))
_STRAP = ((0.34, -0.3), (0.56, -0.1), (0.56, 0.4), (0.5, 0.4), (0.48, -0.05), (0.36, -0.15))
_CROWN = ((0, -0.5), (0.22, -0.46), (0.42, -0.25), (0.48, 0.1), (0, 0.16))
_BRIM = ((0, 0.08), (0.46, 0.06), (0.62, 0.28), (0.3, 0.36), (0, 0.38))
_BEANIE = ((0, -0.6), (0.2, -0.56), (0.42, -0.3), (0.46, 0.3), (0, 0.3))
_POMPOM = ((0, -0.78), (0.1, -0.74), (0.12, -0.6), (0, -0.56))


def _upper(hem: float) -> dict:
    return {"chest": -0.24, "waist": (hem - 0.37) / 2, "hem": hem - 0.14}


def _lower(top: float, hem: float) -> dict:
    return {"hip": top, "knee": (top + hem - 0.14) / 2, "hem": hem - 0.14}


_ANY, _ROUND, _LONG = tuple(SLEEVES), ("crew", "v"), ("long",)
_OPEN = {"sleeves": _LONG, "closures": CLOSURES}
GARMENTS = {
    "tee": Garment("TOPS", _torso(0.38, 0.38, 0.46), _upper(0.46), 0.46, ("short",), _ROUND),
    "tank": Garment("TOPS", _torso(0.3, 0.3, 0.5), _upper(0.5), 0.5, ("sleeveless",), _ROUND),
    "shirt": Garment("SHIRTS", _torso(0.36, 0.32, 0.66), _upper(0.66), 0.66, _ANY[1:], ("collared",), CLOSURES),
    "polo": Garment("SHIRTS", _torso(0.36, 0.37, 0.5), _upper(0.5), 0.5, _ANY[1:], ("collared",)),
    "sweater": Garment("KNITWEAR", _torso(0.44, 0.42, 0.42), _upper(0.42), 0.42, _LONG, ("crew", "v", "high")),
    "cardigan": Garment("KNITWEAR", _torso(0.4, 0.46, 0.66), _upper(0.66), 0.66, necks=_ROUND, **_OPEN),
    "hoodie": Garment("SWEATSHIRTS", _torso(0.42, 0.38, 0.56), _upper(0.56), 0.56, _LONG, ("hooded",)),
    "bomber": Garment("JACKETS", _torso(0.54, 0.28, 0.32), _upper(0.32), 0.32, necks=("crew", "high"), **_OPEN),
    "coat": Garment("COATS", _torso(0.36, 0.54, 0.86), _upper(0.86), 0.86, necks=("collared", "high"), **_OPEN),
    "parka": Garment("COATS", _torso(0.42, 0.44, 0.72), _upper(0.72), 0.72, necks=("hooded", "high"), **_OPEN),
    "mini dress": Garment("DRESSES", _torso(0.2, 0.6, 0.5), _upper(0.5), 0.5, _ANY, _ROUND),
    "maxi dress": Garment("DRESSES", _torso(0.2, 0.66, 0.9), _upper(0.9), 0.9, _ANY, _ROUND),
    "mini skirt": Garment("SKIRTS", _skirt(0.4, 0.6, 0.12), {"hip": -0.4, "hem": -0.04}, 0.12),
    "maxi skirt": Garment("SKIRTS", _skirt(0.36, 0.56, 0.8), _lower(-0.36, 0.8), 0.8),
    "straight trousers": Garment("PANTS", _legs(0.33, 0.3, 0.88), _lower(-0.5, 0.88), 0.88),
    "flared trousers": Garment("PANTS", _legs(0.28, 0.5, 0.9), _lower(-0.5, 0.9), 0.9),
    "shorts": Garment("SHORTS", _legs(0.4, 0.52, 0.08), {"hip": -0.54, "hem": -0.1}, 0.08),
    "tote": Garment("BAGS", _TOTE, {"top": 0.0, "base": 0.42}, 0.62, extras=(_HANDLE,)),
    "backpack": Garment("BAGS", _PACK, {"top": -0.34, "base": 0.36}, 0.6, extras=(_STRAP,)),
    "cap": Garment("HATS", _CROWN, {"front": -0.18}, 0.3, extras=(_BRIM,)),
    "beanie": Garment("HATS", _BEANIE, {"front": -0.22, "hem": 0.16}, 0.3, extras=(_POMPOM,)),
}


@dataclass(frozen=True)
class Detail:
    """A band of its own on a garment: a look and a noun, LOOKS and NOUNS, neither of which tells the other."""

    look: str
    noun: str

    @staticmethod
    def draw(rng: np.random.Generator) -> "Detail":
        return Detail(pick(rng, tuple(LOOKS)), pick(rng, NOUNS))


@dataclass(frozen=True)
class Product:
    """One synthetic product: what it is. Its description follows from that and from `wording`, a seed."""

    garment: str
    colour: str
    pattern: str | None
    sleeve: str | None
    neck: str | None
    closure: str | None
    details: dict[str, Detail]  # by place: some of those of the garment, "back", "inside"
    unseen: dict[str, str] = field(default_factory=dict)  # some of UNSEEN
    wording: int = 0

    @staticmethod
    def draw(rng: np.random.Generator) -> "Product":
        """A random product."""
        name = pick(rng, tuple(GARMENTS))
        garment = GARMENTS[name]
        front = rng.permutation(list(garment.places))[: int(rng.integers(1, 3))].tolist()
        return Product(
            name,
            pick(rng, tuple(COLOURS)),
            pick(rng, PATTERNS) if rng.random() < 0.3 else None,
            pick(rng, garment.sleeves) if garment.sleeves else None,
            pick(rng, garment.necks) if garment.necks else None,
            pick(rng, garment.closures) if garment.closures else None,
            {place: Detail.draw(rng) for place in (*sorted(front), "back")},
        ).with_own_words(rng)

    def with_own_words(self, rng: np.random.Generator) -> "Product":
        """The same to the eye, with another inside, care, season, … and wording."""
        unseen = {what: pick(rng, UNSEEN[what]) for what in sorted(rng.permutation(list(UNSEEN))[:4].tolist())}
        details = self.details | {"inside": Detail.draw(rng)}
        return replace(self, details=details, unseen=unseen, wording=int(rng.integers(2**31)))

    @property
    def style(self) -> str:
        """All that photos can show of it but the colour."""
        seen = [item for item in self.details.items() if item[0] != "inside"]
        seen.sort(key=lambda item: (item[0] == "back", item[0]))  # however it was made
        return repr((self.garment, self.pattern, self.sleeve, self.neck, self.closure, dict(seen)))

    def attributes(self) -> dict[str, object]:
        """What is true of it: a value for every key it has."""
        named = {name: getattr(self, name) for name in ("garment", "colour", "pattern", "sleeve", "neck", "closure")}
        return {name: value for name, value in (named | self.details | self.unseen).items() if value}

    def variants(self) -> Iterator[tuple[str, str, "Product"]]:
        """Every product that differs in one thing that a photo can show and is worded alike: the kind of thing, the
        attribute that shows it, the product."""
        garment = GARMENTS[self.garment]
        options = {"garment": _cut_alike(self), "colour": tuple(COLOURS), "pattern": PATTERNS if self.pattern else (),
                   "sleeve": garment.sleeves, "neck": garment.necks, "closure": garment.closures}  # fmt: skip
        for kind, values in options.items():
            for value in values:
                if value != getattr(self, kind):
                    yield kind, kind, replace(self, **{kind: value})
        for place, detail in self.details.items():
            if place == "inside":
                continue
            for kind, values in (("look", LOOKS), ("noun", NOUNS)):
                for value in values:
                    if value != getattr(detail, kind):
                        changed = replace(detail, **{kind: value})
                        yield kind, place, replace(self, details=self.details | {place: changed})
            for other in garment.places if place != "back" else ():
                if other not in self.details:
                    moved = {other if key == place else key: value for key, value in self.details.items()}
                    yield "place", place, replace(self, details=moved)

    @cached_property
    def marked(self) -> str:
        """The description, in which {key|kind|words} marks the words that are about an attribute."""
        rng, tag = np.random.default_rng(self.wording), lambda key, words, kind="": f"{{{key}|{kind or key}|{words}}}"
        garment, colour = tag("garment", self.garment), tag("colour", self.colour)
        title = pick(rng, (f"{garment} in {colour}", f"{colour} {garment}"))
        if self.sleeve:
            title = f"{tag('sleeve', self.sleeve)}{' sleeve' * (self.sleeve != 'sleeveless')} {title}"
        parts = [f"{tag('pattern', self.pattern)} pattern"] if self.pattern else []
        parts += [f"{tag('neck', self.neck)} neckline"] if self.neck else []
        parts += [f"{tag('closure', self.closure)} front"] if self.closure else []
        for place, detail in self.details.items():
            where = {"inside": "inside", "back": "at back"}.get(place) or f"at {tag(place, place, 'place')}"
            parts.append(f"{tag(place, detail.look, 'look')} {tag(place, detail.noun, 'noun')} {where}")
        parts += [f"{tag('unseen', value)} {what}" for what, value in self.unseen.items()]
        return ". ".join([title, *rng.permutation(parts).tolist()]) + "."

    def caption_and_spans(self) -> tuple[str, list[tuple[int, int, str, str]]]:
        """The description, and (start, end, key, kind) of every stretch of it that names an attribute."""
        caption, spans = "", []
        for marked, key, kind, words, plain in re.findall(r"(\{(\w+)\|(\w+)\|([^}]*)\})|([^{]+)", self.marked):
            if marked:
                if not caption or caption.endswith(". "):
                    words = words[0].upper() + words[1:]
                spans.append((len(caption), len(caption) + len(words), key, kind))
            caption += words if marked else plain
        return caption, spans


def _cut_alike(product: Product) -> list[str]:
    """The garments that could have the sleeves, neck, closure and details of a product."""
    front = product.details.keys() - {"back", "inside"}
    names = []
    for name, garment in GARMENTS.items():
        has = ((product.sleeve, garment.sleeves), (product.neck, garment.necks), (product.closure, garment.closures))
        fits = all(value in options if value else not options for value, options in has)
        if fits and front <= garment.places.keys():
            names.append(name)
    return names


STYLE_COLOURS = 3  # in how many colours a style comes


def draw_family(rng: np.random.Generator, owns: Callable[[Product], bool]) -> list[Product]:
    """Two styles that `owns` admits and that differ in one thing which a photo can show, in STYLE_COLOURS colours each:
    hard neighbours. What no photo shows, and the wording, is each product's own."""
    while True:
        style, sisters = Product.draw(rng), {}
        if not owns(style):
            continue
        for kind, _, variant in style.variants():
            if kind != "colour" and owns(variant):
                sisters.setdefault(kind, []).append(variant)
        if sisters:
            break
    sister = pick(rng, tuple(sisters[pick(rng, tuple(sisters))]))
    colours = rng.permutation(list(COLOURS))[:STYLE_COLOURS].tolist()
    return [replace(one.with_own_words(rng), colour=colour) for colour in colours for one in (style, sister)]
