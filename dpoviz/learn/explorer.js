// The picture of explorer.py. All that moves with the step slider is drawn here, without the kernel.

const SVG = "http://www.w3.org/2000/svg";
const TIMES_PER_SECOND = 5; // steps while it plays
const NEAR = 14; // pixels around a point in which the pointer finds it
const MARGIN = { left: 46, right: 10, top: 8, bottom: 34 };

function html(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  // without this attribute JupyterLab takes the arrow keys and Enter for its own shortcuts
  if (node.matches("button, input, select, textarea, [tabindex]")) node.setAttribute("data-lm-suppress-shortcuts", "true");
  node.append(...children.filter((child) => child !== null));
  return node;
}

/** Return a number with three significant digits and without an exponent where that is readable. */
function number(value, digits = 3) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  const text = size !== 0 && (size < 1e-4 || size >= 1e6)
    ? value.toExponential(digits - 1)
    : size >= 10 ** digits ? value.toFixed(0) : String(value.toPrecision(digits));
  return text.replace("-", "−");
}

const signed = (value) => (value > 0 ? "+" : "") + number(value);
const oneLine = (text, most) => {
  const line = text.split(/\s+/).join(" ").trim();
  return line.length <= most ? line : line.slice(0, most - 1) + "…";
};
const asText = (prompt) =>
  typeof prompt === "string" ? prompt : prompt.map((turn) => `${turn.role}: ${turn.content}`).join("\n");

function ticks(low, high, log) {
  if (!log) {
    const rough = (high - low) / 5;
    const unit = 10 ** Math.floor(Math.log10(rough));
    const step = unit * [1, 2, 5, 10].find((f) => f * unit >= rough);
    const found = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) found.push(i * step);
    return found;
  }
  const leading = high / low < 8 ? [1, 1.5, 2, 3, 4, 5, 7] : high / low < 300 ? [1, 2, 5] : [1];
  const found = [];
  for (let e = Math.floor(Math.log10(low)); e <= Math.log10(high); e++)
    for (const f of leading) if (f * 10 ** e >= low && f * 10 ** e <= high) found.push(f * 10 ** e);
  return found;
}

const tickText = (value) => String(Number(value.toPrecision(6))).replace("-", "−");

/** Return a function from values to pixels; `from` and `to` are the pixels of the ends. */
function scale(low, high, log, from, to) {
  const t = log ? Math.log : (value) => value;
  const a = t(low), b = t(high);
  const map = (value) => from + ((t(value) - a) / (b - a)) * (to - from);
  return Object.assign(map, { low, high, log });
}

function limits(values, log) {
  const known = values.filter((v) => Number.isFinite(v) && (!log || v > 0));
  if (!known.length) return log ? [0.1, 1] : [0, 1];
  let low = Infinity, high = -Infinity;
  for (const v of known) {
    if (v < low) low = v;
    if (v > high) high = v;
  }
  if (log) {
    const pad = Math.max((high / low) ** 0.05, 1.04);
    return [low / pad, high * pad];
  }
  const pad = 0.05 * (high - low) || 0.1 * Math.abs(high) || 1;
  return [low - pad < 0 && low >= 0 ? 0 : low - pad, high + pad];
}

function median(values) {
  const sorted = values.filter(Number.isFinite).sort((a, b) => a - b);
  const half = sorted.length >> 1;
  if (!sorted.length) return NaN;
  return sorted.length % 2 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2;
}

