// Sorts and filters the tables of the page. A head's button sorts, by click, Enter or Space; missing figures stay last.
"use strict";
(function () {
  function key(row, column, numeric) {
    const cell = row.cells[column];
    if (!numeric) return cell.textContent.trim().toLowerCase();
    const order = cell.getAttribute("data-order");
    return order === null ? null : Number(order);
  }

  function compare(a, b, ascending) {
    // What is not known is neither the best nor the worst.
    if (a === null || b === null) return (a === null) - (b === null);
    const way = typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a - b;
    return ascending ? way : -way;
  }

  function sort(table, column, head) {
    const ascending = head.getAttribute("aria-sort") !== "ascending";
    const numeric = head.classList.contains("num");
    const body = table.tBodies[0];
    const rows = Array.from(body.rows).map(function (row, place) {
      return { row: row, place: place, key: key(row, column, numeric) };
    });
    rows.sort(function (a, b) { return compare(a.key, b.key, ascending) || a.place - b.place; });
    body.append.apply(body, rows.map(function (one) { return one.row; }));
    for (const other of table.tHead.rows[0].cells) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
    say(head.textContent.trim() + ", sorted " + (ascending ? "ascending" : "descending"));
  }

  function say(text) {
    document.getElementById("said").textContent = text;
  }

  for (const table of document.querySelectorAll("table")) {
    Array.from(table.tHead.rows[0].cells).forEach(function (head, column) {
      head.querySelector("button").addEventListener("click", function () { sort(table, column, head); });
    });
  }

  const filters = document.getElementById("filters");
  if (!filters) return;
  const table = document.querySelector("#measurements table");
  const words = document.getElementById("filter-text");
  const selects = Array.from(filters.querySelectorAll("select"));

  function filter() {
    const wanted = words.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of table.tBodies[0].rows) {
      const text = row.textContent.toLowerCase();
      const found = wanted.every(function (word) { return text.includes(word); }) &&
        selects.every(function (select) { return !select.value || row.getAttribute("data-" + select.name) === select.value; });
      row.hidden = !found;
      shown += found ? 1 : 0;
    }
    document.getElementById("shown").textContent = shown + " of " + table.tBodies[0].rows.length + " rows";
  }

  words.addEventListener("input", filter);
  selects.forEach(function (select) { select.addEventListener("change", filter); });
  filters.addEventListener("submit", function (event) { event.preventDefault(); });
  filters.addEventListener("reset", function () { setTimeout(filter, 0); });
  filters.hidden = false;
  filter();
})();
