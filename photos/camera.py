"""Photographs the synthetic wardrobe, and remembers where in the photo every attribute is."""

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from photos.wardrobe import COLOURS, GARMENTS, LOOKS, SLEEVES, Detail, Garment, Product

SUPERSAMPLING = 3
ZOOMS = {"close-up": (2.0, 2.6), "half": (1.4, 1.8)}  # other views show the whole garment


class Canvas:
    """A supersampled photo under way, and for every attribute the mask of where it was painted."""

    def __init__(self, size: int, view: str, rng: np.random.Generator, focus: tuple[float, float], fit: float):
        self.size = size
        angle = np.deg2rad(rng.uniform(-7, 7))
        zoom = rng.uniform(*ZOOMS[view]) if view in ZOOMS else fit * rng.uniform(0.78, 1.02)
        centre = np.array(focus) + rng.uniform(-0.08, 0.08, 2) / zoom
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

    def paint(self, key: str, mask: Image.Image, fill: tuple | Image.Image, edge: float = 0.72) -> None:
        """Fill `mask` with a colour or a cloth, with a darker edge, and remember it as the region of `key`."""
        rim = max(1, round(0.018 * self.unit))
        tone = fill if isinstance(fill, tuple) else fill.resize((1, 1)).getpixel((0, 0))
        dark = tuple(int(c * edge) for c in tone)
        self._fill(dark, ImageChops.lighter(mask, _shift(mask, rim)))
        self._fill(fill, ImageChops.darker(mask, _shift(mask, -rim)))
        known = self.regions.get(key)
        self.regions[key] = ImageChops.lighter(known, mask) if known else mask

    def colour_at(self, x: float, y: float) -> tuple:
        """The colour of the photo at a place of the garment, or at the nearest pixel inside."""
        at = self.place([(x, y)])[0].clip(0, self.size - 1).astype(int)
        return self.image.getpixel(tuple(at.tolist()))

    def _fill(self, fill: tuple | Image.Image, mask: Image.Image) -> None:
        if box := mask.getbbox():  # pasting is the costly part: only where there is something
            self.image.paste(fill if isinstance(fill, tuple) else fill.crop(box), box, mask.crop(box))

    def cloth(self, colour: tuple, pattern: tuple[str, tuple] | None) -> Image.Image:
        """A texture as large as the photo; the period of the pattern grows with the zoom."""
        image = Image.new("RGB", (self.size, self.size), colour)
        if pattern is None:
            return image
        draw, (kind, ink), size = ImageDraw.Draw(image), pattern, self.size
        step = 0.2 * self.unit
        for i in range(int(size / step) + 2):
            for j in range(int(size / step) + 2) if kind in ("dotted", "zigzag", "argyle") else (0,):
                a, b = i * step, j * step
                if kind in ("striped", "checked"):
                    draw.rectangle((0, a, size, a + step * 0.4), fill=ink)
                if kind == "checked":
                    draw.rectangle((a, 0, a + step * 0.3, size), fill=ink)
                if kind == "pinstriped":
                    draw.rectangle((a * 0.7, 0, a * 0.7 + step * 0.16, size), fill=ink)
                if kind == "dotted":
                    x = a + (j % 2) * step / 2
                    draw.ellipse((x, b, x + step * 0.45, b + step * 0.45), fill=ink)
                if kind == "zigzag":
                    corners = [(a, b), (a + step / 2, b + step / 2), (a + step, b)]
                    draw.line(corners, fill=ink, width=int(step * 0.22))
                if kind == "argyle":
                    r = step * 0.42
                    draw.polygon([(a, b - r), (a + r, b), (a, b + r), (a - r, b)], fill=ink)
        return image


def shade(colour: tuple, by: float) -> tuple:
    """A colour, by some share of the way to white, or if negative to black."""
    return tuple(int(c + (255 - c) * by if by > 0 else c * (1 + by)) for c in colour)


def _shift(mask: Image.Image, by: int) -> Image.Image:
    """The mask moved right and down, black where it came from."""
    moved = Image.new("L", mask.size)
    moved.paste(mask, (by, by))
    return moved


def _disc(x: float, y: float, rx: float, ry: float | None = None, corners: int = 24, start: float = 0.0) -> list:
    angles = start + np.linspace(0, 2 * np.pi, corners, endpoint=False)
    return [(x + rx * np.cos(a), y + (ry or rx) * np.sin(a)) for a in angles]


def _box(x: float, y: float, half_width: float, half_height: float) -> list:
    return [(x + sx * half_width, y + sy * half_height) for sx, sy in ((-1, -1), (1, -1), (1, 1), (-1, 1))]


