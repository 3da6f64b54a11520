/*
 * Light or dark. Loaded before the page is drawn, which modules are not, so that a chosen theme does not flash.
 * Without a choice the browser's own preference counts. The choice is all that is ever stored here.
 */
(() => {
  const root = document.documentElement;
  const prefersDark = matchMedia("(prefers-color-scheme: dark)");

  const show = (theme) => {
    if (theme === "light" || theme === "dark") root.dataset.theme = theme;
  };

  try {
    show(localStorage.getItem("theme"));
  } catch {
    // A browser that stores nothing follows its own preference.
  }

  addEventListener("DOMContentLoaded", () => {
    document.getElementById("theme").addEventListener("click", () => {
      const isDark = (root.dataset.theme ?? (prefersDark.matches ? "dark" : "light")) === "dark";
      show(isDark ? "light" : "dark");
      try {
        localStorage.setItem("theme", root.dataset.theme);
      } catch {
        // It holds for this visit.
      }
    });
  });
})();
