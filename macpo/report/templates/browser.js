"use strict";
// Shows the responses that the page holds as JSON. It makes text nodes and elements, never markup out of text,
// asks no network, and works from a file.
(() => {
  const PAGE = 50;
  const box = document.getElementById("browser");
  const { collections } = JSON.parse(document.getElementById("response-data").textContent);
  const control = Object.fromEntries([...box.querySelectorAll("[data-control]")].map((e) => [e.dataset.control, e]));
  const KINDS = { response: "response", kept: "kept", lost: "not kept", chosen: "chosen", rejected: "rejected" };
  const MARKS = { kept: "good", chosen: "good", rejected: "bad" };
  let set = collections[0];
  let hits = [];
  let current = null; // index of the shown prompt
  let page = 0;
  let filter = {};

  const make = (name, properties = {}, ...children) => {
    const element = Object.assign(document.createElement(name), properties);
    element.append(...children);
    return element;
  };
  const count = (number) => number.toLocaleString("en");

  // --- which rows and prompts are shown ---

  const sourceOf = (row) => set.sources[row[0]];
  const judged = () => (filter.score >= 0 && filter.score !== set.perplexity ? filter.score : set.judged);

  // Groups of a prompt in which a candidate that was not kept has a higher score than the kept one -> kept score.
  const lostBetter = (prompt) => {
    const by = judged();
    const kept = new Map();
    const found = new Map();
    if (by < 0) return found;
    for (const row of prompt[2]) {
      if (sourceOf(row).kind === "kept" && row[3][by] !== null) kept.set(sourceOf(row).group, row[3][by]);
    }
    for (const row of prompt[2]) {
      const score = kept.get(sourceOf(row).group);
      if (sourceOf(row).kind === "lost" && row[3][by] !== null && row[3][by] > score) {
        found.set(sourceOf(row).group, score);
      }
    }
    return found;
  };

  const passes = (row) => {
    const source = sourceOf(row);
    if (filter.agent && source.agent !== filter.agent) return false;
    if (filter.iteration && String(source.iteration) !== filter.iteration) return false;
    if (filter.arm && source.arm !== (filter.arm === "main" ? "" : filter.arm.slice(4))) return false;
    if (filter.kind && source.kind !== filter.kind) return false;
    if (filter.least === null && filter.most === null) return true;
    const score = row[3][filter.score];
    if (score === null || score === undefined) return false;
    return (filter.least === null || score >= filter.least) && (filter.most === null || score <= filter.most);
  };

  const rowsOf = (prompt) => {
    const better = filter.worse ? lostBetter(prompt) : null;
    return prompt[2].filter((row) => passes(row) && (!better || better.has(sourceOf(row).group)));
  };

  const found = (text) => filter.pattern.test(text);
  const isHit = (prompt) => {
    const rows = rowsOf(prompt);
    if (!rows.length) return false;
    if (!filter.pattern) return true;
    return prompt[1].some((turn) => found(turn[1])) || rows.some((row) => found(row[1])) || found(prompt[0]);
  };

  const number = (element) => (element.value.trim() === "" ? null : Number(element.value));

  const readFilter = () => {
    const query = control.query.value.trim();
    filter = {
      pattern: query ? new RegExp(query.replace(/[\\^$.*+?()[\]{}|]/g, "\\$&"), "iu") : null,
      agent: control.agent.value,
      iteration: control.iteration.value,
      arm: control.arm.value,
      kind: control.kind.value,
      score: control.score.value === "" ? -1 : Number(control.score.value),
      least: number(control.least),
      most: number(control.most),
      worse: control.worse.checked,
    };
    hits = set.prompts.flatMap((prompt, index) => (isHit(prompt) ? [index] : []));
  };

  // --- the page ---

  const marked = (text) => {
    if (!filter.pattern) return [text];
    const parts = [];
    let end = 0;
    for (const match of text.matchAll(new RegExp(filter.pattern.source, "giu"))) {
      parts.push(text.slice(end, match.index), make("mark", { textContent: match[0] }));
      end = match.index + match[0].length;
    }
    return [...parts, text.slice(end)];
  };

  const shownScore = (score, column) => {
    if (score === null || score === undefined) return "–";
    return score.toFixed(column === set.perplexity ? 2 : 3);
  };

  const address = (prompt) => `#prompt/${set.name}/${encodeURIComponent(prompt[0])}`;
  const title = (prompt) => (prompt[1].length ? prompt[1][prompt[1].length - 1][1] : prompt[0]);

  const drawList = () => {
    const pages = Math.max(1, Math.ceil(hits.length / PAGE));
    page = Math.min(page, pages - 1);
    const items = hits.slice(page * PAGE, (page + 1) * PAGE).map((index) => {
      const prompt = set.prompts[index];
      const link = make("a", { href: address(prompt), textContent: title(prompt).slice(0, 120) });
      link.dir = "auto";
      if (index === current) link.setAttribute("aria-current", "true");
      const worse = set.judged >= 0 && lostBetter(prompt).size > 0;
      return make("li", {}, link, ...(worse ? [make("span", { className: "tag warn", textContent: "lost a better one" })] : []));
    });
    control.list.start = page * PAGE + 1;
    control.list.replaceChildren(...items);
    control.page.textContent = `page ${page + 1} of ${pages}`;
    control.back.disabled = page === 0;
    control.forth.disabled = page === pages - 1;
    control.pages.hidden = pages === 1;
  };

  const responseRow = (row, better) => {
    const source = sourceOf(row);
    const by = judged();
    const who = make("th", { scope: "row", className: "text" }, source.agent || "unknown");
    if (source.moment && set.name === "test") who.append(make("span", { className: "small under", textContent: source.moment }));
    if (source.kind !== "response") {
      who.append(" ", make("span", { className: `tag ${MARKS[source.kind] || ""}`, textContent: KINDS[source.kind] }));
    }
    const kept = better.get(source.group);
    if (kept !== undefined && source.kind === "kept") {
      who.append(" ", make("span", { className: "tag warn", textContent: "scores worse" }));
    } else if (kept !== undefined && source.kind === "lost" && row[3][by] > kept) {
      who.append(" ", make("span", { className: "tag warn", textContent: "scores higher" }));
    }
    const say = row[1].trim()
      ? make("div", { className: row[2] ? "say" : "say open", dir: "auto" }, ...marked(row[1]))
      : make("div", { className: "none", textContent: "empty" });
    const line = make("tr", { className: source.kind === "kept" ? "kept" : source.role === "student" ? "student" : "" }, who);
    set.scores.forEach((name, column) => {
      const cell = make("td", { textContent: shownScore(row[3][column], column) });
      cell.dataset.name = name;
      line.append(cell);
    });
    line.append(make("td", { className: "text" }, say));
    return line;
  };

  const drawPrompt = () => {
    const place = hits.indexOf(current);
    control.previous.disabled = place <= 0;
    control.next.disabled = place < 0 || place === hits.length - 1;
    if (current === null) {
      control.count.textContent = "No prompt matches.";
      control.prompt.replaceChildren();
      return;
    }
    const prompt = set.prompts[current];
    control.count.textContent = `Prompt ${count(place + 1)} of ${count(hits.length)}`;
    const turns = prompt[1].map(([role, text]) =>
      make("p", { className: "turn", dir: "auto" }, make("b", { textContent: role }), ...marked(text)),
    );
    if (!turns.length) turns.push(make("p", { className: "turn none", textContent: "prompt not recorded" }));
    const link = make("a", { href: address(prompt), textContent: `link to prompt ${prompt[0]}` });
    const groups = new Map();
    const better = lostBetter(prompt);
    for (const row of rowsOf(prompt)) {
      const group = sourceOf(row).group;
      if (!groups.has(group)) groups.set(group, []);
      groups.get(group).push(responseRow(row, better));
    }
    const tables = [...groups].map(([group, rows]) => {
      const heads = ["who", ...set.scores, "response"].map((name, column, all) =>
        make("th", { scope: "col", className: column === 0 || column === all.length - 1 ? "text" : "", textContent: name }),
      );
      return make(
        "table",
        { className: "responses" },
        make("caption", { textContent: group }),
        make("thead", {}, make("tr", {}, ...heads)),
        make("tbody", {}, ...rows),
      );
    });
    const hidden = prompt[2].length - rowsOf(prompt).length;
    const note = hidden ? [make("p", { className: "small", textContent: `${count(hidden)} more responses are hidden by the filters.` })] : [];
    control.prompt.replaceChildren(make("div", { className: "prompt" }, ...turns), ...tables, ...note, make("p", { className: "small" }, link));
  };

  const draw = () => {
    if (!hits.includes(current)) current = hits.length ? hits[0] : null;
    if (current !== null) page = Math.floor(hits.indexOf(current) / PAGE);
    drawList();
    drawPrompt();
    const all = set.prompts.length;
    control.hits.textContent = hits.length === all ? `${count(all)} prompts` : `${count(hits.length)} of ${count(all)} prompts match`;
  };

  let waiting = 0; // for the end of the typing
  const update = () => {
    clearTimeout(waiting);
    readFilter();
    draw();
  };

  const show = (index) => {
    current = index;
    draw();
    try {
      history.replaceState(null, "", address(set.prompts[index]));
    } catch {
      // a page that may not change its address works without it
    }
  };

  const step = (by) => {
    const next = hits[hits.indexOf(current) + by];
    if (next !== undefined) show(next);
  };

  // --- controls ---

  const fill = (select, label, entries) => {
    select.replaceChildren(make("option", { value: "", textContent: label }), ...entries.map(([value, textContent]) => make("option", { value, textContent })));
    select.closest("label").hidden = entries.length < 2;
  };

  const distinct = (values) => [...new Set(values)];

  const choose = (name) => {
    set = collections.find((each) => each.name === name) || collections[0];
    control.set.value = set.name;
    const moments = new Map(set.sources.filter((s) => s.iteration !== null).map((s) => [s.iteration, s.moment]));
    const arms = distinct(set.sources.map((s) => s.arm));
    fill(control.agent, "everyone", distinct(set.sources.map((s) => s.agent)).map((name) => [name, name]));
    fill(control.iteration, "all", [...moments].sort((a, b) => a[0] - b[0]).map(([at, name]) => [String(at), name]));
    fill(control.arm, "all", arms.map((arm) => (arm ? [`arm:${arm}`, arm] : ["main", "main run"])));
    const choice = set.sources.some((s) => s.kind === "kept");
    control.kind.closest("label").firstElementChild.textContent = choice ? "kept or lost" : "kind";
    fill(control.kind, "all", distinct(set.sources.map((s) => s.kind)).map((kind) => [kind, KINDS[kind]]));
    fill(control.score, "none", set.scores.map((name, column) => [String(column), name]));
    control.score.closest("label").hidden = !set.scores.length;
    control.score.value = set.scores.length ? String(Math.max(set.judged, 0)) : "";
    for (const each of [control.least, control.most]) each.closest("label").hidden = !set.scores.length;
    control.worse.closest("label").hidden = set.judged < 0;
    control.worse.checked = false;
    current = null;
    page = 0;
  };

  const clear = () => {
    for (const name of ["query", "agent", "iteration", "arm", "kind", "least", "most"]) control[name].value = "";
    control.worse.checked = false;
    update();
  };

  const follow = () => {
    const parts = location.hash.split("/");
    if (parts[0] !== "#prompt" || parts.length !== 3) return false;
    let id = parts[2];
    try {
      id = decodeURIComponent(id);
    } catch {
      return false;
    }
    const target = collections.find((each) => each.name === parts[1]);
    const index = target ? target.prompts.findIndex((prompt) => prompt[0] === id) : -1;
    if (index < 0) return false;
    if (target !== set) choose(target.name);
    readFilter();
    if (!hits.includes(index)) clear();
    current = index;
    draw();
    return true;
  };

  control.query.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(update, 120);
  });
  for (const name of ["agent", "iteration", "arm", "kind", "score", "least", "most", "worse"]) {
    control[name].addEventListener("input", update);
  }
  control.set.addEventListener("input", () => {
    choose(control.set.value);
    update();
  });
  control.clear.addEventListener("click", clear);
  control.next.addEventListener("click", () => step(1));
  control.previous.addEventListener("click", () => step(-1));
  control.back.addEventListener("click", () => {
    page -= 1;
    drawList();
  });
  control.forth.addEventListener("click", () => {
    page += 1;
    drawList();
  });
  box.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
    if (event.key === "n" || event.key === "j") step(1);
    else if (event.key === "p" || event.key === "k") step(-1);
    else if (event.key === "/") control.query.focus();
    else return;
    event.preventDefault();
  });
  window.addEventListener("hashchange", () => {
    if (follow()) control.prompt.focus({ preventScroll: false });
  });

  control.set.replaceChildren(...collections.map(({ name, title }) => make("option", { value: name, textContent: title })));
  control.set.closest("label").hidden = collections.length < 2;
  document.documentElement.classList.add("js");
  box.hidden = false;
  choose(collections[0].name);
  update();
  if (follow()) box.scrollIntoView();
})();
