"use strict";
(() => {
  const all = (selector, within = document) => Array.from(within.querySelectorAll(selector));
  const status = document.getElementById("status");

  // Tables: the first press sorts the best to the top, the next one turns the order; what has no figure stays last.
  const sort = (button) => {
    const head = button.closest("th");
    const table = button.closest("table");
    const column = Number(button.dataset.column);
    const turned = { ascending: "descending", descending: "ascending" }[head.getAttribute("aria-sort")];
    const direction = turned || button.dataset.first;
    const sign = direction === "ascending" ? 1 : -1;
    const key = (row) => {
      const cell = row.cells[column];
      if (column === 0) return cell.textContent;
      return "value" in cell.dataset ? Number(cell.dataset.value) : null;
    };
    const body = table.tBodies[0];
    const rows = Array.from(body.rows).map((row) => [key(row), row]);
    rows.sort(([a], [b]) => {
      if (a === null || b === null) return (a === null) - (b === null);
      return sign * (typeof a === "string" ? a.localeCompare(b) : a - b);
    });
    body.append(...rows.map(([, row]) => row));
    for (const other of all("th[aria-sort]", table)) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", direction);
    status.textContent = `Sorted by ${button.textContent}, ${direction}`;
  };
  for (const button of all("table.sortable th button")) button.addEventListener("click", () => sort(button));

  // One choice of rows for the whole page, whichever task it was made at.
  const show = (value) => {
    document.documentElement.dataset.show = value;
    for (const input of all(".toggle input")) input.checked = input.value === value;
  };
  for (const input of all(".toggle input")) input.addEventListener("change", () => show(input.value));
  const checked = document.querySelector(".toggle input:checked");
  if (checked) show(checked.value);

  // Legends: methods that are picked stand out in all panels of their figure.
  for (const button of all(".legend button")) {
    button.addEventListener("click", () => {
      const figure = button.closest("figure");
      button.setAttribute("aria-pressed", String(button.getAttribute("aria-pressed") !== "true"));
      const pressed = all(".legend button[aria-pressed=true]", figure).map((one) => one.dataset.series);
      figure.classList.toggle("picking", pressed.length > 0);
      for (const series of all(".panels .series", figure)) {
        series.classList.toggle("picked", pressed.includes(series.dataset.series));
      }
    });
  }

  // Raw JSON: kept once in the page, shown where it is asked for.
  const data = JSON.parse(document.getElementById("data").textContent);
  const pick = (record, parts) => {
    const found = { task: record.task, seed: record.seed, method: record.method };
    for (const row of ["raw", "scaled"]) {
      if (record[row]) found[row] = Object.fromEntries(parts.filter((one) => one in record[row]).map((one) => [one, record[row][one]]));
    }
    if (parts.includes("cost")) found.cost = record.cost;
    return found;
  };
  const raw = (details) => {
    const parts = details.dataset.parts.split(" ");
    if (parts[0].startsWith("rankings/")) return data.rankings[Number(parts[0].split("/")[1])];
    return data.records.filter((one) => one.task === details.dataset.task && one.raw).map((one) => pick(one, parts));
  };
  // Lists of numbers on one line.
  const shown = (value) =>
    JSON.stringify(value, null, 2).replace(/\[\s+([-+.\deE,\snul]*?)\s+\]/g, (_, list) => `[${list.replace(/\s+/g, " ")}]`);
  for (const details of all("details.raw")) {
    details.addEventListener("toggle", () => {
      const place = details.querySelector("pre");
      if (details.open && !place.textContent) place.textContent = shown(raw(details));
    });
  }
})();
