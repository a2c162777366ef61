"""One self-contained HTML page: sections of values and figures."""

import html
from typing import Any

from moe_jax.report import figures


def page(title: str, sections: list[str]) -> str:
  """A whole page, without anything from outside."""
  return (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width,initial-scale=1">'
    '<meta name="color-scheme" content="light dark">'
    f'<title>{esc(title)}</title><style>{figures.CSS}{CSS}</style></head>\n'
    '<body><main>'
    + '\n'.join(x for x in sections if x)
    + '\n</main></body></html>\n'
  )


def pairs(kind: str, values: list[tuple[str, str]]) -> str:
  """Names and values; as 'tiles', or as 'facts', one a line."""
  rows = ''.join(
    f'<div><dt>{esc(a)}</dt><dd>{esc(b)}</dd></div>' for a, b in values
  )
  return f'<dl class="{kind}">{rows}</dl>'


def section(
  title: str, parts: list[str], kind: str = 'grid', before: str = ''
) -> str:
  """A heading, what stands before its parts, and those that are not empty."""
  return (
    f'<section><h2>{title}</h2>{before}<div class="{kind}">'
    + '\n'.join(x for x in parts if x)
    + '</div></section>'
  )


def esc(x: Any) -> str:
  """A text that HTML shows as it is."""
  return html.escape(str(x))


CSS = """
:root{--page:#f6f6f4}
@media screen and (prefers-color-scheme:dark){:root{--page:#121315}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,sans-serif;font-variant-numeric:tabular-nums}
main{max-width:1180px;margin:auto;padding:28px 16px 48px}
h1{font-size:26px;line-height:1.25;margin:0 0 20px;text-wrap:balance;
overflow-wrap:anywhere}
h2{font-size:18px;margin:36px 0 10px}
.kicker,.hint,.note,dt{color:var(--dim)}
.kicker{margin:0 0 4px;font-size:13px}.hint{margin:-6px 0 12px}
.note{margin:0}dl,dd{margin:0}
.tiles{display:grid;background:var(--card);border:1px solid var(--rule);
border-radius:8px;overflow:hidden;
grid-template-columns:repeat(auto-fill,minmax(152px,1fr))}
.tiles div{padding:11px 14px;box-shadow:1px 1px 0 var(--rule)}
.tiles dt{font-size:13px}.tiles dd{font-size:23px;font-weight:600}
.facts{margin-top:14px;font-size:13px}.facts div{display:flex;gap:10px}
.facts dt{flex:0 0 112px}.facts dd{overflow-wrap:anywhere}
.grid{display:grid;gap:14px;align-items:stretch;
grid-template-columns:repeat(auto-fill,minmax(min(340px,100%),1fr))}
.many{grid-template-columns:repeat(auto-fill,minmax(min(258px,100%),1fr))}
@media(min-width:740px){.wide{grid-column:span 2}}
.columns{columns:340px;column-gap:14px}
details{background:var(--card);border:1px solid var(--rule);border-radius:8px;
padding:8px 14px;margin:0 0 14px;break-inside:avoid}
.grid details{grid-column:1/-1;margin:0}
summary{font-weight:600;cursor:pointer}
table{border-collapse:collapse;width:100%;font-size:13px;margin-top:4px}
th,td{text-align:left;vertical-align:top;padding:3px 0;
border-top:1px solid var(--rule)}
th{font-weight:400;color:var(--dim);padding-right:14px}
td{text-align:right;overflow-wrap:anywhere;
font-family:ui-monospace,monospace;font-size:12.5px}
@media print{:root{--page:#fff}body{font-size:12px;print-color-adjust:exact;
-webkit-print-color-adjust:exact}main{padding:0}h2{break-after:avoid}
.tiles,tr{break-inside:avoid}}
"""
