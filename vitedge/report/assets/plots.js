// Draws the figures that stand in the page as JSON, in the colours of the reader's scheme, and in black on white for paper.
"use strict";
(function () {
  const holder = document.getElementById("figures");
  if (!holder) return;
  const figures = JSON.parse(holder.textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const LIGHT = { fg: "#1b1f24", line: "#d0d7de", bg: "#ffffff" };
  const DARK = { fg: "#e6edf3", line: "#39424d", bg: "#1d232a" };
  // Nothing of Plotly may leave the page: no cloud, no logo's link, no MathJax.
  const CONFIG = {
    responsive: true, displaylogo: false, showSendToCloud: false, plotlyServerURL: "", typesetMath: false,
    scrollZoom: false, modeBarButtonsToRemove: ["select2d", "lasso2d"],
  };

  function axis(own, colours) {
    return Object.assign({ automargin: true, gridcolor: colours.line, zerolinecolor: colours.line, linecolor: colours.line }, own);
  }

  // On a phone the legend has a line for each name, which would leave the plot none.
  function height(figure, place) {
    const legend = figure.layout.showlegend !== false && place.clientWidth < 600;
    return figure.height + (legend ? 20 * figure.traces.length : 0);
  }

  function layout(figure, colours, place) {
    const own = figure.layout;
    return Object.assign({}, own, {
      height: height(figure, place),
      margin: { l: 52, r: 12, t: 12, b: 48 },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: colours.fg, size: 13, family: "system-ui, sans-serif" },
      hoverlabel: { bgcolor: colours.bg, bordercolor: colours.line, font: { color: colours.fg, size: 13 }, align: "left" },
      legend: { orientation: "h", y: -0.2, yanchor: "top", x: 0 },
      xaxis: axis(own.xaxis, colours),
      yaxis: axis(own.yaxis, colours),
    });
  }

  function traces(figure, colours) {
    return figure.traces.map(function (trace) {
      if (trace.mode !== "markers") return trace;
      const line = Object.assign({}, trace.marker.line, { color: colours.fg });
      return Object.assign({}, trace, { marker: Object.assign({}, trace.marker, { line: line }) });
    });
  }

  function draw(colours) {
    return Promise.all(figures.map(function (figure) {
      const place = document.getElementById(figure.name);
      place.style.height = height(figure, place) + "px";
      return window.Plotly.react(place, traces(figure, colours), layout(figure, colours, place), CONFIG);
    }));
  }

  function scheme() { return dark.matches ? DARK : LIGHT; }

  // The library is packed text until the tables are there to be read: compiling its megabytes first would hold them up.
  function unpacked() {
    const packed = atob(document.getElementById("plotly").textContent);
    const bytes = Uint8Array.from(packed, function (letter) { return letter.charCodeAt(0); });
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  }

  function say(text) {
    figures.forEach(function (figure) { document.getElementById(figure.name).textContent = text; });
  }

  function start() {
    if (!window.DecompressionStream) {
      say("This browser is too old to draw the plots (it has no DecompressionStream); the tables are complete.");
      return;
    }
    unpacked().then(function (text) {
      const library = document.createElement("script");
      library.textContent = text;
      document.head.append(library);
      draw(scheme()).then(function () { document.documentElement.setAttribute("data-drawn", String(figures.length)); });
      dark.addEventListener("change", function () { draw(scheme()); });
      window.addEventListener("beforeprint", function () { draw(LIGHT); });
      window.addEventListener("afterprint", function () { draw(scheme()); });
    });
  }

  window.addEventListener("load", function () { setTimeout(start, 0); });
})();
