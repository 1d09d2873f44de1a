"""Draw what a command printed as a picture of a terminal (SVG): docs/quickstart.svg.

    bash scripts/quickstart.sh 2>&1 | python scripts/draw_terminal.py 'bash scripts/quickstart.sh' > docs/quickstart.svg

Of a progress bar only the last state is drawn, and long lines are cut.
"""

import sys
from collections.abc import Iterable
from html import escape

WIDTH = 132  # characters
STEP, HEIGHT, MARGIN = 7.8, 18, 16  # pixels: of a character, of a line, around the text
TEXT, BACK, PROMPT = "#d4d4d4", "#1e1e1e", "#6fc3df"


def draw(command: str, lines: Iterable[str]) -> str:
    """The picture of a command and the lines that it printed."""
    kept = [line.rstrip("\n").rpartition("\r")[2].rstrip() for line in lines]
    texts = [
        (PROMPT, f"$ {command}"),
        *((TEXT, line if len(line) <= WIDTH else f"{line[: WIDTH - 1]}…") for line in kept),
    ]
    rows = "\n".join(
        f'<text x="{MARGIN}" y="{MARGIN + HEIGHT * number}" fill="{colour}">{escape(text)}</text>'
        for number, (colour, text) in enumerate(texts, 1)
        if text
    )
    width, height = round(2 * MARGIN + STEP * WIDTH), 2 * MARGIN + HEIGHT * (len(texts) + 1)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" xml:space="preserve" '
        f'font-family="Menlo, Consolas, DejaVu Sans Mono, monospace" font-size="13">\n'
        f'<rect width="{width}" height="{height}" rx="8" fill="{BACK}"/>\n{rows}\n</svg>\n'
    )


if __name__ == "__main__":
    sys.stdout.write(draw(sys.argv[1], sys.stdin.read().split("\n")[:-1]))
