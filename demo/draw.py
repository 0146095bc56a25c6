"""Draws the pictures of this folder, which README and docs predict: python demo/draw.py [FOLDER]"""

import itertools
import math
import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter

SIDE, FINER = 400, 4  # Pixels; drawn at four times the size, and scaled down.


def canvas(top, bottom):
    """(A picture that goes from one colour to another, its pen, which takes units of 1/100 of its side)."""
    size = SIDE * FINER
    column = Image.new("RGB", (1, size))
    for y in range(size):
        column.putpixel((0, y), tuple(round(a + (b - a) * y / size) for a, b in zip(top, bottom, strict=True)))
    picture = column.resize((size, size))
    return picture, Pen(picture)


class Pen:
    def __init__(self, picture):
        self._draw, self._unit = ImageDraw.Draw(picture), picture.width / 100

    def ellipse(self, x, y, rx, ry, color):
        self._draw.ellipse([self._unit * v for v in (x - rx, y - ry, x + rx, y + ry)], fill=color)

    def polygon(self, points, color):
        self._draw.polygon([(self._unit * x, self._unit * y) for x, y in points], fill=color)

    def line(self, points, width, color):
        """A line with round ends through points, smooth as a chain of discs."""
        for (x0, y0), (x1, y1) in itertools.pairwise(points):
            steps = max(2, int(math.dist((x0, y0), (x1, y1)) * 4))
            for i in range(steps + 1):
                self.ellipse(x0 + (x1 - x0) * i / steps, y0 + (y1 - y0) * i / steps, width / 2, width / 2, color)


def curve(points, count=60):
    """A Bezier curve through the plane."""
    order = len(points) - 1
    return [
        tuple(
            sum(math.comb(order, k) * (1 - t) ** (order - k) * t**k * point[axis] for k, point in enumerate(points))
            for axis in (0, 1)
        )
        for t in (i / count for i in range(count + 1))
    ]


def bird():
    """A flamingo in shallow water, with its reflection."""
    picture, pen = canvas((120, 150, 120), (60, 95, 100))
    rng = random.Random(1)
    for _ in range(500):  # Reeds behind, ripples in front.
        x, y = rng.uniform(0, 100), rng.uniform(0, 50)
        green = rng.randint(-25, 25)
        pen.line(
            [(x, y), (x + rng.uniform(-2, 2), y + rng.uniform(4, 12))], 0.5, (105 + green, 140 + green, 85 + green)
        )
    picture.paste(picture.filter(ImageFilter.GaussianBlur(12 * FINER)))
    for _ in range(420):
        x, y = rng.uniform(-5, 100), rng.uniform(62, 100)
        grey = rng.randint(-18, 26)
        pen.line(
            [(x, y), (x + rng.uniform(4, 14), y + rng.uniform(-0.3, 0.3))], 0.35, (85 + grey, 118 + grey, 122 + grey)
        )
    for flip, pale in ((True, 0.45), (False, 0)):
        for x, foot in ((50, 48), (56, 58)):
            _stroke(pen, [(x, 52), (x - 0.6, 68), (foot, 84)], 1.5, (226, 128, 122), flip, pale)
            _stroke(pen, [(x - 0.6, 67), (x - 0.6, 70)], 2.4, (200, 98, 96), flip, pale)
        for _ in range(1500):  # Feathers, from the tail to the breast.
            angle, r = rng.uniform(0, 2 * math.pi), math.sqrt(rng.random())
            x, y = 54 + 20 * r * math.cos(angle), 43 + 11 * r * math.sin(angle)
            lit = 24 * (43 - y) / 11 + rng.uniform(-20, 20)
            color = tuple(max(0, min(255, round(c + lit))) for c in (238, 128, 120))
            _stroke(pen, [(x, y), (x + 5, y + 2.2)], 1.1, color, flip, pale)
        for i in range(9):
            _stroke(
                pen, curve([(64, 42 + i), (76, 46 + i), (82 - i, 54 + 0.4 * i)]), 0.9, (190, 60 + 4 * i, 66), flip, pale
            )
        neck = curve([(37, 44), (12, 40), (40, 22), (44, 8), (27, 8)])
        for shift, color in ((0.8, (214, 96, 96)), (0, (242, 138, 130)), (-0.9, (252, 178, 168))):
            _stroke(pen, [(x - shift * 0.4, y + shift) for x, y in neck], 5 - abs(shift) * 2.2, color, flip, pale)
        _stroke(pen, [(27, 9), (25.5, 10)], 8, (248, 160, 150), flip, pale)
        _stroke(pen, curve([(22.5, 10), (19, 12), (18.5, 17)]), 3.4, (246, 226, 214), flip, pale)
        _stroke(pen, curve([(18.6, 16), (18.6, 19), (20.5, 21)]), 2.6, (28, 24, 24), flip, pale)
    pen.ellipse(26, 8.6, 1, 1, (250, 226, 120))
    pen.ellipse(26, 8.6, 0.5, 0.5, (20, 20, 20))
    return picture


