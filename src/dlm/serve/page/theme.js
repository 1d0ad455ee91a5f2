// Light and dark, and the colours of the heat map.

const KEY = "dlm-theme";
const dark = matchMedia("(prefers-color-scheme: dark)");

function kept() { try { return localStorage.getItem(KEY); } catch { return null; } }

function put(name) {
  const now = name || (dark.matches ? "dark" : "light");
  document.documentElement.dataset.theme = now;
  const button = document.getElementById("theme");
  button.textContent = now === "dark" ? "Light" : "Dark";
  button.setAttribute("aria-label", now === "dark" ? "Switch to light" : "Switch to dark");
}

export function listen() {
  put(kept());
  dark.addEventListener("change", () => put(kept()));
  document.getElementById("theme").addEventListener("click", () => {
    const next = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    try { localStorage.setItem(KEY, next); } catch { /* it lasts until the page is left */ }
    put(next);
  });
}

export function ramp(root) { // the twelve colours of the heat map
  root.replaceChildren(...Array.from({ length: 12 }, (_, i) => {
    const swatch = document.createElement("i");
    swatch.className = `h${i}`;
    return swatch;
  }));
}
