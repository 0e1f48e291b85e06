"""Parts of an HTML report in one file: tables, bars, a scatter plot and heat maps.

Everything is HTML and CSS, so that text keeps its size on a phone and colours follow the reader's
light or dark setting. The script only adds sorting, filtering and tooltips on touch screens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

_STYLE = """
:root{color-scheme:light dark;--bg:#fff;--ink:#1b1f24;--dim:#59636e;--soft:#f4f6f8;--line:#d9dee4;
--a:#2563eb;--b:#0d9488;--warn:#c2410c;--cold:#fdeedd;--hot:#9b1c0b;--none:#eceff2}
@media(prefers-color-scheme:dark){:root{--bg:#14171b;--ink:#e7eaee;--dim:#9aa5b1;--soft:#1e2329;
--line:#363e48;--a:#6ea8fe;--b:#2dd4bf;--warn:#fb923c;--cold:#33241c;--hot:#ffa27d;--none:#20262d}}
*{box-sizing:border-box}
body{font:16px/1.5 system-ui,sans-serif;background:var(--bg);color:var(--ink);max-width:76rem;
margin:0 auto;padding:1.5rem 1rem 3rem}
h1{font-size:1.7rem;line-height:1.2;margin:.2em 0 .6em}h2{font-size:1.2rem;margin:2.2em 0 .5em}
h3{font-size:1rem;margin:0 0 .4em}p{margin:.6em 0;max-width:48rem}.dim,figcaption,output{
color:var(--dim);font-size:.85rem}
.cards{display:grid;gap:.8rem;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr))}
.cards div{background:var(--soft);border-radius:.6rem;padding:.7rem 1rem}
.cards b{display:block;font-size:1.5rem;line-height:1.3}
.cards span{color:var(--dim);font-size:.85rem}
.wide{overflow-x:auto}table{border-collapse:collapse;width:100%;margin:.5em 0;font-size:.92rem;
font-variant-numeric:tabular-nums}
td,th{border-bottom:1px solid var(--line);padding:.4em .7em;text-align:right;vertical-align:top}
td+td{white-space:nowrap}.text td+td{white-space:normal}
td:first-child,th:first-child,.text td,.text th{text-align:left}
td:first-child,th:first-child{position:sticky;left:0;background:var(--bg);padding-left:.2em}
th{font-weight:600;vertical-align:bottom}th[tabindex]{cursor:pointer}
th[tabindex]::after{content:" ↕";color:var(--dim)}th[aria-sort=ascending]::after{content:" ↑"}
th[aria-sort=descending]::after{content:" ↓"}tbody tr:hover td{background:var(--soft)}
.pair{display:grid;grid-template-columns:minmax(7rem,15rem) 1fr;gap:.2rem .8rem;padding:.45rem 0;
border-bottom:1px solid var(--line);align-items:center;font-size:.92rem}
.bar{position:relative;display:flex;align-items:center;height:1.25rem;white-space:nowrap;
font-size:.8rem}
.bar::before{content:"";width:calc(var(--w)*.68);height:.8rem;border-radius:0 .2rem .2rem 0;
background:var(--a);margin-right:.5rem;flex:none;min-width:2px}.bar.b::before{background:var(--b)}
.bar.slow::before{background:var(--warn)}.bar.slow{color:var(--warn)}
.bar::after{content:"";position:absolute;left:calc(var(--one)*.68);top:-.1rem;bottom:-.1rem;
border-left:2px dotted var(--dim)}
.bar em{font-style:normal;background:var(--bg);z-index:1;padding-right:.3rem}
.named{white-space:nowrap}
.key{display:inline-block;width:.8em;height:.8em;border-radius:.2em;margin:0 .3em 0 .8em}
.plot{position:relative;height:21rem;margin:1.2rem 1rem 3.2rem 4rem;
border:solid var(--dim);border-width:0 0 1px 1px}
.plot>*{position:absolute}.plot i{font-style:normal;font-size:.78rem;color:var(--dim)}
.plot .y{left:0;right:0;border-top:1px dashed var(--line)}.plot .y i{position:absolute;right:100%;
transform:translate(-.4rem,-.75rem);white-space:nowrap}
.plot .x{bottom:-1.6rem;transform:translateX(-50%)}.plot .title{bottom:-3rem;left:0;right:0;
text-align:center}
.dot{width:1.5rem;height:1.5rem;margin:0 0 -.75rem -.75rem;border-radius:50%;background:var(--a);
color:var(--bg);font-size:.8rem;line-height:1.5rem;text-align:center;opacity:.92}
.plot+ol{columns:17rem;font-size:.9rem;margin:0;padding-left:1.6rem}
.plot+ol li{break-inside:avoid}.maps{display:grid;gap:1.2rem 2rem;
grid-template-columns:repeat(auto-fit,minmax(min(100%,28rem),1fr))}
figure{margin:0;break-inside:avoid}.heat{display:grid;gap:1px;font-size:.78rem;align-items:center}
.heat b{font-weight:400;padding-right:.5em;text-align:right;white-space:nowrap}
.heat s{height:1.15rem;text-decoration:none;background:var(--none)}
.heat s[title]{background:var(--hot);background:color-mix(in oklab,var(--hot) var(--v),var(--cold))}
.heat s[title]:hover{outline:2px solid var(--ink)}.heat span{color:var(--dim);grid-row:1}
.scale{display:inline-block;width:8rem;height:.8em;margin:0 .4em;
background:linear-gradient(90deg in oklab,var(--cold),var(--hot))}
output{display:block;min-height:1.5em}details{margin:1em 0}summary{cursor:pointer;font-weight:600}
input{font:inherit;width:100%;max-width:24rem;padding:.3em .6em;margin:.6em 0;background:var(--bg);
color:var(--ink);border:1px solid var(--line);border-radius:.4em}
@media(max-width:600px){body{font-size:15px}.pair{grid-template-columns:1fr}.plot{height:17rem;
margin-left:3.6rem}td,th{padding:.35em .5em}td:first-child{min-width:8.5rem;
max-width:8.5rem;overflow-wrap:anywhere}}
@media print{body{max-width:none;font-size:11px}*{print-color-adjust:exact;
-webkit-print-color-adjust:exact}input{display:none}.wide{overflow:visible}}
"""

_SCRIPT = """
for(const t of document.querySelectorAll('table')){
const body=t.tBodies[0],key=c=>{const s=c.textContent,n=parseFloat(s.replace(/[+,]/g,''));
return /^[+-]?[\\d.,]+/.test(s)?n:s};
[...t.tHead.rows[0].cells].forEach((th,i)=>{if(!th.textContent)return;th.tabIndex=0;const sort=()=>{
const down=th.getAttribute('aria-sort')!=='descending'&&typeof key(body.rows[0].cells[i])==='number'
||th.getAttribute('aria-sort')==='ascending';
[...t.tHead.rows[0].cells].forEach(o=>o.removeAttribute('aria-sort'));
th.setAttribute('aria-sort',down?'descending':'ascending');
[...body.rows].sort((p,q)=>{const a=key(p.cells[i]),b=key(q.cells[i]);
const c=typeof a===typeof b?(a<b?-1:a>b?1:0):typeof a==='number'?-1:1;return down?-c:c})
.forEach(r=>body.append(r))};
th.onclick=sort;th.onkeydown=e=>{if(e.key==='Enter')sort()}});
if(t.classList.contains('find')){const f=document.createElement('input');f.type='search';
f.placeholder='filter rows, e.g. down_proj';f.setAttribute('aria-label','filter rows');
f.oninput=()=>{for(const r of body.rows)
r.hidden=!r.textContent.toLowerCase().includes(f.value.toLowerCase())};t.parentNode.before(f)}}
for(const e of['pointerover','click'])document.addEventListener(e,v=>{
const s=v.target.closest('.heat s[title]');
if(s)s.closest('figure').querySelector('output').textContent=s.title});
"""


class Point(NamedTuple):
    """A dot of a scatter plot: its place, and the name that stands in the legend."""

    name: str
    x: float
    y: float


def page(title: str, parts: Sequence[str]) -> str:
    """Return a whole page of HTML parts, without any outside file."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{escape(title)}</h1>{''.join(parts)}<script>{_SCRIPT}</script></body></html>"
    )