def _stroke(pen, points, width, color, flip, pale):
    """A line, or its reflection in water that begins at 84."""
    if flip:
        points = [(x + 0.6 * math.sin(2 * y), 168 - y) for x, y in points]
    pen.line(points, width, tuple(round(c * (1 - pale) + w * pale) for c, w in zip(color, (80, 110, 115), strict=True)))


def clock():
    """A wall clock that shows ten past ten."""
    picture, pen = canvas((226, 214, 190), (200, 186, 160))
    pen.ellipse(51, 52, 39, 39, (150, 135, 112))
    pen.ellipse(50, 50, 39, 39, (70, 42, 28))
    pen.ellipse(50, 50, 34.5, 34.5, (248, 246, 238))
    for minute in range(60):
        angle = math.radians(6 * minute)
        inner, width = (27, 1.5) if minute % 5 == 0 else (30.5, 0.5)
        ends = [(50 + r * math.sin(angle), 50 - r * math.cos(angle)) for r in (inner, 32.5)]
        pen.line(ends, width, (25, 25, 25))
    for angle, length, width in ((304, 17, 2.2), (60, 26, 1.5)):
        angle = math.radians(angle)
        pen.line([(50, 50), (50 + length * math.sin(angle), 50 - length * math.cos(angle))], width, (20, 20, 20))
    pen.line([(50, 56), (50, 22)], 0.5, (190, 30, 30))
    pen.ellipse(50, 50, 1.8, 1.8, (20, 20, 20))
    return picture


def lights():
    """A traffic light that shows red, at dusk."""
    picture, pen = canvas((58, 84, 132), (214, 170, 140))
    for x, y, r in ((10, 90, 14), (26, 95, 12), (78, 92, 15), (94, 88, 13), (60, 98, 10)):
        pen.ellipse(x, y, r, r * 0.8, (44, 58, 46))
    picture.paste(picture.filter(ImageFilter.GaussianBlur(5 * FINER)))
    pen.polygon([(48.5, 76), (51.5, 76), (51.5, 100), (48.5, 100)], (52, 54, 56))
    pen.polygon([(35, 8), (65, 8), (65, 78), (35, 78)], (214, 168, 40))
    pen.polygon([(37, 10), (63, 10), (63, 76), (37, 76)], (196, 150, 30))
    for y, color in ((21.5, (255, 48, 32)), (43, (66, 52, 20)), (64.5, (18, 52, 38))):
        pen.ellipse(50, y, 9.8, 9.8, (24, 22, 18))
        pen.ellipse(50, y, 8.4, 8.4, color)
        for ring in range(8):
            shade = tuple(min(255, c + 11 * ring) for c in color)
            pen.ellipse(50, y, 6.4 - 0.8 * ring, 6.4 - 0.8 * ring, shade if color[0] == 255 else color)
        pen.line(curve([(40, y - 2), (42, y - 11.5), (58, y - 11.5), (60, y - 2)]), 2, (30, 28, 22))
    return picture


def main(folder):
    for name, draw in {"bird": bird, "clock": clock, "lights": lights}.items():
        picture = draw().resize((SIDE, SIDE), Image.Resampling.LANCZOS).filter(ImageFilter.GaussianBlur(0.6))
        picture.save(folder / f"{name}.JPEG", quality=88)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent))
