// The page: a picture, a question, an answer, and the dials. Talks to /api and to nothing else.

import { $, NEUTRAL, call, post } from "./shared.js";

const SIGN = { gamma: "γ", beta: "β" };
const AXIS = { gamma: [-1, 2.2], beta: [-1.5, 1.5] }; // at least this is shown

let source = null;      // {scene: seed} or {image: id}: the picture asked about
let examples = [];      // [{question, answer}] of this scene
let asked = "";         // the question that the dials belong to
let base = null;        // the reply to the question alone
let now = null;         // the reply with the dials as they stand
let part = "gamma";     // what the charts show
let axis = { ...AXIS };    // [lowest, highest] value on the charts
let blocks = [];        // one Block per block of the network

// ---------------------------------------------------------------- the API

const ask = (question, edits) => post("/api/ask", { ...source, question, edits, top: 1000 });

// ---------------------------------------------------------------- one block and its dials

class Block {
  constructor(site, channels) {
    this.site = site;
    this.name = site.replace(/^b/, "B").replace(/(\d+)$/, " $1"); // block1: Block 1
    this.channels = channels;
    this.at = 0; // the channel that has the keyboard's focus
    this.node = $("block").content.firstElementChild.cloneNode(true);
    this.find = (selector) => this.node.querySelector(selector);
    this.find("h3").textContent = this.name;
    this.chart = this.find(".chart");
    this.bars = Array.from({ length: channels }, (_, c) => this.makeBar(c));
    this.chart.append(...this.bars);
    this.clear();
    this.listen();
  }

  makeBar(channel) {
    const bar = document.createElement("div");
    bar.append(document.createElement("i"), document.createElement("u"));
    bar.dataset.channel = channel;
    bar.tabIndex = channel === 0 ? 0 : -1;
    bar.setAttribute("role", "slider");
    bar.setAttribute("aria-orientation", "vertical");
    return bar;
  }

  listen() {
    const act = (selector, event, change) =>
      this.find(selector).addEventListener(event, (e) => { change(e.target); turned(); });
    act(".mute", "click", () => { this.muted = !this.muted; });
    act(".reset", "click", () => this.clear());
    act(".strength", "input", (input) => { this.strength = +input.value; });
    act(".shift", "input", (input) => { this.shift = +input.value; });
    this.chart.addEventListener("pointerdown", (e) => this.grab(e));
    this.chart.addEventListener("pointerover", (e) => this.read(channelOf(e)));
    this.chart.addEventListener("pointerleave", () => this.read(null));
    this.chart.addEventListener("focusin", (e) => this.focus(channelOf(e)));
    this.chart.addEventListener("focusout", () => this.read(null));
    this.chart.addEventListener("dblclick", (e) => this.putBack(channelOf(e)));
    this.chart.addEventListener("keydown", (e) => this.key(e));
  }

  clear() {
    this.strength = 1;
    this.shift = 0;
    this.muted = false;
    this.single = { gamma: new Map(), beta: new Map() };
  }

  get touched() {
    return this.muted || this.strength !== 1 || this.shift !== 0 || this.single.gamma.size + this.single.beta.size > 0;
  }

  original(which, channel) {
    return base.modulations[this.site][which][channel];
  }

  value(which, channel) {
    const single = this.single[which].get(channel);
    if (single !== undefined) return single;
    if (this.muted) return NEUTRAL[which];
    const original = this.original(which, channel);
    return which === "gamma" ? 1 + this.strength * (original - 1) : original + this.shift;
  }

  edits() {
    const changed = {};
    for (const which of ["gamma", "beta"]) {
      for (let c = 0; c < this.channels; c++) {
        const value = this.value(which, c);
        if (Math.abs(value - this.original(which, c)) > 1e-7) (changed[which] ??= {})[c] = value;
      }
    }
    return changed;
  }

  turn(channel, value) {
    const [low, high] = axis[part];
    this.single[part].set(channel, Math.min(high, Math.max(low, value)));
    turned();
  }

