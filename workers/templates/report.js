"use strict";
(() => {
  const { texts, charts } = JSON.parse(document.getElementById("facts").textContent);
  const choices = [...document.querySelectorAll("input[name=language]")];
  const views = new Map();
  let round = 0;

  const say = (value, language) => {
    if (typeof value === "string") {
      const text = value.startsWith("@") ? texts[value.slice(1)] : undefined;
      return text === undefined ? value : text[language];
    }
    if (Array.isArray(value)) return value.map((item) => say(item, language));
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, say(item, language)]));
  };

  const unpack = ({ fields, spoken, words, cells }) => ({
    values: cells.map((row) =>
      Object.fromEntries(fields.map((field, i) => [field, spoken.includes(field) ? words[row[i]] : row[i]]))),
  });

  const font = getComputedStyle(document.body).fontFamily;
  const config = {
    font,
    background: "transparent",
    view: { stroke: null },
    axis: {
      labelColor: "var(--ink)", titleColor: "var(--ink)", gridColor: "var(--line)", domainColor: "var(--soft)",
      tickColor: "var(--soft)", labelFontSize: 12, titleFontSize: 12, titleFontWeight: "normal",
    },
    axisY: { grid: false, titleAngle: 0, titleAlign: "left", titleAnchor: "end", titleY: -8, titleX: 0 },
    legend: { labelColor: "var(--ink)", titleColor: "var(--ink)", labelFontSize: 12, titleFontSize: 12, titleFontWeight: "normal" },
    text: { fontSize: 12 },
  };
  const padding = { left: 2, top: 4, right: 12, bottom: 4 };
  const autosize = { type: "fit-x", contains: "padding" };

  const draw = async (chart, language, mine) => {
    const place = document.getElementById("chart-" + chart.name);
    const spec = say({ ...chart.spec, data: unpack(chart.spec.data), description: chart.alt }, language);
    try {
      const made = await vegaEmbed(place, { width: "container", padding, autosize, ...spec }, {
        actions: false, renderer: "svg", ast: true, mode: "vega-lite", config, tooltip: { disableDefaultStyle: true },
      });
      views.get(chart.name)?.finalize();
      views.set(chart.name, made);
      place.dataset.drawn = language;
    } catch (error) {
      if (mine !== round) return;
      place.textContent = say("@chart_failed", language);
      console.error(chart.name, error);
    }
  };

  const speak = async (language) => {
    const mine = (round += 1);
    document.documentElement.lang = language;
    document.title = document.querySelector("h1 ." + language).textContent;
    for (const chart of charts) if (mine === round) await draw(chart, language, mine);
    if (mine === round) document.documentElement.dataset.ready = language;
  };

  const asked = new URLSearchParams(location.search).get("lang");
  for (const choice of choices) {
    if (choice.value === asked) choice.checked = true;
    choice.addEventListener("change", () => {
      const address = new URL(location.href);
      address.searchParams.set("lang", choice.value);
      history.replaceState(null, "", address);
      speak(choice.value);
    });
  }
  speak(choices.find((choice) => choice.checked).value);
})();
