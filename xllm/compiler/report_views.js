// --- overview -----------------------------------------------------------------------------------
const sites = p => !p.before ? '–' : p.expected === null ? String(p.sites)
  : el('span', p.sites === p.expected ? 'ok' : 'bad', p.sites);
function overview() {
  const mem = M.memory, m = M.model;
  const facts = [m.architecture, `${m.layers} layers`, M.factors.target.value,
    M.factors.backend.value, m.dtype];
  main.append(el('div', 'bar', el('h2', '', m.name), el('p', '', facts.join(' · '))));
  const verified = D.passes.some(p => p.error !== null);
  main.append(el('h3', '', 'Passes'), table(
    ['', 'pass', 'level', 'expected', 'sites', 'ms', 'nodes', ...(verified ? ['max error'] : [])],
    D.passes.map((p, i) => [i, p.name, p.level, { num: p.before ? p.expected ?? 'any' : '–' },
      { num: sites(p) }, p.ms, p.nodes,
      ...(verified ? [p.error === null ? '–' : p.error.toExponential(1)] : [])]),
    i => go({ view: 'pass', pass: i })));
  const box = (title, ...kids) => el('div', '', el('h3', '', title), ...kids);
  main.append(el('div', 'cols',
    box('Pieces', table(['piece', 'nodes', 'calls'],
      Object.entries(M.pieces).map(([n, p]) => [n, p.nodes, p.calls]))),
    box('Memory plan', table(['', ''], [
      ['weights', { num: bytes(mem.weight_bytes) }],
      ['KV cache per page', { num: bytes(mem.kv_bytes_per_page) }],
      ['KV cache per token', { num: bytes(mem.kv_bytes_per_page / mem.page_size) }],
      ['tokens per page', mem.page_size], ['tokens per step, at most', mem.max_tokens],
      ['sequences per step, at most', mem.max_sequences], ['context length', m.context_length]])),
    box('Buckets', table(['tokens', 'variant', 'padded'],
      M.buckets.map(b => [b.tokens, b.variant, b.padded ? 'yes' : 'no']))),
    box('Compile time', table(['phase', 'seconds'], Object.entries(M.seconds))),
    box('Symbols', table(['', 'counts'], Object.entries(M.symbols)))));
  const hex = v => el('span', 'hex', String(v));
  main.append(el('h3', '', 'What the key is made of'), el('div', 'hex dim', M.key),
    table(['factor', 'value', 'why'],
      Object.entries(M.factors).map(([n, f]) => [n, hex(f.value), el('span', 'dim', f.reason)])));
}

// --- schedule: the unrolled model ---------------------------------------------------------------
/** A line of a piece as one call sees it: names of its weights, and who made what it is given. */
function asCalled(text, index) {
  const call = M.schedule[index], name = text.match(/^%(\w+)/)?.[1];
  if (name && name in call.carried) {
    const value = call.carried[name];
    let from = index - 1;
    while (from >= 0 && !M.schedule[from].outputs.includes(value)) from--;
    return text.replace(/<- .*/, `<- %${value} of call ${from} (${M.schedule[from]?.piece})`);
  }
  return text.includes(' <- ') ? text.replace(/'([^']*)'/g, (all, leaf) =>
    leaf in call.leaves ? `'${call.leaves[leaf]}'` : all) : text;
}
/** A module path of a piece, which is named after its first call, as one call sees it. */
function pathAsCalled(path, index) {
  const number = name => +(name.match(/\.(\d+)\./)?.[1] ?? Infinity);
  const layer = i => Math.min(...Object.values(M.schedule[i].leaves).map(number));
  const first = M.schedule.findIndex(c => c.piece === M.schedule[index].piece);
  const shift = layer(index) - layer(first);
  return shift ? path.replace(/\.(\d+)(?=\.|$)/, (all, n) => '.' + (+n + shift)) : path;
}
function scheduleView() {
  const calls = M.schedule, index = S.call = Math.min(Math.max(S.call, 0), calls.length - 1);
  const runs = [];
  calls.forEach((c, i) => {
    const last = runs[runs.length - 1];
    if (last && last.piece === c.piece) last.to = i;
    else runs.push({ piece: c.piece, from: i, to: i });
  });
  const words = runs.map(r => r.piece + (r.to > r.from ? ` × ${r.to - r.from + 1}` : ''));
  const total = calls.reduce((n, c) => n + D.final[c.piece].length, 0);
  main.append(el('div', 'bar', el('h2', '', 'Schedule'), el('p', '',
    `${words.join(', ')} · ${calls.length} calls · ${total} nodes unrolled`)));
  for (const r of runs) {
    const row = el('div', 'calls', el('b', '', r.piece));
    for (let i = r.from; i <= r.to; i++) {
      const b = el('button', i === index ? 'on' : '', r.to > r.from ? i - r.from : 'call ' + i);
      b.title = `call ${i}`;
      row.append(click(b, () => go({ view: 'schedule', call: i })));
    }
    main.append(row);
  }
  const call = calls[index], lines = ids(D.final[call.piece]).map(i => LINES[i]);
  main.append(el('h3', '', `call ${index}: ${call.piece} → ${call.outputs.join(', ')}`));
  const box = el('section', 'sec one');
  let module = null;
  for (const [path, text] of lines) {
    if (path !== module) box.append(el('div', 'mod', '# ' + pathAsCalled(path, index)));
    module = path;
    const line = asCalled(text, index);
    box.append(rowElement({ k: '=', l: line, r: line }, '', true));
  }
  main.append(box);
}