  putBack(channel) {
    if (channel === null) return;
    this.single[part].delete(channel);
    turned();
  }

  grab(event) {
    const channel = channelOf(event);
    if (channel === null || event.button !== 0) return;
    event.preventDefault();
    const bar = this.bars[channel];
    bar.focus({ preventScroll: true });
    bar.setPointerCapture(event.pointerId);
    const from = this.value(part, channel);
    const unit = (axis[part][1] - axis[part][0]) / this.chart.clientHeight;
    const move = (e) => {
      if (Math.abs(e.clientY - event.clientY) > 1) this.turn(channel, from + (event.clientY - e.clientY) * unit);
    };
    bar.addEventListener("pointermove", move);
    const drop = () => bar.removeEventListener("pointermove", move);
    bar.addEventListener("pointerup", drop, { once: true });
    bar.addEventListener("pointercancel", drop, { once: true });
  }

  key(event) {
    const channel = channelOf(event);
    if (channel === null || event.altKey || event.ctrlKey || event.metaKey) return;
    const step = event.shiftKey ? 0.02 : 0.1;
    const value = this.value(part, channel);
    const actions = {
      ArrowUp: () => this.turn(channel, value + step),
      ArrowDown: () => this.turn(channel, value - step),
      PageUp: () => this.turn(channel, value + 5 * step),
      PageDown: () => this.turn(channel, value - 5 * step),
      ArrowRight: () => this.bars[Math.min(channel + 1, this.channels - 1)].focus(),
      ArrowLeft: () => this.bars[Math.max(channel - 1, 0)].focus(),
      Home: () => this.bars[0].focus(),
      End: () => this.bars[this.channels - 1].focus(),
      Delete: () => this.putBack(channel),
      Backspace: () => this.putBack(channel),
    };
    if (!actions[event.key]) return;
    event.preventDefault();
    actions[event.key]();
  }

  focus(channel) {
    if (channel === null) return;
    this.bars[this.at].tabIndex = -1;
    this.at = channel;
    this.bars[channel].tabIndex = 0;
    this.read(channel);
  }

  read(channel) {
    const focused = this.chart.contains(document.activeElement) ? this.at : null;
    const shown = channel ?? focused;
    let text = "";
    if (shown !== null && base) {
      const value = this.value(part, shown);
      const original = this.original(part, shown);
      text = `channel ${shown}: ${SIGN[part]} = ${number(value)}`;
      if (Math.abs(value - original) > 1e-7) text += `, the question said ${number(original)}`;
    }
    this.find(".state").textContent = text || this.state;
  }

  draw() {
    const [low, high] = axis[part];
    const place = (value) => Math.min(100, Math.max(0, (100 * (high - value)) / (high - low))); // percent from the top
    const zero = place(0);
    this.find(".plot").style.setProperty("--zero", `${zero}%`);
    this.find(".plot").style.setProperty("--one", `${place(1)}%`);
    this.chart.setAttribute("aria-label",
      `${this.name}: ${SIGN[part]} of ${this.channels} channels. Left and right choose a channel, up and down turn it, Delete puts it back.`);
    this.bars.forEach((bar, c) => {
      const value = this.value(part, c);
      const original = this.original(part, c);
      const changed = Math.abs(value - original) > 1e-7;
      const top = place(value);
      const [fill, ghost] = bar.children;
      fill.style.top = `${Math.min(top, zero)}%`;
      fill.style.height = `${Math.abs(top - zero)}%`;
      ghost.style.top = `${place(original)}%`;
      ghost.hidden = !changed;
      bar.className = `${value < 0 ? "below" : "above"}${this.single[part].has(c) ? " turned" : ""}`;
      bar.setAttribute("aria-label", `${this.name}, ${SIGN[part]} of channel ${c}`);
      bar.setAttribute("aria-valuemin", low.toFixed(2));
      bar.setAttribute("aria-valuemax", high.toFixed(2));
      bar.setAttribute("aria-valuenow", value.toFixed(2));
    });
    this.drawKnobs();
  }

