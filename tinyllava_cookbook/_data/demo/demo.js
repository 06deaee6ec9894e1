// The demo's page: a conversation over the server's own interface, and two views inside the last answer.
'use strict';
const $ = id => document.getElementById(id);
const LARGEST = 1536;          // Longest side of an image that is sent, in pixels
let model = '', messages = [], pending = [], running = null, looked = null;

function element(name, text, attributes = {}) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;      // never HTML: answers are a model's words
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function notice(text) { $('notice').textContent = text; }

async function call(path, body, signal) {
  const headers = {'Content-Type': 'application/json'};
  if ($('key').value) headers.Authorization = 'Bearer ' + $('key').value;
  const how = body ? {method: 'POST', body: JSON.stringify(body)} : {};
  const reply = await fetch(path, {...how, headers, signal});
  if (reply.ok) return reply;
  let said = reply.status + ' ' + reply.statusText;
  try { said = (await reply.json()).error.message; } catch { /* no JSON: the status must do */ }
  throw new Error(said);
}

// ---- images

async function shrunk(file) {
  let bitmap;
  try { bitmap = await createImageBitmap(file); }
  catch { throw new Error(`${file.name || 'this file'} is not an image that the browser can read`); }
  const scale = Math.min(1, LARGEST / Math.max(bitmap.width, bitmap.height));
  const canvas = document.createElement('canvas');
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  const pen = canvas.getContext('2d');
  pen.fillStyle = '#fff';                               // transparency over white, as in training
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  if (scale < 1) notice(`${file.name || 'The image'} has ${bitmap.width} x ${bitmap.height} pixels: sent as ${canvas.width} x ${canvas.height}`);
  bitmap.close();
  return canvas.toDataURL('image/png');
}

async function add(files) {
  notice('');
  for (const file of files) {
    try { pending.push(await shrunk(file)); } catch (error) { notice(error.message); }
  }
  showPending();
}

function showPending() {
  $('images').replaceChildren(...pending.map((url, i) => {
    const item = element('li');
    const remove = element('button', '\u00d7', {type: 'button', 'aria-label': `Remove image ${i + 1}`});
    remove.onclick = () => { pending.splice(i, 1); showPending(); };
    item.append(element('img', undefined, {src: url, alt: `Image ${i + 1} of the next question`}), remove);
    return item;
  }));
}

// ---- drawing

function clearCanvas() {
  const pen = $('canvas').getContext('2d');
  pen.fillStyle = '#fff';
  pen.fillRect(0, 0, $('canvas').width, $('canvas').height);
}

function stroke(event) {
  if (!(event.buttons & 1)) return;
  const box = $('canvas').getBoundingClientRect(), pen = $('canvas').getContext('2d');
  pen.fillStyle = $('color').value;
  pen.beginPath();
  pen.arc(event.clientX - box.left, event.clientY - box.top, 12, 0, 7);
  pen.fill();
}

// ---- the conversation

function show(role, text, images = []) {
  const item = element('li', undefined, {class: role});
  for (const url of images) item.append(element('img', undefined, {src: url, alt: 'An image of this question'}));
  const words = element('span', text);
  item.append(words);
  $('turns').append(item);
  item.scrollIntoView({block: 'nearest'});
  return words;
}

async function* pieces(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = '';
  for (;;) {
    const {done, value} = await reader.read();
    if (done) return;
    const lines = (rest + value).split('\n');
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith('data: ') || line === 'data: [DONE]') continue;
      const news = JSON.parse(line.slice(6));
      if (news.error) throw new Error(news.error.message);
      yield news.choices[0]?.delta?.content ?? '';
    }
  }
}

async function answer(words) {
  const asked = {model, messages, stream: true, temperature: Number($('temperature').value),
    max_tokens: Number($('tokens').value)};
  const reply = await call('v1/chat/completions', asked, running.signal);
  for await (const piece of pieces(reply)) words.textContent += piece;
}

async function ask(event) {
  event?.preventDefault();
  const text = $('question').value.trim();
  if (running || (!text && !pending.length)) return;
  notice('');
  const images = pending.map(url => ({type: 'image_url', image_url: {url}}));
  messages.push({role: 'user', content: images.length ? [...images, {type: 'text', text}] : text});
  const turn = show('user', text, pending), words = show('assistant', '');
  running = new AbortController();
  setRunning(true);
  clearViews();
  try { await answer(words); }
  catch (error) { if (error.name !== 'AbortError') notice(error.message); }
  setRunning(false);
  if (!words.textContent) {              // nothing was said: the question can be asked again
    messages.pop();
    turn.parentElement.remove();
    words.parentElement.remove();
    if (!$('notice').textContent) notice('The answer is empty.');
    return;
  }
  $('question').value = '';
  pending = [];
  showPending();
  messages.push({role: 'assistant', content: words.textContent});
  await inside();
}

