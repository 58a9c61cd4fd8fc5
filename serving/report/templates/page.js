// A chart is drawn before its grid is whole, and inside closed details before it has a width. A table that is wider than
// the page must be scrolled, and so reached with the keyboard.
const fit = (part) => {
  part.querySelectorAll(".plotly-graph-div").forEach((chart) => chart.offsetWidth && Plotly.Plots.resize(chart));
  reach(part);
};
const reach = (part) => part.querySelectorAll(".scroll").forEach((table) => {
  if (table.scrollWidth > table.clientWidth) table.tabIndex = 0; else table.removeAttribute("tabindex");
});
// Paper has a width of its own, and a chart keeps the one it was drawn with.
const draw = (printing) => {
  document.body.classList.toggle("paper", printing);
  document.querySelectorAll(".plotly-graph-div").forEach((chart) => chart.offsetWidth && Plotly.relayout(chart, { autosize: true }));
};
for (const details of document.querySelectorAll("details")) details.addEventListener("toggle", () => fit(details));
addEventListener("load", () => fit(document));
addEventListener("resize", () => reach(document));
addEventListener("beforeprint", () => draw(true));
addEventListener("afterprint", () => draw(false));