  drawKnobs() {
    const [strength, shift] = [this.find(".strength"), this.find(".shift")];
    strength.value = this.strength;
    shift.value = this.shift;
    strength.setAttribute("aria-label", `${this.name}: strength of γ`);
    shift.setAttribute("aria-label", `${this.name}: shift of β`);
    strength.nextElementSibling.textContent = `×${this.strength.toFixed(2)}`;
    shift.nextElementSibling.textContent = signed(this.shift);
    const mute = this.find(".mute");
    mute.setAttribute("aria-pressed", this.muted);
    mute.setAttribute("aria-label", `Mute ${this.name}`);
    const reset = this.find(".reset");
    reset.disabled = !this.touched;
    reset.setAttribute("aria-label", `Reset ${this.name}`);
    this.node.classList.toggle("muted", this.muted);
    this.state = this.muted
      ? "does not hear the question (γ = 1, β = 0)"
      : this.touched ? "turned by you" : "as the question says";
    this.read(null);
  }
}

function channelOf(event) {
  const bar = event.target.closest("[data-channel]");
  return bar ? +bar.dataset.channel : null;
}

const number = (value) => value.toFixed(2).replace("-", "−");
const signed = (value) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(2);
const percent = (p) => (p > 0.9995 && p < 1 ? "> 99.9 %" : p < 0.0005 && p > 0 ? "< 0.1 %" : `${(100 * p).toFixed(1)} %`);

// ---------------------------------------------------------------- asking

async function askNow(question) {
  asked = question.trim();
  $("question").value = asked;
  $("answer").setAttribute("aria-busy", "true");
  notice("");
  markExample();
  const [wanted, wording] = [source, asked];
  try {
    const reply = await ask(wording, null);
    if (wanted !== source || wording !== asked) return; // another picture or question came in between
    base = now = reply;
    build();
    draw();
  } catch (problem) {
    explain(problem);
    $("answer").classList.add("stale");
  }
  $("answer").setAttribute("aria-busy", "false");
}

let running = false;
let waiting = false;

// The dials moved: draw them at once, ask as fast as the server answers, and never have two requests under way.
function turned() {
  blocks.forEach((block) => block.draw());
  drawTurned();
  waiting = true;
  if (!running) settle();
}

async function settle() {
  running = true;
  while (waiting) {
    waiting = false;
    const [belongs, edits] = [base, collect()];
    try {
      const reply = edits ? await ask(asked, edits) : base;
      if (belongs !== base) continue;
      now = reply;
      notice("");
      drawAnswer();
    } catch (problem) {
      explain(problem);
    }
  }
  running = false;
}

function collect() {
  const edits = {};
  for (const block of blocks) {
    const changed = block.edits();
    if (Object.keys(changed).length) edits[block.site] = changed;
  }
  return Object.keys(edits).length ? edits : null;
}

// ---------------------------------------------------------------- drawing

// New dials for a new answer: one block per site, nothing turned, and a common scale for all charts.
function build() {
  const sites = Object.entries(base.modulations);
  const same = blocks.length === sites.length && sites.every(([site, m], i) =>
    blocks[i].site === site && blocks[i].channels === m.gamma.length);
  if (!same) {
    blocks = sites.map(([site, m]) => new Block(site, m.gamma.length));
    $("blocks").replaceChildren(...blocks.map((block) => block.node));
  }
  blocks.forEach((block) => block.clear());
  for (const which of ["gamma", "beta"]) {
    const all = sites.flatMap(([, m]) => m[which]);
    axis[which] = [Math.min(AXIS[which][0], 1.1 * Math.min(...all)), Math.max(AXIS[which][1], 1.1 * Math.max(...all))];
  }
}

function draw() {
  $("blocks").dataset.part = part;
  $("hint").textContent = part === "gamma"
    ? "Each bar is a channel and how loud the question makes it: 1 as it is, 0 silent, below 0 it counts against. Drag a bar, or mute a block."
    : "Each bar is a channel and what the question adds to it: above 0 it fires more easily, below 0 less. Drag a bar, or mute a block.";
  blocks.forEach((block) => block.draw());
  drawTurned();
  drawAnswer();
}

