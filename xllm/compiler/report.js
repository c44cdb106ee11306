'use strict';
const D = JSON.parse(document.getElementById('data').textContent), M = D.manifest;
const side = document.getElementById('side'), main = document.getElementById('main');
const CONTEXT = 2, OPEN_ROWS = 700;

// --- data ---------------------------------------------------------------------------------------
const LINES = [];                                                       // [module path, line]
{
  const parts = D.templates.map(t => t.split('\x01'));
  for (let i = 0; i < D.lines.length;) {
    const p = parts[D.lines[i++]];
    let s = p[0];
    for (let k = 1; k < p.length; k++) s += D.lines[i++] + p[k];
    const tab = s.indexOf('\t');
    LINES.push([s.slice(0, tab), s.slice(tab + 1)]);
  }
}
const ids = steps => { let at = 0; return steps.map(d => at += d); };
const tag = (n, i) => String(i).padStart(2, '0') + '_' + n;
D.passes.forEach((p, i) => { p.id = tag(p.name, i); p.before = D.passes[i - 1]; });

/** Rows of a section's member: {k: kind, l: line or null, r: line or null, path}. */
function rowsOf(sec, m) {
  const member = sec.members[m];
  if (member.rows) return member.rows;
  const L = ids(member[1]), R = ids(member[2]), rows = [];
  let i = 0, j = 0;
  for (let o = 0; o < sec.ops.length; o += 3) {
    const [k, n, q] = sec.ops.slice(o, o + 3);
    for (let x = 0; x < Math.max(n, q); x++) {
      const l = x < n ? LINES[L[i + x]] : null, r = x < q ? LINES[R[j + x]] : null;
      rows.push({ k, l: l && l[1], r: r && r[1], path: (r || l)[0], i: rows.length,
        text: ((l ? l.join(' ') : '') + '\n' + (r ? r.join(' ') : '')).toLowerCase() });
    }
    i += n; j += q;
  }
  return member.rows = rows;
}
const changed = row => row.k === '!' || row.k === '~';

/** [removed, added, edited] over rows or a section's ops. */
function tally(rows) {
  const c = [0, 0, 0];
  for (const r of rows) {
    if (r.k === '!') { c[0] += r.l !== null; c[1] += r.r !== null; } else c[2] += r.k === '~';
  }
  return c;
}

// --- elements -----------------------------------------------------------------------------------
function el(name, cls, ...kids) {
  const e = document.createElement(name);
  if (cls) e.className = cls;
  e.append(...kids.filter(k => k !== null));
  return e;
}
const click = (e, f) => (e.addEventListener('click', f), e);
const count = c => el('span', 'count', ...[['−', 'bad'], ['+', 'ok'], ['~', 'dim']].map(
  ([sign, cls], i) => c[i] ? el('span', cls, sign + c[i]) : null));
const isNum = v => typeof v === 'number' || v?.num !== undefined;

/** Rows of strings, numbers, elements, or {num: what is set like a number}; `go` takes clicks. */
function table(heads, rows, go) {
  const cell = v => el('td', isNum(v) ? 'num' : '', v?.num ?? v ?? '–');
  const head = heads.map((h, i) => el('th', rows.length && isNum(rows[0][i]) ? 'num' : '', h));
  return el('table', '', el('tr', '', ...head), ...rows.map((r, i) => {
    const tr = el('tr', go ? 'go' : '', ...r.map(cell));
    return go ? click(tr, () => go(i)) : tr;
  }));
}
const bytes = n => n < 1024 ? n + ' B' : n < 1 << 20 ? (n / 1024).toFixed(1) + ' KiB'
  : n < 2 ** 30 ? (n / 2 ** 20).toFixed(1) + ' MiB' : (n / 2 ** 30).toFixed(2) + ' GiB';

/** A node's line in spans; `other` is the line that it is compared with, `q` what is searched. */
function code(line, other, q) {
  const token = /%\w+|[A-Za-z_][\w.]*(?=\()|\b[a-z]+\d+\[[^\]]*\]|[^%\w]+|\w+/g;
  const mine = line.match(token) || [], theirs = other ? other.match(token) : mine;
  const low = line.toLowerCase(), hits = [];
  for (let h = q ? low.indexOf(q) : -1; h >= 0; h = low.indexOf(q, h + 1)) hits.push(h);
  const isHit = x => hits.some(h => h <= x && x < h + q.length);
  const kind = t => t[0] === '%' ? '' : /^[a-z]+\d+\[/.test(t) ? 't'
    : /^[A-Za-z_][\w.]*\./.test(t) ? 'o' : '';
  const out = el('span');
  let at = 0;
  mine.forEach((t, i) => {
    const e = el(theirs[i] === t ? 'span' : 'em', kind(t));
    for (let k = 0; k < t.length;) {
      const inside = isHit(at + k);
      let end = k + 1;
      while (end < t.length && isHit(at + end) === inside) end++;
      e.append(inside ? el('mark', '', t.slice(k, end)) : t.slice(k, end));
      k = end;
    }
    out.append(e);
    at += t.length;
  });
  return out;
}
function rowElement(row, q, single) {
  const side = (cls, text, other) => el('div', cls + (row.k === '!' && text !== null ? ' d' : ''),
    text === null ? '' : code(text, row.k === '~' ? other : null, q));
  const e = el('div', 'row' + (row.k === '~' ? ' e' : row.k === 'r' ? ' rn' : ''),
    ...(single ? [side('r', row.r)] : [side('l', row.l, row.r), side('r', row.r, row.l)]));
  if (row.k === 'r') e.title = 'the same value under another name';
  e.dataset.i = row.i;
  return e;
}

