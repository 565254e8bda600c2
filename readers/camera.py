"""Photographs the synthetic wardrobe, and remembers where in the photo every attribute is."""

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw
from PIL.ImageChops import darker, lighter, subtract  # of masks: what both cover, what one covers, what only the first

from readers.wardrobe import COLOURS, GARMENTS, LOOKS, SLEEVES, Garment, Polygon, Product, pick

SUPERSAMPLING = 3
Colour = tuple[int, ...]
Mask = Image.Image  # mode "L": 255 where something is, else 0


class Canvas:
    """A supersampled photo under way, and for every attribute the mask of where it shows."""

    def __init__(self, garment: Garment, view: str, size: int, rng: Generator):
        if view == "close-up":
            focus = pick(rng, garment.places.values())
            zooms = (1.7, 2.2)
        elif view == "half":
            focus = pick(rng, (garment.outline[0][1] + 0.25, garment.bottom - 0.3))
            zooms = (1.3, 1.6)
        else:  # the whole garment
            focus = garment.middle
            fit = 0.84 / max(0.55, garment.bottom - garment.middle)
            zooms = (0.78 * fit, 1.02 * fit)
        angle = np.deg2rad(rng.uniform(-7, 7))
        cos = np.cos(angle)
        sin = np.sin(angle)
        self.turn = np.array([[cos, sin], [-sin, cos]])
        zoom = rng.uniform(*zooms)
        offset = rng.uniform(-0.08, 0.08, 2) / zoom
        self.centre = (0, focus) + offset
        self.size = size
        self.unit = zoom * size / 2  # pixels of one garment unit
        background = rng.uniform(196, 236) + rng.uniform(-8, 8, 3)
        self.image = Image.new("RGB", (size, size), _colour(background))
        self.regions = {}  # key of an attribute -> Mask

    def mask(self, *polygons: Polygon) -> Mask:
        """What some polygons of garment space cover of the photo."""
        mask = Image.new("L", (self.size, self.size))
        draw = ImageDraw.Draw(mask)
        for polygon in polygons:
            corners = np.array(polygon) - self.centre
            pixels = corners @ self.turn * self.unit + self.size / 2
            draw.polygon(pixels.ravel().tolist(), 255)
        return mask

    def both_sides(self, half: Polygon) -> Mask:
        """What the right half of a shape and its mirror image cover of the photo."""
        return self.mask(half, [(-x, y) for x, y in half])

    def paint(self, key: str, mask: Mask, cloth: Image.Image | Colour) -> None:
        """Fill `mask` with a cloth with a darker edge, as a region of `key`; what it covers is no longer seen."""
        rim = max(1, round(0.018 * self.unit))
        edge = lighter(mask, _shift(mask, rim))
        inside = darker(mask, _shift(mask, -rim))
        box = edge.getbbox()
        if box:  # pasting is slow: only where there is something
            colour = cloth
            if isinstance(cloth, Image.Image):
                colour = cloth.resize((1, 1)).getpixel((0, 0))
                cloth = cloth.crop(box)
            self.image.paste(shade(colour, -0.28), box, edge.crop(box))
            self.image.paste(cloth, box, inside.crop(box))
        painted = self.regions.get(key, mask)
        for other, region in self.regions.items():
            self.regions[other] = subtract(region, mask)
        self.regions[key] = lighter(painted, mask)

    def cloth(self, colour: Colour, weave: str | None, ink: Colour, period: float) -> Image.Image:
        """A texture as large as the photo, of a pattern or a detail; `period` is in garment units."""
        size = self.size
        image = Image.new("RGB", (size, size), colour)
        draw = ImageDraw.Draw(image)
        step = period * self.unit
        dot = 0.55 * step
        starts = np.arange(0, size, step).tolist()
        for row, start in enumerate(starts):
            end = start + 0.42 * step
            if weave in ("striped", "checked", "stripes"):
                draw.rectangle((0, start, size, end), ink)
            if weave in ("pinstriped", "checked", "pleats"):
                draw.rectangle((start, 0, end, size), ink)
            if weave in ("dotted", "eyelets"):
                for column in starts:
                    x = column + row % 2 * step / 2  # the dots of every other row stand between those above
                    draw.ellipse((x, start, x + dot, start + dot), ink)
        if weave == "quilting":
            width = int(0.35 * step)
            for start in np.arange(-size, size, 1.4 * step).tolist():
                end = start + size
                draw.line((start, 0, end, size), ink, width)
                draw.line((end, 0, start, size), ink, width)
        return image


def _colour(values: np.ndarray) -> Colour:
    return tuple(values.astype(int).tolist())


def shade(colour: Colour, by: float) -> Colour:
    """A colour, by some share of the way to white, or if negative to black."""
    values = np.array(colour)
    if by > 0:
        return _colour(values + (255 - values) * by)
    return _colour(values * (1 + by))


def _shift(mask: Mask, by: int) -> Mask:
    """The mask moved right and down, black where it came from."""
    moved = Image.new("L", mask.size)
    moved.paste(mask, (by, by))
    return moved


