// What screen readers and the keyboard need in addition to the pages of Sphinx and its gallery.
addEventListener("DOMContentLoaded", () => {
  for (const box of document.querySelectorAll("article pre, article .table-wrapper")) {
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0; // scrolls
  }
  for (const list of document.querySelectorAll(".sig dl, .sig dl dd")) {
    list.setAttribute("role", "presentation"); // lines of a signature
  }
  for (const link of document.querySelectorAll(".sphx-glr-thumbcontainer a.internal")) {
    link.setAttribute("aria-label", link.textContent); // its text is hidden
  }
});
