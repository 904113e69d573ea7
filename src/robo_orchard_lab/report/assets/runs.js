"use strict";
// List of runs, asked from the server of the page. Text of the runs is set as text, never as markup.
(() => {
  const EVERY_MS = 2000;
  const page = document.getElementById("page");
  const home = location.pathname.replace(/\/$/, "");
  let tag = null;

  function el(name, props, ...children) {
    const node = Object.assign(document.createElement(name), props);
    node.append(...children.flat().filter((child) => child !== null && child !== undefined));
    return node;
  }

  const state = el("span", { className: "soft" }, "reading the runs ...");
  state.setAttribute("role", "status");
  const body = el("section", { className: "card", id: "runs" });
  page.append(el("header", { className: "top" }, el("div", {}, el("h1", {}, "Runs"), state)), body);

  const TONES = { completed: "good", stopped: "good", preempted: "warn", failed: "bad", unknown: "warn" };

  function duration(seconds) {
    if (seconds === null) return "";
    const [h, m, s] = [Math.floor(seconds / 3600), Math.floor(seconds / 60) % 60, Math.floor(seconds % 60)];
    return h ? `${h.toLocaleString("en-US")} h ${m} min` : m ? `${m} min ${s} s` : `${s} s`;
  }

  function row(run) {
    const where = run.host === null ? "" : ` on ${run.host}`;
    const steps = run.steps === null ? "" : run.steps.toLocaleString("en-US");
    const total = run.total_steps === null || run.stage === "" ? "" : ` of ${run.total_steps.toLocaleString("en-US")}`;
    const best = run.best === null ? "" : `${run.metric} ${Number(run.best.toPrecision(5))} (step ${run.best_step.toLocaleString("en-US")})`;
    const problems = run.problems.length ? el("small", { className: "soft", title: run.problems.join("\n") }, " incomplete") : null;
    return el("tr", {},
      el("td", {}, el("a", { href: `${home}/run/${run.link}` }, run.name), problems),
      el("td", {}, el("span", { className: `chip ${TONES[run.state] ?? ""}` }, run.stage || run.state), where),
      el("td", { className: "number" }, steps + total),
      el("td", {}, duration(run.seconds)),
      el("td", {}, best),
      el("td", {}, run.commit === null ? "" : run.commit.slice(0, 8) + (run.changed ? "+" : "")),
      el("td", { className: "short soft" }, run.started_at === null ? "" : `${run.started_at.slice(0, 10)} ${run.started_at.slice(11, 19)}`));
  }

  function show(runs) {
    const names = ["run", "state", "steps", "time", "best", "commit", "started (UTC)"];
    const head = names.map((name) => {
      const heading = el("th", { className: name === "steps" ? "number" : "" }, name);
      heading.scope = "col";
      return heading;
    });
    const focused = document.activeElement?.getAttribute("href");
    const scroll = el("div", { className: "scroll", tabIndex: 0 }, el("table", {}, el("thead", {}, el("tr", {}, head)), el("tbody", {}, runs.map(row))));
    scroll.setAttribute("role", "region");
    scroll.setAttribute("aria-label", "Runs");
    body.replaceChildren(runs.length ? scroll : el("p", { className: "soft" }, "There are no runs in this folder."));
    if (focused) [...body.querySelectorAll("a")].find((a) => a.getAttribute("href") === focused)?.focus({ preventScroll: true });
  }

  async function poll() {
    if (!document.hidden) {
      try {
        const answer = await fetch(`${home}/runs`, { headers: tag ? { "If-None-Match": tag } : {}, cache: "no-store" });
        if (answer.status === 200) {
          tag = answer.headers.get("ETag");
          const found = await answer.json();
          show(found.runs);
          state.textContent = found.folder;
        } else if (answer.status !== 304) state.textContent = "the list can't be updated now";
      } catch (error) {
        state.textContent = "the viewer has ended";
        tag = null;
      }
    }
    setTimeout(poll, EVERY_MS);
  }

  poll();
})();
