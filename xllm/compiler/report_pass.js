// --- one pass -----------------------------------------------------------------------------------
const S = { view: 'overview', pass: 0, q: '', full: false, hit: -1, hits: [], call: 0 };

/** Rows in their places: those that matter as elements, the others behind a button. */
function rowList(box, rows, sub, single) {
  const near = new Set();
  rows.forEach((r, i) => {
    if (S.q ? r.text.includes(S.q) : changed(r)) {
      for (let k = S.q ? 0 : -CONTEXT; k <= (S.q ? 0 : CONTEXT); k++) near.add(i + k);
    }
  });
  const all = !S.q && (S.full || single);
  let module = '';
  const put = (parent, row) => {
    const deep = row.path.slice(sub.length + 1);
    if (deep !== module) parent.append(el('div', 'mod', '# ' + (deep || sub.split('.').at(-1))));
    module = deep;
    parent.append(rowElement(row, S.q, single));
  };
  for (let i = 0; i < rows.length;) {
    let end = i;
    while (end < rows.length && !all && !near.has(end)) end++;
    if (end - i > (S.q ? 0 : 1)) {
      const hidden = rows.slice(i, end), what = S.q ? 'other' : 'unchanged';
      const lines = hidden.length > 1 ? 'lines' : 'line';
      const more = el('button', 'more', `… ${hidden.length} ${what} ${lines}`);
      box.append(click(more, () => {
        const part = document.createDocumentFragment();
        module = '';
        hidden.forEach(r => put(part, r));
        more.replaceWith(part);
      }));
      i = end;
    } else put(box, rows[i++]);
  }
}

/** Body of a section: its modules as blocks that fold. */
function sectionBody(sec, single) {
  const rows = rowsOf(sec, sec.sel), body = el('div');
  const prefix = sec.title.replace('#', sec.members[sec.sel][0]);
  const first = r => r.path.startsWith(prefix + '.')
    ? r.path.slice(prefix.length + 1).split('.')[0] : '';
  for (let i = 0; i < rows.length;) {
    let end = i;
    const name = first(rows[i]);
    while (end < rows.length && first(rows[end]) === name) end++;
    const part = rows.slice(i, end), c = tally(part), box = el('div'), inner = el('div');
    i = end;
    if (S.q && !part.some(r => r.text.includes(S.q))) continue;
    const sub = name ? prefix + '.' + name : prefix;
    let done = false;
    const fill = () => { if (!done) rowList(inner, part, sub, single); done = true; };
    if (name) {
      const busy = c.some(Boolean), what = single ? 'nodes' : 'unchanged';
      const note = busy ? count(c) : el('span', 'count dim', `${part.length} ${what}`);
      box.append(click(el('div', 'sub fold', name, note), () => {
        inner.hidden = !box.classList.toggle('open');
        fill();
      }));
      const open = S.q || S.full || busy || single;
      box.classList.toggle('open', !!open);
      inner.hidden = !open;
      if (open) fill();
    } else fill();
    if (!name && body.childElementCount) inner.className = 'own';
    box.append(inner);
    body.append(box);
  }
  return body;
}
function ranges(members) {
  const out = [];
  for (const n of members.map(m => +m[0])) {
    const last = out[out.length - 1];
    if (last && last[1] === n - 1) last[1] = n; else out.push([n, n]);
  }
  return out.map(([a, b]) => a === b ? a : a + '–' + b).join(', ');
}
function sectionElement(sec, single, calls) {
  const head = el('header', 'fold'), box = el('section', 'sec' + (single ? ' one' : ''), head);
  const many = sec.members.length > 1;
  sec.sel ??= 0;
  sec.render = (open = true) => {
    box.querySelector(':scope > div')?.remove();
    box.classList.toggle('open', open);
    if (open) box.append(sectionBody(sec, single));
    if (many) pick.value = sec.sel;
  };
  sec.box = box;
  head.append(el('b', '', sec.title.replace('#', ranges(sec.members)).replaceAll('.', ' › ')));
  if (calls > 1 && sec.title.includes('#')) {
    head.append(el('span', 'dim', `stands for ${calls} calls`));
  }
  const pick = el('select');
  if (many) {
    sec.members.forEach((m, i) => pick.append(new Option(m[0], i)));
    pick.addEventListener('click', e => e.stopPropagation());
    pick.addEventListener('change', () => { sec.sel = +pick.value; sec.render(); });
    head.append(el('span', 'dim', sec.members.length + ' alike, showing'), pick);
  }
  const c = tally(rowsOf(sec, sec.sel)), n = rowsOf(sec, sec.sel).length;
  sec.busy = c.some(Boolean);
  box.classList.toggle('calm', !sec.busy && !single);
  head.append(sec.busy ? count(c) : el('span', 'count dim',
    `${n} ${single ? 'node' : 'unchanged'}${single && n > 1 ? 's' : ''}`));
  click(head, () => sec.render(!box.classList.contains('open')));
  return box;
}
const sections = p => p.pieces.flatMap(x => x.sections);

