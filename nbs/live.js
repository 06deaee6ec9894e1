// The quickstart's model in the page: draw or shuffle a scene, ask, and see where each word looked.
// Runs on onnxruntime-web (wasm) with files that tools/live.py puts into live/. Nothing is loaded from elsewhere.

// ---- Tokenizer: byte-level BPE, as in tokenizer.json ----

const PIECES = /'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+/gu;

function byteLetters() {   // each byte has a printable letter of its own
  const printable = b => (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
  let next = 256;
  return Array.from({length: 256}, (_, b) => String.fromCodePoint(printable(b) ? b : next++));
}

class Tokenizer {
  constructor(spec) {   // the content of tokenizer.json
    this.vocab = spec.model.vocab;
    this.letters = byteLetters();
    this.bytes = new Map(this.letters.map((letter, b) => [letter, b]));
    this.words = new Map(Object.entries(this.vocab).map(([word, id]) => [id, word]));
    this.special = new Set(spec.added_tokens.map(o => o.id));
    const pairs = spec.model.merges.map(o => (Array.isArray(o) ? o.join(' ') : o));
    this.rank = new Map(pairs.map((pair, i) => [pair, i]));
  }
  merge(letters) {   // join the pair of lowest rank until there is none
    const rank = i => this.rank.get(`${letters[i]} ${letters[i + 1]}`) ?? Infinity;
    for (;;) {
      let best = 0;
      for (let i = 1; i < letters.length - 1; i++) if (rank(i) < rank(best)) best = i;
      if (letters.length < 2 || rank(best) === Infinity) return letters;
      letters.splice(best, 2, letters[best] + letters[best + 1]);
    }
  }
  encode(text) {
    const ids = [];
    for (const [piece] of text.matchAll(PIECES)) {
      const letters = [...new TextEncoder().encode(piece)].map(b => this.letters[b]);
      for (const part of this.merge(letters)) ids.push(this.vocab[part]);
    }
    return ids;
  }
  decode(ids) {
    const text = ids.filter(id => !this.special.has(id)).map(id => this.words.get(id) ?? '').join('');
    return new TextDecoder().decode(Uint8Array.from([...text].map(letter => this.bytes.get(letter))));
  }
}

// ---- Pixels: Pillow's bicubic resize, to the bit, then -1 to 1 ----

function cubic(x) {
  x = Math.abs(x);
  if (x < 1) return (1.5*x - 2.5)*x*x + 1;
  return x < 2 ? ((-.5*x + 2.5)*x - 4)*x + 2 : 0;
}

function weights(from, to) {   // for each new pixel: the first old one, and fixed-point weights
  const scale = from/to, one = 2**22;
  return Array.from({length: to}, (_, i) => {
    const centre = (i + .5)*scale;
    const first = Math.max(0, Math.trunc(centre - 1.5));
    const last = Math.min(from, Math.trunc(centre + 2.5));
    const raw = Array.from({length: last - first}, (_, k) => cubic(first + k - centre + .5));
    const sum = raw.reduce((a, b) => a + b);
    return [first, raw.map(w => Math.trunc(w/sum*one + Math.sign(w)*.5))];
  });
}

function resizeRows(src, width, height, to) {   // src[y][x] → out[y][i], clipped to bytes
  return weights(width, to).reduce((out, [first, ws], i) => {
    for (let y = 0; y < height; y++) {
      const sum = ws.reduce((a, w, k) => a + w*src[y*width + first + k], 2**21);
      out[y*to + i] = Math.min(255, Math.max(0, Math.floor(sum/2**22)));
    }
    return out;
  }, new Float32Array(height*to));
}

function turned(src, width, height) {
  return src.map((_, i) => src[(i % height)*width + Math.floor(i/height)]);
}

function pixels(rgba, side, to) {   // RGBA bytes of a square → channels first
  const out = new Float32Array(3*to*to);
  for (let c = 0; c < 3; c++) {
    const plane = Float32Array.from({length: side*side}, (_, i) => rgba[4*i + c]);
    const wide = resizeRows(plane, side, side, to);
    const tall = turned(resizeRows(turned(wide, to, side), side, to, to), to, to);
    tall.forEach((value, i) => { out[c*to*to + i] = Math.fround(value/255 - .5)/.5; });
  }
  return out;
}

// ---- The model: three graphs ----

function script(url) {
  return new Promise((resolve, reject) => {
    const tag = Object.assign(document.createElement('script'), {src: url, onload: resolve, onerror: () => reject(Error(`no ${url}`))});
    document.head.append(tag);
  });
}

class Model {
  static async load(base) {
    const get = name => fetch(new URL(name, base));
    const model = new Model();
    await script(new URL('ort.wasm.min.js', base).href);
    ort.env.wasm.wasmPaths = new URL('.', base).href;
    ort.env.wasm.numThreads = 1;   // more of them would need headers that plain servers do not send
    model.about = await (await get('manifest.json')).json();
    model.tokenizer = new Tokenizer(await (await get('tokenizer.json')).json());
    for (const name of ['vision', 'embed', 'language'])
      model[name] = await ort.InferenceSession.create(new URL(`${name}.onnx`, base).href);
    return model;
  }
  async run(name, tensors) {   // inputs and outputs by their order
    const session = this[name];
    const out = await session.run(Object.fromEntries(session.inputNames.map((o, i) => [o, tensors[i]])));
    return session.outputNames.map(o => out[o]);
  }
  async embedded(ids) {
    const data = BigInt64Array.from(ids, BigInt);
    return (await this.run('embed', [new ort.Tensor('int64', data, [1, ids.length])]))[0];
  }
  prompt(question) {
    const {before, lead, after} = this.about;
    return [...before, ...this.tokenizer.encode(lead + question.trim() + after)];
  }
  async start(ids, image) {   // embeddings of the prompt, image features in their places
    const {input, image_token} = this.about;
    const shown = new ort.Tensor('float32', image, [1, 3, input, input]);
    const [features] = await this.run('vision', [shown]);
    const emb = await this.embedded(ids), width = emb.dims[2];
    emb.data.set(features.data, ids.indexOf(image_token)*width);
    return emb;
  }
  look(rows) {   // attention of the last position to the image, mean over layers and heads
    const {before, image_token, grid} = this.about;
    const length = rows.dims[2], many = rows.dims[0]*rows.dims[1], first = before.indexOf(image_token);
    return Array.from({length: grid[0]*grid[1]}, (_, i) => {
      let sum = 0;
      for (let row = 0; row < many; row++) sum += rows.data[row*length + first + i];
      return sum/many;
    });
  }
  async *answer(image, question, most = 48) {   // yields {id, look} for each token
    const {cache, layers, ends} = this.about, ids = this.prompt(question);
    const empty = () => new ort.Tensor('float32', new Float32Array(0), [1, cache[0], 0, cache[1]]);
    let past = Array.from({length: 2*layers}, empty), emb = await this.start(ids, image), done = 0;
    while (most--) {
      const at = BigInt64Array.from({length: emb.dims[1]}, (_, i) => BigInt(done + i));
      const positions = new ort.Tensor('int64', at, [1, emb.dims[1]]);
      const [logits, rows, ...longer] = await this.run('language', [emb, ...past, positions]);
      const id = logits.data.reduce((best, value, i, all) => (value > all[best] ? i : best), 0);
      if (ends.includes(id)) return;
      yield {id, look: this.look(rows)};
      [past, done, emb] = [longer, done + emb.dims[1], await this.embedded([id])];
    }
  }
}

// ---- The panel ----

const SIDE = 64, COLORS = {red: '#d62828', green: '#2ea043', blue: '#2654d6', yellow: '#f4c914', purple: '#8c3cb4', orange: '#f5821e'};
const SHAPES = {
  circle: (g, x, y, r) => g.arc(x, y, r, 0, 7),
  square: (g, x, y, r) => g.rect(x - .88*r, y - .88*r, 1.76*r, 1.76*r),
  triangle: (g, x, y, r) => { g.moveTo(x, y - r); g.lineTo(x + r, y + .8*r); g.lineTo(x - r, y + .8*r); },
  cross: (g, x, y, r) => { g.rect(x - r, y - .34*r, 2*r, .68*r); g.rect(x - .34*r, y - r, .68*r, 2*r); },
};
const ASKED = ['what color is the cross?', 'how many objects are there?', 'where is the circle?', 'what is the highest object?',
  'is there a red triangle in the image?', 'are there more circles than squares?', 'what word is written in the image?'];
const option = name => `<option>${name}</option>`;
const HTML = `<div class="live-scene"><canvas class="live-image" width="64" height="64" tabindex="0" role="button" aria-label="The scene; click or press Enter to add a shape"></canvas>
  <canvas class="live-look" width="6" height="6"></canvas></div>
<form><p><button type="button" name="shuffle">Shuffle</button> <button type="button" name="clear">Clear</button> then click to add a
  <select name="size">${['large', 'small'].map(option).join('')}</select> <select name="color">${Object.keys(COLORS).map(option).join('')}</select>
  <select name="shape">${Object.keys(SHAPES).map(option).join('')}</select></p>
<p><input name="question" value="${ASKED[0]}" list="live-asked" aria-label="Question" autocomplete="off"> <button>Ask</button>
  <datalist id="live-asked">${ASKED.map(o => `<option value="${o}">`).join('')}</datalist></p>
<p class="live-answer" aria-live="polite"></p><p class="live-note">The model (21 MB with its runtime) is loaded when you ask.</p></form>`;

class Panel {
  constructor(box, base) {
    Object.assign(this, {box, base, shown: 0});
    box.innerHTML = HTML;
    this.find = name => box.querySelector(name);
    this.image = this.find('.live-image').getContext('2d', {willReadFrequently: true});
    this.find('[name=shuffle]').onclick = () => this.shuffle();
    this.find('[name=clear]').onclick = () => this.clear();
    this.find('.live-scene').onclick = event => this.stamp(event);
    this.find('.live-scene').onkeydown = event => { if (event.key === 'Enter') this.stamp(event); };
    this.find('form').onsubmit = event => { event.preventDefault(); this.ask(); };
    this.strip = new Image();
    this.strip.onload = () => this.shuffle();
    this.strip.src = new URL('scenes.png', base).href;
  }
  clear() {
    this.image.fillStyle = '#e8e8e8';
    this.image.fillRect(0, 0, SIDE, SIDE);
    this.forget();
  }
  shuffle() {   // the next of the scenes that were held out from training
    this.image.drawImage(this.strip, SIDE*this.shown, 0, SIDE, SIDE, 0, 0, SIDE, SIDE);
    this.shown = (this.shown + 1) % (this.strip.width/SIDE);
    this.forget();
  }
  stamp(event) {   // where the pointer is, or from the keyboard anywhere
    const box = event.currentTarget.getBoundingClientRect(), pointed = event.type === 'click';
    const place = (at, start, length) => SIDE*(pointed ? (at - start)/length : .15 + .7*Math.random());
    this.add(place(event.clientX, box.left, box.width), place(event.clientY, box.top, box.height));
  }
  add(x, y) {
    const value = name => this.find(`[name=${name}]`).value;
    this.image.fillStyle = COLORS[value('color')];
    this.image.beginPath();
    SHAPES[value('shape')](this.image, x, y, value('size') === 'large' ? 9 : 5);
    this.image.fill();
    this.forget();
  }
  forget() { this.find('.live-answer').textContent = ''; this.heat([]); }
  heat(look) {   // dark where it did not look
    const g = this.find('.live-look').getContext('2d'), top = Math.max(...look);
    g.clearRect(0, 0, 6, 6);
    look.forEach((value, i) => { g.fillStyle = `rgba(0, 0, 0, ${.8*(1 - value/top)})`; g.fillRect(i % 6, Math.floor(i/6), 1, 1); });
  }
  word({id, look}) {   // a button for each token: its map is shown while it is pointed at
    const button = document.createElement('button');
    button.type = 'button';
    button.textContent = this.model.tokenizer.decode([id]);
    button.onmouseenter = button.onfocus = () => this.heat(look);
    this.find('.live-answer').append(button);
    this.heat(look);
  }
  async ask() {
    const note = this.find('.live-note');
    this.forget();
    const question = this.find('[name=question]').value;
    if (!question.trim()) return;
    try {
      note.textContent = 'Loading ...';
      this.model ??= await Model.load(this.base);
      const bytes = this.image.getImageData(0, 0, SIDE, SIDE).data, from = performance.now();
      let n = 0;
      for await (const token of this.model.answer(pixels(bytes, SIDE, this.model.about.input), question)) {
        this.word(token);
        n++;
        await new Promise(requestAnimationFrame);
      }
      note.textContent = `${n} tokens in ${Math.round(performance.now() - from)} ms, in this page. Point at a word to see where it looked.`;
    } catch (error) { note.textContent = `The model cannot run here: ${error.message}`; }
  }
}

function openPanels() {   // in the place of the picture that stands there without scripts
  if (location.protocol === 'file:') return;   // pages opened as files may not load the model: serve the folder
  const base = new URL('live/', document.currentScript.src);
  document.addEventListener('DOMContentLoaded', () => {
    for (const picture of document.querySelectorAll('img[src$="/live.png"]')) {
      const box = document.createElement('div');
      box.className = 'live';
      (picture.closest('a') ?? picture).replaceWith(box);
      new Panel(box, base);
    }
  });
}

if (typeof module !== 'undefined') module.exports = {Tokenizer, pixels};
else openPanels();