function render({ model, el }) {
  const run = model.get("contents");
  const { forms, tasks, points, steps, estimators, terms } = run;
  const colors = Object.fromEntries(tasks.map((task) => [task.name, task.color]));
  const raw = model.get("betas");
  const betas = new Float32Array(raw.buffer.slice(raw.byteOffset, raw.byteOffset + raw.byteLength));
  const inverse = (form) => form.name === "inverse";
  const scaleOf = (form, beta) => (inverse(form) ? 1 / beta : beta);
  const set = (name, value) => {
    model.set(name, value);
    model.save_changes();
  };

  /** Return a text in the language of the widget, its {name} fields filled; every text in a call is a key of words. */
  const word = (text, values = {}) => (run.words[text] ?? text).replace(/\{(\w+)\}/g, (_, name) => values[name]);
  const formName = (form) => word("{form} form", { form: word(form.name) });

  // -- what the state says --------------------------------------------------------------------------------
  const position = () => Math.max(0, steps.indexOf(model.get("step")));
  const betaAt = (f, step, point) => betas[(f * steps.length + step) * points.length + point];
  const asked = () => model.get("asked").filter((one) => !one.error);
  const isAsked = (point) => point >= points.length;
  const betaOf = (f, point, step = position()) =>
    isAsked(point) ? asked()[point - points.length]?.beta[forms[f].name] : betaAt(f, step, point);
  const taskOf = (point) => (isAsked(point) ? null : points[point].task);
  const textOf = (point) => (isAsked(point) ? asText(asked()[point - points.length].prompt) : points[point].prompt);
  const estimator = () => model.get("estimator");
  const entropyOf = (point) => {
    if (!isAsked(point)) return [estimators[estimator()].values[point], estimators[estimator()].se[point]];
    const one = asked()[point - points.length]; // only the run's own estimator is computed for it
    return estimator() === 0 ? [one.entropy, one.se] : [null, null];
  };
  const seen = (point) => isAsked(point) || !model.get("hidden_tasks").includes(points[point].task);
  const everyPoint = () => [...points.keys(), ...asked().map((_, i) => points.length + i)].filter(seen);
  const shownForms = () => [...forms.keys()].filter((f) => !model.get("hidden_forms").includes(forms[f].name));
  const shownTasks = () => tasks.filter((task) => !model.get("hidden_tasks").includes(task.name));

  // -- the head: the run, the step, and what is shown -----------------------------------------------------
  const root = html("div", { class: "dpoviz", role: "group", "aria-label": word("explorer of the run {run}", { run: run.run }) });
  const slider = html("input", {
    type: "range", min: 0, max: steps.length - 1, step: 1, "aria-label": word("training step"),
    disabled: steps.length < 2, oninput: () => set("step", steps[Number(slider.value)]),
  });
  const stepText = html("output", { "data-role": "step" });
  const play = html("button", { class: "play", type: "button", disabled: steps.length < 2, onclick: () => toggle() });
  let timer = null;

  function toggle(on = timer === null) {
    clearInterval(timer);
    timer = null;
    if (on) {
      if (position() === steps.length - 1) set("step", steps[0]);
      timer = setInterval(() => {
        if (position() === steps.length - 1) toggle(false);
        else set("step", steps[position() + 1]);
      }, 1000 / TIMES_PER_SECOND);
    }
    play.textContent = timer === null ? "▶" : "❚❚";
    play.setAttribute("aria-label", timer === null ? word("play the training steps") : word("pause"));
    play.title = play.getAttribute("aria-label");
  }

  function switchOf(name, key, attributes, text = name) {
    const node = html("button", {
      type: "button", ...attributes,
      onclick: () => {
        const off = model.get(key);
        set(key, off.includes(name) ? off.filter((other) => other !== name) : [...off, name]);
      },
    }, text);
    node.update = () => node.setAttribute("aria-pressed", String(!model.get(key).includes(name)));
    return node;
  }

  function choice(label, options, key, toState, fromState) {
    const node = html("select", { "aria-label": label, onchange: () => set(key, toState(node.value)) });
    options.forEach((text, i) => node.append(html("option", { value: i }, text)));
    node.update = () => (node.value = String(fromState(model.get(key))));
    return node;
  }

  const switches = [
    ...tasks.map((task) => switchOf(task.name, "hidden_tasks", { class: "toggle task", style: `--task: ${task.color}` })),
    ...forms.map((form) => switchOf(form.name, "hidden_forms", { class: "toggle" }, word(form.name))),
  ];
  const choices = [
    choice(word("entropy on the x axis"), estimators.map((e) => e.label), "estimator", Number, String),
    choice(word("β axis"), [word("linear"), word("log")], "log_beta", (v) => v === "1", Number),
    choice(word("entropy axis"), [word("linear"), word("log")], "log_entropy", (v) => v === "1", Number),
  ];
  root.append(
    html("header", {},
      html("strong", {}, run.run),
      html("span", {}, word("{n} held-out prompts", { n: points.length })),
      html("div", { class: "time" }, play, slider, stepText)),
    ...run.notes.map((note) => html("div", { class: "note" }, note)),
    html("div", { class: "controls" },
      html("div", { class: "group" }, html("span", {}, word("tasks")), ...switches.slice(0, tasks.length)),
      html("div", { class: "group" }, html("span", {}, word("forms")), ...switches.slice(tasks.length)),
      html("label", { class: "group" }, html("span", {}, "H"), choices[0]),
      html("label", { class: "group" }, html("span", {}, word("β axis")), choices[1]),
      html("label", { class: "group" }, html("span", {}, word("H axis")), choices[2])));

  // -- the picture ----------------------------------------------------------------------------------------
  const RADIUS = points.length < 150 ? 4 : points.length < 600 ? 3 : 2.2;
  let shades = {}; // the colour of each task on the ground of the theme
  const plots = html("div", { class: "plots" });
  const details = html("aside", { "aria-live": "polite", "aria-label": word("the selected prompt"), tabindex: 0, class: "scroll" });
  const tip = html("div", { class: "tip", hidden: true, role: "tooltip" });
  let panels = [];

  /** Draw the axes and all points anew: after a change of what is shown, not of the step. */
  function build() {
    plots.replaceChildren();
    panels = [];
    tip.hidden = true;
    shades = Object.fromEntries(tasks.map((task, i) => [task.name, getComputedStyle(switches[i], "::before").borderTopColor]));
    for (const f of shownForms()) {
      const [strips, cloud] = ["strips", "cloud"].map((kind) => panelOf(f, kind));
      panels.push(strips, cloud);
      const what = inverse(forms[f]) ? word("loss −log σ(h/β(x))") : word("loss −log σ(β(x)·h)");
      plots.append(
        html("h4", {}, formName(forms[f]), html("span", {}, what)),
        html("div", { class: "row" }, strips.box, cloud.box));
    }
    if (!panels.length) plots.append(html("p", { class: "hint" }, word("Both forms are switched off.")));
    for (const panel of panels) panel.draw();
    move();
  }

  /** Return the ends of a form's β axis: over all steps, so that the axis stands still while it plays. */
  function betaAxis(f) {
    const form = forms[f];
    const log = model.get("log_beta");
    const values = [form.beta0];
    for (const point of everyPoint())
      if (isAsked(point)) values.push(betaOf(f, point));
      else for (let step = 0; step < steps.length; step++) values.push(betaAt(f, step, point));
    const known = values.filter((v) => v !== null && Number.isFinite(v));
    if (log) known.push(form.beta_min ?? NaN, form.beta_max ?? NaN);
    return limits(known, log);
  }

  function panelOf(f, kind) {
    const form = forms[f];
    const about = kind === "strips" ? word("β by task") : word("β against the entropy of the reference");
    const canvas = html("canvas"); // the points: thousands of SVG circles would take a second to move
    const node = svg("svg", {
      tabindex: 0, role: "img", "data-form": form.name, "data-kind": kind,
      "aria-label": word("{about}, {form}. Arrow keys go through the prompts in the order of β.", { about, form: formName(form) }),
      onpointermove: (event) => hover(panel, event),
      onpointerleave: () => hover(panel, null),
      onclick: (event) => {
        const point = nearest(panel, event);
        if (point !== null) set("selected", point);
      },
      onkeydown: (event) => walk(f, event),
    });
    const box = html("div", { class: "panel" }, canvas, node);
    const panel = { f, kind, box, node, canvas, x: new Map(), places: new Map(), typed: new Map(), medians: [] };

    panel.draw = () => {
      const width = box.clientWidth || 380, height = box.clientHeight || 268;
      const density = window.devicePixelRatio || 1;
      node.setAttribute("viewBox", `0 0 ${width} ${height}`);
      canvas.width = width * density;
      canvas.height = height * density;
      panel.pen = canvas.getContext("2d");
      panel.pen.setTransform(density, 0, 0, density, 0, 0);
      const right = width - MARGIN.right, bottom = height - MARGIN.bottom;
      const log = model.get("log_beta");
      panel.y = scale(...betaAxis(f), log, bottom, MARGIN.top);
      panel.x.clear();
      panel.typed.clear();
      panel.medians = [];
      const parts = [];
      for (const tick of ticks(panel.y.low, panel.y.high, log)) {
        const y = panel.y(tick);
        parts.push(svg("line", { class: "grid", x1: MARGIN.left, x2: right, y1: y, y2: y }),
          svg("text", { x: MARGIN.left - 6, y: y + 4, "text-anchor": "end" }, tickText(tick)));
      }
      const level = (name, value, label) => {
        if (value === null || value < panel.y.low || value > panel.y.high) return;
        const y = panel.y(value);
        parts.push(svg("line", { class: name, x1: MARGIN.left, x2: right, y1: y, y2: y }, svg("title", {}, label)));
        if (kind === "strips") parts.push(svg("text", { x: right, y: y - 3, "text-anchor": "end" }, label));
      };
      level("beta0", form.beta0, "β₀");
      level("bound", form.beta_min, "β_min");
      level("bound", form.beta_max, "β_max");
      parts.push(svg("line", { class: "axis", x1: MARGIN.left, x2: right, y1: bottom, y2: bottom }));
      parts.push(...(kind === "strips" ? stripAxis(panel, right, bottom) : cloudAxis(panel, right, bottom)));
      for (const [point, x] of panel.x) {
        if (!isAsked(point)) continue;
        panel.typed.set(point, svg("circle", { class: "asked", cx: x, r: RADIUS + 2 }));
        parts.push(panel.typed.get(point));
      }
      if (kind === "strips") {
        for (const [i, task] of shownTasks().entries()) {
          const line = svg("line", { class: "median", x1: panel.columns(i) - 17, x2: panel.columns(i) + 17 },
            svg("title", {}, word("median of {task}", { task: task.name })));
          panel.medians.push([task.name, line]);
          parts.push(line);
        }
      }
      panel.error = svg("line", { class: "error" });
      panel.hovered = svg("circle", { class: "ring hover", r: RADIUS + 3, visibility: "hidden" });
      panel.ring = svg("circle", { class: "ring", r: RADIUS + 4 });
      node.replaceChildren(...parts, panel.error, panel.hovered, panel.ring);
    };
    return panel;
  }

  function stripAxis(panel, right, bottom) {
    const names = [...shownTasks().map((task) => task.name), ...(asked().length ? [word("typed")] : [])];
    const width = (right - MARGIN.left) / Math.max(1, names.length);
    panel.columns = (i) => MARGIN.left + (i + 0.5) * width;
    for (const point of everyPoint()) {
      const column = names.indexOf(taskOf(point) ?? word("typed"));
      // the fractional parts of multiples of the golden ratio spread evenly, and stay where they are
      const spread = (((point + 1) * 0.618034) % 1) - 0.5;
      panel.x.set(point, panel.columns(column) + spread * Math.min(0.7 * width, 110));
    }
    return names.flatMap((name, i) => {
      const count = everyPoint().filter((point) => (taskOf(point) ?? word("typed")) === name).length;
      const at = { x: panel.columns(i), "text-anchor": "middle" };
      return [svg("text", { class: "title", ...at, y: bottom + 15 }, oneLine(name, Math.max(5, Math.floor(width / 6.5)))),
        svg("text", { ...at, y: bottom + 29 }, `n=${count}`)];
    });
  }

  function cloudAxis(panel, right, bottom) {
    const form = forms[panel.f];
    const values = everyPoint().map((point) => entropyOf(point)[0]).filter((v) => v !== null);
    const log = model.get("log_entropy") && values.every((v) => v > 0);
    const x = (panel.h = scale(...limits(values, log), log, MARGIN.left, right));
    for (const point of everyPoint()) {
      const [value] = entropyOf(point);
      if (value !== null) panel.x.set(point, x(value));
    }
    const parts = ticks(x.low, x.high, log).map((tick) =>
      svg("text", { x: x(tick), y: bottom + 15, "text-anchor": "middle" }, tickText(tick)));
    const refused = model.get("log_entropy") && !log ? word(" (not log: some are 0)") : "";
    parts.push(svg("text", { class: "title", x: (MARGIN.left + right) / 2, y: bottom + 30, "text-anchor": "middle" },
      word("H of the reference, {estimator}", { estimator: estimators[estimator()].label }) + refused));
    if (estimator() === 0 && form.alpha !== null) { // α is per nat of this estimator only
      const path = [];
      for (let i = 0; i <= 60; i++) {
        const value = log ? x.low * (x.high / x.low) ** (i / 60) : x.low + ((x.high - x.low) * i) / 60;
        const beta = form.alpha * value;
        if (beta > 0 && beta >= panel.y.low && beta <= panel.y.high) path.push(`${x(value)},${panel.y(beta)}`);
      }
      parts.push(svg("polyline", { class: "target", points: path.join(" ") }, svg("title", {}, "αH")));
      if (path.length) {
        const [at, y] = path.at(-1).split(",").map(Number);
        parts.push(svg("text", { class: "title", x: at - 4, y: Math.max(y - 6, 12), "text-anchor": "end" }, "αH"));
      }
    }
    return parts;
  }

  /** Put points, medians and marks where the step says: all that a step of the slider costs. */
  function move() {
    const step = position();
    const last = step === steps.length - 1;
    for (const panel of panels) {
      dots(panel, step);
      for (const [point, circle] of panel.typed) {
        circle.setAttribute("cy", panel.places.get(point)[1]);
        circle.classList.toggle("other", !last); // its β is that of the last step
      }
      for (const [task, line] of panel.medians) {
        const own = [];
        points.forEach((point, i) => point.task === task && own.push(betaAt(panel.f, step, i)));
        const y = panel.y(median(own));
        line.setAttribute("visibility", Number.isFinite(y) ? "visible" : "hidden");
        if (Number.isFinite(y)) {
          line.setAttribute("y1", y);
          line.setAttribute("y2", y);
        }
      }
      mark(panel);
    }
    slider.value = String(step);
    slider.setAttribute("aria-valuetext", word("step {step}", { step: steps[step] }));
    stepText.textContent = word("step {step} of {last}", { step: steps[step], last: steps.at(-1) });
    for (const update of pathUpdates) update(step);
    list();
  }

  function dots(panel, step) {
    const { pen, canvas, places } = panel;
    pen.clearRect(0, 0, canvas.width, canvas.height);
    pen.globalAlpha = 0.72;
    places.clear();
    for (const [point, x] of panel.x) {
      const beta = betaOf(panel.f, point, step);
      if (!Number.isFinite(beta)) continue;
      const y = panel.y(beta);
      places.set(point, [x, y]);
      if (isAsked(point)) continue;
      pen.fillStyle = shades[points[point].task];
      pen.beginPath();
      pen.arc(x, y, RADIUS, 0, 2 * Math.PI);
      pen.fill();
    }
  }

  /** Put the ring, and the bar of ± one standard error of H, on the selected point. */
  function mark(panel) {
    const point = model.get("selected");
    const place = panel.places.get(point);
    panel.ring.setAttribute("visibility", place ? "visible" : "hidden");
    panel.error.setAttribute("visibility", "hidden");
    if (!place) return;
    const [cx, cy] = place;
    panel.ring.setAttribute("cx", cx);
    panel.ring.setAttribute("cy", cy);
    const [value, se] = panel.kind === "cloud" ? entropyOf(point) : [null, null];
    if (value === null || !se) return;
    const low = panel.h.log ? Math.max(value - se, panel.h.low) : value - se;
    const ends = { x1: panel.h(low), x2: panel.h(value + se), y1: cy, y2: cy, visibility: "visible" };
    for (const [name, end] of Object.entries(ends)) panel.error.setAttribute(name, end);
  }

  function nearest(panel, event) {
    const box = panel.node.getBoundingClientRect();
    let found = null, least = NEAR ** 2;
    for (const [point, [x, y]] of panel.places) {
      const dx = x - (event.clientX - box.left), dy = y - (event.clientY - box.top);
      // among equally near points the later one lies on top
      if (dx * dx + dy * dy <= least) [found, least] = [point, dx * dx + dy * dy];
    }
    return found;
  }

  function hover(panel, event) {
    const point = event === null ? null : nearest(panel, event);
    panel.hovered.setAttribute("visibility", point === null ? "hidden" : "visible");
    tip.hidden = point === null;
    if (point === null) return;
    const [cx, cy] = panel.places.get(point);
    panel.hovered.setAttribute("cx", cx);
    panel.hovered.setAttribute("cy", cy);
    const form = forms[panel.f], beta = betaOf(panel.f, point), [value, se] = entropyOf(point);
    tip.replaceChildren(
      tagOf(point), ` ${oneLine(textOf(point), 120)}`, html("br"),
      `β ${number(beta)} · s ${number(scaleOf(form, beta))} · H ${entropyText(value, se)}`);
    const box = root.getBoundingClientRect();
    const left = event.clientX - box.left + 14;
    tip.style.left = `${Math.max(4, Math.min(left, box.width - tip.offsetWidth - 6))}px`;
    tip.style.top = `${Math.min(event.clientY - box.top + 14, box.height - tip.offsetHeight - 6)}px`;
  }

  function walk(f, event) {
    const moves = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1, Home: -Infinity, End: Infinity };
    if (event.key === "Escape") set("selected", -1);
    if (!(event.key in moves)) return;
    event.preventDefault();
    const order = everyPoint().sort((a, b) => betaOf(f, a) - betaOf(f, b));
    const at = order.indexOf(model.get("selected"));
    const to = at < 0 ? 0 : Math.max(0, Math.min(order.length - 1, at + moves[event.key]));
    if (order.length) set("selected", order[to]);
  }

  // -- the selected prompt --------------------------------------------------------------------------------
  let pathUpdates = [];

  const entropyText = (value, se) => (value === null ? "–" : `${number(value)} ± ${number(se, 2)}`);

  function tagOf(point) {
    const task = taskOf(point);
    return html("span", { class: "tag task", style: task === null ? "" : `--task: ${colors[task]}` }, task ?? word("typed"));
  }

  function table(head, rows) {
    const line = (cells, tag) => html("tr", {}, ...cells.map((cell) => html(tag, {}, cell)));
    return html("table", {}, html("thead", {}, line(head, "th")), html("tbody", {}, ...rows.map((r) => line(r, "td"))));
  }

  function describe() {
    const point = model.get("selected");
    pathUpdates = [];
    if (point < 0 || point >= points.length + asked().length) {
      details.replaceChildren(html("h4", {}, word("No prompt is selected")),
        html("p", { class: "hint" }, word("Point at a point for its prompt, click it to keep it here. With the keyboard: Tab to a panel, then the arrow keys.")),
        html("p", { class: "hint" }, word("The slider goes through the logged training steps; the axes stand still. Bars are the medians of the tasks. The line αH is where the entropy term alone would put β.")));
      return;
    }
    const [value, se] = entropyOf(point);
    const head = html("h4", {}, tagOf(point), isAsked(point) ? word(" prompt") : word(" prompt {i} of {n}", { i: point + 1, n: points.length }));
    const betaRows = html("tbody");
    const parts = [head, html("p", { class: "text", "data-role": "prompt" }, textOf(point)),
      html("table", { style: "margin-top: 8px" },
        html("thead", {}, html("tr", {}, ...[word("form"), "β", "s", "β/β₀"].map((name) => html("th", {}, name)))), betaRows),
      html("p", { class: "hint" }, word("H {value} (± one standard error; {estimator})", { value: entropyText(value, se), estimator: estimators[estimator()].label }))];
    pathUpdates.push((step) => {
      betaRows.replaceChildren(...forms.map((form, f) => {
        const beta = betaOf(f, point, step);
        const cells = [word(form.name), number(beta), number(scaleOf(form, beta)), number(beta / form.beta0)];
        return html("tr", {}, ...cells.map((cell) => html("td", {}, cell)));
      }));
    });
    if (isAsked(point)) {
      parts.push(html("p", { class: "hint" }, word("Of the trained β(x), after the last step. A typed prompt has no pair, so no h and no pulls.")));
    } else {
      parts.push(...detailsOfPoint(point));
    }
    details.replaceChildren(...parts);
    details.scrollTop = 0;
    for (const update of pathUpdates) update(position());
  }

  function detailsOfPoint(point) {
    const { task, pulls, pairs, answers } = points[point];
    const parts = [];
    if (steps.length > 1) {
      parts.push(html("h5", {}, word("β over the steps")),
        html("div", { class: "paths task", style: `--task: ${colors[task]}` }, ...forms.map((_, f) => pathOf(f, point))));
    }
    const pulled = forms.filter((form) => pulls[form.name]);
    if (pulled.length) {
      parts.push(html("h5", {}, word("Pulls on β after the last step (positive lowers it)")), pullTable(pulls, pulled));
    }
    if (pairs.length) parts.push(pairsOf(pairs));
    if (answers.length) {
      parts.push(html("h5", {}, word("Answers, sampled before and after training")), ...answers.map(([variant, answer]) =>
        html("p", { class: "text" },
          html("span", { class: "who" }, variant === "reference" ? word("before (reference)") : word("after ({variant})", { variant: word(variant) })), answer)));
    }
    return parts;
  }

  function pathOf(f, point) {
    const width = 140, height = 82, left = 42, bottom = height - 6, top = 16;
    const values = steps.map((_, step) => betaAt(f, step, point));
    const y = scale(...limits([...values, forms[f].beta0].filter((v) => v !== null), true), true, bottom, top);
    const x = scale(steps[0], steps.at(-1), false, left, width - 8);
    const line = values.map((v, i) => (Number.isFinite(v) ? `${x(steps[i])},${y(v)}` : null)).filter(Boolean);
    const now = svg("circle", { class: "now", r: 4 });
    pathUpdates.push((step) => {
      const known = Number.isFinite(values[step]);
      now.setAttribute("visibility", known ? "visible" : "hidden");
      if (!known) return;
      now.setAttribute("cx", x(steps[step]));
      now.setAttribute("cy", y(values[step]));
    });
    const level = forms[f].beta0 === null ? null
      : svg("line", { class: "beta0", x1: left, x2: width, y1: y(forms[f].beta0), y2: y(forms[f].beta0) });
    const marks = [Math.min(...values), Math.max(...values)].filter(Number.isFinite);
    const apart = Math.abs(y(marks[0]) - y(marks[1])) > 12 ? marks : marks.slice(0, 1);
    return svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${word("β over the steps")}: ${word(forms[f].name)}` },
      svg("text", { class: "title", x: left, y: 10 }, word(forms[f].name)), level,
      ...apart.map((v) => svg("text", { x: left - 4, y: y(v) + 4, "text-anchor": "end" }, number(v))),
      svg("polyline", { class: "path", points: line.join(" ") }), now);
  }

  function pullTable(pulls, pulled) {
    const names = Object.keys(terms).filter((term) => pulled.some((form) => term in pulls[form.name]));
    const rows = names.map((term) => [word(term), ...pulled.map((form) => {
      const own = Object.values(pulls[form.name]).map((v) => Math.abs(v ?? 0));
      const value = pulls[form.name][term] ?? NaN;
      const part = Number.isFinite(value) ? (50 * Math.abs(value)) / Math.max(...own, 1e-300) : 0;
      return html("span", { class: "term", style: `--task: ${terms[term]}` },
        html("span", { class: "bar" }, html("i", { style: `width: ${part}%; left: ${value < 0 ? 50 - part : 50}%` })),
        ` ${signed(value)}`);
    })]);
    return table([word("term"), ...pulled.map((form) => word(form.name))], rows);
  }

  function pairsOf(pairs) {
    let at = 0;
    const box = html("div");
    const turn = (by) => {
      at = (at + by + pairs.length) % pairs.length;
      show();
    };
    const show = () => {
      const pair = pairs[at];
      const title = html("h5", {}, pairs.length > 1 ? word("Pair {i} of {n} ", { i: at + 1, n: pairs.length }) : word("Pair "));
      if (pairs.length > 1) {
        title.append(html("button", { type: "button", "aria-label": word("previous pair"), onclick: () => turn(-1) }, "‹"), " ",
          html("button", { type: "button", "aria-label": word("next pair"), onclick: () => turn(1) }, "›"));
      }
      const texts = ["chosen", "rejected"].filter((side) => pair[side] !== undefined).map((side) =>
        html("p", { class: "text", "data-role": side }, html("span", { class: "who" }, word(side)), pair[side]));
      const rows = Object.entries(pair.ratios).map(([variant, values]) => [word(variant), ...values.map(signed)]);
      box.replaceChildren(title, ...texts,
        html("div", { style: "margin-top: 4px" }, table(["log π/π_ref", word("chosen"), word("rejected"), "h"], rows)));
    };
    show();
    return box;
  }

  // -- a new prompt ---------------------------------------------------------------------------------------
  const box = html("textarea", {
    "aria-label": word("a new prompt"), placeholder: word("Type a prompt and press Enter (Shift+Enter: a new line)"),
    onkeydown: (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      ask();
    },
  });
  const newlines = points.every((point) => point.prompt.endsWith("\n"));
  const newline = html("input", { type: "checkbox" });
  newline.checked = newlines;
  const chat = html("input", { type: "checkbox" });
  const button = html("button", { type: "button", onclick: () => ask() }, word("compute β and H"));
  const status = html("div", { class: "state", role: "status" });
  let asking = null;

  function ask() {
    if (asking !== null) return;
    if (!box.value.trim()) {
      say(word("Type a prompt first."), "bad");
      return;
    }
    const text = newline.checked && !box.value.endsWith("\n") ? `${box.value}\n` : box.value;
    asking = `${Date.now()}-${Math.random().toString(36).slice(2)}`; // another view may ask at the same time
    button.disabled = true;
    say(word("The kernel computes β and H …"), "busy");
    set("question", { id: asking, prompt: chat.checked ? [{ role: "user", content: text }] : text });
  }

  function say(text, kind = "") {
    status.className = `state ${kind}`;
    status.textContent = text;
  }

  function answered() {
    const one = model.get("asked").find((other) => other.id === asking);
    build();
    if (one === undefined) return;
    asking = null;
    button.disabled = false;
    if (one.error) {
      say(one.error, "bad");
      return;
    }
    const values = forms.map((form) => `β ${number(one.beta[form.name])} (${word(form.name)})`).join(", ");
    say(`${values}, H ${entropyText(one.entropy, one.se)} ${word("nats per token")}`);
    set("selected", points.length + asked().length - 1);
  }

  // -- prompts by β or by a word --------------------------------------------------------------------------
  const query = html("input", { type: "search", placeholder: word("search in prompts"), "aria-label": word("search in prompts"), oninput: () => list() });
  const ofTask = html("select", { "aria-label": word("task of the list"), onchange: () => list() },
    html("option", { value: "" }, word("all tasks")), ...tasks.map((task) => html("option", { value: task.name }, task.name)));
  const ofForm = html("select", { "aria-label": word("form of the list"), onchange: () => list() },
    ...forms.map((form, f) => html("option", { value: f }, word(form.name))));
  const order = html("select", { "aria-label": word("order of the list"), onchange: () => list() },
    html("option", { value: "high" }, word("highest β")), html("option", { value: "low" }, word("lowest β")));
  const listed = html("ol", { "aria-label": word("prompts by β") });
  const count = html("p", { class: "hint" });

  function list() {
    const sought = query.value.trim().toLowerCase();
    const f = Number(ofForm.value), sign = order.value === "high" ? -1 : 1;
    const found = [...points.keys()].filter((i) =>
      (!ofTask.value || points[i].task === ofTask.value) && (!sought || points[i].prompt.toLowerCase().includes(sought)));
    found.sort((a, b) => sign * (betaOf(f, a) - betaOf(f, b)));
    const top = found.slice(0, 10);
    while (listed.children.length > top.length) listed.lastChild.remove();
    while (listed.children.length < top.length) {
      const item = html("button", { type: "button", onclick: () => set("selected", Number(item.dataset.point)) },
        html("b"), html("span"));
      listed.append(html("li", {}, item));
    }
    top.forEach((point, i) => {
      const item = listed.children[i].firstChild;
      item.dataset.point = point;
      item.className = "task";
      item.style.setProperty("--task", colors[points[point].task]);
      item.setAttribute("aria-current", String(point === model.get("selected")));
      item.title = points[point].task;
      item.firstChild.textContent = number(betaOf(f, point));
      item.lastChild.textContent = oneLine(points[point].prompt, 160);
    });
    count.textContent = word("{n} of {all} prompts, {form}, step {step}",
      { n: top.length, all: found.length, form: formName(forms[f]), step: steps[position()] });
  }

  const lower = html("div", { class: "lower" },
    html("section", { class: "ask" }, html("h4", {}, word("A prompt of your own")), box,
      html("div", { class: "group" },
        html("div", { class: "group" },
          newlines ? html("label", { title: word("All prompts of this run end with a line break.") }, newline, word(" end with a line break")) : null,
          run.chat ? html("span", {}, word("sent as a user's message")) // as all prompts of this run
            : html("label", { title: word("As a user's message, through the model's chat template.") }, chat, word(" as a chat message"))),
        button), status),
    html("section", { class: "find" }, html("h4", {}, word("Prompts by β")),
      html("div", { class: "group" }, query, ofTask, order, ofForm), listed, count));
  root.append(html("div", { class: "body" }, plots, details), lower, tip);
  el.append(root);

  // -- following the state --------------------------------------------------------------------------------
  const controls = () => [...switches, ...choices].forEach((node) => node.update());
  const events = {
    "change:step": move,
    "change:selected": () => {
      describe();
      panels.forEach(mark);
      list();
    },
    "change:asked": answered,
    "change:estimator": () => {
      controls();
      build();
      describe();
    },
  };
  for (const key of ["log_beta", "log_entropy", "hidden_tasks", "hidden_forms"])
    events[`change:${key}`] = () => {
      controls();
      build();
    };
  for (const [name, follow] of Object.entries(events)) model.on(name, follow);
  controls();
  toggle(false);
  describe();
  build();
  let width = root.clientWidth;
  const resized = new ResizeObserver(() => {
    if (root.clientWidth === width) return;
    width = root.clientWidth;
    build();
  });
  resized.observe(root);
  const themed = new MutationObserver(build);
  themed.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-light"] });
  return () => { // the cell was run again, or its output was cleared
    toggle(false);
    resized.disconnect();
    themed.disconnect();
    for (const [name, follow] of Object.entries(events)) model.off(name, follow);
  };
}

export default { render };
