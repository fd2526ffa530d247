"""Style sheet and script of the report; nothing in them is fetched, and the page reads without the script too."""

STYLE = """
:root { color-scheme: light dark;
  --page: #f6f7f8; --card: #ffffff; --text: #1b2026; --muted: #5a6470; --line: #dfe3e8; --soft: #eef1f4; --mark: #fff3c4;
  --c0: #0072b2; --c1: #d55e00; --c2: #00855f; --c3: #a3478f; --c4: #8a6a00; --c5: #3a78d8;
  --raw: #7fb4e0; --sink: #1f5f99; --g0: #f0a830; --g1: #c2508f; --g2: #2f9e77; --g3: #7d62c9; --hidden: #e6e9ec; }
@media (prefers-color-scheme: dark) { :root {
  --page: #14171a; --card: #1d2125; --text: #e8eaed; --muted: #a3acb7; --line: #343a41; --soft: #272c32; --mark: #4a4016;
  --c0: #5ab4f0; --c1: #ff914d; --c2: #3fc99a; --c3: #e58fd0; --c4: #e0bb3c; --c5: #9db8ff;
  --raw: #5b93c4; --sink: #a9d4fb; --g0: #f0a830; --g1: #e274b2; --g2: #3fc99a; --g3: #a892ee; --hidden: #2b3036; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 15px/1.5 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1200px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 26px; margin: 0; line-height: 1.25; }
h2 { font-size: 19px; margin: 36px 0 12px; } h3 { font-size: 15px; margin: 0; }
p { margin: 6px 0; max-width: 80ch; } .muted { color: var(--muted); } small { font-size: 13px; }
code { font: 13px ui-monospace, "SF Mono", Menlo, Consolas, monospace; overflow-wrap: anywhere; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; }
.warning { border-left: 4px solid var(--c1); }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(205px, 1fr)); gap: 12px; margin: 18px 0 0; }
.figures dt { color: var(--muted); font-size: 13px; } .figures dd { margin: 0; font-variant-numeric: tabular-nums; }
.figures .value { font-size: 23px; font-weight: 600; line-height: 1.3; } .detail { color: var(--muted); font-size: 13px; }
.bar { height: 5px; border-radius: 3px; background: var(--soft); margin-top: 6px; overflow: hidden; }
.bar i { display: block; height: 100%; background: var(--c2); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 5px 12px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
thead th { color: var(--muted); font-weight: 500; font-size: 13px; vertical-align: bottom; } tbody th { font-weight: 500; }
tr:last-child > * { border-bottom: 0; } .headline { margin-top: 18px; }
.compared .value { font-size: 17px; font-weight: 600; }
.compared thead th { color: var(--text); font-size: 15px; font-weight: 600; }
.compared td { min-width: 150px; } .compared .bar { max-width: 150px; }
tr.differs > * { background: var(--mark); } td.changed, td.changed code { font-weight: 700; }
.axes { border: 0; padding: 0; margin: 0; display: inline; } .pick { position: absolute; opacity: 0; }
.pick + label { display: inline-block; padding: 3px 12px; border: 1px solid var(--line); border-radius: 16px; cursor: pointer;
  font-size: 13px; margin-right: 6px; background: var(--card); }
.pick:checked + label { background: var(--text); color: var(--page); border-color: var(--text); }
.pick:focus-visible + label, .chart svg:focus-visible { outline: 2px solid var(--c5); outline-offset: 2px; }
.charts { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 14px; margin-top: 12px; }
.chart { margin: 0; position: relative; } .chart.wide { grid-column: 1 / -1; }
@media (max-width: 760px) { .charts { grid-template-columns: minmax(0, 1fr); } .chart.wide { overflow-x: auto; } }
.chart svg { width: 100%; height: auto; display: none; margin-top: 6px; }
#axis-step:checked ~ .charts svg[data-axis=step], #axis-tokens:checked ~ .charts svg[data-axis=tokens],
#axis-hours:checked ~ .charts svg[data-axis=hours] { display: block; }
@media (max-width: 760px) { .chart.wide > svg { width: 760px; } }
svg text { fill: var(--muted); font: 12px system-ui, "Segoe UI", Roboto, sans-serif; font-variant-numeric: tabular-nums; }
.grid { stroke: var(--line); } .axis, .tick { stroke: var(--muted); }
.reference { stroke: var(--muted); stroke-dasharray: 6 4; stroke-width: 1.3; } svg .reference-label { fill: var(--text); }
.line { fill: none; stroke: var(--c); stroke-width: 2; stroke-linejoin: round; stroke-dasharray: var(--d); }
.trace { fill: none; stroke: var(--c); stroke-width: 1; opacity: .35; } .band { fill: var(--c); opacity: .2; }
.marks circle { fill: var(--card); stroke: var(--c); stroke-width: 2; } .cursor { stroke: var(--muted); }
.dot { fill: var(--c); stroke: var(--card); stroke-width: 1.5; }
.c0 { --c: var(--c0); } .c1 { --c: var(--c1); } .c2 { --c: var(--c2); } .c3 { --c: var(--c3); } .c4 { --c: var(--c4); }
.c5 { --c: var(--c5); } .d0 { --d: none; } .d1 { --d: 8 4; } .d2 { --d: 2 3; } .d3 { --d: 10 3 2 3; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 4px 0 0; padding: 0; list-style: none; font-size: 13px; }
.legend li { display: flex; align-items: center; gap: 7px; } .legend svg { display: inline !important; width: 30px; margin: 0; }
.tip { position: absolute; pointer-events: none; background: var(--card); border: 1px solid var(--line); border-radius: 6px;
  padding: 6px 9px; font-size: 12.5px; box-shadow: 0 3px 12px #0003; white-space: nowrap; z-index: 2; }
.tip div::before { content: "\\25cf\\a0"; color: var(--c); } .tip b { font-weight: 600; }
.sample { display: grid; grid-template-columns: minmax(0, 5fr) minmax(0, 6fr); gap: 26px; margin-top: 14px; }
@media (max-width: 860px) { .sample { grid-template-columns: minmax(0, 1fr); } }
.remark { max-width: none; } .strip { line-height: 1.9; margin-top: 10px; }
.token { color: #14171a; padding: 2px 3px; margin: 0 1px; border-radius: 4px; white-space: pre;
  display: inline-block;
  line-height: 1.35; font-size: 13px; background: var(--k); cursor: pointer; }
.token.unseen { background: var(--hidden); color: var(--muted); }
.token.query { outline: 2.5px solid var(--text); outline-offset: 1px; } .token.first { margin-left: 22px; }
.raw { --k: var(--raw); } .sink { --k: var(--sink); } .g0 { --k: var(--g0); } .g1 { --k: var(--g1); } .g2 { --k: var(--g2); }
.g3 { --k: var(--g3); } .token.sink { color: var(--card); } .token.sink.unseen { color: var(--muted); }
.token.g0, .token.g1, .token.g2, .token.g3 { font-weight: 700; } .token.unseen { font-weight: 400; }
.swatch { width: 14px; height: 14px; border-radius: 3px; background: var(--k); border: 1px solid #0002; }
.hidden-cell { --k: var(--hidden); } .later { --k: transparent; } .mask { width: 100%; max-width: 620px; cursor: crosshair; }
.mask path, .mask rect { fill: var(--k); } .mask .row-mark { fill: none; stroke: var(--text); stroke-width: .45; }
.explained + .explained { margin-top: 14px; } input[type=range] { width: 100%; accent-color: var(--c0); }
.sections { columns: 2; column-gap: 14px; } .sections .card { break-inside: avoid; margin-bottom: 14px; }
.sections.several { columns: 1; } @media (max-width: 760px) { .sections { columns: 1; } }
.sections td:first-child { width: 46%; } .sections.several td:first-child { width: 24%; } .key { cursor: help; }
"""

