"""A terminal for programs that draw on one: a pseudo terminal, and what a screen would show.

It understands what ratatui sends through crossterm: absolute positions, colours, attributes, clearing and the
alternate screen. Anything else is an error, so that a test does not pass by what it skips.
"""

import contextlib
import dataclasses
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
import xml.sax.saxutils

PATIENCE = 30.0

SEQUENCE = re.compile(rb"\x1b\[([<-?]?)([0-9;]*)([@-~])")

# The names of the 16 colours in the palette of the pictures.
PALETTE = {
    0: "#5c6773", 1: "#f07178", 2: "#7fd88f", 3: "#e6c35c", 4: "#59c2ff", 5: "#d2a6ff", 6: "#6fd3e0",
    7: "#d9dde3",
    8: "#8a94a0", 9: "#f07178", 10: "#7fd88f", 11: "#e6c35c", 12: "#59c2ff", 13: "#d2a6ff", 14: "#6fd3e0",
    15: "#ffffff",
}
GROUND, INK = "#11161d", "#d9dde3"


@dataclasses.dataclass(frozen=True)
class Style:
    """How a cell is drawn; no colour is the terminal's own."""

    ink: int | None = None
    ground: int | None = None
    bold: bool = False
    dim: bool = False
    reversed: bool = False


class Screen:
    """The cells that a terminal shows."""

    def __init__(self, columns, rows):
        self.columns, self.rows = columns, rows
        self.style, self.at = Style(), (0, 0)
        self.is_alternate = self.is_cursor_hidden = False
        self.rest = b""
        self.clear()

    def clear(self):
        self.cells = [[(" ", Style())] * self.columns for _ in range(self.rows)]

    def feed(self, data):
        data, self.rest = self.rest + data, b""
        place = 0
        while place < len(data):
            if data[place] == 0x1B:
                found = SEQUENCE.match(data, place)
                if not found:
                    if len(data) - place < 32:
                        self.rest = data[place:]
                        return
                    raise ValueError(f"not understood: {data[place:place + 16]!r}")
                self.control(*found.groups())
                place = found.end()
                continue
            length = 1 if data[place] < 0x80 else 2 if data[place] < 0xE0 else 3 if data[place] < 0xF0 else 4
            if place + length > len(data):
                self.rest = data[place:]
                return
            self.put(data[place : place + length].decode())
            place += length

    def put(self, text):
        row, column = self.at
        if text == "\r":
            self.at = (row, 0)
        elif text == "\n":
            self.at = (row + 1, column)
        elif row < self.rows and column < self.columns:
            self.cells[row][column] = (text, self.style)
            self.at = (row, column + 1)

    def control(self, private, numbers, final):
        numbers = [int(number or 0) for number in numbers.split(b";")]
        match (private, final):
            case (b"", b"H"):
                row, column = (numbers + [1, 1])[:2]
                self.at = (max(row, 1) - 1, max(column, 1) - 1)
            case (b"", b"m"):
                self.attribute(numbers)
            case (b"", b"J") if numbers == [2]:
                self.clear()
            case (b"?", b"h" | b"l"):
                is_set = final == b"h"
                if 1049 in numbers:
                    self.is_alternate = is_set
                if 25 in numbers:
                    self.is_cursor_hidden = not is_set
            case _:
                raise ValueError(f"not understood: {private!r} {numbers} {final!r}")

    def attribute(self, numbers):
        numbers = list(numbers)
        while numbers:
            match numbers.pop(0):
                case 0:
                    self.style = Style()
                case 1:
                    self.change(bold=True)
                case 2:
                    self.change(dim=True)
                case 7:
                    self.change(reversed=True)
                case 22:
                    self.change(bold=False, dim=False)
                case 27:
                    self.change(reversed=False)
                case 38 | 48 as where if numbers[0] == 5:
                    self.change(**{"ink" if where == 38 else "ground": numbers[1]})
                    del numbers[:2]
                case 39:
                    self.change(ink=None)
                case 49:
                    self.change(ground=None)
                case 59:
                    pass
                case other:
                    raise ValueError(f"attribute {other} is not understood")

    def change(self, **what):
        self.style = dataclasses.replace(self.style, **what)

    def lines(self):
        return ["".join(text for text, _ in row).rstrip() for row in self.cells]

    def text(self):
        return "\n".join(self.lines())