/** Matches: of the member that is shown, then those that only other members have. */
function search() {
  S.hits = []; S.hit = -1;
  let total = 0;
  if (S.q) for (const sec of sections(D.passes[S.pass])) {
    const seen = new Set(), order = sec.members.map((_, i) => i);
    order.sort((a, b) => (b === sec.sel) - (a === sec.sel));
    sec.found = false;
    for (const m of order) rowsOf(sec, m).forEach(r => {
      if (!r.text.includes(S.q)) return;
      total++;
      if (seen.has(r.i)) return;
      if (!sec.found) sec.sel = m;
      sec.found = true;
      seen.add(r.i);
      S.hits.push([sec, m, r.i]);
    });
  }
  return total;
}
function showMatches() {
  const p = D.passes[S.pass], total = search();
  let shown = 0;
  for (const sec of sections(p)) {
    sec.box.hidden = S.q && !sec.found;
    const open = (S.q ? sec.found : sec.busy || S.full) && shown < OPEN_ROWS;
    if (open) shown += rowsOf(sec, sec.sel).length;
    sec.render(!!open);
  }
  for (const piece of p.pieces) {
    piece.box.hidden = S.q && !piece.sections.some(s => s.found);
    piece.fold(S.q || S.full || !p.before || piece.sections.some(s => s.busy));
  }
  const more = total > S.hits.length ? `, ${total} in all layers` : '';
  const matches = S.hits.length === 1 ? 'match' : 'matches';
  document.getElementById('found').textContent = S.q ? `${S.hits.length} ${matches}${more}` : '';
}
function nextHit(step) {
  if (!S.hits.length) return;
  S.hit = (S.hit + step + S.hits.length) % S.hits.length;
  const [sec, m, i] = S.hits[S.hit];
  if (sec.sel !== m || !sec.box.classList.contains('open')) { sec.sel = m; sec.render(); }
  main.querySelector('.cur')?.classList.remove('cur');
  const row = sec.box.querySelector(`.row[data-i="${i}"]`);
  row?.classList.add('cur');
  row?.scrollIntoView({ block: 'center' });
  document.getElementById('found').textContent = `${S.hit + 1} of ${S.hits.length}`;
}
function passView() {
  const p = D.passes[S.pass], single = !p.before, b = p.before || p;
  const box = el('input');
  Object.assign(box, { type: 'search', id: 'q', value: S.q,
    placeholder: 'filter nodes, ops, modules   /' });
  let timer;
  box.addEventListener('input', () => { clearTimeout(timer); timer = setTimeout(() => {
    S.q = box.value.trim().toLowerCase(); showMatches(); note(); }, 150); });
  const all = el('input');
  all.type = 'checkbox'; all.checked = S.full;
  all.addEventListener('change', () => { S.full = all.checked; showMatches(); note(); });
  const expected = p.expected === null ? 'no expectation' : p.expected + ' expected';
  const facts = single ? `level ${p.level} · ${p.nodes} nodes` : [`${b.level} → ${p.level}`,
    `${p.sites} sites, ${expected}`, `${p.ms} ms`, `${b.nodes} → ${p.nodes} nodes`,
    p.error === null ? 'not verified' : 'max error ' + p.error.toExponential(1)].join(' · ');
  const swatch = (v, t) => { const i = el('i'); i.style.background = `var(${v})`; return [i, t]; };
  main.append(el('div', 'bar', el('h2', '', p.name), el('p', '', facts), el('div', 'tools', box,
    Object.assign(el('span'), { id: 'found' }),
    single ? null : el('label', '', all, 'unchanged lines'),
    single ? null : el('span', 'key', ...swatch('--del', 'removed'), ...swatch('--add', 'added'),
      ...swatch('--em', 'other operands')))));
  if (p.doc) {
    const d = el('details', '', el('summary', 'dim', 'what this pass does'), el('pre', '', p.doc));
    main.append(d);
  }
  if (!p.pieces.length) main.append(el('p', 'dim', 'This pass changed nothing in this model.'));
  for (const piece of p.pieces) {
    const calls = M.pieces[piece.name]?.calls;
    const title = piece.name === '(folded)'
      ? 'folded: what no piece holds under its old name; layers here became calls of a piece above'
      : piece.name + (calls > 1 ? ` × ${calls}` : '');
    const body = el('div', '', ...piece.sections.map(s => sectionElement(s, single, calls)));
    const calm = piece.sections.every(s => s.ops.every((x, i) => i % 3 || x === '=' || x === 'r'));
    const head = el('h3', 'fold', title, calm && !single ? el('span', 'dim', ' unchanged') : null);
    piece.fold = open => { piece.box.classList.toggle('open', !!open); body.hidden = !open; };
    click(head, () => piece.fold(body.hidden));
    piece.box = el('div', 'piece', head, body);
    main.append(piece.box);
  }
  showMatches();
}
