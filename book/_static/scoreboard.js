/* Filters for the tables of verdicts that papercore.lab.scoreboard writes. It shows and hides rows; it loads nothing. */
(() => {
  "use strict";
  function start(board) {
    const form = board.querySelector(".pc-filters");
    if (!form) return; // a chapter's own table has none
    const shown = form.querySelector("output");
    const lists = [...form.querySelectorAll("select")], rows = [...board.querySelectorAll("tr[data-verdict]")];
    const apply = () => {
      let left = 0;
      for (const row of rows) {
        row.hidden = lists.some(list => list.value && row.dataset[list.dataset.key] !== list.value);
        left += row.hidden ? 0 : 1;
      }
      // A claim or chapter of which nothing is left goes too, with its heading.
      for (const group of board.querySelectorAll("tbody, table")) {
        group.hidden = !group.querySelector("tr[data-verdict]:not([hidden])");
      }
      shown.textContent = left === 0 ? "No verdict matches." : `Showing ${left} of ${rows.length} verdicts.`;
    };
    form.hidden = false;
    form.addEventListener("change", apply);
    form.addEventListener("reset", () => setTimeout(apply)); // the lists are reset after this event
    form.addEventListener("submit", event => event.preventDefault());
    apply(); // a browser may have kept the lists of the last visit
  }
  const all = () => document.querySelectorAll(".pc-verdicts:not([data-live])").forEach(board => {
    board.setAttribute("data-live", "");
    start(board);
  });
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", all);
  else all();
})();