class Program:
    """A program on a pseudo terminal."""

    def __init__(self, child, file, screen):
        self.child, self.file, self.screen = child, file, screen

    def read(self, seconds):
        """Shows what the program writes within some seconds; false once it has ended."""
        ready, _, _ = select.select([self.file], [], [], seconds)
        if not ready:
            return True
        try:
            data = os.read(self.file, 65536)
        except OSError:
            return False
        self.screen.feed(data)
        return bool(data)

    def until(self, what, patience=PATIENCE):
        """Waits until the screen shows a text, or is as a function wants it."""
        wanted = what if callable(what) else lambda screen: what in screen.text()
        end = time.monotonic() + patience
        while not wanted(self.screen):
            if time.monotonic() > end or not self.read(0.2):
                raise AssertionError(f"{what!r} is not shown:\n{self.screen.text()}")
        return self.screen

    def press(self, keys):
        os.write(self.file, keys.encode())

    def resize(self, columns, rows):
        self.screen = Screen(columns, rows)
        self.screen.is_alternate = True
        set_size(self.file, columns, rows)
        os.kill(self.child.pid, signal.SIGWINCH)

    def end(self, patience=PATIENCE):
        """Waits for the end of the program; returns its code."""
        end = time.monotonic() + patience
        while self.read(0.1) and time.monotonic() < end:
            pass
        return self.child.wait(timeout=patience)


def set_size(file, columns, rows):
    fcntl.ioctl(file, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


@contextlib.contextmanager
def program(command, columns=80, rows=24, **environment):
    """Runs a program on a terminal of this size until the block ends."""
    ours, its = pty.openpty()
    set_size(its, columns, rows)
    settings = {**os.environ, "TERM": "xterm-256color", **environment}
    settings.pop("NO_COLOR", None)
    child = subprocess.Popen(
        command, stdin=its, stdout=its, stderr=its, env=settings, start_new_session=True, close_fds=True
    )
    os.close(its)
    try:
        yield Program(child, ours, Screen(columns, rows))
    finally:
        child.kill()
        child.wait()
        os.close(ours)


def svg(screen, title):
    """A screen as a picture."""
    wide, high, margin = 8.4, 18, 14
    width, height = screen.columns * wide + 2 * margin, screen.rows * high + 2 * margin
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" role="img">',
        f"<title>{xml.sax.saxutils.escape(title)}</title>",
        f'<rect width="100%" height="100%" rx="8" fill="{GROUND}"/>',
        '<g font-family="ui-monospace, SFMono-Regular, Menlo, Consolas, monospace" font-size="14">',
    ]
    for number, row in enumerate(screen.cells):
        start = 0
        for column in range(1, len(row) + 1):
            if column < len(row) and row[column][1] == row[start][1]:
                continue
            parts += run(row[start:column], margin + start * wide, margin + number * high, wide, high)
            start = column
    return "\n".join([*parts, "</g>", "</svg>", ""])


def run(cells, left, top, wide, high):
    """The elements of cells in one style."""
    text, style = "".join(cell for cell, _ in cells), cells[0][1]
    ink, ground = PALETTE.get(style.ink, INK), PALETTE.get(style.ground)
    if style.reversed:
        ink, ground = ground or GROUND, ink
    if ground:
        width = len(cells) * wide
        yield f'<rect x="{left:.1f}" y="{top}" width="{width:.1f}" height="{high}" fill="{ground}"/>'
    if text.strip():
        lead = len(text) - len(text.lstrip())
        text = text.strip()
        length, shown = len(text) * wide, xml.sax.saxutils.escape(text)
        weight = ' font-weight="700"' if style.bold else ""
        opacity = ' opacity="0.6"' if style.dim else ""
        yield (
            f'<text x="{left + lead * wide:.1f}" y="{top + 14}" fill="{ink}"{weight}{opacity}'
            f' textLength="{length:.1f}" xml:space="preserve">{shown}</text>'
        )
