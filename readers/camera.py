"""Photographs the synthetic wardrobe, and remembers where in the photo every attribute is."""

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from readers.wardrobe import COLOURS, GARMENTS, LOOKS, SLEEVES, Detail, Garment, Product, pick

SUPERSAMPLING = 3
ZOOMS = {"close-up": (1.7, 2.2), "half": (1.3, 1.6)}  # other views fit the height of the garment


class Canvas:
    """A supersampled photo under way, and for every attribute the mask of where it was painted."""

    def __init__(self, size: int, view: str, rng: np.random.Generator, focus: float, fit: float):
        self.size = size
        angle = np.deg2rad(rng.uniform(-7, 7))
        zoom = rng.uniform(*ZOOMS[view]) if view in ZOOMS else fit * rng.uniform(0.78, 1.02)
        centre = np.array([0.0, focus]) + rng.uniform(-0.08, 0.08, 2) / zoom
        turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        self.place = lambda points: ((np.asarray(points, float) - centre) @ turn * zoom + 1) * size / 2
        self.unit = zoom * size / 2  # pixels of one garment unit
        light = rng.uniform(196, 236) + rng.uniform(-8, 8, 3)
        self.image = Image.new("RGB", (size, size), tuple(int(c) for c in light))
        self.regions: dict[str, Image.Image] = {}

    def mask(self, polygons: list, mirrored: bool = True, clip: Image.Image | None = None) -> Image.Image:
        """What some polygons, and with `mirrored` their mirror images, cover of the photo, inside `clip`."""
        mask = Image.new("L", (self.size, self.size))
        draw = ImageDraw.Draw(mask)
        for polygon in polygons:
            for side in (1, -1) if mirrored else (1,):
                draw.polygon([tuple(p) for p in self.place([(side * x, y) for x, y in polygon])], fill=255)
        return ImageChops.darker(mask, clip) if clip else mask

    def paint(self, key: str, mask: Image.Image, fill: tuple | Image.Image) -> None:
        """Fill `mask` with a colour or a cloth, with a darker edge, and remember it as the region of `key`; what it
        covers is no longer seen."""
        rim = max(1, round(0.018 * self.unit))
        tone = fill if isinstance(fill, tuple) else fill.resize((1, 1)).getpixel((0, 0))
        dark = shade(tone, -0.28)
        self._fill(dark, ImageChops.lighter(mask, _shift(mask, rim)))
        self._fill(fill, ImageChops.darker(mask, _shift(mask, -rim)))
        self.regions = {what: ImageChops.subtract(seen, mask) for what, seen in self.regions.items()}
        self.regions[key] = ImageChops.lighter(self.regions[key], mask) if key in self.regions else mask

    def _fill(self, fill: tuple | Image.Image, mask: Image.Image) -> None:
        if box := mask.getbbox():  # pasting is the costly part: only where there is something
            self.image.paste(fill if isinstance(fill, tuple) else fill.crop(box), box, mask.crop(box))

    def cloth(self, colour: tuple, weave: str | None = None, ink: tuple = (), period: float = 0.24) -> Image.Image:
        """A texture as large as the photo, of a pattern or a detail; `period` is in garment units."""
        image = Image.new("RGB", (self.size, self.size), colour)
        draw, size, step = ImageDraw.Draw(image), self.size, period * self.unit
        starts = np.arange(0, size, step).tolist()
        for a in starts:
            if weave in ("striped", "checked", "stripes"):
                draw.rectangle((0, a, size, a + 0.42 * step), fill=ink)
            if weave in ("pinstriped", "checked", "pleats"):
                draw.rectangle((a, 0, a + 0.42 * step, size), fill=ink)
            if weave in ("dotted", "eyelets"):
                for row, b in enumerate(starts):
                    x = a + row % 2 * step / 2
                    draw.ellipse((x, b, x + 0.55 * step, b + 0.55 * step), fill=ink)
        if weave == "quilting":
            for x in np.arange(-size, size, 1.4 * step).tolist():
                draw.line([(x, 0), (x + size, size)], fill=ink, width=int(0.35 * step))
                draw.line([(x + size, 0), (x, size)], fill=ink, width=int(0.35 * step))
        return image


def shade(colour: tuple, by: float) -> tuple:
    """A colour, by some share of the way to white, or if negative to black."""
    return tuple(int(c + (255 - c) * by if by > 0 else c * (1 + by)) for c in colour)


def _shift(mask: Image.Image, by: int) -> Image.Image:
    """The mask moved right and down, black where it came from."""
    moved = Image.new("L", mask.size)
    moved.paste(mask, (by, by))
    return moved


def _disc(x: float, y: float, rx: float, ry: float | None = None) -> list:
    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    return [(x + rx * np.cos(a), y + (ry or rx) * np.sin(a)) for a in angles]


def _box(x: float, y: float, half_width: float, half_height: float) -> list:
    return [(x + sx * half_width, y + sy * half_height) for sx, sy in ((-1, -1), (1, -1), (1, 1), (-1, 1))]


