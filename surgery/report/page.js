"use strict";
(() => {
  const figures = [...document.querySelectorAll("figure[data-chart]")];
  const options = {
    actions: false, // a menu that opens other sites
    ast: true, // expressions are interpreted: the page's policy forbids to compile them
    defaultStyle: false,
    renderer: "svg",
    tooltip: { disableDefaultStyle: true, theme: "custom" },
    loader: { load: () => Promise.reject(new Error("this page loads nothing")) },
  };
  const draw = async (figure) => {
    const spec = JSON.parse(document.getElementById(figure.dataset.chart).textContent);
    const result = await vegaEmbed(figure.querySelector(".chart"), spec, options);
    return [figure.dataset.chart, result.view];
  };
  Promise.all(figures.map(draw)).then((drawn) => {
    window.charts = Object.fromEntries(drawn);
    document.documentElement.dataset.drawn = Math.round(performance.now());
  });
})();