def _paint_neck(canvas: Canvas, neck: str, front: bool, tone: tuple, inside: tuple) -> None:
    dark = tuple(int(c * 0.62) if sum(tone) > 200 else int(c * 0.5 + 70) for c in tone)
    if neck == "hooded":  # seen from both sides
        canvas.paint("neck", canvas.mask([_disc(0, -0.66, 0.27, 0.2)], False), dark)
        if front:
            canvas.paint("neck", canvas.mask([_disc(0, -0.64, 0.17, 0.13)], False), inside)
    elif neck == "high":
        canvas.paint("neck", canvas.mask([_box(0, -0.64, 0.17, 0.09)], False), dark)
    elif front and neck == "collared":
        canvas.paint("neck", canvas.mask([[(0.02, -0.52), (0.15, -0.66), (0.27, -0.46), (0.1, -0.34)]]), dark)
    elif front:
        corners = 12 if neck == "crew" else 3  # a half ellipse, or a triangle
        for width, depth, fill in ((0.21, 1.0, dark), (0.14, 0.66, inside)):
            depth *= {"crew": 0.17, "v": 0.36}[neck]
            angles = np.linspace(0, np.pi, corners)
            opening = [(width * np.cos(a), -0.61 + depth * np.sin(a)) for a in angles]
            canvas.paint("neck", canvas.mask([opening], False), fill)


def _place(garment: Garment, place: str) -> tuple[float, float]:
    """The middle of a detail."""
    if place == "back":
        return 0.0, (garment.outline[0][1] + garment.hem) / 2 + 0.08
    return garment.places[place]


def _detail(detail: Detail, x: float, y: float) -> list:
    """The polygons of a detail; of a pocket the edge, all around."""
    r, _ = LOOKS[detail.look]
    match detail.noun:
        case "badge":
            return [_disc(x, y, r)]
        case "star":
            tips = zip(
                _disc(x, y, 1.25 * r, corners=5, start=-np.pi / 2), _disc(x, y, r / 2, corners=5, start=-0.3 * np.pi)
            )
            return [[p for pair in tips for p in pair]]
        case "cross":
            return [_box(x, y, r, r * 0.3), _box(x, y, r * 0.3, r)]
        case "stripe":
            return [_box(0, y, 1, r * 0.4)]
    rim = 0.3 * r  # pocket
    sides = [_box(x + s * (r - rim / 2), y, rim / 2, r) for s in (1, -1)]
    return [*sides, _box(x, y + r - rim / 2, r, rim / 2), _box(x, y - r + rim, r, rim)]


def _closure(canvas: Canvas, closure: str, garment: Garment, fill: tuple, body: Image.Image) -> None:
    top, bottom = -0.42, garment.hem
    if closure == "buttoned":
        polygons = [_disc(0, h, 0.045) for h in np.linspace(top + 0.06, bottom - 0.12, 5)]
    else:
        polygons = [_box(0, (top + bottom) / 2, 0.03, (bottom - top) / 2), _box(0.05, top + 0.06, 0.03, 0.06)]
    canvas.paint("closure", canvas.mask(polygons, mirrored=False, clip=body), fill)


def render(product: Product, view: str, size: int, rng: np.random.Generator) -> tuple[Image.Image, dict]:
    """Photograph a product: (RGB image of `size` pixels, region masks by attribute at the supersampled size).

    view: "front", "back", "close-up" of something at the front, "half" of the front.
    """
    garment = GARMENTS[product.garment]
    front = view != "back"
    spots = list(garment.places.values())
    if view == "half":
        spots = [(0.0, garment.outline[0][1] + 0.25), (0.0, garment.hem - 0.3)]
    middle = (garment.outline[0][1] + garment.hem) / 2
    focus = spots[int(rng.integers(len(spots)))] if view in ZOOMS else (0.0, middle)
    canvas = Canvas(size * SUPERSAMPLING, view, rng, focus, fit=0.84 / max(0.55, garment.hem - middle))
    tone = tuple(int(np.clip(c + rng.uniform(-9, 9), 0, 255)) for c in COLOURS[product.colour])
    cloth = canvas.cloth(tone, product.pattern and (product.pattern, shade(tone, 0.3)))
    inside = tuple(int(c * 0.45 + 20) for c in tone)

    if garment.extras:
        canvas.paint("garment", canvas.mask(list(garment.extras)), tone)
    sleeves = canvas.mask([SLEEVES[product.sleeve]]) if SLEEVES.get(product.sleeve) else Image.new("L", cloth.size)
    if product.sleeve not in (None, "sleeveless"):
        canvas.paint("sleeve", sleeves, cloth)
    body = canvas.mask([garment.outline])
    canvas.paint("garment", body, cloth)
    if product.neck:
        _paint_neck(canvas, product.neck, front, tone, inside)
    if product.closure and front:
        _closure(canvas, product.closure, garment, shade(tone, -0.55), body)
    for place, detail in product.details.items():
        if place != "inside" and front == (place != "back"):
            polygons = _detail(detail, *_place(garment, place))
            canvas.paint(place, canvas.mask(polygons, False, body), shade(tone, LOOKS[detail.look][1]))
    canvas.regions["garment"] = ImageChops.lighter(canvas.regions["garment"], sleeves)
    canvas.regions["colour"] = canvas.regions["garment"]
    if product.pattern:
        canvas.regions["pattern"] = ImageChops.lighter(body, sleeves)
    if product.sleeve == "sleeveless":  # what shows it is the bare shoulder
        canvas.regions["sleeve"] = canvas.mask([_box(0.38, -0.42, 0.08, 0.15)])

    pixels = np.asarray(canvas.image.reduce(SUPERSAMPLING), dtype=np.float32)
    slope = np.linspace(*rng.uniform(0.9, 1.08, 2), size, dtype=np.float32)[:, None, None]
    pixels = pixels * slope + rng.normal(0, 4, pixels.shape).astype(np.float32)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), canvas.regions
