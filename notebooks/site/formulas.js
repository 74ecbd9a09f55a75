// MathJax sets the formulas that the Markdown extension arithmatex has marked, and nothing else.
window.MathJax = {
  messageStyle: "none",
  showMathMenu: false,
  "HTML-CSS": { availableFonts: [], webFont: "STIX-Web", imageFont: null },
  tex2jax: { inlineMath: [["\\(", "\\)"]], displayMath: [["\\[", "\\]"]], processClass: "arithmatex", ignoreClass: ".*" },
};
const formulas = document.createElement("script");
formulas.src = new URL("../mathjax/MathJax.js?config=TeX-AMS-MML_HTMLorMML-full", document.currentScript.src);
document.head.append(formulas);
