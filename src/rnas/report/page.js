"use strict";
(() => {
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const remembered = () => { try { return localStorage.getItem("rnas-theme"); } catch { return null; } };
  const remember = (theme) => { try { localStorage.setItem("rnas-theme", theme); } catch { /* a page without storage */ } };
  const show = (theme) => {
    if (theme === "auto") delete root.dataset.theme; else root.dataset.theme = theme;
    button.textContent = "Theme: " + theme;
  };
  const themes = ["auto", "light", "dark"];
  let theme = themes.includes(remembered()) ? remembered() : "auto";
  show(theme);
  button.hidden = false;
  button.addEventListener("click", () => {
    theme = themes[(themes.indexOf(theme) + 1) % 3];
    show(theme);
    remember(theme);
  });

  // Tables: a heading's button sorts by its column; numbers come from data-value, largest first.
  for (const table of document.querySelectorAll("table[data-sortable]")) {
    const heads = [...table.tHead.rows[0].cells];
    const body = table.tBodies[0];
    const key = (row, column) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
    const compare = (a, b) => {
      const [x, y] = [Number(a), Number(b)];
      if (Number.isNaN(x) !== Number.isNaN(y)) return Number.isNaN(x) ? 1 : -1;
      return Number.isNaN(x) ? a.localeCompare(b) : x - y;
    };
    heads.forEach((head, column) => {
      const sort = document.createElement("button");
      sort.type = "button";
      sort.append(...head.childNodes);
      head.append(sort);
      sort.addEventListener("click", () => {
        const text = head.classList.contains("text") || column === 0;
        const down = head.getAttribute("aria-sort") ? head.getAttribute("aria-sort") === "ascending" : !text;
        for (const other of heads) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const empty = (row) => key(row, column) === "";
        const rows = [...body.rows].sort((a, b) =>
          empty(a) - empty(b) || (down ? -1 : 1) * compare(key(a, column), key(b, column)));
        body.append(...rows);
      });
    });
  }

  // Charts: pointing, or the arrow keys, reads the values of an epoch.
  const SVG = "http://www.w3.org/2000/svg";
  for (const svg of document.querySelectorAll("svg[data-chart]")) {
    const chart = JSON.parse(svg.dataset.chart);
    const readout = document.createElement("p");
    readout.className = "readout";
    readout.setAttribute("aria-live", "polite");
    svg.after(readout);
    const cross = document.createElementNS(SVG, "line");
    cross.setAttribute("class", "cross");
    cross.setAttribute("y1", chart.top);
    cross.setAttribute("y2", chart.bottom);
    let at = -1;
    const place = (i) => chart.left + (chart.x.length > 1 ? (chart.x[i] - chart.x[0]) / (chart.x.at(-1) - chart.x[0]) : 0) * (chart.right - chart.left);
    const read = (i) => {
      at = Math.max(0, Math.min(chart.x.length - 1, i));
      cross.setAttribute("x1", place(at));
      cross.setAttribute("x2", place(at));
      svg.append(cross);
      readout.replaceChildren(`epoch ${chart.x[at]}`);
      for (const series of chart.series) {
        if (series.text[at] === null) continue;
        const item = document.createElement("span");
        const value = document.createElement("i");
        value.style.color = `var(--${series.role})`;
        value.textContent = series.text[at];
        item.append(`${series.name} `, value);
        readout.append(item);
      }
    };
    const clear = () => { cross.remove(); readout.replaceChildren(); };
    svg.setAttribute("tabindex", "0");
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const x = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
      let best = 0;
      chart.x.forEach((_, i) => { if (Math.abs(place(i) - x) < Math.abs(place(best) - x)) best = i; });
      read(best);
    });
    svg.addEventListener("pointerleave", clear);
    svg.addEventListener("blur", clear);
    svg.addEventListener("keydown", (event) => {
      if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
      read(at < 0 ? 0 : at + (event.key === "ArrowRight" ? 1 : -1));
      event.preventDefault();
    });
  }
})();