// --- navigation ---------------------------------------------------------------------------------
function sidebar() {
  const link = (on, cls, state, ...cells) => {
    const spans = cells.map((c, i) => el('span', i > 1 ? 'num' : '', c));
    const a = el('a', (on ? 'on ' : '') + cls, ...spans);
    a.href = '#' + hash(state);
    return a;
  };
  const where = [M.factors.target.value, M.factors.backend.value, M.model.dtype].join(' · ');
  const keys = [['↑', ' '], ['↓', ' pass  '], ['/', ' filter  '], ['⏎', ' next match']];
  side.replaceChildren(
    el('h1', '', M.model.name), el('p', '', where),
    link(S.view === 'overview', '', { view: 'overview' }, '', 'Overview'),
    link(S.view === 'schedule', '', { view: 'schedule', call: 0 }, '', 'Schedule',
      `${M.schedule.length} calls`),
    el('h2', '', 'Passes'),
    ...D.passes.map((p, i) => link(S.view === 'pass' && S.pass === i,
      p.pieces.length ? '' : 'quiet', { view: 'pass', pass: i }, i, p.name, sites(p))),
    el('p', '', el('br'), ...keys.flatMap(([k, what]) => [el('kbd', '', k), what])));
  side.querySelector('.on')?.scrollIntoView({ block: 'nearest' });
}
function hash(s) {
  if (s.view === 'overview') return 'view=overview';
  if (s.view === 'schedule') return 'view=schedule&call=' + s.call;
  const more = (s.q ? '&q=' + encodeURIComponent(s.q) : '') + (s.full ? '&full=1' : '');
  return 'pass=' + D.passes[s.pass].id + more;
}
let noted = '';
/** Keep the address in step with what is shown, without drawing again. */
function note() {
  noted = '#' + hash(S);
  if (location.hash !== noted) history.replaceState(null, '', noted);
}
function go(state) { location.hash = hash({ ...S, ...state }); }
function draw() {
  main.replaceChildren();
  sidebar();
  ({ overview, schedule: scheduleView, pass: passView })[S.view]();
  main.scrollTop = 0;
}
function route() {
  if (location.hash && location.hash === noted) return;
  const at = new URLSearchParams(location.hash.slice(1)), pass = at.get('pass');
  S.view = pass ? 'pass' : at.get('view') === 'schedule' ? 'schedule' : 'overview';
  S.pass = Math.max(0, D.passes.findIndex(p => p.id === pass || p.name === pass));
  S.q = (at.get('q') || '').trim().toLowerCase();
  S.full = at.get('full') === '1';
  S.call = +at.get('call') || 0;
  for (const sec of sections(D.passes[S.pass])) {
    sec.sel = Math.max(0, sec.members.findIndex(m => m[0] === at.get('layer')));
  }
  draw();
  noted = location.hash;
}
addEventListener('hashchange', route);
addEventListener('keydown', e => {
  const field = document.getElementById('q'), typing = e.target === field;
  if (e.target.tagName === 'SELECT' || e.ctrlKey || e.metaKey || e.altKey) return;
  const step = { ArrowDown: 1, ArrowUp: -1 }[e.key];
  if (step && !typing) {
    const at = S.view === 'pass' ? S.pass + step : step > 0 ? 0 : -1;
    if (at >= 0 && at < D.passes.length) go({ view: 'pass', pass: at });
    else if (at < 0) go({ view: 'overview' });
  } else if (e.key === '/' && field && !typing) field.focus();
  else if (e.key === 'Enter' && (typing || e.target === document.body || e.target === main)) {
    nextHit(e.shiftKey ? -1 : 1);
  } else if (e.key === 'Escape' && typing) {
    field.value = '';
    field.dispatchEvent(new Event('input'));
    field.blur();
  } else return;
  e.preventDefault();
});
route();
