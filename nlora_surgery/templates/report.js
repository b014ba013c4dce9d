"use strict";
// Moves everything that depends on the rank when another one is chosen. Without this the page shows the first one.
(() => {
  const { spectra } = JSON.parse(document.getElementById("data").textContent);
  const slider = document.getElementById("rank");
  const number = document.getElementById("rank-number");
  if (!spectra || !slider) return;

  const at = (curve, rank) => (curve.length ? curve[Math.min(rank, curve.length) - 1] : null);
  const percent = (share) => (share === null ? "-" : `${(100 * share).toFixed(1)}%`);
  const amount = (value, unit) => {
    const prefixes = ["", "k", "M", "G", "T"];
    while (value >= 999.5 && prefixes.length > 1) {
      value /= 1000;
      prefixes.shift();
    }
    return `${Number(value.toPrecision(3))} ${prefixes[0]}${unit}`.trim();
  };
  const costs = (sizes, rank) => {
    const sum = { lora: 0, slora: 0, inttune: 0 };
    for (const [outFeatures, inFeatures, count] of sizes) {
      const r = Math.min(rank, outFeatures, inFeatures);
      sum.lora += count * r * (outFeatures + inFeatures);
      sum.inttune += count * r * r;
    }
    sum.slora = sum.lora + sum.inttune;
    return { ...sum, adapter_bytes: 4 * sum.slora, virtual_adapter_bytes: 8 * sum.slora };
  };
  const put = (name, value, text) => {
    for (const element of document.querySelectorAll(`[data-figure="${name}"]`)) {
      element.value = String(value);
      element.textContent = text;
      const cell = element.closest(".bar");
      if (cell) cell.style.setProperty("--p", value === null ? "0%" : `${100 * value}%`);
    }
  };
  const putCosts = (name, sums) => {
    for (const [what, value] of Object.entries(sums)) {
      put(`${name}.${what}`, value, amount(value, what.endsWith("bytes") ? "B" : ""));
    }
  };

  const cells = [...document.querySelectorAll("td[data-module]")].map((cell) => [
    cell,
    cell.dataset.module.split(" ").map((index) => spectra.modules[index].curve),
  ]);
  const markers = [...document.querySelectorAll(".rank-marker")];

  const show = (rank) => {
    let sum = 0;
    let modules = 0;
    spectra.kinds.forEach((kind, index) => {
      const energy = at(kind.curve, rank);
      if (energy !== null) {
        sum += energy * kind.modules;
        modules += kind.modules;
      }
      put(`kind${index}.energy`, energy, percent(energy));
      putCosts(`kind${index}`, costs(kind.sizes, rank));
    });
    const mean = modules ? sum / modules : null;
    put("all.energy", mean, percent(mean));
    putCosts("all", costs(spectra.kinds.flatMap((kind) => kind.sizes), rank));
    for (const element of document.querySelectorAll("[data-rank-text]")) element.textContent = String(rank);
    for (const [cell, curves] of cells) {
      const energy = curves.reduce((total, curve) => total + at(curve, rank), 0) / curves.length;
      cell.className = `h${Math.min(9, Math.floor(10 * energy))}`;
      cell.firstElementChild.value = String(energy);
      cell.firstElementChild.textContent = (100 * energy).toFixed(0);
    }
    for (const marker of markers) {
      const { from, to, most, rank: drawn } = marker.closest("svg").dataset;
      const shift = ((to - from) * Math.log(rank / drawn)) / Math.log(most);
      marker.setAttribute("transform", `translate(${shift} 0)`);
    }
    for (const column of document.querySelectorAll("[data-rank]:is(th, td)")) {
      column.classList.toggle("chosen", Number(column.dataset.rank) === rank);
    }
  };

  slider.addEventListener("input", () => {
    number.value = slider.value;
    show(Number(slider.value));
  });
  number.addEventListener("input", () => {
    const rank = Number(number.value);
    if (!Number.isInteger(rank) || rank < 1 || rank > Number(slider.max)) return;
    slider.value = number.value;
    show(rank);
  });
  document.getElementById("chooser").hidden = false;
})();