function drawTurned() {
  const total = blocks.reduce((sum, block) => sum + 2 * block.channels, 0);
  const count = blocks.reduce((sum, block) =>
    sum + Object.values(block.edits()).reduce((n, values) => n + Object.keys(values).length, 0), 0);
  $("turned").textContent = count ? `${count} of ${total} numbers turned` : "nothing turned";
  $("reset-all").disabled = !blocks.some((block) => block.touched);
  $("mute-all").setAttribute("aria-pressed", blocks.length > 0 && blocks.every((block) => block.muted));
}

function drawAnswer() {
  const edited = now !== base;
  $("answer").classList.remove("stale");
  const verdict = $("verdict");
  verdict.replaceChildren();
  if (now.answer !== base.answer) {
    const before = document.createElement("s");
    before.textContent = base.answer;
    verdict.append(before, " → ");
  }
  verdict.append(now.answer);
  $("sure").textContent = percent(now.probability);
  $("strip").textContent = `${verdict.textContent} · ${percent(now.probability)}`;
  drawChange(edited);
  drawBars(edited);
  drawHeat();
  const before = edited ? `. Before turning: ${base.answer}, ${percent(base.probability)}` : "";
  $("live").textContent = `Answer: ${now.answer}, ${percent(now.probability)}${before}.`;
}

function drawChange(edited) {
  const known = examples.find((example) => example.question === asked);
  const right = known?.answer === now.answer;
  $("change").textContent = edited
    ? `without your turning: ${base.answer}, ${percent(base.probability)}`
    : "This is what the network says on its own.";
  $("truth").className = right ? "good" : "bad";
  $("truth").textContent = !known ? "" : right ? "✓ right" : `✗ truth: ${known.answer}`;
}

function drawBars(edited) {
  const shown = now.probabilities.slice(0, 5);
  const original = new Map(base.probabilities.map((item) => [item.answer, item.probability]));
  if (!shown.some((item) => item.answer === base.answer)) {
    shown[shown.length - 1] = now.probabilities.find((item) => item.answer === base.answer);
  }
  $("bars").replaceChildren(...shown.map(({ answer, probability }) => {
    const item = document.createElement("li");
    const [label, track, value] = ["span", "div", "span"].map((tag) => document.createElement(tag));
    label.textContent = answer;
    value.textContent = percent(probability);
    track.className = "bar";
    const fill = document.createElement("i");
    fill.style.width = `${100 * probability}%`;
    track.append(fill);
    if (edited) {
      const ghost = document.createElement("u");
      ghost.style.left = `${100 * original.get(answer)}%`;
      track.append(ghost);
      track.title = `without your turning: ${percent(original.get(answer))}`;
    }
    item.append(label, track, value);
    return item;
  }));
}

// Where the network looked: a dark veil over the picture, open where channels have their maximum.
function drawHeat() {
  const canvas = $("heat");
  canvas.hidden = !$("look").checked || !now;
  if (canvas.hidden) return;
  const grid = now.looked;
  canvas.height = grid.length;
  canvas.width = grid[0].length;
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(canvas.width, canvas.height);
  const most = Math.max(1, ...grid.flat());
  grid.flat().forEach((count, i) => {
    const light = Math.sqrt(count / most);
    pixels.data.set([12, 12, 24, 255 * 0.8 * (1 - light)], 4 * i);
  });
  context.putImageData(pixels, 0, 0);
}

function notice(text) {
  $("notice").textContent = text;
}

// A problem in words; for an unknown word, the nearest known words as buttons that put them in.
function explain(problem) {
  if (!problem.nearest?.length) {
    notice(problem.message);
    return;
  }
  notice(`The network does not know the word “${problem.word}”. Did you mean`);
  for (const word of problem.nearest) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = word;
    button.addEventListener("click", () => {
      askNow($("question").value.split(/(\W+)/).map((w) => (w === problem.word ? word : w)).join(""));
    });
    $("notice").append(" ", button);
  }
}

