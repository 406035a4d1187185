// What the theme adds to a page while it runs, named and within reach of the keyboard.
const named = () => {
  document.querySelectorAll(".md-code__nav").forEach((nav, i) => nav.setAttribute("aria-label", `Code ${i + 1}`));
  document.querySelectorAll(".md-content nav.md-nav, .md-sidebar nav nav").forEach((nav, i) => {
    const label = nav.getAttribute("aria-label");
    if (label && !nav.dataset.named) nav.setAttribute("aria-label", `${(nav.dataset.named = label)}, ${i + 1}`);
  });
  document.querySelectorAll(".md-typeset__scrollwrap, pre > code").forEach((part) => part.setAttribute("tabindex", "0"));
};
new MutationObserver(named).observe(document.body, { childList: true, subtree: true });
named();