def paragraph(text: str, *, dim: bool = False) -> str:
    """Return a paragraph of plain text."""
    return f"<p{' class=dim' if dim else ''}>{escape(text)}</p>"


def cards(items: Sequence[tuple[str, str]]) -> str:
    """Return figures that stand out: pairs of what is read first, and what it is."""
    inner = "".join(f"<div><b>{escape(b)}</b><span>{escape(s)}</span></div>" for b, s in items)
    return f'<div class="cards">{inner}</div>'


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, text: bool = False, find: bool = False
) -> str:
    """Return a sortable table: names first, then numbers or `text`; `find` adds a filter."""
    kinds = " ".join(["text"] * text + ["find"] * find)
    lines = ["<tr>" + "".join(f"<th>{escape(t)}</th>" for t in head) + "</tr></thead><tbody>"]
    lines += ["<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows]
    body = "\n".join(lines)
    return f'<div class="wide"><table class="{kinds}"><thead>{body}</tbody></table></div>'


def folded(title: str, inner: str) -> str:
    """Return a part that opens on a click."""
    return f"<details><summary>{escape(title)}</summary>{inner}</details>"


def bars(base: str, names: Sequence[str], series: Mapping[str, Sequence[float]], unit: str) -> str:
    """Return a bar a series for each name, as times the first name's value; slower ones say so.

    Args:
        base: what the first name is called in the text, as in "times as fast as float32".
        names: one a group of bars; the first is what the others are compared with.
        series: values by title, in the order of `names`; two at most.
        unit: of the values.
    """
    most = max(max(values) / values[0] for values in series.values())
    keys = "".join(
        f'<span class="named"><span class="key" style="background:var(--{letter})"></span>'
        f"{escape(title)}</span> "
        for title, letter in zip(series, "ab", strict=False)
    )
    rows = []
    for i, name in enumerate(names):
        lines = []
        for values, letter in zip(series.values(), "ab", strict=False):
            times = values[i] / values[0]
            note = f" – slower than {base}" if times < 0.95 else ""
            lines.append(
                f'<div class="bar {letter}{" slow" if note else ""}" '
                f'style="--w:{100 * times / most:.1f}%;--one:{100 / most:.1f}%">'
                f"<em>{times:.1f}× · {values[i]:.0f} {escape(unit)}{escape(note)}</em></div>"
            )
        rows.append(f'<div class="pair"><div>{escape(name)}</div><div>{"".join(lines)}</div></div>')
    return f'<p class="dim">Times as fast as {escape(base)} (dotted line):{keys}</p>{"".join(rows)}'


def scatter(points: Sequence[Point], x_title: str, floor: float, y_unit: str = " %") -> str:
    """Return numbered dots with their legend: x from 0, y on a log scale that `floor` ends below.

    What is below `floor`, zero or negative stands on the lowest line, whose label says so.
    """
    right = 1.08 * max(p.x for p in points)
    decades = math.log10(max(10 * floor, *(p.y for p in points))) - math.log10(floor) + 0.15

    def up(y: float) -> float:
        return 6 + 94 * max(0.0, math.log10(max(y, floor) / floor)) / decades

    def line(y: float, label: str) -> str:
        return f'<div class="y" style="bottom:{up(y):.1f}%"><i>{label}{y_unit}</i></div>'

    parts = [line(floor, f"≤ {floor:g}")]
    steps = [step * 10**k for k in range(int(decades) + 1) for step in (1, 3)]
    if decades > 3:  # enough lines without those between
        steps = [step for step in steps if f"{step}"[0] == "1"]
    parts += [line(floor * n, f"{floor * n:g}") for n in steps if 1 < n < 10**decades]
    step = 10 ** math.floor(math.log10(right))
    step = next(s for s in (step / 5, step / 2, step) if right / s <= 6 or s == step)
    parts += [
        f'<i class="x" style="left:{100 * k * step / right:.1f}%">{k * step:g}</i>'
        for k in range(int(right / step) + 1)
    ]
    parts.append(f'<i class="title">{escape(x_title)}</i>')
    legend = []
    for number, p in enumerate(points, 1):
        place = f"left:{100 * p.x / right:.1f}%;bottom:{up(p.y):.1f}%"
        title = f"{p.name}: {p.x:.1f}, {p.y:+.1f}{y_unit}"
        parts.append(f'<b class="dot" style="{place}" title="{escape(title)}">{number}</b>')
        legend.append(f"<li>{escape(p.name)}</li>")
    return f'<div class="plot">{"".join(parts)}</div><ol>{"".join(legend)}</ol>'


def heat_maps(maps: Mapping[str, Mapping[str, Mapping[int, float]]], column: str) -> str:
    """Return a heat map a title, all on one log scale: percentages by row's name and column.

    Args:
        maps: title → name of a row → number of a column → share, shown in percent.
        column: what the columns count, as in "layer".
    """
    values = [v for rows in maps.values() for cells in rows.values() for v in cells.values()]
    positive = [v for v in values if v > 0]
    if not positive:
        return ""
    low = max(min(positive), 1e-4 * max(positive))
    span = math.log(max(positive) / low) or 1.0
    figures = [_heat_map(title, rows, column, low, span) for title, rows in maps.items()]
    scale = f'{_percent(low)}<span class="scale"></span>{_percent(max(positive))}'
    key = f'<p class="dim">{scale} (log scale). Point at a cell or tap it for its value.</p>'
    return f'{key}<div class="maps">{"".join(figures)}</div>'


def _percent(share: float) -> str:
    return f"{100 * share:.{0 if share > 0.1 else 2}f} %"


def _heat_map(
    title: str, rows: Mapping[str, Mapping[int, float]], column: str, low: float, span: float
) -> str:
    columns = sorted({c for cells in rows.values() for c in cells})
    short = {name: name.rpartition(".")[2] for name in rows}
    if len(set(short.values())) < len(short):
        short = {name: name for name in rows}
    parts = [f'<span style="grid-column:1">{escape(column)}</span>']
    every = max(1, math.ceil(len(columns) / 8))
    for i, number in enumerate(columns):
        if i % every == 0:
            spanned = min(every, len(columns) - i)
            parts.append(f'<span style="grid-column:{i + 2}/span {spanned}">{number}</span>')
    for name, cells in rows.items():
        parts.append(f'<b title="{escape(name)}">{escape(short[name])}</b>')
        for number in columns:
            if number not in cells:
                parts.append("<s></s>")
                continue
            v = cells[number]
            heat = 100 * min(1.0, max(0.0, math.log(max(v, low) / low) / span))
            tip = f"{name}, {column} {number}: {100 * v:.2f} %"
            parts.append(f'<s style="--v:{heat:.0f}%" title="{escape(tip)}"></s>')
    heading = f"<h3>{escape(title)}</h3>" if title else ""
    grid = f"grid-template-columns:max-content repeat({len(columns)},1fr)"
    return (
        f'<figure>{heading}<div class="heat" style="{grid}">{"".join(parts)}</div>'
        f"<output></output></figure>"
    )