// ---------------------------------------------------------------- pictures

async function freshScene(seed) {
  await show(async () => {
    const scene = await call("/api/scene" + (seed === null ? "" : `?seed=${encodeURIComponent(seed)}`));
    const own = asked && !examples.some((example) => example.question === asked);
    source = { scene: scene.seed };
    examples = scene.examples;
    $("image").src = scene.image;
    $("image").alt = `A rendered scene, number ${scene.seed}`;
    history.replaceState(null, "", `?seed=${scene.seed}`);
    showExamples();
    return own ? asked : examples[0]?.question ?? asked;
  });
}

async function upload(file) {
  if (!file) return;
  await show(async () => {
    const form = new FormData();
    form.append("file", file);
    const picture = await call("/api/upload", { method: "POST", body: form });
    source = { image: picture.id };
    examples = [];
    $("image").src = picture.image;
    $("image").alt = `Your picture ${file.name}, as the network sees it`;
    history.replaceState(null, "", location.pathname);
    showExamples();
    return asked || "What color is the large sphere?";
  });
}

// Bring a new picture and ask the question that goes with it.
async function show(bring) {
  const figure = $("picture");
  figure.setAttribute("aria-busy", "true");
  notice("");
  try {
    await askNow(await bring());
  } catch (problem) {
    explain(problem);
  } finally {
    figure.setAttribute("aria-busy", "false");
  }
}

function showExamples() {
  $("try").hidden = examples.length === 0;
  $("facts").open = false;
  $("facts").querySelector("ol").replaceChildren();
  $("examples").replaceChildren(...examples.map(({ question }) => {
    const item = document.createElement("li");
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = question;
    button.addEventListener("click", () => askNow(question));
    item.append(button);
    return item;
  }));
}

function markExample() {
  for (const button of $("examples").querySelectorAll("button")) {
    button.setAttribute("aria-current", button.textContent === asked);
  }
}

async function showFacts() {
  const list = $("facts").querySelector("ol");
  if (!$("facts").open || list.children.length || source.scene === undefined) return;
  try {
    const { facts } = await call(`/api/scene?seed=${source.scene}&facts=true`);
    list.replaceChildren(...facts.map((thing) => {
      const item = document.createElement("li");
      item.textContent = `${thing.size} ${thing.color} ${thing.material} ${thing.shape}`;
      return item;
    }));
  } catch (problem) {
    explain(problem);
  }
}

// ---------------------------------------------------------------- wiring

$("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("form").requestSubmit();
});
$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  askNow($("question").value);
});
$("fresh").addEventListener("click", () => freshScene(null));
$("file").addEventListener("change", (event) => {
  upload(event.target.files[0]);
  event.target.value = "";
});
$("look").addEventListener("change", () => drawHeat());
$("facts").addEventListener("toggle", () => showFacts());
$("reset-all").addEventListener("click", () => {
  blocks.forEach((block) => block.clear());
  turned();
});
$("mute-all").addEventListener("click", () => {
  const mute = !blocks.every((block) => block.muted);
  blocks.forEach((block) => { block.muted = mute; });
  turned();
});
for (const radio of document.getElementsByName("part")) {
  radio.addEventListener("change", () => {
    part = radio.value;
    if (base) draw();
  });
}
const figure = $("picture");
figure.addEventListener("dragover", (event) => {
  event.preventDefault();
  figure.classList.add("drop");
});
figure.addEventListener("dragleave", () => figure.classList.remove("drop"));
figure.addEventListener("drop", (event) => {
  event.preventDefault();
  figure.classList.remove("drop");
  upload(event.dataTransfer.files[0]);
});

const named = new URLSearchParams(location.search).get("seed");
freshScene(/^\d+$/.test(named ?? "") && named < 2 ** 32 ? named : null);
