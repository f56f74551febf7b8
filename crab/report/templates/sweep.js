"use strict";
// Sorts the table by any column, and marks a trial in every figure at once. The page says all it has to say without it.

for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];

  const compare = (one, other) => {
    const [left, right] = [Number(one), Number(other)];
    return Number.isNaN(left) || Number.isNaN(right) ? one.localeCompare(other) : left - right;
  };

  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const value = row => row.cells[column].dataset.sort;
      const rows = [...body.rows].sort((one, other) => {
        // What is not known comes last in either direction.
        if (value(one) === "" || value(other) === "") return (value(one) === "") - (value(other) === "");
        return (down ? -1 : 1) * compare(value(one), value(other));
      });
      body.append(...rows);
    });
  });
}

const root = document.documentElement;
root.classList.add("scripted");
document.querySelectorAll(".scripted[hidden]").forEach(hint => { hint.hidden = false; });

const elements = new Map();
for (const element of document.querySelectorAll("[data-trial]")) {
  const key = element.dataset.trial;
  elements.set(key, [...(elements.get(key) ?? []), element]);
}

let pinned = null;
let shown = null;

const show = key => {
  if (key === shown) return;
  for (const element of elements.get(shown) ?? []) element.classList.remove("on");
  for (const element of elements.get(key) ?? []) element.classList.add("on");
  root.classList.toggle("marking", key !== null);
  shown = key;
};

const trialAt = event => event.target.closest?.("[data-trial]")?.dataset.trial ?? null;

document.addEventListener("pointerover", event => show(pinned ?? trialAt(event)));
document.addEventListener("click", event => {
  const key = trialAt(event);
  pinned = key === pinned ? null : key;
  show(pinned ?? key);
});
document.addEventListener("keydown", event => {
  if (event.key !== "Escape") return;
  pinned = null;
  show(null);
});
