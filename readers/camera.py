"""Renders images of the synthetic wardrobe, with a mask of each attribute that an image shows."""

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw
from PIL.ImageChops import darker, lighter, subtract  # of masks: intersection, union, difference

from readers.wardrobe import COLOURS, GARMENTS, LOOKS, SLEEVES, Garment, Polygon, Product, pick

SUPERSAMPLING = 3  # images are drawn this much larger, then averaged
Colour = tuple[int, ...]  # (red, green, blue), 0 to 255
Mask = Image.Image  # mode "L": 255 inside, 0 outside


class Canvas:
    """A supersampled image that is being drawn, with the mask of each attribute that is visible so far.

    garment, view: determine what the camera points at · size: side in pixels
    rng: draws rotation, zoom, offset and background
    """

    def __init__(self, garment: Garment, view: str, size: int, rng: Generator):
        if view == "close-up":
            focus = pick(rng, garment.places.values())
            zoom_range = (1.7, 2.2)
        elif view == "half":
            focus = pick(rng, (garment.outline[0][1] + 0.25, garment.bottom - 0.3))
            zoom_range = (1.3, 1.6)
        else:  # the whole garment
            focus = garment.middle
            fit = 0.84 / max(0.55, garment.bottom - garment.middle)
            zoom_range = (0.78 * fit, 1.02 * fit)
        angle = np.deg2rad(rng.uniform(-7, 7))
        cos = np.cos(angle)
        sin = np.sin(angle)
        self.rotation = np.array([[cos, sin], [-sin, cos]])
        zoom = rng.uniform(*zoom_range)
        offset = rng.uniform(-0.08, 0.08, 2) / zoom
        self.centre = (0, focus) + offset  # in garment space
        self.size = size
        self.unit = zoom * size / 2  # pixels of one garment unit
        background = rng.uniform(196, 236) + rng.uniform(-8, 8, 3)
        self.image = Image.new("RGB", (size, size), _to_colour(background))
        self.regions: dict[str, Mask] = {}  # by attribute

    def mask(self, *polygons: Polygon) -> Mask:
        """Make the mask of some polygons, given in garment space."""
        mask = Image.new("L", (self.size, self.size))
        draw = ImageDraw.Draw(mask)
        for polygon in polygons:
            corners = np.array(polygon) - self.centre
            pixels = corners @ self.rotation * self.unit + self.size / 2
            draw.polygon(pixels.ravel().tolist(), 255)
        return mask

    def mirrored_mask(self, polygon: Polygon) -> Mask:
        """Make the mask of the right half of a shape together with its mirror image."""
        mirror_image = [(-x, y) for x, y in polygon]
        return self.mask(polygon, mirror_image)

    def paint(self, key: str, mask: Mask, cloth: Image.Image | Colour) -> None:
        """Fill a mask with cloth that has a darker edge, and add the mask to the region of an attribute.

        Attributes below it are no longer visible there, so the mask is subtracted from their regions.
        """
        rim = max(1, round(0.018 * self.unit))
        edge = lighter(mask, _shift(mask, rim))
        inside = darker(mask, _shift(mask, -rim))
        box = edge.getbbox()
        if box:  # pasting is slow, so only this part is pasted
            colour = cloth
            if isinstance(cloth, Image.Image):
                colour = cloth.resize((1, 1)).getpixel((0, 0))
                cloth = cloth.crop(box)
            self.image.paste(shade(colour, -0.28), box, edge.crop(box))
            self.image.paste(cloth, box, inside.crop(box))
        region = self.regions.get(key, mask)
        for covered_key, covered_region in self.regions.items():
            self.regions[covered_key] = subtract(covered_region, mask)
        self.regions[key] = lighter(region, mask)

    def cloth(self, ground: Colour, texture: str | None, ink: Colour, period: float) -> Image.Image:
        """Draw cloth as large as the image.

        texture: a pattern, the noun of a detail, or None for plain cloth, in the colour `ink` on `ground`
        period: distance from one stripe or dot to the next, in garment units
        """
        size = self.size
        image = Image.new("RGB", (size, size), ground)
        draw = ImageDraw.Draw(image)
        step = period * self.unit
        dot = 0.55 * step
        starts = np.arange(0, size, step).tolist()
        for row, start in enumerate(starts):
            end = start + 0.42 * step
            if texture in ("striped", "checked", "stripes"):
                draw.rectangle((0, start, size, end), ink)
            if texture in ("pinstriped", "checked", "pleats"):
                draw.rectangle((start, 0, end, size), ink)
            if texture in ("dotted", "eyelets"):
                for column in starts:
                    x = column + row % 2 * step / 2  # every other row is shifted by half a step
                    draw.ellipse((x, start, x + dot, start + dot), ink)
        if texture == "quilting":
            width = int(0.35 * step)
            for start in np.arange(-size, size, 1.4 * step).tolist():
                end = start + size
                draw.line((start, 0, end, size), ink, width)
                draw.line((end, 0, start, size), ink, width)
        return image


def _to_colour(values: np.ndarray) -> Colour:
    return tuple(values.astype(int).tolist())


def shade(colour: Colour, share: float) -> Colour:
    """Move a colour by a share of the way to white, or to black where the share is negative. share in [−1, 1]"""
    values = np.array(colour)
    if share > 0:
        return _to_colour(values + (255 - values) * share)
    return _to_colour(values * (1 + share))


