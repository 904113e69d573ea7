"use strict";
// Text of the runs reaches the page by textContent alone, never as markup.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const page = document.getElementById("page");
  const runs = data.runs;
  const several = "differences" in data;
  const LIGHT = ["#0b6bcb", "#c2410c", "#15803d", "#7e22ce", "#b91c6b", "#0f766e", "#92600a", "#475569"];
  const DARK = ["#6cb6ff", "#ffa657", "#6ee7a0", "#c9a0ff", "#ff8ac4", "#5eead4", "#eac54f", "#a9b8c9"];
  const DASHES = [[], [6, 4], [2, 3]];
  const state = { smoothing: 0, log: false, filter: "", zoom: null };
  const charts = [];

  // --- elements ----------------------------------------------------------------------------

  function el(tag, props, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(props || {})) {
      if (value === null || value === undefined || value === false) continue;
      if (name === "class") node.className = value;
      else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else if (name in node && !name.includes("-")) node[name] = value;
      else node.setAttribute(name, value === true ? "" : value);
    }
    for (const child of children.flat(3)) {
      if (child !== null && child !== undefined && child !== false) node.append(child);
    }
    return node;
  }

  function table(headings, rows, label, tall) {
    const head = headings.map((h) => {
      const heading = typeof h === "object" ? h : { text: h };
      const content = heading.node || heading.text; // a cell without text heads nothing
      return content ? el("th", { scope: "col", class: heading.class, "aria-sort": heading.sort }, content) : el("td", {});
    });
    const body = rows.map((row) => {
      const cells = row.cells || row;
      return el("tr", { class: row.class }, cells.map((cell) => {
        const plain = cell === null || typeof cell !== "object" || cell instanceof Node;
        return plain ? el("td", {}, cell) : el("td", { class: cell.class, title: cell.title }, cell.content);
      }));
    });
    return el("div", { class: tall ? "scroll tall" : "scroll", tabIndex: 0, role: "region", "aria-label": `Table: ${label}` },
      el("table", {}, el("thead", {}, el("tr", {}, head)), el("tbody", {}, body)));
  }

  function section(id, title, ...content) {
    return el("section", { class: "card", id, "aria-labelledby": `${id}-title` }, el("h2", { id: `${id}-title` }, title), content);
  }

  // --- text --------------------------------------------------------------------------------

  function number(value) {
    if (value === null || value === undefined) return "";
    if (typeof value !== "number") return String(value);
    if (Number.isInteger(value) && Math.abs(value) < 1e9) return value.toLocaleString("en-US");
    const size = Math.abs(value);
    if (size >= 1e-3 && size < 10) return value.toFixed(4);
    if (size >= 10 && size < 1e5) return value.toFixed(2);
    return value.toExponential(3);
  }

  function duration(seconds) {
    if (seconds === null || seconds === undefined) return "unknown";
    if (seconds < 60) return `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`;
    const [h, m, s] = [Math.floor(seconds / 3600), Math.floor(seconds / 60) % 60, Math.floor(seconds % 60)];
    return h ? `${h.toLocaleString("en-US")} h ${m} min` : `${m} min ${s} s`;
  }

  function bytes(count) {
    let unit = "B";
    for (const next of ["KiB", "MiB", "GiB", "TiB"]) {
      if (count < 1024) break;
      count /= 1024;
      unit = next;
    }
    return `${unit === "B" ? count : count.toFixed(1)} ${unit}`;
  }

  function time(iso) {
    return iso ? `${iso.slice(0, 10)} ${iso.slice(11, 19)}` : "";
  }

  // As short_location in Python.
  function source(path) {
    const parts = path.split("/");
    const at = Math.max(parts.lastIndexOf("robo_orchard_lab"), parts.lastIndexOf("robo_orchard_core"), parts.lastIndexOf("site-packages") + 1 || -1);
    if (at < 0) return path;
    return parts.length - at > 2 ? `${parts[at]}/.../${parts.at(-1)}` : parts.slice(at).join("/");
  }

  function count(n, noun) {
    return `${(n || 0).toLocaleString("en-US")} ${noun}${n === 1 ? "" : "s"}`;
  }

  const TONES = { completed: "good", stopped: "good", preempted: "warn", failed: "bad", running: "", unknown: "warn" };

  function chip(name) {
    return el("span", { class: `chip ${TONES[name] || ""}` }, name);
  }

  function sentence(run) {
    const v = run.verdict;
    const at = `after ${count(v.steps, "step")}${v.epochs ? `, ${count(v.epochs, "epoch")}` : ""}`;
    const why = v.reason ? `${v.by ? `${v.by}: ` : ""}${v.reason}` : "";
    if (v.state === "completed") return `Completed ${at}.`;
    if (v.state === "stopped") return `Stopped early ${at} by ${why}.`;
    if (v.state === "preempted") return `Stopped ${at}, to be continued${why ? ` (${why})` : ""}.`;
    if (v.state === "running") return `In progress ${at}, as of ${time(v.updated_at)} UTC.`;
    if (v.state === "failed") return `Failed ${at}${why ? ` (${why})` : ""}.`;
    return "The outcome of this run is unknown.";
  }

  // --- top of the page ---------------------------------------------------------------------

  function themeButton() {
    const names = ["auto", "light", "dark"];
    const button = el("button", { class: "tool", type: "button" });
    const show = () => {
      const name = document.documentElement.dataset.theme || "auto";
      button.textContent = `Theme: ${name}`;
    };
    button.addEventListener("click", () => {
      const now = document.documentElement.dataset.theme || "auto";
      const next = names[(names.indexOf(now) + 1) % 3];
      if (next === "auto") delete document.documentElement.dataset.theme;
      else document.documentElement.dataset.theme = next;
      show();
      redraw();
    });
    show();
    return button;
  }

  function fact(name, value, note) {
    return el("div", {}, el("dt", {}, name), el("dd", {}, value, note ? el("small", {}, note) : null));
  }

  function bestFacts(run) {
    const known = run.evaluations.columns.filter((c) => c.best !== null);
    return known.slice(0, 3).map((c) => fact(`best ${c.name}`, number(c.best), `step ${number(c.best_step)}`));
  }

  function lastLoss(run) {
    const name = ["loss/total", "train/loss", "loss"].find((n) => run.series[n]) ||
      Object.keys(run.series).find((n) => /(^|\/)loss(\/|$)/.test(n) && !n.startsWith("eval/"));
    const curve = name && run.series[name];
    const value = curve && curve.y.findLast((y) => y !== null);
    return value === undefined || !curve ? null : fact(`last ${name}`, number(value));
  }

  function resumeLine(run) {
    if (!run.is_experiment || !["preempted", "failed"].includes(run.verdict.state)) return null;
    const saved = run.checkpoints.findLast((c) => !c.damage && !c.non_finite.length);
    if (!saved) return el("p", { class: "resume soft" }, "There is no intact checkpoint to resume from.");
    return el("p", { class: "resume" }, `Resume from step ${number(saved.step)}: `, el("code", {}, `robo-orchard-lab resume ${run.folder}`));
  }

  function verdictCard(run) {
    const v = run.verdict;
    const error = v.error && el("div", { class: "error" },
      el("div", { class: "code" }, `${v.error.type}: ${v.error.message}`),
      v.error.hook ? el("div", {}, "in hook ", el("span", { class: "code" }, v.error.hook)) : null,
      v.error.location ? el("div", {}, "at ", el("span", { class: "code" }, v.error.location)) : null,
      v.error.rank && v.error.rank !== "0" ? el("div", {}, `on rank ${v.error.rank}`) : null);
    const changed = run.environment.has_changes ? "with uncommitted changes" : "";
    return el("section", { class: `card verdict ${TONES[v.state]}`, id: "verdict", "aria-label": "Outcome" },
      el("div", { class: "line" }, chip(v.state), el("strong", {}, sentence(run))),
      error,
      resumeLine(run),
      el("dl", { class: "facts" },
        bestFacts(run),
        lastLoss(run),
        fact("steps", number(v.steps ?? 0), v.epochs ? count(v.epochs, "epoch") : ""),
        v.skipped_updates ? fact("skipped updates", number(v.skipped_updates)) : null,
        v.rollbacks ? fact("rollbacks", number(v.rollbacks)) : null,
        run.seconds === null ? null : fact("time", duration(run.seconds), v.world_size > 1 ? `world size ${v.world_size}` : ""),
        run.environment.commit ? fact("commit", run.environment.commit.slice(0, 10), changed) : null));
  }

  function problemsCard(run) {
    if (!run.problems.length) return null;
    return el("section", { class: "card problems", id: "problems", "aria-label": "Missing or damaged" },
      el("h2", {}, "Missing or damaged"), el("ul", {}, run.problems.map((p) => el("li", {}, p))));
  }

  // --- charts ------------------------------------------------------------------------------

  function isDark() {
    const theme = document.documentElement.dataset.theme;
    return theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  }

  function color(name) {
    const probe = el("span", {});
    probe.style.color = `var(--${name})`;
    document.body.append(probe);
    const found = getComputedStyle(probe).color;
    probe.remove();
    return found;
  }

  function groupOf(name) {
    let parts = (name.startsWith("eval/") ? name.replace(/_(low|high)$/, "") : name).split("/"); // an interval
    if (parts[0] === "eval" && parts.length > 1) parts = parts.slice(Math.min(2, parts.length - 1));
    else if (parts[0] === "train" && parts.length > 1) parts = parts.slice(1);
    if (["loss", "lr", "grad_norm"].includes(parts[0])) return parts[0];
    if (parts[0] === "perf" && ["hooks", "stages"].includes(parts[1])) return `perf/${parts[1]}`;
    return parts.join("/").replace(/_epoch$/, "");
  }

  const RANK = ["loss", "accuracy", "lr", "grad_norm"];

  function groups() {
    const found = new Map();
    for (const [index, run] of runs.entries()) {
      for (const [name, curve] of Object.entries(run.series)) {
        const key = several ? name : groupOf(name);
        if (!found.has(key)) found.set(key, []);
        found.get(key).push({ name: several ? run.name : name, metric: name, run: index, ...curve });
      }
    }
    const rank = (key) => {
      const at = RANK.indexOf(groupOf(key));
      return at < 0 ? RANK.length - 1.5 : at;
    };
    return [...found].sort(([a], [b]) => rank(a) - rank(b) || a.localeCompare(b));
  }

  function smooth(values) {
    let [mean, weight] = [0, 0];
    return values.map((value) => {
      if (value === null || value === undefined) return value;
      mean = state.smoothing * mean + (1 - state.smoothing) * value;
      weight = state.smoothing * weight + (1 - state.smoothing);
      return mean / weight;
    });
  }

  // Points without neighbors, as between two NaNs, have no line and get a dot.
  function alone(u, index) {
    const column = u.data[index];
    const found = [];
    let before = null;
    for (let i = 0; i < column.length; i++) {
      if (column[i] === undefined) continue;
      if (column[i] !== null && before === null) {
        let next = i + 1;
        while (next < column.length && column[next] === undefined) next++;
        if ((column[next] ?? null) === null) found.push(i);
      }
      before = column[i];
    }
    return found;
  }

  class Chart {
    constructor(title, series) {
      this.title = title;
      this.series = series;
      this.shown = series.map(() => true);
      this.plot = null;
      this.host = el("div", { class: "plot", tabIndex: 0, role: "img", "aria-label": this.summary() });
      this.legend = el("div", { class: "legend" });
      this.step = el("span", { class: "soft" });
      this.notes = el("div", {}, this.lost());
      this.node = el("figure", { class: "chart" },
        el("figcaption", {}, el("h3", {}, title || "(no name)"), this.step), this.host, this.legend, this.notes);
      this.host.addEventListener("keydown", (event) => this.key(event));
    }

    summary() {
      const parts = this.series.slice(0, 6).map((s) => {
        const finite = s.y.filter((y) => y !== null);
        if (!finite.length) return `${s.name}: no finite value`;
        const low = finite.reduce((a, b) => Math.min(a, b));
        const high = finite.reduce((a, b) => Math.max(a, b));
        return `${s.name}: last ${number(finite.at(-1))}, smallest ${number(low)}, largest ${number(high)}`;
      });
      return `Curve of ${this.title} by step. ${parts.join("; ")}. Arrow keys move the cursor, plus and minus zoom, 0 shows all.`;
    }

    lost() {
      return this.series.filter((s) => s.non_finite).map((s) => el("div", { class: "lost" },
        `${s.name}: ${count(s.non_finite, "non-finite value")}, the first at step ${number(s.first_non_finite)}`));
    }

    color(index) {
      const palette = isDark() ? DARK : LIGHT;
      const at = several ? this.series[index].run : index;
      return palette[at % palette.length];
    }

    dash(index) {
      const at = several ? this.series[index].run : index;
      return DASHES[Math.floor(at / LIGHT.length) % DASHES.length];
    }

    data() {
      const usable = (y) => y.map((v) => (state.log && v !== null && v <= 0 ? null : v));
      const tables = this.series.map((s) => [s.x, usable(s.y)]);
      const joined = tables.length === 1 ? tables[0] : uPlot.join(tables, tables.map(() => [0, 1]));
      if (!state.smoothing) return joined;
      return [joined[0], ...joined.slice(1).flatMap((y) => [y, smooth(y)])];
    }

    draw() {
      this.undraw();
      const width = this.host.clientWidth;
      if (!width) return;
      const [soft, grid] = [color("soft"), color("grid")];
      const lines = this.series.flatMap((s, index) => {
        const stroke = this.color(index);
        const line = { label: s.name, stroke, width: 1.7, dash: this.dash(index), show: this.shown[index], points: { filter: (u, at, show) => (show ? null : alone(u, at)) } };
        return state.smoothing ? [{ ...line, stroke: `${stroke}55`, width: 1 }, { ...line, points: { show: false } }] : [line];
      });
      const axis = { stroke: soft, grid: { stroke: grid, width: 1 }, ticks: { stroke: grid, width: 1 }, font: "11px system-ui, sans-serif" };
      const short = (v) => (v === null ? "" : Math.abs(v) >= 1e5 || (v !== 0 && Math.abs(v) < 1e-3) ? v.toExponential(0) : String(+v.toPrecision(6)));
      const positive = this.series.some((s) => s.y.some((y) => y > 0));
      const options = {
        width,
        height: 220,
        legend: { show: false },
        cursor: { sync: { key: "steps", setSeries: false }, drag: { x: true, y: false, dist: 4 }, points: { size: 6 } },
        scales: { x: { time: false }, y: { distr: state.log && positive ? 3 : 1 } },
        axes: [
          { ...axis, size: 30, values: (u, ticks) => ticks.map((v) => (Number.isInteger(v) ? v.toLocaleString("en-US") : "")) },
          { ...axis, size: 58, values: (u, ticks) => ticks.map(short) },
        ],
        series: [{}, ...lines],
        hooks: {
          setCursor: [() => this.values()],
          setScale: [(u, key) => { if (key === "x") rememberZoom(u); }],
        },
      };
      this.plot = new uPlot(options, this.data(), this.host);
      if (state.zoom) this.plot.setScale("x", state.zoom);
      this.buttons();
    }

    // Show new values; the zoom and the hidden curves stay.
    update(series) {
      const names = (of) => of.map((s) => s.name).join("\n");
      const isSame = names(series) === names(this.series);
      const hidden = new Set(this.series.filter((s, i) => !this.shown[i]).map((s) => s.name));
      this.series = series;
      this.shown = series.map((s) => !hidden.has(s.name));
      this.host.setAttribute("aria-label", this.summary());
      this.notes.replaceChildren(...this.lost());
      if (!this.plot) return;
      if (!isSame) this.draw();
      else if (state.zoom) {
        const zoom = state.zoom;
        this.plot.setData(this.data(), false);
        this.plot.setScale("x", zoom);
      } else this.plot.setData(this.data());
      this.values();
    }

    undraw() {
      if (this.plot) this.plot.destroy();
      this.plot = null;
    }

    buttons() {
      this.cells = [];
      this.legend.replaceChildren(...this.series.map((s, index) => {
        const swatch = el("span", { class: "swatch" });
        swatch.style.background = this.color(index);
        const value = el("span", { class: "value" });
        this.cells.push(value);
        const toggle = (event) => {
          this.shown[index] = !this.shown[index];
          event.currentTarget.setAttribute("aria-pressed", String(this.shown[index]));
          const per = state.smoothing ? 2 : 1;
          for (let i = 0; i < per; i++) this.plot.setSeries(1 + index * per + i, { show: this.shown[index] });
        };
        return el("button", { type: "button", "aria-pressed": String(this.shown[index]), onclick: toggle }, swatch, el("span", {}, s.name), value);
      }));
      this.values();
    }

    values() {
      if (!this.plot || !this.cells) return;
      const per = state.smoothing ? 2 : 1;
      const at = this.plot.cursor.idx;
      this.step.textContent = at === null || at === undefined ? "" : `step ${number(this.plot.data[0][at])}`;
      this.cells.forEach((cell, index) => {
        const column = this.plot.data[1 + index * per + per - 1];
        let value = at === null || at === undefined ? undefined : column[at];
        if (value === undefined) value = column.slice(0, at === null || at === undefined ? undefined : at + 1).findLast((y) => y !== null && y !== undefined);
        cell.textContent = number(value);
      });
    }

    key(event) {
      const u = this.plot;
      if (!u) return;
      const { min, max } = u.scales.x;
      const inside = u.data[0].map((x, i) => i).filter((i) => u.data[0][i] >= min && u.data[0][i] <= max);
      const now = u.cursor.idx ?? inside[0];
      const move = { ArrowLeft: now - 1, ArrowRight: now + 1, Home: inside[0], End: inside.at(-1) }[event.key];
      if (move !== undefined) {
        const target = Math.min(inside.at(-1), Math.max(inside[0], move));
        const left = u.valToPos(u.data[0][target], "x");
        u.setCursor({ left, top: u.bbox.height / devicePixelRatio / 2 });
      } else if (event.key === "+" || event.key === "-") {
        const middle = u.data[0][now] ?? (min + max) / 2;
        const half = ((max - min) / 2) * (event.key === "+" ? 0.5 : 2);
        const [low, high] = [u.data[0][0], u.data[0].at(-1)];
        setZoom(half * 2 >= high - low ? null : { min: Math.max(low, middle - half), max: Math.min(high, middle + half) });
      } else if (event.key === "0" || event.key === "Escape") {
        setZoom(null);
      } else return;
      event.preventDefault();
    }
  }

  function rememberZoom(u) {
    const [low, high] = [u.data[0][0], u.data[0].at(-1)];
    const { min, max } = u.scales.x;
    state.zoom = min > low || max < high ? { min, max } : null;
  }

  function setZoom(range) {
    for (const chart of charts) {
      if (!chart.plot) continue;
      const x = chart.plot.data[0];
      chart.plot.setScale("x", range || { min: x[0], max: x.at(-1) });
    }
    state.zoom = range;
  }

  function redraw() {
    for (const chart of charts) if (chart.plot) chart.draw();
  }

  function drawAll() {
    for (const chart of charts) if (!chart.plot) chart.draw();
  }

  const near = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      const chart = entry.isIntersecting && charts.find((c) => c.host === entry.target);
      if (chart && !chart.plot) chart.draw();
    }
  }, { rootMargin: "300px" });

  let resizing = 0;
  const sized = new ResizeObserver(() => {
    cancelAnimationFrame(resizing);
    resizing = requestAnimationFrame(() => {
      for (const c of charts) {
        if (c.plot && c.host.clientWidth && c.plot.width !== c.host.clientWidth) c.plot.setSize({ width: c.host.clientWidth, height: 220 });
      }
    });
  });

  function chartGrid(found) {
    const grid = el("div", { class: "charts" });
    for (const [title, series] of found) {
      const chart = new Chart(title, series);
      charts.push(chart);
      grid.append(chart.node);
    }
    return grid;
  }

  function controls() {
    let waiting = 0;
    const later = (change) => {
      change();
      cancelAnimationFrame(waiting);
      waiting = requestAnimationFrame(redraw);
    };
    const shown = el("output", {}, "0");
    const smoothing = el("input", { type: "range", min: "0", max: "0.99", step: "0.01", value: "0", oninput: (event) => later(() => {
      state.smoothing = Number(event.target.value);
      shown.textContent = event.target.value;
    }) });
    const log = el("button", { class: "tool", type: "button", "aria-pressed": "false", onclick: (event) => later(() => {
      state.log = !state.log;
      event.currentTarget.setAttribute("aria-pressed", String(state.log));
    }) }, "Log scale");
    const filter = el("input", { type: "search", placeholder: "Filter metrics", "aria-label": "Filter metrics", oninput: (event) => {
      const text = event.target.value.toLowerCase();
      for (const chart of charts) {
        const names = [chart.title, ...chart.series.map((s) => s.metric)];
        chart.node.hidden = !names.some((n) => n.toLowerCase().includes(text));
      }
      if (text) for (const d of document.querySelectorAll("#curves details")) d.open = true;
    } });
    return el("div", { class: "controls" },
      filter,
      el("label", {}, "Smoothing", smoothing, shown),
      log,
      el("button", { class: "tool", type: "button", onclick: () => setZoom(null) }, "Reset zoom"),
      el("span", { class: "soft" }, "Drag to zoom, double-click to reset."));
  }

  function curvesSection() {
    const found = groups();
    if (!found.length) return null;
    const collapsed = [["Performance", /^perf\/(?!hooks(\/|$))/], ["Time of hooks", /^perf\/hooks(\/|$)/]]
      .map(([title, names]) => [title, found.filter(([name]) => names.test(name))]);
    const major = found.filter((group) => !collapsed.some(([, groups]) => groups.includes(group)));
    const thinned = runs.some((run) => Object.values(run.series).some((s) => s.points > s.x.length));
    return section("curves", "Curves", controls(), chartGrid(major),
      collapsed.map(([title, groups]) => groups.length ? el("details", { open: !major.length },
        el("summary", {}, `${title} (${count(groups.reduce((n, [, series]) => n + series.length, 0), "curve")})`), chartGrid(groups)) : null),
      thinned ? el("p", { class: "soft" }, "Long curves show fewer points; the smallest and the largest values are kept.") : null);
  }

  // --- tables of a run ---------------------------------------------------------------------

  function evaluationSection(run) {
    const { columns, rows, omitted } = run.evaluations;
    if (!columns.length) return null;
    const arrows = { min: " ↓", max: " ↑" };
    const headings = ["step", ...columns.map((c) => c.name + (arrows[c.mode] || ""))].map((text) => ({ text, class: "number" }));
    const body = rows.toReversed().map(([step, ...values]) => [
      { content: number(step), class: "number" },
      ...values.map((value, i) => {
        const best = columns[i].best_step === step;
        return { content: best ? [`★ ${number(value)}`, el("span", { class: "hidden-text" }, " (best)")] : number(value), class: best ? "number best" : "number" };
      }),
    ]);
    return section("evaluations", "Evaluations", table(headings, body, "Evaluations by step", rows.length > 12),
      el("p", { class: "soft" }, `★ best; ↓ small, ↑ large values are good.${omitted > 0 ? ` ${count(omitted, "earlier evaluation")} not shown.` : ""}`));
  }

  function timelineSection(run) {
    if (!run.events.length) return null;
    const end = Math.max(1, run.verdict.steps || 0, ...run.events.map((e) => e.step || 0));
    const lanes = new Map([["start, resume, end", []]]);
    for (const event of run.events) {
      const lane = ["start", "resume", "end"].includes(event.event) ? "start, resume, end" : event.event;
      if (!lanes.has(lane)) lanes.set(lane, []);
      lanes.get(lane).push(event);
    }
    const drawn = [...lanes].filter(([, events]) => events.length).map(([lane, events]) => {
      const track = el("div", { class: "track" }, events.filter((e) => e.step !== null).map((event) => {
        const mark = el("span", { class: event.event.split(" ")[0], title: `step ${number(event.step)}: ${event.event} ${event.text}` });
        mark.style.left = `${(100 * event.step) / end}%`;
        return mark;
      }));
      return el("div", { class: "lane" }, el("span", { class: "soft" }, lane), track);
    });
    const tone = { warning: "warn", error: "bad", "skipped update": "warn", rollback: "warn", save: "good" };
    const rows = run.events.toReversed().map((event) => [
      { content: number(event.step), class: "number" },
      { content: time(event.at), class: "short soft" },
      el("span", { class: `chip ${tone[event.event] || ""}` }, event.event),
      { content: event.text, class: "long" },
    ]);
    const notable = run.events.filter((e) => ["warning", "error", "skipped update", "rollback"].includes(e.event)).length;
    return section("timeline", "Timeline", el("div", { class: "lanes", "aria-hidden": "true" }, drawn,
      el("div", { class: "lane soft" }, el("span", {}), el("span", { class: "top" }, el("span", {}, "step 0"), el("span", {}, `step ${number(end)}`)))),
    el("details", { open: notable > 0 && run.verdict.state !== "completed" }, el("summary", {}, `All ${count(run.events.length, "event")}`),
      table([{ text: "step", class: "number" }, "time (UTC)", "event", "details"], rows, "Events", true)));
  }

  function checkpointSection(run) {
    if (!run.checkpoints.length) return null;
    const rows = run.checkpoints.toReversed().map((c) => {
      const marks = [
        c.damage ? el("span", { class: "chip bad" }, "damaged") : el("span", { class: "chip good" }, "complete"),
        c.non_finite.length ? [" ", el("span", { class: "chip bad" }, "not finite")] : null,
        c.links.map((link) => [" ", el("span", { class: "chip" }, link)]),
        c.damage || c.non_finite.length ? el("div", { class: "soft" }, [c.damage, ...c.non_finite].filter(Boolean).join(", ")) : null,
      ];
      const values = Object.entries(c.metrics).filter(([n]) => !/^(perf|lr)\//.test(n)).slice(0, 6);
      return [{ content: number(c.step), class: "number" }, { content: time(c.saved_at), class: "short" }, { content: bytes(c.size_bytes), class: "number" },
        { content: marks }, { content: values.map(([n, v]) => `${n} ${number(v)}`).join(", "), class: "long" }, { content: c.reason, class: "long" }];
    });
    return section("checkpoints", "Checkpoints",
      table([{ text: "step", class: "number" }, "saved (UTC)", { text: "size", class: "number" }, "state", "metrics", "reason"], rows, "Checkpoints", rows.length > 12),
      el("p", { class: "soft" }, "Complete: all files have the recorded sizes. To compare digests: ", el("code", {}, `robo-orchard-lab checkpoint verify ${run.folder}`)));
  }

  function mediaBody(item, label) {
    const note = item.problem ? el("p", { class: "lost" }, item.problem) : null;
    if (item.text !== undefined) return el("div", { class: "scroll tall note code", tabIndex: 0, role: "region", "aria-label": label }, item.text);
    if (item.columns) return table(item.columns, item.rows, label, item.rows.length > 12);
    if (!item.data) return note;
    const isVideo = item.kind === "video";
    const shown = isVideo
      ? el("video", { controls: true, loop: true, muted: true, playsInline: true, preload: "metadata", src: item.data, "aria-label": label })
      : el("img", { src: item.data, alt: item.caption || label });
    shown.addEventListener("load", () => { if (shown.naturalWidth < 400) shown.className = "small"; });
    shown.addEventListener("error", () => shown.replaceWith(
      el("p", { class: "lost" }, `${item.file} can't be shown: damaged, or of a kind unknown to this browser`)));
    return note ? el("div", {}, shown, note) : shown;
  }

  // Of each name, all items of one step are shown; those of the newest first.
  function mediaGroup(name, items) {
    const steps = [...Map.groupBy(items, (item) => item.step).values()];
    const figures = el("div", { class: "media" });
    const show = (shown) => figures.replaceChildren(...shown.map((item) => {
      const label = `${name}${item.step === null ? "" : `, step ${number(item.step)}`}${item.caption ? `: ${item.caption}` : ""}`;
      return el("figure", {}, mediaBody(item, label), el("figcaption", {}, label));
    }));
    show(steps.at(-1));
    const last = steps.length - 1;
    const slider = last ? el("input", { type: "range", min: "0", max: String(last), value: String(last), "aria-label": `Step of ${name}`, oninput: (event) => show(steps[Number(event.target.value)]) }) : null;
    return el("div", { class: steps.some((shown) => shown.length > 1) ? "several" : null }, figures, slider);
  }

  function mediaSection(run) {
    if (!run.media.length) return null;
    const names = new Map();
    for (const item of run.media.toReversed()) {
      if (!names.has(item.name)) names.set(item.name, []);
      names.get(item.name).push(item);
    }
    return section("media", "Media", el("div", { class: "media" }, [...names].map(([name, items]) => mediaGroup(name, items))));
  }

  // Parents in PIPELINE_CHANNELS.
  const NESTING = { on_epoch: "on_loop", on_step: "on_epoch", on_batch: "on_step", on_model_forward: "on_batch", on_model_backward: "on_batch", on_optimizer_step: "on_step", on_evaluation: "on_loop" };

  // Times of HookProfiler are short, and many.
  function brief(seconds) {
    for (const [unit, size] of [["s", 1], ["ms", 1e-3]]) if (seconds >= size) return `${(seconds / size).toPrecision(3)} ${unit}`;
    return `${(seconds / 1e-6).toFixed(1)} µs`;
  }

  function percent(share) {
    return `${(100 * share).toFixed(share < 0.1 ? 2 : 1)} %`;
  }

  function costTag(cost, profile) {
    if (!cost || !profile) return null;
    const title = `${count(cost.calls, "call")}, the first in ${brief(cost.first_s)}; its own time, without the channels that it opens`;
    const text = cost.self_s ? `${brief(cost.self_s / profile.steps)} a step, ${percent(cost.share)}` : `first call ${brief(cost.first_s)}`;
    return el("span", { class: cost.share >= 0.02 ? "cost high" : "cost", title }, text);
  }

  // Where a hook appears first: what it reads, changes and requests.
  function effects(hook) {
    const names = ["reads", "changes", "requests"];
    if (names.every((name) => hook[name] === null)) return el("span", { class: "effects soft" }, "reads, changes, requests: not declared");
    const parts = names.filter((name) => hook[name] === null || hook[name].length).map((name) =>
      el("span", {}, el("strong", {}, name), ` ${hook[name] === null ? "not declared" : hook[name].join(", ")}`));
    return el("span", { class: "effects" }, parts.length ? parts : "reads, changes and requests nothing");
  }

  function sourceOf(hook) {
    const [before, after] = [hook.before, hook.after].map(source);
    const [file, line] = [before.slice(0, before.lastIndexOf(":") + 1), after.slice(after.lastIndexOf(":") + 1)];
    if (before && after) return `before, after ${before === after ? before : file && after.startsWith(file) ? `${before}, ${line}` : `${before}, ${after}`}`;
    return before ? `before ${before}` : `after ${after}`;
  }

  function profileTable(profile) {
    if (!profile || !profile.stages.length) return null;
    const rows = profile.stages.map((stage) => {
      const bar = el("span", { class: "bar" });
      bar.style.width = `${Math.min(100, 100 * (stage.share || 0))}%`;
      return [{ content: stage.name.replaceAll("_", " "), class: "short" }, { content: brief(stage.step_s), class: "number" }, { content: percent(stage.share || 0), class: "number" }, { content: bar, class: "bars" }];
    });
    const facts = [`${count(profile.steps, "step")} after the first`, profile.step_s !== null && `median ${brief(profile.step_s)}`,
      profile.first_step_s && `first step ${brief(profile.first_step_s)}`, profile.device_idle_s !== null && `device idle ${brief(profile.device_idle_s)} between two steps`,
      profile.ranks > 1 && `rank 0 of ${profile.ranks}`].filter(Boolean);
    return el("div", {}, el("h3", { class: "part" }, "Time of a step"), el("p", { class: "soft" }, `${facts.join(", ")}; measured by HookProfiler.`),
      table(["stage", { text: "a step", class: "number" }, { text: "share", class: "number" }, ""], rows, "Time of a step"));
  }

  function hooksSection(run) {
    if (!run.plan.length && !run.profile) return null;
    const boxes = new Map();
    const box = (channel) => {
      if (!boxes.has(channel)) {
        const [list, name] = [el("ol", {}), el("summary", {}, channel || "(no name)")];
        boxes.set(channel, { list, name, node: el("details", { class: "channel", open: true }, name, list), used: false, share: 0, seconds: 0 });
      }
      return boxes.get(channel);
    };
    for (const channel of ["on_loop", ...Object.keys(NESTING)]) box(channel);
    const seen = new Set();
    for (const hook of run.plan) {
      const found = box(hook.channel);
      found.used = true;
      if (hook.cost && run.profile) {
        for (let channel = hook.channel; channel; channel = NESTING[channel]) {
          boxes.get(channel).share += hook.cost.share;
          boxes.get(channel).seconds += hook.cost.self_s / run.profile.steps;
        }
      }
      found.list.append(el("li", {}, el("strong", {}, hook.hook), hook.class_name !== hook.hook ? el("span", { class: "soft" }, hook.class_name) : null,
        hook.when !== "always" ? el("span", { class: "tag" }, hook.when) : null, el("span", { class: "code soft" }, sourceOf(hook)),
        costTag(hook.cost, run.profile), seen.has(hook.hook) ? null : effects(hook)));
      seen.add(hook.hook);
    }
    const top = el("div", {});
    for (const [channel, found] of boxes) {
      if (found.seconds) found.name.append(el("span", { class: "cost" }, ` ${brief(found.seconds)} a step, ${percent(found.share)}`));
      (boxes.get(NESTING[channel])?.node || top).append(found.node);
    }
    for (const [channel, found] of [...boxes].reverse()) {
      if (!found.used && !found.node.querySelector("li") && channel !== "on_loop") found.node.remove();
      if (!found.list.children.length) found.list.remove();
    }
    const changes = run.plan_changes.map((c) => [{ content: number(c.step), class: "number" }, { content: el("code", {}, c.what), class: "short" }, { content: c.before, class: "long" }, { content: c.after, class: "long" }]);
    return section("hooks", "Hooks", profileTable(run.profile),
      changes.length ? el("div", {}, el("h3", { class: "part" }, "Changes at resumes"), table([{ text: "after step", class: "number" }, "hook", "before", "after"], changes, "Changes of the hooks", changes.length > 12)) : null,
      run.plan.length ? [el("p", { class: "soft" }, "Channels are nested as they run; updates that the batch processor yields or makes itself run inside on_batch. The first hook of a channel is the outermost: its before runs first, its after last. Effects are listed where a hook appears first."), top] : null);
  }

  function traceSection(run) {
    if (!run.trace) return null;
    return section("trace", "Trace", el("p", {}, "Stages and hooks of some steps on a time axis: ", el("code", {}, `${run.folder}/${run.trace.file}`),
      ` (${bytes(run.trace.size_bytes)}). Open the file in chrome://tracing or ui.perfetto.dev.`));
  }

  function configurationSection(run) {
    const values = run.configuration;
    if (!values.length && !run.base && !run.changes.length) return null;
    const sourced = values.some((v) => v.from);
    const rows = values.map((v) => ({ class: sourced && !v.from ? "default" : "", cells: [{ content: el("code", {}, v.path), class: "short" }, { content: el("code", {}, v.value), class: "long" }, ...(sourced ? [{ content: v.from || "default", class: "soft" }] : [])] }));
    const body = table(["field", "value", ...(sourced ? ["from"] : [])], rows, "Configuration", true);
    const toggle = sourced && el("button", { class: "tool", type: "button", "aria-pressed": "true", onclick: (event) => {
      const hide = event.currentTarget.getAttribute("aria-pressed") !== "true";
      event.currentTarget.setAttribute("aria-pressed", String(hide));
      for (const row of body.querySelectorAll("tr.default")) row.hidden = hide;
    } }, "Hide defaults");
    if (sourced) for (const row of body.querySelectorAll("tr.default")) row.hidden = true;
    const changes = (items) => table(["field", "before", "after", ...(items.some((c) => c.start) ? ["start", "effect on resume"] : [])],
      items.map((c) => [{ content: el("code", {}, c.path), class: "short" }, el("code", {}, c.before), el("code", {}, c.after), ...(c.start ? [c.start, c.resume] : [])]), "Changes", items.length > 12);
    return section("configuration", "Configuration",
      run.base ? el("div", {}, el("h3", { class: "part" }, `Differences from ${run.base.file}`), run.base.changes.length ? changes(run.base.changes) : el("p", { class: "soft" }, "none")) : null,
      run.changes.length ? el("div", {}, el("h3", { class: "part" }, "Changes at resumes"), changes(run.changes)) : null,
      values.length ? [el("div", { class: "controls" }, toggle), body] : null);
  }

  function environmentSection(run) {
    const e = run.environment;
    const pairs = [["command", e.command, true], ["started in", e.folder, true], ["host", e.host], ["world size", run.verdict.world_size],
      ["commit", e.commit && `${e.commit}${e.branch ? ` (${e.branch})` : ""}`, true],
      ["changed files", e.changed.join("\n"), true], ["run folder", run.folder, true],
      ...Object.entries(e.versions)].filter(([, value]) => value);
    const starts = e.starts.length > 1 ? el("details", {}, el("summary", {}, count(e.starts.length, "start")),
      table(["start", "at (UTC)", "host", "command"], e.starts.map((s) => [s.name, time(s.at), s.host, el("code", {}, s.command)]), "Starts", true)) : null;
    return section("environment", "Environment",
      el("dl", { class: "pairs" }, pairs.map(([name, value, code]) => [el("dt", {}, name), el("dd", { class: code ? "code" : "" }, String(value))])), starts);
  }

  // --- comparison --------------------------------------------------------------------------

  function comparisonSection() {
    const names = [...new Set(runs.flatMap((run) => run.evaluations.columns.map((c) => c.name)))];
    const lastOf = (run, name) => run.series[name]?.y.findLast((y) => y !== null);
    const losses = [...new Set(runs.flatMap((run) => Object.keys(run.series)))].filter((n) => n === "loss/total" || n === data.sort);
    const columns = [
      { name: "run", of: (run) => run.name },
      { name: "state", of: (run) => run.verdict.state },
      { name: "steps", of: (run) => run.verdict.steps, numeric: true },
      { name: "time", of: (run) => run.seconds, show: duration, numeric: true },
      ...losses.filter((n) => !names.includes(n)).map((name) => ({ name: `last ${name}`, metric: name, of: (run) => lastOf(run, name), numeric: true })),
      ...names.map((name) => {
        const column = runs.flatMap((run) => run.evaluations.columns).find((c) => c.name === name && c.mode);
        const mode = column ? column.mode : null;
        const best = (run) => run.evaluations.columns.find((c) => c.name === name)?.best;
        return { name: `${mode ? "best" : "last"} ${name}`, metric: name, mode, of: (run) => (mode ? best(run) : lastOf(run, name)), numeric: true };
      }),
      { name: "commit", of: (run) => run.environment.commit.slice(0, 10) },
    ];
    const wanted = columns.findIndex((c) => c.metric && (c.metric === data.sort || (!data.sort && c.mode)));
    let order = { index: Math.max(0, wanted), down: wanted >= 0 && columns[wanted].mode === "max" };
    const host = el("div", {});
    const hidden = new Set();
    const show = () => {
      const { index, down } = order;
      const key = (run) => columns[index].of(run) ?? null;
      const sorted = [...runs.keys()].sort((a, b) => {
        const [x, y] = [key(runs[a]), key(runs[b])];
        if (x === null || y === null) return (x === null) - (y === null);
        return (down ? -1 : 1) * (typeof x === "number" ? x - y : String(x).localeCompare(String(y)));
      });
      const best = columns.map((c) => {
        const values = runs.map(c.of).filter((v) => typeof v === "number");
        return c.mode && values.length ? values.reduce((a, b) => (c.mode === "min" ? Math.min(a, b) : Math.max(a, b))) : undefined;
      });
      const headings = columns.map((c, i) => ({
        class: c.numeric ? "number" : "",
        sort: i === index ? (down ? "descending" : "ascending") : null,
        node: el("button", { type: "button", onclick: () => {
          order = { index: i, down: order.index === i ? !order.down : c.mode === "max" };
          show();
          host.querySelectorAll("th button")[i].focus();
        } }, c.name, i === index ? (down ? " ▼" : " ▲") : ""),
      }));
      const rows = sorted.map((r) => columns.map((c, i) => {
        const value = c.of(runs[r]);
        if (i === 0) {
          const swatch = el("span", { class: "swatch" });
          swatch.style.background = (isDark() ? DARK : LIGHT)[r % LIGHT.length];
          const box = el("input", { type: "checkbox", checked: !hidden.has(r), "aria-label": `Show ${value}`, onchange: (event) => {
            if (event.target.checked) hidden.delete(r);
            else hidden.add(r);
            for (const chart of charts) {
              chart.series.forEach((s, at) => { chart.shown[at] = !hidden.has(s.run); });
            }
            redraw();
          } });
          return { content: el("label", {}, box, " ", swatch, " ", value), class: "short" };
        }
        if (c.name === "state") return chip(value);
        const isBest = best[i] !== undefined && value === best[i];
        const text = (c.show || number)(value);
        return { content: isBest ? `★ ${text}` : text, class: c.numeric ? (isBest ? "number best" : "number") : "" };
      }));
      host.replaceChildren(table(headings, rows, "Runs", runs.length > 14));
    };
    show();
    const problems = runs.filter((run) => run.problems.length);
    return [section("runs", "Runs", host,
      problems.length ? el("details", {}, el("summary", {}, "Missing or damaged"), el("ul", {}, problems.flatMap((run) => run.problems.map((p) => el("li", {}, `${run.name}: ${p}`))))) : null),
    section("differences", "Differences of the configurations", data.differences.length
      ? table(["field", ...runs.map((run) => run.name)], data.differences.map((d) => [{ content: el("code", {}, d.path), class: "short" }, ...d.values.map((v) => el("code", {}, v === null ? "" : v))]), "Differences", data.differences.length > 14)
      : el("p", { class: "soft" }, "The configurations are equal, or were not recorded."))];
  }

  function extraSection(extra, index) {
    return section(`table-${index}`, extra.title, table(extra.headings, extra.rows, extra.title, extra.rows.length > 14),
      extra.note ? el("div", { class: "scroll", tabIndex: 0, role: "region", "aria-label": "Command" }, el("pre", {}, extra.note)) : null);
  }

  // --- page --------------------------------------------------------------------------------

  function content(curves) {
    const run = runs[0];
    const sections = several
      ? [...data.tables.map(extraSection), ...comparisonSection(), curves]
      : [curves, evaluationSection(run), mediaSection(run), timelineSection(run), checkpointSection(run), hooksSection(run), traceSection(run), configurationSection(run), environmentSection(run)];
    const present = sections.filter(Boolean);
    const titles = present.map((s) => [s.id, s.querySelector("h2").textContent]);
    const note = several ? count(runs.length, "run") : `${run.verdict.started_at ? `started ${time(run.verdict.started_at)} UTC · ` : ""}${run.folder}`;
    return [
      el("a", { class: "skip", href: `#${present[0].id}` }, `Skip to ${titles[0][1]}`),
      el("header", { class: "top" }, el("div", {}, el("h1", {}, several ? data.title : run.name), el("div", { class: "soft" }, note)), themeButton()),
      ...(several ? [] : [verdictCard(run), problemsCard(run)].filter(Boolean)),
      el("nav", { "aria-label": "Sections" }, titles.map(([id, title]) => el("a", { href: `#${id}` }, title))),
      ...present,
      el("footer", {}, `Written ${time(data.generated_at)} UTC by robo-orchard-lab.`)];
  }

  const written = new WeakMap(); // markup of each part of the page as it was built

  function keep(node, curves) {
    if (node !== curves) written.set(node, node.outerHTML);
    return node;
  }

  function observe(chart) {
    near.observe(chart.host);
    sized.observe(chart.host);
  }

  function build() {
    const curves = curvesSection();
    page.append(...content(curves).map((node) => keep(node, curves)));
    charts.forEach(observe);
  }

  // Show a newer state of the run: charts keep zoom, and parts of the page that are equal stay.
  function update(fresh) {
    runs[0] = fresh.runs[0];
    data.generated_at = fresh.generated_at;
    const old = document.getElementById("curves");
    const before = new Set(charts);
    const curves = old && updateCharts(old) ? old : curvesSection();
    const nameOf = (node) => node.id || node.className || node.tagName;
    const parts = new Map([...page.children].map((node) => [nameOf(node), node]));
    let last = null;
    for (const node of content(curves)) {
      let shown = parts.get(nameOf(node));
      parts.delete(nameOf(node));
      const isEqual = shown && (shown === node || written.get(shown) === node.outerHTML);
      if (!isEqual) {
        keep(node, curves);
        if (shown) replacePart(shown, node);
        else if (last) last.after(node);
        else page.prepend(node);
        shown = node;
      }
      last = shown;
    }
    for (const node of parts.values()) node.remove();
    charts.filter((chart) => !before.has(chart)).forEach(observe);
  }

  // Update all charts of the section; false if the groups of curves changed.
  function updateCharts() {
    const found = new Map(groups());
    const known = charts.map((chart) => chart.title);
    if (known.length !== found.size || !known.every((title) => found.has(title))) {
      for (const chart of charts) chart.undraw();
      charts.length = 0;
      return false;
    }
    for (const chart of charts) chart.update(found.get(chart.title));
    return true;
  }

  function replacePart(old, fresh) {
    const each = (selector, copy) => {
      const made = fresh.querySelectorAll(selector);
      old.querySelectorAll(selector).forEach((node, i) => { if (made[i]) copy(node, made[i]); });
    };
    const places = [];
    each("details", (from, to) => { to.open = from.open; });
    each(".scroll", (from, to) => places.push([to, from.scrollTop, from.scrollLeft]));
    each("a, button, input, summary, [tabindex]", (from, to) => { if (from === document.activeElement) places.push([to]); });
    each(".tool[aria-pressed]", (from, to) => {
      const pressed = from.getAttribute("aria-pressed");
      if (pressed === to.getAttribute("aria-pressed")) return;
      if (fresh.id === "curves") to.setAttribute("aria-pressed", pressed);
      else to.click();
    });
    old.replaceWith(fresh);
    each("input", (from, to) => {
      if (from.value === from.defaultValue) return;
      to.value = from.value;
      to.dispatchEvent(new Event("input"));
    });
    for (const [node, top, left] of places) {
      if (top === undefined) node.focus({ preventScroll: true });
      else node.scrollTo(left, top);
    }
  }

  build();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  let before;
  addEventListener("beforeprint", () => {
    before = document.documentElement.dataset.theme;
    document.documentElement.dataset.theme = "light";
    for (const d of document.querySelectorAll("details")) d.open = true;
    redraw();
    drawAll();
  });
  addEventListener("afterprint", () => {
    if (before) document.documentElement.dataset.theme = before;
    else delete document.documentElement.dataset.theme;
    redraw();
  });
  window.report = { data, charts, drawAll, setZoom, state, update };
})();
