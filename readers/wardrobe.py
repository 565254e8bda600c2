"""The synthetic wardrobe: which garments there are, what a product can look like, and what its caption says.

A style comes in several colours, so that a colour does not identify a product. A caption names more attributes than any
single image shows. Colour, pattern, and the look and noun of a detail are drawn independently. The garment limits
sleeves, neck, closure and places.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from numpy.random import Generator, default_rng

from readers.dataset import Span


class Look(NamedTuple):
    """The look of a detail as drawn: a band, lighter or darker than the garment, with a texture on it."""

    half_height: float  # in garment units
    ground_shade: float  # from the garment's colour to the band's, see `camera.shade`
    texture_shade: float  # from the garment's colour to the texture's


COLOURS = {
    "red": (196, 52, 52),
    "green": (62, 140, 80),
    "blue": (62, 112, 200),
    "purple": (134, 78, 170),
    "grey": (126, 128, 132),
}
PATTERNS = ("striped", "pinstriped", "checked", "dotted")
CLOSURES = ("zipped", "buttoned")
NOUNS = ("stripes", "pleats", "quilting", "eyelets")  # textures of details
LOOKS = {
    "narrow": Look(0.11, -0.4, 0.3),
    "wide": Look(0.28, -0.4, 0.3),
    "light": Look(0.18, 0.8, -0.3),
    "dark": Look(0.18, -0.8, 0.3),
}
INVISIBLE = {  # attributes that no image shows
    "fabric": ("cotton", "wool", "linen", "silk", "nylon"),
    "fit": ("slim", "regular", "relaxed", "oversized"),
    "wash": ("machine", "hand", "cold", "gentle"),
    "lining": ("full", "half", "mesh", "quilted"),
    "season": ("spring", "summer", "autumn", "winter"),
}
# Kinds of attributes. A detail, such as "dark stripes at chest", has three: its look, noun and place.
COARSE = ("garment", "colour", "pattern", "sleeve")  # large in the image; the other visible kinds are fine
ATTRIBUTE_KINDS = (*COARSE, "neck", "closure", "look", "noun", "place", "invisible")

# Garment space: x to the right, y down, inside [−1, 1]². Polygons are the right half of a shape; the left mirrors it.
Polygon = Sequence[tuple[float, float]]  # or an array (corners, 2)
SLEEVES = {
    "short": [(0.33, -0.56), (0.68, -0.3), (0.56, -0.1), (0.33, -0.24)],
    "long": [(0.33, -0.56), (0.9, 0.16), (0.76, 0.28), (0.33, -0.2)],
}
ABSENT = (None,)  # the options of a garment that has no sleeves, neck or closure


@dataclass(frozen=True)
class Garment:
    """A sub-category: its outline, and the options for its attributes. Heights are y in garment space."""

    category: str
    outline: Polygon
    places: dict[str, float]  # places at the front for details -> height of their middle
    bottom: float  # height of the hem
    sleeves: tuple = ABSENT
    necks: tuple = ABSENT
    closures: tuple = ABSENT
    extra: Polygon = ()  # a strap, handle or brim of the same cloth

    @property
    def middle(self) -> float:
        """The height of the middle of the outline."""
        return (self.outline[0][1] + self.bottom) / 2


def _top(
    category: str,
    waist: float,
    hem: float,
    bottom: float,
    sleeves: tuple,
    necks: tuple,
    closures: tuple = ABSENT,
) -> Garment:
    """Make a garment for the upper body. waist, hem: half of its width there · bottom: height of the hem"""
    shoulder = ((0, -0.6), (0.16, -0.6), (0.38, -0.54), (0.36, -0.12))
    outline = (*shoulder, (waist, 0.08), (hem, bottom), (0, bottom))
    places = {"chest": -0.24, "waist": (bottom - 0.37) / 2, "hem": bottom - 0.14}
    return Garment(category, outline, places, bottom, sleeves, necks, closures)


def _legs(thigh: float, ankle: float, bottom: float) -> Polygon:
    """Make the outline of trousers. thigh, ankle: x of their outer edge"""
    return ((0, -0.8), (0.27, -0.8), (thigh, -0.35), (ankle, bottom), (ankle - 0.24, bottom), (0, -0.22))


def _skirt(hip: float, hem: float, bottom: float) -> Polygon:
    """Make the outline of a skirt. hip, hem: half of its width there"""
    return ((0, -0.6), (0.25, -0.6), (hip, -0.25), (hem, bottom), (0, bottom))


def _long_places(hip: float, bottom: float) -> dict[str, float]:
    """Make the places of a long garment for the lower body. hip: height of its hip"""
    return {"hip": hip, "knee": (hip + bottom - 0.14) / 2, "hem": bottom - 0.14}


_TOTE = ((0, -0.2), (0.5, -0.2), (0.42, 0.62), (0, 0.62))
_HANDLE = ((0.2, -0.2), (0.15, -0.72), (0, -0.72), (0, -0.65), (0.1, -0.65), (0.14, -0.2))
_PACK = ((0, -0.62), (0.26, -0.6), (0.4, -0.4), (0.44, 0.6), (0, 0.62))
_STRAP = ((0.34, -0.3), (0.56, -0.1), (0.56, 0.4), (0.5, 0.4), (0.48, -0.05), (0.36, -0.15))
_CROWN = ((0, -0.5), (0.22, -0.46), (0.42, -0.25), (0.48, 0.1), (0, 0.16))
_BRIM = ((0, 0.08), (0.46, 0.06), (0.62, 0.28), (0.3, 0.36), (0, 0.38))
_BEANIE = ((0, -0.6), (0.2, -0.56), (0.42, -0.3), (0.46, 0.3), (0, 0.3))
_POMPOM = ((0, -0.78), (0.1, -0.74), (0.12, -0.6), (0, -0.56))
_CREW_OR_V = ("crew", "v")
_SHORT_OR_LONG = ("short", "long")
GARMENTS = {
    "tee": _top("TOPS", 0.38, 0.38, 0.46, ("short",), _CREW_OR_V),
    "tank": _top("TOPS", 0.3, 0.3, 0.5, ("sleeveless",), _CREW_OR_V),
    "shirt": _top("SHIRTS", 0.36, 0.32, 0.66, _SHORT_OR_LONG, ("collared",), CLOSURES),
    "polo": _top("SHIRTS", 0.36, 0.37, 0.5, _SHORT_OR_LONG, ("collared",)),
    "sweater": _top("KNITWEAR", 0.44, 0.42, 0.42, ("long",), ("crew", "v", "high")),
    "cardigan": _top("KNITWEAR", 0.4, 0.46, 0.66, ("long",), _CREW_OR_V, CLOSURES),
    "hoodie": _top("SWEATSHIRTS", 0.42, 0.38, 0.56, ("long",), ("hooded",)),
    "bomber": _top("JACKETS", 0.54, 0.28, 0.32, ("long",), ("crew", "high"), CLOSURES),
    "coat": _top("COATS", 0.36, 0.54, 0.86, ("long",), ("collared", "high"), CLOSURES),
    "parka": _top("COATS", 0.42, 0.44, 0.72, ("long",), ("hooded", "high"), CLOSURES),
    "mini dress": _top("DRESSES", 0.2, 0.6, 0.5, ("sleeveless", *_SHORT_OR_LONG), _CREW_OR_V),
    "maxi dress": _top("DRESSES", 0.2, 0.66, 0.9, ("sleeveless", *_SHORT_OR_LONG), _CREW_OR_V),
    "mini skirt": Garment("SKIRTS", _skirt(0.4, 0.6, 0.12), {"hip": -0.4, "hem": -0.04}, 0.12),
    "maxi skirt": Garment("SKIRTS", _skirt(0.36, 0.56, 0.8), _long_places(-0.36, 0.8), 0.8),
    "straight trousers": Garment("PANTS", _legs(0.33, 0.3, 0.88), _long_places(-0.5, 0.88), 0.88),
    "flared trousers": Garment("PANTS", _legs(0.28, 0.5, 0.9), _long_places(-0.5, 0.9), 0.9),
    "shorts": Garment("SHORTS", _legs(0.4, 0.52, 0.08), {"hip": -0.54, "hem": -0.1}, 0.08),
    "tote": Garment("BAGS", _TOTE, {"top": 0.0, "base": 0.42}, 0.62, extra=_HANDLE),
    "backpack": Garment("BAGS", _PACK, {"top": -0.34, "base": 0.36}, 0.6, extra=_STRAP),
    "cap": Garment("HATS", _CROWN, {"front": -0.18}, 0.3, extra=_BRIM),
    "beanie": Garment("HATS", _BEANIE, {"front": -0.22, "hem": 0.16}, 0.3, extra=_POMPOM),
}


def pick(rng: Generator, options: Iterable):
    """Draw one of some options, each with the same probability."""
    options = list(options)
    return options[rng.integers(len(options))]


@dataclass(frozen=True)
class Detail:
    """A band on a garment, such as "dark stripes". Look and noun vary independently."""

    look: str  # one of LOOKS
    noun: str  # one of NOUNS


class Words(NamedTuple):
    """Some words of a caption. Words that name no attribute have neither key nor kind."""

    text: str
    key: str = ""
    kind: str = ""


@dataclass(frozen=True)
class Product:
    """A synthetic product: the values of its attributes. They and `wording` determine its caption."""

    garment: str
    colour: str
    pattern: str | None
    sleeve: str | None
    neck: str | None
    closure: str | None
    details: dict[str, Detail]  # place -> detail; places of the garment, "back", and "inside", which no image shows
    invisible: dict[str, str] = field(default_factory=dict)  # some of INVISIBLE -> value
    wording: int = 0  # seed of the order of the phrases

    def redraw_invisible(self, rng: Generator) -> "Product":
        """Return a product that looks alike, with a new wording, new invisible attributes and a new detail inside."""
        names = sorted(rng.permutation(list(INVISIBLE)).tolist()[:4])
        invisible = {name: pick(rng, INVISIBLE[name]) for name in names}
        inside = Detail(pick(rng, LOOKS), pick(rng, NOUNS))
        wording = int(rng.integers(2**31))
        return replace(self, details=self.details | {"inside": inside}, invisible=invisible, wording=wording)

    @property
    def style(self) -> str:
        """A text of all that images can show of the product, except its colour. It ignores the order of details."""
        places = sorted(self.details.keys() - {"back", "inside"})
        if "back" in self.details:
            places.append("back")
        visible_details = {place: self.details[place] for place in places}
        return repr((self.garment, self.pattern, self.sleeve, self.neck, self.closure, visible_details))

    def attributes(self) -> dict[str, str | Detail]:
        """Return the value of each attribute that the product has. A detail has its place as key."""
        values = {}
        for key in (*COARSE, "neck", "closure"):
            value = getattr(self, key)
            if value:
                values[key] = value
        return values | self.details | self.invisible

    def siblings(self) -> Iterator["Sibling"]:
        """List every product that differs in one attribute that an image can show, and is worded alike."""
        garment = GARMENTS[self.garment]
        options = {
            "garment": [name for name in GARMENTS if self._fits(name)],
            "colour": COLOURS,
            "pattern": PATTERNS if self.pattern else (),
            "sleeve": garment.sleeves,
            "neck": garment.necks,
            "closure": garment.closures,
        }
        for kind, values in options.items():
            for value in values:
                if value != getattr(self, kind):
                    yield Sibling(kind, kind, replace(self, **{kind: value}))
        for place in self.details:
            if place == "inside":
                continue
            for kind, details in self._changed_details(place):
                yield Sibling(kind, place, replace(self, details=details))

    def _fits(self, garment_name: str) -> bool:
        """Return whether a garment can have the sleeves, neck, closure and details of this product."""
        garment = GARMENTS[garment_name]
        if self.sleeve not in garment.sleeves or self.neck not in garment.necks:
            return False
        if self.closure not in garment.closures:
            return False
        return self.details.keys() - {"back", "inside"} <= garment.places.keys()

    def _changed_details(self, place: str) -> Iterator[tuple[str, dict[str, Detail]]]:
        """List the ways to change the detail at a place: its look, its noun, its place. -> kind of change, details"""
        detail = self.details[place]
        for look in LOOKS:
            if look != detail.look:
                yield "look", self.details | {place: Detail(look, detail.noun)}
        for noun in NOUNS:
            if noun != detail.noun:
                yield "noun", self.details | {place: Detail(detail.look, noun)}
        if place == "back":
            return
        for new_place in GARMENTS[self.garment].places:
            if new_place not in self.details:
                details = {}
                for old_place, value in self.details.items():
                    key = new_place if old_place == place else old_place
                    details[key] = value
                yield "place", details

    def caption_and_spans(self) -> tuple[str, list[Span]]:
        """Compose the caption. -> caption, the stretches of it that name an attribute"""
        sentences = []
        spans = []
        start = 0
        for phrase in self._phrases():
            for words in phrase:
                end = start + len(words.text)
                if words.key:
                    spans.append(Span(start, end, words.key, words.kind))
                start = end + 1  # a blank follows
            start += 1  # a full stop stands before the last blank
            sentence = " ".join(words.text for words in phrase)
            sentences.append(f"{sentence.capitalize()}.")
        return " ".join(sentences), spans

    def _phrases(self) -> list[list[Words]]:
        """Compose the sentences of the caption: the title, then the others in random order."""
        rng = default_rng(self.wording)
        garment = Words(self.garment, "garment", "garment")
        colour = Words(self.colour, "colour", "colour")
        title = pick(rng, ([garment, Words("in"), colour], [colour, garment]))
        if self.sleeve in SLEEVES:
            title.insert(0, Words("sleeve"))
        if self.sleeve:
            title.insert(0, Words(self.sleeve, "sleeve", "sleeve"))
        phrases = []
        for kind, noun in (("pattern", "pattern"), ("neck", "neckline"), ("closure", "front")):
            value = getattr(self, kind)
            if value:
                phrases.append([Words(value, kind, kind), Words(noun)])
        for place, detail in self.details.items():
            phrase = [Words(detail.look, place, "look"), Words(detail.noun, place, "noun")]
            if place == "inside":
                phrase.append(Words("inside"))
            elif place == "back":
                phrase.append(Words("at back"))
            else:
                phrase += [Words("at"), Words(place, place, "place")]
            phrases.append(phrase)
        for name, value in self.invisible.items():
            phrases.append([Words(value, "invisible", "invisible"), Words(name)])
        order = rng.permutation(len(phrases))
        return [title, *(phrases[number] for number in order)]


class Sibling(NamedTuple):
    """A product that differs from another one in one attribute."""

    kind: str  # of the attribute, one of ATTRIBUTE_KINDS
    key: str  # of the attribute, in `attributes` of the other product
    product: Product


def draw_product(rng: Generator) -> Product:
    """Draw a product with one or two details at the front and one at the back."""
    name = pick(rng, GARMENTS)
    garment = GARMENTS[name]
    places = rng.permutation(list(garment.places)).tolist()
    front_places = places[: rng.integers(1, 3)]
    product = Product(
        garment=name,
        colour=pick(rng, COLOURS),
        pattern=pick(rng, PATTERNS) if rng.random() < 0.3 else None,
        sleeve=pick(rng, garment.sleeves),
        neck=pick(rng, garment.necks),
        closure=pick(rng, garment.closures),
        details={place: Detail(pick(rng, LOOKS), pick(rng, NOUNS)) for place in (*sorted(front_places), "back")},
    )
    return product.redraw_invisible(rng)


def pick_sibling(rng: Generator, siblings: list[Sibling]) -> Product:
    """Draw a kind of attribute, then the product of a sibling of this kind."""
    kind = pick(rng, dict.fromkeys(sibling.kind for sibling in siblings))
    return pick(rng, [sibling.product for sibling in siblings if sibling.kind == kind])


STYLE_COLOURS = 3  # colours that a style comes in


def draw_family(rng: Generator, in_split: Callable[[Product], bool]) -> list[Product]:
    """Draw two styles of a split that differ in one attribute other than colour, in STYLE_COLOURS colours each.

    Each product has a wording, invisible attributes and a detail inside of its own.
    -> 2 · STYLE_COLOURS products: style and sibling style in the first colour, in the second, and so on
    """
    siblings = []
    while not siblings:
        style = draw_product(rng)
        if in_split(style):
            for sibling in style.siblings():
                if sibling.kind != "colour" and in_split(sibling.product):
                    siblings.append(sibling)
    sibling_style = pick_sibling(rng, siblings)
    colours = rng.permutation(list(COLOURS)).tolist()[:STYLE_COLOURS]
    family = []
    for colour in colours:
        for product in (style, sibling_style):
            family.append(replace(product.redraw_invisible(rng), colour=colour))
    return family
