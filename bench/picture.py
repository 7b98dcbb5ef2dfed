"""The picture: repair latency as a distribution, and cost against the number of foreign rules.

Law: no library, no script in it; every line bears its name beside it, so that nothing hangs on its colour.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from xml.sax.saxutils import escape

Series = Mapping[str, Sequence[Sequence[float]]]

_WIDTH, _HEIGHT, _GAP = 470, 330, 20
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 16, 46, 92
_COLOURS = ("#0b6e4f", "#5fad56", "#b23a48", "#e08e45", "#3d5a80", "#7b5ea7")
_MORE_THAN_NOTHING = 100.0  # where a logarithmic axis shows 0 foreign rules


def drawn(samples: Mapping[str, Sequence[float]], growth: Series) -> str:
    """The picture as SVG."""
    charts = [
        _chart(
            0, "After how long our jump is right again", "ms", "share of repairs", _distributions(samples), share=True
        ),
        _chart(_WIDTH + _GAP, "What grows with the foreign rules", "foreign rules", "ms", growth, share=False),
    ]
    width = 2 * _WIDTH + _GAP
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {_HEIGHT}" '
        'font-family="sans-serif" font-size="11">\n'
        f'<rect width="{width}" height="{_HEIGHT}" fill="white"/>\n' + "".join(charts) + "</svg>\n"
    )


def _distributions(samples: Mapping[str, Sequence[float]]) -> Series:
    """Each sample as the share (in percent) of it that is no longer than so many milliseconds."""
    return {
        name: [(max(value, 0.01), 100 * (n + 1) / len(values)) for n, value in enumerate(sorted(values))]
        for name, values in samples.items()
    }


def _chart(x: float, title: str, along: str, up: str, series: Series, *, share: bool) -> str:
    bottom, right = _HEIGHT - _BOTTOM, x + _WIDTH - _RIGHT
    parts = [
        _text(x + _LEFT, 20, title, 'font-size="14" font-weight="bold"'),
        _text(x + _LEFT, _TOP - 8, up, 'fill="#555"'),
        _text(right, bottom + 28, along, 'text-anchor="end" fill="#555"'),
    ]
    points = [(_shown(px), py) for line in series.values() for px, py in line]
    if points:
        across = _logarithmic([px for px, _ in points], x + _LEFT, right)
        if share:
            upwards, ticks = _straight(bottom), [(float(tick), f"{tick} %") for tick in (0, 25, 50, 75, 100)]
        else:
            heights = [py for _, py in points]
            upwards, ticks = _logarithmic(heights, bottom, _TOP), [(t, f"{t:g}") for t in _decades(heights)]
        parts += [_level(x + _LEFT, right, upwards(tick), name) for tick, name in ticks]
        for tick in _decades([px for px, _ in points]):
            name = "0" if not share and tick == _MORE_THAN_NOTHING else f"{tick:,g}"
            parts.append(_text(across(tick), bottom + 14, name, 'text-anchor="middle"'))
        for number, (name, line) in enumerate(series.items()):
            colour = _COLOURS[number % len(_COLOURS)]
            path = " ".join(f"{across(_shown(px)):.1f},{upwards(py):.1f}" for px, py in line)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>\n')
            parts.append(_legend(x + _LEFT + number % 2 * 205, bottom + 44 + number // 2 * 16, name, colour))
    return "".join(parts)


def _shown(value: float) -> float:
    return value or _MORE_THAN_NOTHING


def _decades(values: Sequence[float]) -> list[float]:
    """The powers of ten from just below the least to just above the greatest."""
    positive = [value for value in values if value > 0] or [1.0]
    low, high = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
    return [10.0**n for n in range(low, max(high, low + 1) + 1)]


def _logarithmic(values: Sequence[float], start: float, end: float) -> Callable[[float], float]:
    ticks = _decades(values)
    low, high = math.log10(ticks[0]), math.log10(ticks[-1])
    return lambda value: start + (end - start) * (math.log10(max(value, ticks[0])) - low) / (high - low)


def _straight(bottom: float) -> Callable[[float], float]:
    return lambda percent: bottom - (bottom - _TOP) * percent / 100


def _level(left: float, right: float, y: float, name: str) -> str:
    line = f'<line x1="{left}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}" stroke="#ddd"/>\n'
    return line + _text(left - 6, y + 4, name, 'text-anchor="end"')


def _legend(x: float, y: float, name: str, colour: str) -> str:
    line = f'<line x1="{x}" y1="{y - 4}" x2="{x + 16}" y2="{y - 4}" stroke="{colour}" stroke-width="3"/>\n'
    return line + _text(x + 21, y, name, "")


def _text(x: float, y: float, words: str, style: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(words)}</text>\n'
