// The policy's page: a table, up to four sentences, what the arm does, and what its layers hear.

import { $, NEUTRAL, call, post } from "./shared.js";

const FRAME = 50;               // ms: 20 frames a second, as fast as it was
const TONE = { gamma: ["#3b6fd4", "#d9660a"], beta: ["#7a4bc2", "#0b8f83"] }; // below and above neutral

let table = null;               // the reply of /api/table
let told = [];                  // one ToldReply for each take
let started = 0;                // when the replay began
let takes = [];

// ---------------------------------------------------------------- drawing; y goes up on the table and down in SVG

function shape(kind, attributes, parent) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", kind);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  parent.append(node);
  return node;
}

const disc = ([x, y], r, name, parent) => shape("circle", { cx: x, cy: -y, r, class: name }, parent);
const line = (points) => points.map(([x, y], i) => `${i ? "L" : "M"}${x} ${-y}`).join("");

class Take {
  constructor(parent) {
    this.node = $("take").content.firstElementChild.cloneNode(true);
    this.find = (selector) => this.node.querySelector(selector);
    this.box = this.find("textarea");
    this.box.addEventListener("keydown", (e) => {
      if (e.key !== "Enter" || e.shiftKey) return;
      e.preventDefault();
      $("form").requestSubmit();
    });
    this.box.addEventListener("input", () => this.node.classList.add("stale"));
    parent.append(this.node);
  }

  lay(text) {
    this.box.value = text;
    const still = this.find(".still");
    still.replaceChildren();
    for (const place of Object.values(table.places)) disc(place, 0.06, "place", still);
    disc(table.goal, 0.05, "goal", still);
    this.post = disc(table.obstacle, 0.05, "post", still);
    const moving = this.find(".moving");
    moving.replaceChildren();
    this.things = table.things.map((thing) => {
      const group = shape("g", {}, moving);
      const [r, fill] = [thing.radius, thing.colour];
      shape("circle", { r, fill, class: "foot" }, group);
      if (thing.shape === "cube") shape("rect", { x: -0.62 * r, y: -0.62 * r, width: 1.24 * r, height: 1.24 * r, fill }, group);
      else shape("circle", { r: 0.78 * r, fill }, group);
      if (thing.shape === "can") shape("circle", { r: 0.4 * r, fill: "#0004" }, group);
      if (thing.shape === "ball") shape("circle", { cx: -0.2 * r, cy: -0.2 * r, r: 0.25 * r, fill: "#fff6" }, group);
      return group;
    });
    this.arm = shape("path", { class: "arm" }, moving);
    this.finger = disc(table.finger, 0.012, "finger", moving);
    this.find(".trail").setAttribute("d", "");
    this.pose(table.elbow, table.finger, table.things.map((thing) => thing.at));
    for (const name of [".verdict", ".facts", ".looked"]) this.find(name).replaceChildren();
    this.find(".verdict").className = "verdict";
    this.node.classList.remove("stale");
  }

  pose(elbow, finger, things) {
    this.arm.setAttribute("d", line([[0, 0], elbow, finger]));
    this.finger.setAttribute("cx", finger[0]);
    this.finger.setAttribute("cy", -finger[1]);
    things.forEach(([x, y], i) => this.things[i].setAttribute("transform", `translate(${x} ${-y})`));
  }

  show(reply, frame) {
    const i = Math.min(frame, reply.finger.length - 1);
    this.pose(reply.elbow[i], reply.finger[i], reply.things[i]);
    this.find(".trail").setAttribute("d", line(reply.finger.slice(0, i + 1)));
    return i === reply.finger.length - 1;
  }

  report(reply) {
    this.node.classList.remove("stale");
    this.post.classList.toggle("touched", reply.collisions > 0);
    const verdict = this.find(".verdict");
    verdict.textContent = `${reply.success ? "✓" : "✗"} understood: ${reply.understood}`;
    verdict.className = `verdict ${reply.success ? "good" : "bad"}`;
    verdict.title = reply.success ? "and did it" : "and did not do it";
    const clear = 100 * reply.clearance;
    const kept = reply.collisions ? "touched the post" : `kept ${clear.toFixed(1)} cm off the post`;
    this.find(".facts").innerHTML = `<b>${reply.energy.toFixed(2)} J</b> · <b>${reply.seconds.toFixed(1)} s</b> · <b>${kept}</b>`;
    this.find(".looked").replaceChildren(...reply.looked.map((share, i) => bar(table.things[i].name, share)));
  }
}

