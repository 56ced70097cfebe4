"""The page around a report's sections: its frame and its style."""

import html
import itertools
from collections.abc import Sequence

from efficient_llm.training import chart, sections

_STYLE = """
:root {
  color-scheme: light dark;
  --page: #fdfdfc; --ink: #1d1f23; --muted: #62666e; --line: #e4e4e1;
  --soft: #f4f4f1; --accent: #0b5fa5;
  --series-0: #0b66b0; --series-1: #c2480a; --series-2: #00805c;
  --series-3: #a8457f; --series-4: #7a6200; --series-5: #5b51b8;
}
@media (prefers-color-scheme: dark) { :root {
  --page: #15171a; --ink: #e8e8e6; --muted: #a2a6ad; --line: #2e3238;
  --soft: #1e2125; --accent: #7db9ee;
  --series-0: #62b0ee; --series-1: #f0955c; --series-2: #3fc49b;
  --series-3: #e295c4; --series-4: #d8c04a; --series-5: #aaa3f5;
} }
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 2.5rem 1.25rem 3rem; max-width: 62rem;
  background: var(--page); color: var(--ink); line-height: 1.55;
  font-family: system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue',
    Arial, sans-serif;
  -webkit-text-size-adjust: 100%; overflow-wrap: break-word;
}
header { border-bottom: 1px solid var(--line); padding-bottom: 1rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0; font-weight: 650; }
header p { color: var(--muted); margin: .3rem 0 0; }
h2 { font-size: 1.05rem; margin: 0 0 .6rem; font-weight: 650; }
section { margin-top: 2.2rem; min-width: 0; }
p { margin: 0 0 .8rem; max-width: 44rem; }
.tiles {
  display: grid; gap: 1px; margin: 0; border: 1px solid var(--line);
  border-radius: .6rem; overflow: hidden;
  grid-template-columns: repeat(auto-fill, minmax(max(8.5rem, 22%), 1fr));
}
.tile {
  padding: .8rem 1rem .9rem; min-width: 0; box-shadow: 0 0 0 1px var(--line);
}
.tile dt { color: var(--muted); font-size: .82rem; }
.tile dd { margin: 0; }
.tile b {
  font-size: 1.55rem; font-weight: 600; font-variant-numeric: tabular-nums;
  letter-spacing: -.01em;
}
.tile small { display: block; color: var(--muted); }
.unit, .note, .axis, .empty { color: var(--muted); font-size: .85rem; }
.charts {
  display: grid; gap: 0 2.5rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr));
}
.chart h2 { margin-bottom: 0; }
.axis { margin: 0; min-height: 1.3rem; }
.legend {
  list-style: none; margin: .2rem 0 .3rem; padding: 0; font-size: .85rem;
  display: flex; flex-wrap: wrap; gap: 0 1.2rem; min-height: 1.3rem;
}
.legend i {
  display: inline-block; width: 1.4rem; margin-right: .45rem;
  border-top: 2.5px solid currentColor; vertical-align: middle;
}
.legend i.dashed { border-top-style: dashed; }
.legend i.dotted { border-top-style: dotted; }
@media (max-width: 50rem) { .axis:empty, .legend:empty { display: none; } }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: inherit !important; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; min-width: 20rem; }
th, td {
  text-align: left; vertical-align: top; padding: .35rem 1.2rem .35rem 0;
  border-bottom: 1px solid var(--line);
}
th { color: var(--muted); font-weight: 600; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
.settings { width: 100%; }
.settings td:first-child { color: var(--muted); width: 40%; }
.settings td { overflow-wrap: anywhere; }
pre {
  margin: 0 0 .8rem; padding: .9rem 1.1rem; border-radius: .6rem;
  background: var(--soft); white-space: pre-wrap; overflow-wrap: anywhere;
  font: .85rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
}
mark { background: none; color: var(--accent); font-weight: 600; }
details { border-top: 1px solid var(--line); padding-top: .9rem; }
summary { cursor: pointer; }
summary h2 { display: inline; }
details .scroll { margin-top: .7rem; }
section:has(> details) { margin-top: 1.1rem; }
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; }
  section, .tile { break-inside: avoid; }
  section:has(table), section:has(pre) { break-inside: auto; }
  details::details-content { content-visibility: visible; display: block; }
}
"""
# Should anything slip past the escaping, the browser still runs no script and
# fetches nothing.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def render(
  title: str, parts: Sequence[sections.Section], *, subtitle: str = ''
) -> str:
  """Returns a whole HTML document; neighbouring charts share a grid."""
  body = []
  for are_charts, group in itertools.groupby(
    parts, lambda part: isinstance(part, chart.Curve)
  ):
    rendered = '\n'.join(part.render() for part in group)
    body.append(
      f'<div class="charts">{rendered}</div>' if are_charts else rendered
    )
  below = f'<p>{html.escape(subtitle)}</p>' if subtitle else ''
  return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<header><h1>{html.escape(title)}</h1>{below}</header>
<main>
{chr(10).join(body)}
</main>
</body>
</html>
"""