def _shift(mask: Mask, pixels: int) -> Mask:
    """Move a mask to the right and down."""
    shifted = Image.new("L", mask.size)
    shifted.paste(mask, (pixels, pixels))
    return shifted


def _box(left: float, top: float, right: float, bottom: float) -> Polygon:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def _arc(middle: float, width: float, height: float, degrees: float = 360, corners: int = 25) -> Polygon:
    """Make a polygon of an ellipse around (0, middle), or of its arc from angle 0. -> (corners, 2)"""
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


def render(product: Product, view: str, size: int, rng: Generator) -> tuple[Image.Image, dict[str, Mask]]:
    """Render an image of a product.

    view: "front"; "back"; "close-up" of a place at the front; "half", the upper or lower half of the front
    size: side of the image in pixels · rng: draws the camera, the exact colour, the light and the noise
    -> RGB image; attribute -> mask of where it is visible, with SUPERSAMPLING · size pixels a side
    """
    garment = GARMENTS[product.garment]
    front = view != "back"
    canvas = Canvas(garment, view, size * SUPERSAMPLING, rng)
    colour = _to_colour(COLOURS[product.colour] + rng.uniform(-9, 9, 3))
    cloth = canvas.cloth(colour, product.pattern, shade(colour, 0.6), period=0.24)

    if garment.extra:
        canvas.paint("garment", canvas.mirrored_mask(garment.extra), colour)
    sleeves = canvas.mask()  # empty
    if product.sleeve in SLEEVES:
        sleeves = canvas.mirrored_mask(SLEEVES[product.sleeve])
        canvas.paint("sleeve", sleeves, cloth)
    body = canvas.mirrored_mask(garment.outline)
    canvas.paint("garment", body, cloth)
    silhouette = lighter(canvas.regions["garment"], sleeves)
    if product.pattern:
        canvas.regions["pattern"] = lighter(body, sleeves)
    narrower = np.array(garment.outline) * (0.8, 1)  # the outline stays visible beside the details
    _paint_details(canvas, product, front, colour, darker(canvas.mirrored_mask(narrower), body))
    if product.neck:
        _paint_neck(canvas, product.neck, front, colour)
    if product.closure and front:
        _paint_closure(canvas, product.closure, garment.bottom, colour, body)
    canvas.regions["garment"] = silhouette  # with all that lies on it
    canvas.regions["colour"] = silhouette
    if product.sleeve == "sleeveless":  # the bare shoulder shows it
        canvas.regions["sleeve"] = canvas.mirrored_mask(_box(0.3, -0.57, 0.46, -0.27))
    return _add_light_and_noise(canvas.image.reduce(SUPERSAMPLING), rng), canvas.regions


def _paint_details(canvas: Canvas, product: Product, front: bool, colour: Colour, clip: Mask) -> None:
    """Paint a band for each detail on the visible side, inside the mask `clip`."""
    garment = GARMENTS[product.garment]
    places = garment.places if front else {"back": garment.middle + 0.08}
    bands = []
    for place in product.details.keys() & places.keys():
        half_height = LOOKS[product.details[place].look].half_height
        bands.append((-half_height, place))
    for _, place in sorted(bands):  # the widest first, since it would cover the others
        detail = product.details[place]
        look = LOOKS[detail.look]
        y = places[place]
        box = _box(-1, y - look.half_height, 1, y + look.half_height)
        band = darker(canvas.mask(box), clip)
        ground = shade(colour, look.ground_shade)
        ink = shade(colour, look.texture_shade)
        cloth = canvas.cloth(ground, detail.noun, ink, period=0.18)
        canvas.paint(place, band, cloth)


def _paint_neck(canvas: Canvas, neck: str, front: bool, colour: Colour) -> None:
    """Paint a collar, or the rim of a neckline and the shadow in its opening."""
    if neck in ("hooded", "high") or (front and neck in _RIMS):
        canvas.paint("neck", canvas.mask(_RIMS[neck]), shade(colour, -0.38))
    if front and neck in _OPENINGS:
        shadow = _to_colour(np.array(colour) * 0.45 + 20)
        canvas.paint("neck", canvas.mask(_OPENINGS[neck]), shadow)
    if front and neck == "collared":
        canvas.paint("neck", canvas.mirrored_mask(_COLLAR), shade(colour, 0.75))


def _paint_closure(canvas: Canvas, closure: str, bottom: float, colour: Colour, body: Mask) -> None:
    """Paint a zip, or five buttons, from the neck down to the hem at the height `bottom`."""
    if closure == "buttoned":
        polygons = [_arc(y, 0.07, 0.07) for y in np.linspace(-0.36, bottom - 0.12, 5)]
    else:
        polygons = [_box(-0.04, -0.42, 0.04, bottom)]
    mask = darker(canvas.mask(*polygons), body)
    canvas.paint("closure", mask, shade(colour, -0.85))


def _add_light_and_noise(image: Image.Image, rng: Generator) -> Image.Image:
    """Multiply an image by light that changes from top to bottom, and add noise to each pixel."""
    pixels = np.asarray(image)
    top_light, bottom_light = rng.uniform(0.9, 1.08, 2)
    light = np.linspace(top_light, bottom_light, len(pixels), dtype=np.float32)
    noise = rng.normal(0, 4, pixels.shape).astype(np.float32)
    pixels = pixels * light[:, None, None] + noise
    pixels = pixels.clip(0, 255).astype(np.uint8)
    return Image.fromarray(pixels)
