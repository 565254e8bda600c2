"""The synthetic wardrobe: which garments there are, what a product can look like, and how it is described.

A style comes in several colours, so that no colour tells products apart. A description says more than one photo shows,
and every word that says something varies on its own: no other word of the description gives it away.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from numpy.random import Generator, default_rng

COLOURS = {
    "red": (196, 52, 52),
    "green": (62, 140, 80),
    "blue": (62, 112, 200),
    "purple": (134, 78, 170),
    "grey": (126, 128, 132),
}
PATTERNS = ("striped", "pinstriped", "checked", "dotted")
CLOSURES = ("zipped", "buttoned")
NOUNS = ("stripes", "pleats", "quilting", "eyelets")
# of a detail: half of its height; how far its ground, and what is on it, are from the garment's colour (`shade`)
LOOKS = {"narrow": (0.11, -0.4, 0.3), "wide": (0.28, -0.4, 0.3), "light": (0.18, 0.8, -0.3), "dark": (0.18, -0.8, 0.3)}
COARSE = ("garment", "colour", "pattern", "sleeve")  # what one sees from afar; the other kinds are details
KINDS = (*COARSE, "neck", "closure", "look", "noun", "place", "unseen")  # what words are about
UNSEEN = {  # what no photo shows
    "fabric": ("cotton", "wool", "linen", "silk", "nylon"),
    "fit": ("slim", "regular", "relaxed", "oversized"),
    "wash": ("machine", "hand", "cold", "gentle"),
    "lining": ("full", "half", "mesh", "quilted"),
    "season": ("spring", "summer", "autumn", "winter"),
}

# Garment space: x to the right, y down, inside [−1, 1]². Polygons are the right half of a shape; the left mirrors it.
Polygon = Sequence[tuple[float, float]]  # or an array (corners, 2)
SLEEVES = {
    "short": [(0.33, -0.56), (0.68, -0.3), (0.56, -0.1), (0.33, -0.24)],
    "long": [(0.33, -0.56), (0.9, 0.16), (0.76, 0.28), (0.33, -0.2)],
}
NONE = (None,)  # the options of a garment that has no sleeves, neck or closure


@dataclass(frozen=True)
class Garment:
    """A sub-category: its outline and which attributes it can have."""

    category: str
    outline: Polygon
    places: dict[str, float]  # where at the front a detail can be: the height (y) of its middle
    bottom: float  # the height of its hem
    sleeves: tuple = NONE
    necks: tuple = NONE
    closures: tuple = NONE
    extra: Polygon = ()  # a strap, handle or brim of the same cloth

    @property
    def middle(self) -> float:
        """Half the height of the outline."""
        return (self.outline[0][1] + self.bottom) / 2


def _top(
    category: str, waist: float, hem: float, bottom: float, sleeves: tuple, necks: tuple, closures: tuple = NONE
) -> Garment:
    """A garment for the upper body, `waist` and `hem` half as wide, down to `bottom`."""
    shoulder = ((0, -0.6), (0.16, -0.6), (0.38, -0.54), (0.36, -0.12))
    outline = (*shoulder, (waist, 0.08), (hem, bottom), (0, bottom))
    places = {"chest": -0.24, "waist": (bottom - 0.37) / 2, "hem": bottom - 0.14}
    return Garment(category, outline, places, bottom, sleeves, necks, closures)


def _legs(thigh: float, ankle: float, bottom: float) -> Polygon:
    return ((0, -0.8), (0.27, -0.8), (thigh, -0.35), (ankle, bottom), (ankle - 0.24, bottom), (0, -0.22))


def _skirt(hip: float, hem: float, bottom: float) -> Polygon:
    return ((0, -0.6), (0.25, -0.6), (hip, -0.25), (hem, bottom), (0, bottom))


def _lower(hip: float, bottom: float) -> dict[str, float]:
    """The places of a long garment for the lower body."""
    return {"hip": hip, "knee": (hip + bottom - 0.14) / 2, "hem": bottom - 0.14}


_TOTE = ((0, -0.2), (0.5, -0.2), (0.42, 0.62), (0, 0.62))
_HANDLE = ((0.2, -0.2), (0.15, -0.72), (0, -0.72), (0, -0.65), (0.1, -0.65), (0.14, -0.2))
_PACK = ((0, -0.62), (0.26, -0.6), (0.4, -0.4), (0.44, 0.6), (0, 0.62))
_STRAP = ((0.34, -0.3), (0.56, -0.1), (0.56, 0.4), (0.5, 0.4), (0.48, -0.05), (0.36, -0.15))
_CROWN = ((0, -0.5), (0.22, -0.46), (0.42, -0.25), (0.48, 0.1), (0, 0.16))
_BRIM = ((0, 0.08), (0.46, 0.06), (0.62, 0.28), (0.3, 0.36), (0, 0.38))
_BEANIE = ((0, -0.6), (0.2, -0.56), (0.42, -0.3), (0.46, 0.3), (0, 0.3))
_POMPOM = ((0, -0.78), (0.1, -0.74), (0.12, -0.6), (0, -0.56))
_ROUND = ("crew", "v")
_EITHER = ("short", "long")
GARMENTS = {
    "tee": _top("TOPS", 0.38, 0.38, 0.46, ("short",), _ROUND),
    "tank": _top("TOPS", 0.3, 0.3, 0.5, ("sleeveless",), _ROUND),
    "shirt": _top("SHIRTS", 0.36, 0.32, 0.66, _EITHER, ("collared",), CLOSURES),
    "polo": _top("SHIRTS", 0.36, 0.37, 0.5, _EITHER, ("collared",)),
    "sweater": _top("KNITWEAR", 0.44, 0.42, 0.42, ("long",), ("crew", "v", "high")),
    "cardigan": _top("KNITWEAR", 0.4, 0.46, 0.66, ("long",), _ROUND, CLOSURES),
    "hoodie": _top("SWEATSHIRTS", 0.42, 0.38, 0.56, ("long",), ("hooded",)),
    "bomber": _top("JACKETS", 0.54, 0.28, 0.32, ("long",), ("crew", "high"), CLOSURES),
    "coat": _top("COATS", 0.36, 0.54, 0.86, ("long",), ("collared", "high"), CLOSURES),
    "parka": _top("COATS", 0.42, 0.44, 0.72, ("long",), ("hooded", "high"), CLOSURES),
    "mini dress": _top("DRESSES", 0.2, 0.6, 0.5, ("sleeveless", *_EITHER), _ROUND),
    "maxi dress": _top("DRESSES", 0.2, 0.66, 0.9, ("sleeveless", *_EITHER), _ROUND),
    "mini skirt": Garment("SKIRTS", _skirt(0.4, 0.6, 0.12), {"hip": -0.4, "hem": -0.04}, 0.12),
    "maxi skirt": Garment("SKIRTS", _skirt(0.36, 0.56, 0.8), _lower(-0.36, 0.8), 0.8),
    "straight trousers": Garment("PANTS", _legs(0.33, 0.3, 0.88), _lower(-0.5, 0.88), 0.88),
    "flared trousers": Garment("PANTS", _legs(0.28, 0.5, 0.9), _lower(-0.5, 0.9), 0.9),
    "shorts": Garment("SHORTS", _legs(0.4, 0.52, 0.08), {"hip": -0.54, "hem": -0.1}, 0.08),
    "tote": Garment("BAGS", _TOTE, {"top": 0.0, "base": 0.42}, 0.62, extra=_HANDLE),
    "backpack": Garment("BAGS", _PACK, {"top": -0.34, "base": 0.36}, 0.6, extra=_STRAP),
    "cap": Garment("HATS", _CROWN, {"front": -0.18}, 0.3, extra=_BRIM),
    "beanie": Garment("HATS", _BEANIE, {"front": -0.22, "hem": 0.16}, 0.3, extra=_POMPOM),
}


def pick(rng: Generator, options: Iterable):
    """One of some options, each as likely."""
    options = list(options)
    return options[rng.integers(len(options))]


@dataclass(frozen=True)
class Detail:
    """A band of its own on a garment: one of LOOKS and one of NOUNS, neither of which tells the other."""

    look: str
    noun: str


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

    def with_own_words(self, rng: Generator) -> "Product":
        """The same to the eye, with another inside, others of UNSEEN, and another wording."""
        chosen = sorted(rng.permutation(list(UNSEEN)).tolist()[:4])
        unseen = {what: pick(rng, UNSEEN[what]) for what in chosen}
        details = self.details | {"inside": Detail(pick(rng, LOOKS), pick(rng, NOUNS))}
        return replace(self, details=details, unseen=unseen, wording=int(rng.integers(2**31)))

    @property
    def style(self) -> str:
        """All that photos can show of it but the colour; the order in which details were given does not matter."""
        front = sorted(self.details.keys() - {"back", "inside"})
        seen = {place: self.details[place] for place in (*front, "back") if place in self.details}
        return repr((self.garment, self.pattern, self.sleeve, self.neck, self.closure, seen))

    def attributes(self) -> dict[str, str | Detail]:
        """What is true of it: a value for every key it has."""
        names = (*COARSE, "neck", "closure")
        values = {name: getattr(self, name) for name in names if getattr(self, name)}
        return values | self.details | self.unseen

    def siblings(self) -> Iterator[tuple[str, str, "Product"]]:
        """Every product that differs in one thing that a photo can show and is worded alike: the kind of thing, the
        attribute that shows it, the product."""
        garment = GARMENTS[self.garment]
        options = {
            "garment": [name for name in GARMENTS if self._could_be(name)],
            "colour": COLOURS,
            "pattern": PATTERNS if self.pattern else (),
            "sleeve": garment.sleeves,
            "neck": garment.necks,
            "closure": garment.closures,
        }
        for kind, values in options.items():
            for value in values:
                if value != getattr(self, kind):
                    yield kind, kind, replace(self, **{kind: value})
        for place in self.details:
            if place != "inside":
                for kind, details in self._changed_details(place):
                    yield kind, place, replace(self, details=details)

    def _could_be(self, name: str) -> bool:
        """Whether a garment can have the sleeves, neck, closure and details of this product."""
        garment = GARMENTS[name]
        fits = self.sleeve in garment.sleeves and self.neck in garment.necks and self.closure in garment.closures
        return fits and self.details.keys() - {"back", "inside"} <= garment.places.keys()

    def _changed_details(self, place: str) -> Iterator[tuple[str, dict[str, Detail]]]:
        """The details with another look or noun at a place, or with what is there moved to another place."""
        detail = self.details[place]
        for look in LOOKS:
            if look != detail.look:
                yield "look", self.details | {place: Detail(look, detail.noun)}
        for noun in NOUNS:
            if noun != detail.noun:
                yield "noun", self.details | {place: Detail(detail.look, noun)}
        for other in GARMENTS[self.garment].places:
            if place != "back" and other not in self.details:
                moved = {other if key == place else key: value for key, value in self.details.items()}
                yield "place", moved

    def caption_and_spans(self) -> tuple[str, list[tuple[int, int, str, str]]]:
        """The description, and (start, end, key, kind) of every stretch of it that names an attribute."""
        caption = ""
        spans = []
        for phrase in self._phrases():
            start = len(caption)
            for words, key, kind in phrase:
                if key:
                    spans.append((len(caption), len(caption) + len(words), key, kind))
                caption += f"{words} "
            caption = f"{caption[:start]}{caption[start:].rstrip().capitalize()}. "
        return caption.rstrip(), spans

    def _phrases(self) -> list[list[tuple[str, str, str]]]:
        """The title, then the rest in random order, as (words, key, kind); key is "" of words that name nothing."""
        rng = default_rng(self.wording)
        garment = (self.garment, "garment", "garment")
        colour = (self.colour, "colour", "colour")
        title = pick(rng, ([garment, ("in", "", ""), colour], [colour, garment]))
        if self.sleeve in SLEEVES:
            title.insert(0, ("sleeve", "", ""))
        if self.sleeve:
            title.insert(0, (self.sleeve, "sleeve", "sleeve"))
        phrases = []
        for kind, noun in (("pattern", "pattern"), ("neck", "neckline"), ("closure", "front")):
            value = getattr(self, kind)
            if value:
                phrases.append([(value, kind, kind), (noun, "", "")])
        for place, detail in self.details.items():
            where = [("at", "", ""), (place, place, "place")]
            if place in ("inside", "back"):
                where = [("inside" if place == "inside" else "at back", "", "")]
            phrases.append([(detail.look, place, "look"), (detail.noun, place, "noun"), *where])
        for what, value in self.unseen.items():
            phrases.append([(value, "unseen", "unseen"), (what, "", "")])
        return [title, *(phrases[number] for number in rng.permutation(len(phrases)))]


def draw_product(rng: Generator) -> Product:
    """Draw a product: garment, colour, parts, one or two details in front and one at the back, words of its own."""
    name = pick(rng, GARMENTS)
    garment = GARMENTS[name]
    places = rng.permutation(list(garment.places)).tolist()
    front = places[: rng.integers(1, 3)]
    product = Product(
        garment=name,
        colour=pick(rng, COLOURS),
        pattern=pick(rng, PATTERNS) if rng.random() < 0.3 else None,
        sleeve=pick(rng, garment.sleeves),
        neck=pick(rng, garment.necks),
        closure=pick(rng, garment.closures),
        details={place: Detail(pick(rng, LOOKS), pick(rng, NOUNS)) for place in (*sorted(front), "back")},
    )
    return product.with_own_words(rng)


def pick_sibling(rng: Generator, siblings: list[tuple[str, Product]]) -> Product:
    """One of some variants, given with their kinds: first a kind is drawn, then a variant of it."""
    chosen = pick(rng, dict.fromkeys(kind for kind, _ in siblings))
    return pick(rng, [sibling for kind, sibling in siblings if kind == chosen])


STYLE_COLOURS = 3  # in how many colours a style comes


def draw_family(rng: Generator, owns: Callable[[Product], bool]) -> list[Product]:
    """Two styles that `owns` admits and that differ in one thing which a photo can show, in STYLE_COLOURS colours each.
    What no photo shows, and the wording, is each product's own."""
    sisters = []
    while not sisters:
        style = draw_product(rng)
        if owns(style):
            for kind, _, sibling in style.siblings():
                if kind != "colour" and owns(sibling):
                    sisters.append((kind, sibling))
    sister = pick_sibling(rng, sisters)
    family = []
    for colour in rng.permutation(list(COLOURS)).tolist()[:STYLE_COLOURS]:
        for product in (style, sister):
            family.append(replace(product.with_own_words(rng), colour=colour))
    return family