SCRIPT = """
'use strict';
const data = JSON.parse(document.getElementById('data').textContent);
const svgNode = (tag, parent, css) => {
  const node = document.createElementNS('http://www.w3.org/2000/svg', tag);
  node.setAttribute('class', css);
  return parent.appendChild(node);
};
const figure = v => {
  const size = Math.abs(v);
  for (const [limit, divisor, unit] of [[1e12, 1e12, ' T'], [1e9, 1e9, ' G'], [1e6, 1e6, ' M'], [1e4, 1e3, ' k']])
    if (size >= limit) return Number((v / divisor).toPrecision(4)) + unit;
  return size && size < 1e-3 ? v.toExponential(2) : String(Number(v.toPrecision(4)));
};

function point(svg) {
  const chart = svg.closest('.chart');
  const lines = [...svg.querySelectorAll('[data-curve]')].map(path => ({
    curve: data.curves[path.dataset.curve],
    at: path.getAttribute('d').slice(1).split('L').map(p => p.split(' ').map(Number)),
  }));
  const places = [...new Set(lines.flatMap(l => l.at.map(p => p[0])))].sort((a, b) => a - b);
  const nearest = (values, x) => values.reduce((best, v, i) => Math.abs(v - x) < Math.abs(values[best] - x) ? i : best, 0);
  let tip = null, marks = null, place = places.length - 1;
  const hide = () => { if (tip) { tip.remove(); marks.remove(); tip = null; } };
  const show = x => {
    hide();
    place = nearest(places, x);
    marks = svgNode('g', svg, '');
    tip = chart.appendChild(document.createElement('div'));
    tip.className = 'tip';
    const cursor = svgNode('line', marks, 'cursor');
    const box = svg.viewBox.baseVal;
    Object.entries({ x1: places[place], x2: places[place], y1: 10, y2: box.height - 40 }).forEach(e => cursor.setAttribute(...e));
    for (const { curve, at } of lines) {
      const i = nearest(at.map(p => p[0]), places[place]);
      if (Math.abs(at[i][0] - places[place]) > 12) continue;
      const dot = svgNode('circle', marks, 'dot ' + curve.style);
      Object.entries({ cx: at[i][0], cy: at[i][1], r: 4 }).forEach(e => dot.setAttribute(...e));
      const row = tip.appendChild(document.createElement('div'));
      row.className = curve.style;
      const last = curve.last ? curve.last[i] : curve.first[i];
      const steps = last > curve.first[i] ? 'steps ' + curve.first[i] + '\\u2013' + last : 'step ' + last;
      const tokens = curve.tokens.length ? ', ' + figure(curve.tokens[i]) + ' tokens' : '';
      let range = '';
      if (curve.low && curve.low[i] !== curve.high[i])
        range = ' (' + figure(curve.low[i]) + ' \\u2026 ' + figure(curve.high[i]) + ')';
      else if (curve.low && curve.low[i] !== curve.y[i]) range = ' (this step ' + figure(curve.low[i]) + ')';
      row.append(curve.name + ' ');
      row.appendChild(document.createElement('b')).textContent = figure(curve.y[i]);
      row.append(range + ' \\u00b7 ' + steps + tokens);
    }
    const outer = svg.getBoundingClientRect(), frame = chart.getBoundingClientRect();
    const left = outer.left - frame.left + places[place] / box.width * outer.width;
    const room = frame.width - tip.offsetWidth - 4;
    const wanted = left + 14 > room ? left - tip.offsetWidth - 14 : left + 14;
    tip.style.left = Math.max(4, Math.min(room, wanted)) + 'px';
    tip.style.top = outer.top - frame.top + 14 + 'px';
  };
  svg.setAttribute('tabindex', '0');
  svg.addEventListener('pointermove', event => {
    const outer = svg.getBoundingClientRect();
    show((event.clientX - outer.left) / outer.width * svg.viewBox.baseVal.width);
  });
  svg.addEventListener('pointerleave', hide);
  svg.addEventListener('blur', hide);
  svg.addEventListener('keydown', event => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by) return;
    event.preventDefault();
    show(places[Math.max(0, Math.min(places.length - 1, place + by))]);
  });
}

function explain(section, sample) {
  const tokens = [...section.querySelectorAll('.token')], slider = section.querySelector('input');
  const mask = section.querySelector('.mask'), mark = mask.querySelector('.row-mark');
  const pick = query => {
    const edges = sample.sees[query], counts = sample.names.map(() => 0);
    let total = 0;
    tokens.forEach((token, i) => {
      const seen = edges.filter(e => e <= i).length % 2 === 1;
      token.classList.toggle('unseen', !seen);
      token.classList.toggle('query', i === query);
      if (seen) { counts[sample.kinds[i]]++; total++; }
    });
    const listed = sample.names.map((n, k) => counts[k] ? counts[k] + ' ' + n + (counts[k] === 1 ? '' : 's') : '').filter(t => t);
    section.querySelector('.says').textContent = 'Token ' + query + ' (' + sample.text[query].trim() + ') sees ' + total
      + ' of ' + (query + 1 - sample.begin[query]) + ' tokens so far: ' + listed.join(', ') + '.';
    mark.setAttribute('y', query - 0.1);
    slider.value = query;
  };
  slider.disabled = false;
  slider.addEventListener('input', () => pick(Number(slider.value)));
  tokens.forEach((token, i) => token.addEventListener('click', () => pick(i)));
  mask.addEventListener('pointermove', event => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(mask.getScreenCTM().inverse());
    if (at.y >= 0 && at.y < tokens.length) pick(Math.floor(at.y));
  });
}

document.querySelectorAll('.chart > svg').forEach(point);
document.querySelectorAll('.explained').forEach((section, i) => explain(section, data.samples[i]));
"""
