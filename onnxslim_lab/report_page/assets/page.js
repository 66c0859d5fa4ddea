"use strict";
(() => {
  const root = document.documentElement;

  /* Sort: the buttons in the headers; cells with data-value as numbers, empty ones last either way. */
  const key = (row, column) => {
    const cell = row.cells[column];
    if (cell.dataset.value !== undefined) return Number(cell.dataset.value);
    const text = cell.textContent.trim();
    return text === "" || cell.classList.contains("number") ? null : text;
  };
  const order = new Intl.Collator(undefined, { numeric: true });
  const compare = (a, b) => {
    const lost = (value) => value === null || Number.isNaN(value);
    if (lost(a) || lost(b)) return null;
    if (typeof a === "number" && typeof b === "number") return a < b ? -1 : a > b ? 1 : 0;
    return order.compare(String(a), String(b));
  };
  for (const table of document.querySelectorAll("table.sortable")) {
    const headers = [...table.tHead.rows[0].cells];
    headers.forEach((header, column) => {
      header.querySelector("button").addEventListener("click", () => {
        const down = header.getAttribute("aria-sort") === "ascending";
        for (const other of headers) other.setAttribute("aria-sort", "none");
        header.setAttribute("aria-sort", down ? "descending" : "ascending");
        const rows = [...table.tBodies[0].rows].map((row) => [key(row, column), row]);
        rows.sort(([a], [b]) => {
          const found = compare(a, b);
          if (found !== null) return down ? -found : found;
          const lost = (value) => Number(value === null || Number.isNaN(value));
          return lost(a) - lost(b);
        });
        table.tBodies[0].append(...rows.map(([, row]) => row));
      });
    });
  }

  /* Filter: rows that have every word. */
  for (const input of document.querySelectorAll("input[data-filters]")) {
    const rows = [...document.getElementById(input.dataset.filters).tBodies[0].rows];
    const texts = new Map(rows.map((row) => [row, row.textContent.toLowerCase()]));
    const count = document.getElementById(input.dataset.filters + "-count");
    const filter = () => {
      const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const [row, text] of texts) {
        row.hidden = !words.every((word) => text.includes(word));
        shown += Number(!row.hidden);
      }
      count.textContent = shown + " of " + rows.length;
    };
    input.addEventListener("input", filter);
    filter();
  }

  /* Charts: plotly.js is in this page, compressed; colours follow the light or dark style. */
  const held = document.getElementById("figures");
  if (!held) {
    root.dataset.charts = "none";
    return;
  }
  const roles = ["text", "line", "accent", "good", "bad", "unsure", "faint", "card"];
  const colours = () => {
    const style = getComputedStyle(root);
    return Object.fromEntries(roles.map((role) => [role, style.getPropertyValue("--" + role).trim()]));
  };
  const painted = (value, colour) => {
    if (Array.isArray(value)) return value.map((item) => painted(item, colour));
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(
      Object.entries(value).map(([name, item]) => [
        name,
        name === "color" && item in colour ? colour[item] : painted(item, colour),
      ]),
    );
  };
  const draw = (figures) => {
    const colour = colours();
    const axis = { gridcolor: colour.line, linecolor: colour.line, tickcolor: colour.line, fixedrange: true };
    return Promise.all(
      figures.map(({ id, data, layout }) => {
        const filled = {
          ...layout,
          font: { color: colour.text, family: "system-ui, sans-serif", size: 12 },
          paper_bgcolor: "rgba(0,0,0,0)",
          plot_bgcolor: "rgba(0,0,0,0)",
          hoverlabel: { bgcolor: colour.card, bordercolor: colour.line, font: { color: colour.text } },
          xaxis: { ...axis, ...layout.xaxis },
          yaxis: { ...axis, ...layout.yaxis },
        };
        const options = { responsive: true, displayModeBar: false, showTips: false };
        return Plotly.react(document.getElementById(id), painted(data, colour), filled, options);
      }),
    );
  };
  const inflate = async (text) => {
    const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).text();
  };
  const start = async () => {
    const figures = JSON.parse(held.textContent);
    const script = document.createElement("script");
    script.textContent = await inflate(document.getElementById("plotly").textContent);
    document.head.append(script);
    await draw(figures);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw(figures));
    root.dataset.charts = "drawn";
  };
  start().catch((error) => {
    root.dataset.charts = "failed";
    for (const place of document.querySelectorAll(".chart")) {
      place.textContent = "This browser cannot draw the chart (" + error.message + "); the table has the figures.";
      place.removeAttribute("role");
    }
  });
})();