function bar(name, share) {
  const row = document.createElement("li");
  row.innerHTML = '<span></span><span class="bar"><i></i></span><span></span>';
  row.children[0].textContent = name;
  row.querySelector("i").style.width = `${100 * share}%`;
  row.children[2].textContent = `${Math.round(100 * share)} %`;
  return row;
}

// ---------------------------------------------------------------- what the layers hear

function chosen(name) {
  return document.querySelector(`input[name="${name}"]:checked`).value;
}

function strips() {
  const part = chosen("part");
  const against = chosen("against") === "first" ? told[0] : null;
  const head = $("sites").tHead.rows[0];
  head.replaceChildren(cell("th", ""), ...told.map((reply) => cell("th", reply.instruction)));
  const rows = told.length ? Object.keys(told[0].modulations) : [];
  $("sites").tBodies[0].replaceChildren(...rows.map((site) => {
    const row = document.createElement("tr");
    const away = told.map((reply) => reply.modulations[site][part].map((value, c) =>
      value - (against ? against.modulations[site][part][c] : NEUTRAL[part])));
    const most = Math.max(1e-6, ...told.flatMap((reply) => reply.modulations[site][part].map((v) => Math.abs(v - NEUTRAL[part]))));
    row.append(cell("th", site), ...away.map((values) => strip(site, part, values, most)));
    return row;
  }));
}

function cell(kind, text) {
  const node = document.createElement(kind);
  node.textContent = text;
  node.title = text;
  return node;
}

function strip(site, part, values, most) {
  const node = document.createElement("td");
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [values.length, 1];
  const mean = values.reduce((sum, v) => sum + Math.abs(v), 0) / values.length;
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `${site}: mean distance of ${part} ${mean.toFixed(2)}`);
  canvas.title = `mean distance ${mean.toFixed(2)} over ${values.length} channels`;
  const context = canvas.getContext("2d");
  values.forEach((value, c) => {
    context.globalAlpha = Math.min(1, Math.abs(value) / most);
    context.fillStyle = TONE[part][value > 0 ? 1 : 0];
    context.fillRect(c, 0, 1, 1);
  });
  node.append(canvas);
  return node;
}

// ---------------------------------------------------------------- what happens

function busy(on) {
  for (const name of ["replay", "fresh", "deed"]) $(name).disabled = on || (name === "replay" && !told.length);
  $("form").setAttribute("aria-busy", on);
}

async function attempt(work) {
  busy(true);
  $("notice").textContent = "";
  try {
    await work();
  } catch (error) {
    $("notice").textContent = error.message;
  }
  busy(false);
}

async function lay(seed) {
  table = await call(seed === null ? "api/table" : `api/table?seed=${seed}`);
  history.replaceState(null, "", `?seed=${table.seed}`);
  $("deed").replaceChildren(...table.examples.map((texts, i) => new Option(texts[0], i)));
  await example(0);
}

async function example(which) {
  $("deed").value = which;
  takes.forEach((take, i) => take.lay(table.examples[which][i]));
  await tell();
}

async function tell() {
  const filled = takes.filter((take) => take.box.value.trim());
  if (!filled.length) throw new Error("Write at least one sentence.");
  const instructions = filled.map((take) => take.box.value.trim());
  const reply = await post("api/tell", { scene: table.seed, instructions });
  takes.forEach((take) => { if (!filled.includes(take)) take.lay(""); });
  told = reply.told;
  told.forEach((one, i) => { one.take = filled[i]; filled[i].report(one); });
  $("live").textContent = told.map((one) => `${one.instruction}: ${one.take.find(".verdict").textContent}`).join(". ");
  strips();
  replay();
}

function replay() {
  started = performance.now();
  requestAnimationFrame(draw);
}

function draw(now) {
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const frame = still ? 1e9 : Math.max(0, Math.floor((now - started) / FRAME));
  const ended = told.map((one) => one.take.show(one, frame));
  if (!ended.every(Boolean)) requestAnimationFrame(draw);
}

$("form").addEventListener("submit", (e) => { e.preventDefault(); attempt(tell); });
$("replay").addEventListener("click", replay);
$("fresh").addEventListener("click", () => attempt(() => lay(null)));
$("deed").addEventListener("change", (e) => attempt(() => example(+e.target.value)));
for (const input of document.querySelectorAll('input[type="radio"]')) input.addEventListener("change", strips);
takes = Array.from({ length: 4 }, () => new Take($("takes")));
const asked = new URLSearchParams(location.search).get("seed");
attempt(() => lay(/^\d+$/.test(asked ?? "") && asked < 2 ** 32 ? asked : null));
