/* Controls and drawing for the figures that papercore.lab.explore stores in a page.
   Each <figure class="pc-explore"> holds its numbers as JSON and a still picture. This script puts the controls above
   the picture and draws it again at the reader's setting and at the width of the column. It loads nothing. */
(() => {
  "use strict";
  let count = 0;

  const make = (parent, tag, attributes, text) => {
    const node = document.createElementNS(parent.namespaceURI, tag);
    for (const [key, value] of Object.entries(attributes || {})) {
      if (key === "fill" || key === "stroke") node.style.setProperty(key, value); // colours may be variables
      else node.setAttribute(key, value);
    }
    if (text !== undefined) node.textContent = text;
    parent.append(node);
    return node;
  };

  const placer = (axis, start, end) => {
    const scale = axis.log ? Math.log10 : Number;
    const lo = scale(axis.lo), hi = scale(axis.hi);
    return value => start + (end - start) * (scale(value) - lo) / (hi - lo);
  };

  function draw(svg, spec, frame, id, width) {
    const height = Math.round(Math.min(360, Math.max(250, width * 0.58)));
    const { x: xAxis, y: yAxis } = spec.axes;
    const longest = Math.max(1, ...yAxis.ticks.map(tick => tick[1].length));
    const left = 34 + 7 * longest, right = width - 16, top = 14, bottom = height - 46;
    const px = placer(xAxis, left, right), py = placer(yAxis, bottom, top);
    svg.replaceChildren();
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.setAttribute("width", width);
    const clip = make(svg, "clipPath", { id: `pc-clip-${id}-live` });
    make(clip, "rect", { x: left, y: top - 6, width: right - left + 6, height: bottom - top + 12 });

    let free = -Infinity; // a label that would touch the one before it is left out
    for (const [value, text] of xAxis.ticks) {
      const at = px(value), half = text.length * 4;
      make(svg, "path", { d: `M${at},${top}V${bottom}`, stroke: "currentColor", opacity: 0.15 });
      if (at - half < free) continue;
      make(svg, "text", { x: at, y: bottom + 18, "text-anchor": "middle" }, text);
      free = at + half + 6;
    }
    for (const [value, text] of yAxis.ticks) {
      const at = py(value);
      make(svg, "path", { d: `M${left},${at}H${right}`, stroke: "currentColor", opacity: 0.15 });
      make(svg, "text", { x: left - 8, y: at + 4, "text-anchor": "end" }, text);
    }
    make(svg, "path", { d: `M${left},${top}V${bottom}H${right}`, fill: "none", stroke: "currentColor", opacity: 0.6 });
    make(svg, "text", { x: (left + right) / 2, y: height - 8, "text-anchor": "middle" }, xAxis.label);
    make(svg, "text", { transform: `translate(15,${(top + bottom) / 2}) rotate(-90)`, "text-anchor": "middle" },
      yAxis.label);

    const plane = make(svg, "g", { "clip-path": `url(#pc-clip-${id}-live)` });
    const thin = { stroke: "currentColor", "stroke-dasharray": "2 3", opacity: 0.75 };
    for (const [label, value] of frame.h || []) {
      const at = py(value);
      make(plane, "path", { d: `M${left},${at}H${right}`, ...thin });
      make(plane, "text", { x: right - 4, y: at + (at < top + 12 ? 14 : -5), "text-anchor": "end" }, label);
    }
    for (const [label, value] of frame.v || []) {
      const at = px(value), late = at > (left + right) / 2;
      make(plane, "path", { d: `M${at},${top}V${bottom}`, ...thin });
      make(plane, "text", { x: at + (late ? -5 : 5), y: top + 10, "text-anchor": late ? "end" : "start" }, label);
    }
    spec.series.forEach((look, i) => {
      const ys = frame.y[i];
      if (!ys) return;
      const step = frame.x.length <= 25 ? 1 : Math.ceil(frame.x.length / 10);
      const offset = Math.floor(look.phase * step);
      let path = "", down = false;
      const marks = [];
      frame.x.forEach((x, k) => {
        if (x === null || ys[k] === null) { down = false; return; }
        const at = `${px(x).toFixed(1)},${py(ys[k]).toFixed(1)}`;
        path += (down ? "L" : "M") + at;
        down = true;
        if (k % step === offset) marks.push(at);
      });
      const line = { d: path, fill: "none", stroke: look.colour, "stroke-width": 2, "stroke-linejoin": "round" };
      if (look.dash) line["stroke-dasharray"] = look.dash;
      make(plane, "path", line);
      for (const at of marks) make(plane, "path", { d: look.mark, transform: `translate(${at})`, fill: look.colour });
    });
    (frame.r || []).forEach((pair, i) => (pair ? pair[0] : []).forEach((x, k) => {
      if (x === null || pair[1][k] === null) return;
      make(plane, "path", {
        d: spec.reported[i].mark, transform: `translate(${px(x)},${py(pair[1][k])}) scale(1.25)`,
        fill: "var(--pc-ground,#fff)", stroke: spec.reported[i].colour, "stroke-width": 1.3,
      });
    }));
  }

  function start(figure) {
    const spec = JSON.parse(figure.querySelector('script[type="application/json"]').textContent);
    const box = figure.querySelector(".pc-controls"), svg = figure.querySelector("svg.pc-plot");
    const text = figure.querySelector(".pc-text"), id = `${figure.id}-${count++}`;
    const places = spec.controls.map(control => control.start);
    const redraw = () => {
      const number = spec.controls.reduce((n, control, i) => n * control.values.length + places[i], 0);
      const frame = { ...spec.shared, ...spec.frames[number] };
      const setting = spec.controls.map((control, i) => `${control.label} = ${control.values[places[i]]}`).join(", ");
      draw(svg, spec, frame, id, Math.max(260, Math.min(700, figure.clientWidth || 560)));
      svg.setAttribute("aria-label", `${spec.alt} Shown: ${setting}.`);
      text.textContent = frame.text || "";
    };
    spec.controls.forEach((control, i) => {
      const row = make(box, "div", { class: "pc-control" }), key = `${id}-control-${i}`;
      make(row, "label", { for: key }, control.label);
      if (!control.slider) {
        const list = make(row, "select", { id: key });
        control.values.forEach((value, place) => make(list, "option", { value: place }, value));
        list.value = places[i];
        list.addEventListener("change", () => { places[i] = Number(list.value); redraw(); });
        return;
      }
      const slider = make(row, "input", { id: key, type: "range", min: 0, max: control.values.length - 1, step: 1 });
      const shown = make(row, "output", { for: key });
      const show = () => {
        shown.textContent = control.values[places[i]];
        slider.setAttribute("aria-valuetext", shown.textContent); // the value, not its place in the list
      };
      slider.value = places[i];
      slider.addEventListener("input", () => { places[i] = Number(slider.value); show(); redraw(); });
      show();
    });
    text.setAttribute("aria-live", "polite");
    figure.querySelector(".pc-still").remove();
    redraw();
    if (window.ResizeObserver) {
      let width = figure.clientWidth;
      new ResizeObserver(() => {
        if (figure.clientWidth !== width) { width = figure.clientWidth; redraw(); }
      }).observe(figure);
    }
  }

  const all = () => document.querySelectorAll("figure.pc-explore:not([data-live])").forEach(figure => {
    figure.setAttribute("data-live", "");
    start(figure);
  });
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", all);
  else all();
})();
