"use strict";
// Tables sort by a click on a heading, and long ones take a filter. Without this the page is complete all the same.
const valueOf = (row, column) => {
  const cell = row.cells[column];
  return cell.dataset.value === undefined ? cell.textContent.trim() : Number(cell.dataset.value);
};
const compare = (a, b) => {
  if (typeof a === "number" && typeof b === "number") return a - b;
  if (typeof a === typeof b) return a.localeCompare(b);
  return typeof a === "number" ? -1 : 1;
};
const sort = (table, column) => {
  const heads = [...table.tHead.rows[0].cells];
  const down = heads[column].ariaSort === "descending" ? 1 : -1;
  heads.forEach((head) => { head.ariaSort = "none"; });
  heads[column].ariaSort = down < 0 ? "descending" : "ascending";
  const body = table.tBodies[0];
  const keyed = [...body.rows].map((row) => [valueOf(row, column), row]);
  keyed.sort(([a], [b]) => (typeof a === typeof b ? down * compare(a, b) : compare(a, b)));
  body.append(...keyed.map(([, row]) => row));
};
for (const table of document.querySelectorAll("table")) {
  const rows = [...table.tBodies[0].rows];
  if (rows.length < 3) continue;
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    button.addEventListener("click", () => sort(table, column));
    head.replaceChildren(button);
    head.ariaSort = "none";
  });
  if (rows.length < 12) continue;
  const filter = document.createElement("input");
  filter.type = "search";
  filter.className = "filter";
  filter.placeholder = "show rows with ...";
  filter.ariaLabel = "show rows with these words";
  const texts = rows.map((row) => row.textContent.toLowerCase());
  filter.addEventListener("input", () => {
    const words = filter.value.toLowerCase().split(/\s+/);
    rows.forEach((row, place) => { row.hidden = !words.every((word) => texts[place].includes(word)); });
  });
  table.parentElement.before(filter);
}
