"use strict";
// Keeps the page of a run current: asks the server of the page for newer data once a second.
(() => {
  const EVERY_MS = 1000;
  const state = document.createElement("span");
  const back = document.createElement("a");
  const bar = document.createElement("div");
  bar.className = "live";
  state.setAttribute("role", "status");
  back.textContent = "All runs";
  const [home, path] = location.pathname.split("/run/", 2);
  back.href = `${home}/`;
  bar.append(back, state);
  document.getElementById("page").before(bar);
  const address = `${home}/data/${path}`;
  let tag = null;

  function show(text, isLive) {
    if (state.textContent !== text) state.textContent = text;
    state.className = isLive ? "good" : "bad";
  }

  async function poll() {
    if (!document.hidden) {
      try {
        const answer = await fetch(address, { headers: tag ? { "If-None-Match": tag } : {}, cache: "no-store" });
        if (answer.status === 200) {
          tag = answer.headers.get("ETag");
          report.update(await answer.json());
        }
        if (answer.status === 200 || answer.status === 304) show("live", true);
        else if (answer.status === 404) show("the run folder is gone", false);
        else show("the page can't be updated now", false);
      } catch (error) {
        show("the viewer has ended", false);
      }
    }
    setTimeout(poll, EVERY_MS);
  }

  document.addEventListener("visibilitychange", () => { if (!document.hidden) show("updating", true); });
  poll();
})();