function setRunning(on) {
  $('send').disabled = on;
  $('stop').disabled = !on;
  if (!on) running = null;
}

function restart() {
  running?.abort();
  messages = [];
  pending = [];
  showPending();
  $('turns').replaceChildren();
  clearViews();
  notice('');
  $('question').focus();
}

// ---- inside the answer

function clearViews() {
  $('looked').replaceChildren();
  $('steps').replaceChildren();
  $('picture').hidden = true;
}

async function inside() {
  const body = {messages: messages.slice(0, -1), answer: messages.at(-1).content};
  const last = messages.length;
  try {
    const maps = await (await call('demo/look', body)).json();
    const words = await (await call('demo/words', body)).json();
    if (messages.length !== last || running) return;      // a newer question is on its way
    looked = maps;
    showLooked();
    showWords(words.steps);
  } catch (error) { notice(error.message); }
}

function showLooked() {
  $('picture').hidden = !looked.image;
  $('looked').replaceChildren(...looked.tokens.map((token, i) => {
    const chip = element('button', token.text.trim() || '\u2423', {type: 'button', title: `${Math.round(100 * token.share)} % on the image`});
    chip.onclick = chip.onfocus = chip.onmouseenter = () => paint(i);
    return chip;
  }));
  if (!looked.image) return;
  $('seen').src = looked.image;
  paint(0);
}

function paint(i) {
  const rows = looked.tokens[i].map, heat = $('heat'), pen = heat.getContext('2d');
  heat.height = rows.length;
  heat.width = rows[0].length;
  const dots = pen.createImageData(heat.width, heat.height);
  rows.flat().forEach((value, k) => dots.data.set([255, Math.min(255, value * 1.2), 40, value], 4 * k));
  pen.putImageData(dots, 0, 0);
  [...$('looked').children].forEach((chip, k) => chip.setAttribute('aria-pressed', k === i));
}

function showWords(steps) {
  $('steps').replaceChildren(...steps.map(step => {
    const row = element('tr');
    row.append(element('th', step.text.trim() || '\u2423', {scope: 'row'}));
    for (const [word, probability] of step.choices) {
      const cell = element('td');
      cell.append(element('meter', undefined, {value: probability, 'aria-hidden': 'true'}), ` ${word.trim() || '\u2423'} ${(100 * probability).toFixed(0)} %`);
      row.append(cell);
    }
    return row;
  }));
}

// ---- tabs

const tabs = ['look', 'words'];
function select(name) {
  for (const other of tabs) {
    $('tab-' + other).setAttribute('aria-selected', other === name);
    $('tab-' + other).tabIndex = other === name ? 0 : -1;
    $(other).hidden = other !== name;
  }
  $('tab-' + name).focus();
}
for (const [i, name] of tabs.entries()) {
  $('tab-' + name).onclick = () => select(name);
  $('tab-' + name).onkeydown = event => {
    if (event.key === 'ArrowRight' || event.key === 'ArrowLeft') select(tabs[1 - i]);
  };
}

// ---- wiring

$('ask').onsubmit = ask;
$('stop').onclick = () => running?.abort();
$('new').onclick = restart;
$('files').onchange = async event => { await add([...event.target.files]); event.target.value = ''; };
document.querySelector('label[for=files]').onkeydown = event => { if (event.key === 'Enter' || event.key === ' ') $('files').click(); };
$('question').onkeydown = event => { if (event.key === 'Enter' && !event.shiftKey && !event.isComposing) ask(event); };
document.onkeydown = event => { if (event.key === 'Escape') running?.abort(); };
document.onpaste = event => { if (event.clipboardData.files.length) add([...event.clipboardData.files]); };
document.ondragover = event => event.preventDefault();
document.ondrop = event => { event.preventDefault(); add([...event.dataTransfer.files]); };
$('draw').onclick = () => {
  $('drawing').hidden = !$('drawing').hidden;
  $('draw').setAttribute('aria-expanded', !$('drawing').hidden);
};
$('canvas').onpointerdown = $('canvas').onpointermove = stroke;
$('clear').onclick = clearCanvas;
$('use').onclick = () => { pending.push($('canvas').toDataURL('image/png')); showPending(); clearCanvas(); };
$('temperature').oninput = () => { $('shown').textContent = $('temperature').value; };
clearCanvas();
fetch('health').then(reply => reply.json()).then(found => { model = found.model; $('model').textContent = model; },
  () => notice('The server does not answer.'));
$('question').focus();
