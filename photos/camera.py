"""Photographs the synthetic wardrobe, and remembers where in the photo every attribute is."""

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from photos.wardrobe import COLOURS, DETAILS, GARMENTS, SLEEVES, Garment, Product

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
            for j in range(int(size / step) + 2) if kind in ("dotted", "zigzag", "diamond") else (0,):
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
                if kind == "diamond":
                    r = step * 0.42
                    draw.polygon([(a, b - r), (a + r, b), (a, b + r), (a - r, b)], fill=ink)
        return image


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


def _shape(name: str, x: float, y: float, r: float) -> list[list]:
    """The polygons of one of GRAPHICS."""
    if name == "star":
        points = zip(_disc(x, y, r, corners=5, start=-np.pi / 2), _disc(x, y, r * 0.42, corners=5, start=-0.3 * np.pi))
        return [[p for pair in points for p in pair]]
    if name == "heart":
        lobes = [_disc(x + s * r * 0.45, y - r * 0.3, r * 0.5) for s in (1, -1)]
        return [*lobes, [(x - 0.9 * r, y - 0.08 * r), (x + 0.9 * r, y - 0.08 * r), (x, y + r)]]
    if name == "triangle":
        return [_disc(x, y + 0.15 * r, r, corners=3, start=-np.pi / 2)]
    if name == "cross":
        return [_box(x, y, r, r * 0.32), _box(x, y, r * 0.32, r)]
    return [_disc(x, y, r * 0.9)]


def _paint_neck(canvas: Canvas, neck: str, front: bool, tone: tuple, inside: tuple) -> None:
    dark = tuple(int(c * 0.62) if sum(tone) > 200 else int(c * 0.5 + 70) for c in tone)
    if neck == "hood":  # seen from both sides
        canvas.paint("neck", canvas.mask([_disc(0, -0.66, 0.27, 0.2)], False), dark)
        if front:
            canvas.paint("neck", canvas.mask([_disc(0, -0.64, 0.17, 0.13)], False), inside)
    elif neck == "turtle":
        canvas.paint("neck", canvas.mask([_box(0, -0.64, 0.17, 0.09)], False), dark)
    elif front and neck == "spread":
        canvas.paint("neck", canvas.mask([[(0.02, -0.52), (0.15, -0.66), (0.27, -0.46), (0.1, -0.34)]]), dark)
    elif front:
        corners = 12 if neck == "crew" else 3  # a half ellipse, or a triangle
        for width, depth, fill in ((0.21, 1.0, dark), (0.14, 0.66, inside)):
            depth *= {"crew": 0.17, "v": 0.36}[neck]
            angles = np.linspace(0, np.pi, corners)
            opening = [(width * np.cos(a), -0.61 + depth * np.sin(a)) for a in angles]
            canvas.paint("neck", canvas.mask([opening], False), fill)


def _detail(garment: Garment, key: str, shape: str) -> list:
    """The polygons of one of DETAILS."""
    x, y = garment.chest
    match key:
        case "pocket":
            return [_box(x + 0.18, y, 0.1, 0.11)]
        case "logo":
            return [_box(x - 0.17, y - 0.04, 0.085, 0.055)]
        case "label":
            return [_box(x + 0.1, y - 0.02, 0.11, 0.06)]
        case "badge":
            return _shape(shape, x, y + 0.2, 0.14)
        case "graphic":
            return _shape(shape, x, y + 0.1, 0.25)
        case "belt":
            return [_box(0, garment.waist, 1, 0.05)]
        case "hem":
            return [_box(0, garment.hem - 0.03, 1, 0.065)]
        case "cuffs":
            return [_box(0, 0.32, 1, 0.075)]
        case "knees":
            return [_box(0.2, 0.2, 0.09, 0.13)]
        case "stripe":
            side = list(garment.outline[1:4])
            return [side + [(px - 0.08, py) for px, py in side[::-1]]]
    top, bottom = garment.outline[0][1] + (0.24 if garment.necks else 0.1), garment.hem - 0.1
    if garment.waist < -0.5:  # the fly, or the front of a skirt
        top, bottom = garment.waist + 0.08, min(bottom, garment.waist + 0.6)
    if key == "buttons":
        return [_disc(0, h, 0.035) for h in np.linspace(top, bottom, 5)]
    return [_box(0, (top + bottom) / 2, 0.025, (bottom - top) / 2), _box(0, top, 0.05, 0.04)]  # zip


def render(product: Product, view: str, size: int, rng: np.random.Generator) -> tuple[Image.Image, dict]:
    """Photograph a product: (RGB image of `size` pixels, region masks by attribute at the supersampled size).

    view: "front", "back", "close-up" of something at the front, "half" of the front.
    """
    garment = GARMENTS[product.garment]
    front = view != "back"
    spots = [garment.chest, (0.12, garment.chest[1] + 0.1), (0.0, garment.waist), (0.2, garment.hem - 0.1)]
    if view == "half":
        spots = [(0.0, -0.4), (0.0, garment.hem - 0.3)]
    middle = (garment.outline[0][1] + garment.hem) / 2
    focus = spots[int(rng.integers(len(spots)))] if view in ZOOMS else (0.0, middle)
    canvas = Canvas(size * SUPERSAMPLING, view, rng, focus, fit=0.84 / max(0.55, garment.hem - middle))
    ink = lambda name: tuple(int(np.clip(c + rng.uniform(-9, 9), 0, 255)) for c in COLOURS[name])
    tone = ink(product.colour)
    pattern = product.pattern and (product.pattern[0], ink(product.pattern[1]))
    cloth = canvas.cloth(tone, pattern)
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
    clips = {"cuffs": sleeves, **dict.fromkeys(("belt", "hem", "stripe", "knees"), body)}
    for key, colour, shape in product.details:
        if ("front" if front else "back") in DETAILS[key][1]:
            polygons, fill, pocket = _detail(garment, key, shape), ink(colour), key == "pocket"
            if pocket:  # of the cloth under it, but darker
                fill = tuple(int(c * 0.7) for c in canvas.colour_at(garment.chest[0] + 0.18, garment.chest[1]))
            mask = canvas.mask(polygons, mirrored=key in ("stripe", "knees"), clip=clips.get(key))
            canvas.paint(key, mask, fill, edge=0.4 if pocket else 0.72)
    canvas.regions["garment"] = ImageChops.lighter(canvas.regions["garment"], sleeves)
    canvas.regions["colour"] = canvas.regions["garment"]
    if pattern:
        canvas.regions["pattern"] = ImageChops.lighter(body, sleeves)
    if product.sleeve == "sleeveless":  # what shows it is the bare shoulder
        canvas.regions["sleeve"] = canvas.mask([_box(0.38, -0.42, 0.08, 0.15)])

    pixels = np.asarray(canvas.image.reduce(SUPERSAMPLING), dtype=np.float32)
    slope = np.linspace(*rng.uniform(0.9, 1.08, 2), size, dtype=np.float32)[:, None, None]
    pixels = pixels * slope + rng.normal(0, 4, pixels.shape).astype(np.float32)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), canvas.regions