def _box(left: float, top: float, right: float, bottom: float) -> Polygon:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def _arc(middle: float, width: float, height: float, degrees: float = 360, corners: int = 25) -> Polygon:
    """An ellipse around (0, middle), or the part of it up to an angle, as a polygon. -> (corners, 2)."""
    angles = np.deg2rad(np.linspace(0, degrees, corners))
    x = width * np.cos(angles)
    y = middle + height * np.sin(angles)
    return np.stack([x, y], axis=1)


_COLLAR = ((0, -0.5), (0.14, -0.7), (0.34, -0.5), (0.14, -0.3))
_RIMS = {
    "hooded": _arc(-0.72, 0.3, 0.26),
    "high": _box(-0.19, -0.79, 0.19, -0.53),
    "crew": _arc(-0.61, 0.26, 0.16, 180, 12),
    "v": _arc(-0.61, 0.26, 0.5, 180, 3),
}
_OPENINGS = {
    "hooded": _arc(-0.7, 0.19, 0.17),
    "crew": _arc(-0.61, 0.2, 0.128, 180, 12),
    "v": _arc(-0.61, 0.2, 0.4, 180, 3),
}


def _paint_neck(canvas: Canvas, neck: str, front: bool, tone: Colour) -> None:
    """Paint a collar, or the rim of a neckline and what one sees inside it."""
    if neck in ("hooded", "high") or (front and neck in _RIMS):
        canvas.paint("neck", canvas.mask(_RIMS[neck]), shade(tone, -0.38))
    if front and neck in _OPENINGS:
        shadow = _colour(np.array(tone) * 0.45 + 20)
        canvas.paint("neck", canvas.mask(_OPENINGS[neck]), shadow)
    if front and neck == "collared":
        canvas.paint("neck", canvas.both_sides(_COLLAR), shade(tone, 0.75))


def _paint_details(canvas: Canvas, product: Product, front: bool, tone: Colour, clip: Mask) -> None:
    """Paint a band for each detail that can be seen: lighter or darker than the garment, with a texture of its own."""
    garment = GARMENTS[product.garment]
    places = garment.places if front else {"back": garment.middle + 0.08}
    bands = []
    for place in product.details.keys() & places.keys():
        half_height = LOOKS[product.details[place].look][0]
        bands.append((-half_height, place))
    for _, place in sorted(bands):  # the widest first, or they would cover the others
        detail = product.details[place]
        half_height, ground_shade, ink_shade = LOOKS[detail.look]
        y = places[place]
        box = _box(-1, y - half_height, 1, y + half_height)
        band = darker(canvas.mask(box), clip)
        ground = shade(tone, ground_shade)
        ink = shade(tone, ink_shade)
        cloth = canvas.cloth(ground, detail.noun, ink, period=0.18)
        canvas.paint(place, band, cloth)


def render(product: Product, view: str, size: int, rng: Generator) -> tuple[Image.Image, dict]:
    """Photograph a product: (RGB image of `size` pixels, region masks by attribute at the supersampled size).

    view: "front", "back", "close-up" of something at the front, "half" of the front.
    """
    garment = GARMENTS[product.garment]
    front = view != "back"
    canvas = Canvas(garment, view, size * SUPERSAMPLING, rng)
    tone = _colour(COLOURS[product.colour] + rng.uniform(-9, 9, 3))
    cloth = canvas.cloth(tone, product.pattern, shade(tone, 0.6), period=0.24)

    if garment.extra:
        canvas.paint("garment", canvas.both_sides(garment.extra), tone)
    sleeves = canvas.mask()  # none
    if product.sleeve in SLEEVES:
        sleeves = canvas.both_sides(SLEEVES[product.sleeve])
        canvas.paint("sleeve", sleeves, cloth)
    body = canvas.both_sides(garment.outline)
    canvas.paint("garment", body, cloth)
    silhouette = lighter(canvas.regions["garment"], sleeves)
    if product.pattern:
        canvas.regions["pattern"] = lighter(body, sleeves)
    narrower = np.array(garment.outline) * (0.8, 1)  # so that the outline shows beside the details
    inner = darker(canvas.both_sides(narrower), body)
    _paint_details(canvas, product, front, tone, inner)
    if product.neck:
        _paint_neck(canvas, product.neck, front, tone)
    if product.closure and front:
        polygons = [_box(-0.04, -0.42, 0.04, garment.bottom)]  # a zip
        if product.closure == "buttoned":
            polygons = [_arc(y, 0.07, 0.07) for y in np.linspace(-0.36, garment.bottom - 0.12, 5)]
        closure = darker(canvas.mask(*polygons), body)
        canvas.paint("closure", closure, shade(tone, -0.85))
    canvas.regions["garment"] = silhouette  # whatever lies on it
    canvas.regions["colour"] = silhouette
    if product.sleeve == "sleeveless":  # what shows it is the bare shoulder
        canvas.regions["sleeve"] = canvas.both_sides(_box(0.3, -0.57, 0.46, -0.27))

    pixels = np.asarray(canvas.image.reduce(SUPERSAMPLING))
    top_light, bottom_light = rng.uniform(0.9, 1.08, 2)
    light = np.linspace(top_light, bottom_light, size, dtype=np.float32)
    noise = rng.normal(0, 4, pixels.shape).astype(np.float32)
    pixels = pixels * light[:, None, None] + noise
    pixels = pixels.clip(0, 255).astype(np.uint8)
    return Image.fromarray(pixels), canvas.regions