def _paint_neck(canvas: Canvas, neck: str, front: bool, tone: tuple) -> None:
    dark = tuple(int(c * 0.62) if sum(tone) > 200 else int(c * 0.5 + 70) for c in tone)
    inside = tuple(int(c * 0.45 + 20) for c in tone)
    if neck == "hooded":  # seen from both sides
        canvas.paint("neck", canvas.mask([_disc(0, -0.72, 0.3, 0.26)], False), dark)
        if front:
            canvas.paint("neck", canvas.mask([_disc(0, -0.7, 0.19, 0.17)], False), inside)
    elif neck == "high":
        canvas.paint("neck", canvas.mask([_box(0, -0.66, 0.19, 0.13)], False), dark)
    elif front and neck == "collared":
        canvas.paint("neck", canvas.mask([[(0.0, -0.5), (0.14, -0.7), (0.34, -0.5), (0.14, -0.3)]]), shade(tone, 0.75))
    elif front:
        corners = 12 if neck == "crew" else 3  # a half ellipse, or a triangle
        for width, depth, fill in ((0.26, 1.0, dark), (0.2, 0.8, inside)):
            depth *= {"crew": 0.16, "v": 0.5}[neck]
            angles = np.linspace(0, np.pi, corners)
            opening = [(width * np.cos(a), -0.61 + depth * np.sin(a)) for a in angles]
            canvas.paint("neck", canvas.mask([opening], False), fill)


def _paint_detail(canvas: Canvas, key: str, detail: Detail, y: float, tone: tuple, clip: Image.Image) -> None:
    """A band across the garment, lighter or darker than it, of a texture of its own."""
    half_height, *tones = LOOKS[detail.look]
    ground, ink = (shade(tone, by) for by in tones)
    band = canvas.mask([_box(0, y, 1, half_height)], mirrored=False, clip=clip)
    canvas.paint(key, band, canvas.cloth(ground, detail.noun, ink, period=0.18))


def _paint_closure(canvas: Canvas, closure: str, garment: Garment, tone: tuple, body: Image.Image) -> None:
    top, bottom = -0.42, garment.bottom
    if closure == "buttoned":
        polygons = [_disc(0, h, 0.07) for h in np.linspace(top + 0.06, bottom - 0.12, 5)]
    else:
        polygons = [_box(0, (top + bottom) / 2, 0.04, (bottom - top) / 2)]
    canvas.paint("closure", canvas.mask(polygons, mirrored=False, clip=body), shade(tone, -0.85))


def render(product: Product, view: str, size: int, rng: np.random.Generator) -> tuple[Image.Image, dict]:
    """Photograph a product: (RGB image of `size` pixels, region masks by attribute at the supersampled size).

    view: "front", "back", "close-up" of something at the front, "half" of the front.
    """
    garment = GARMENTS[product.garment]
    front = view != "back"
    middle = (garment.outline[0][1] + garment.bottom) / 2
    heights = {"close-up": list(garment.places.values()), "half": [garment.outline[0][1] + 0.25, garment.bottom - 0.3]}
    focus = pick(rng, tuple(heights.get(view, [middle])))
    canvas = Canvas(size * SUPERSAMPLING, view, rng, focus, fit=0.84 / max(0.55, garment.bottom - middle))
    tone = tuple(int(np.clip(c + rng.uniform(-9, 9), 0, 255)) for c in COLOURS[product.colour])
    cloth = canvas.cloth(tone, product.pattern, shade(tone, 0.6))

    if garment.extra:
        canvas.paint("garment", canvas.mask([garment.extra]), tone)
    sleeves = canvas.mask([SLEEVES[product.sleeve]]) if SLEEVES.get(product.sleeve) else Image.new("L", cloth.size)
    if product.sleeve not in (None, "sleeveless"):
        canvas.paint("sleeve", sleeves, cloth)
    body = canvas.mask([garment.outline])
    canvas.paint("garment", body, cloth)
    silhouette = ImageChops.lighter(canvas.regions["garment"], sleeves)
    if product.pattern:
        canvas.regions["pattern"] = ImageChops.lighter(body, sleeves)
    inner = canvas.mask([[(0.8 * x, y) for x, y in garment.outline]], clip=body)  # so that the outline shows
    widest_first = sorted(product.details.items(), key=lambda item: (-LOOKS[item[1].look][0], item[0]))
    for place, detail in widest_first:  # or they would cover the others
        if place != "inside" and front == (place != "back"):
            _paint_detail(canvas, place, detail, garment.places.get(place, middle + 0.08), tone, inner)
    if product.neck:
        _paint_neck(canvas, product.neck, front, tone)
    if product.closure and front:
        _paint_closure(canvas, product.closure, garment, tone, body)
    canvas.regions["garment"] = canvas.regions["colour"] = silhouette  # whatever lies on it
    if product.sleeve == "sleeveless":  # what shows it is the bare shoulder
        canvas.regions["sleeve"] = canvas.mask([_box(0.38, -0.42, 0.08, 0.15)])

    pixels = np.asarray(canvas.image.reduce(SUPERSAMPLING), dtype=np.float32)
    slope = np.linspace(*rng.uniform(0.9, 1.08, 2), size, dtype=np.float32)[:, None, None]
    pixels = pixels * slope + rng.normal(0, 4, pixels.shape).astype(np.float32)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), canvas.regions
